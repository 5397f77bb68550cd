"""Pictures of runs and profiles as PNG or SVG, drawn by matplotlib (extra `plot`).

Not here: curves in a terminal (curves.py).
"""

import importlib
import importlib.util
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megalodon.errors import EnvironmentFault, InputError
from megalodon_cli import console
from megalodon_cli.run_files import Row, points

KINDS = (".png", ".svg")
COLORS = ("#3566a8", "#c8553d", "#3c8d5a", "#8a5fb0", "#b58a1f", "#4f9da6", "#7a7a7a", "#c2548f")


def check(file: Path) -> None:
    """Refuse a picture that cannot be drawn, before anything else is done.

    Raises:
        InputError: the name ends in something else than .png or .svg, or its folder is not there.
        EnvironmentFault: matplotlib is not installed.
    """
    if file.suffix.lower() not in KINDS:
        raise InputError(f"{file}: expected a name ending in .png or .svg")
    if not file.parent.is_dir():
        raise InputError(f"{file}: there is no folder {file.parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise EnvironmentFault("pictures need the extra [plot]: pip install 'megalodon-lm[plot]'")


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of the `window` values around each one, of as many as there are near the ends."""
    sums = list(itertools.accumulate(values, initial=0.0))
    half, count = window // 2, len(values)
    spans = ((max(0, n - half), min(count, n - half + window)) for n in range(count))
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in spans]


def plot_run(name: str, rows: Sequence[Row], unigram: float | None, file: Path) -> None:
    """Draw a run: losses, bits per byte, learning rate, gradient norm, speed, loss by position, health."""
    panels: list[Callable[[Any], None]] = [lambda axis: _losses(axis, {name: rows}, "step")]
    if points(rows, "eval", "bits_per_byte"):
        panels.append(lambda axis: _bits(axis, rows, unigram))
    if any(row.get("kind") == "eval" and row.get("by_position") for row in rows):
        panels.append(lambda axis: _by_position(axis, rows))
    panels.append(lambda axis: _series(axis, rows, "lr", "learning rate", log=False))
    panels.append(lambda axis: _series(axis, rows, "grad_norm", "gradient norm before clipping", log=True))
    panels.append(lambda axis: _series(axis, rows, "tok_per_s", "tokens a second", log=False))
    health = [row for row in rows if row.get("kind") == "health" and row.get("layers")]
    if any("memory" in layer for row in health for layer in row["layers"]):
        panels.append(lambda axis: _memory(axis, health))
    draw(name, panels, file)


def plot_comparison(runs: Mapping[str, Sequence[Row]], file: Path) -> None:
    """Draw the training and validation losses of several runs over tokens."""
    draw(" · ".join(runs), [lambda axis: _losses(axis, runs, "tokens"), lambda axis: _valid(axis, runs)], file)


def plot_speeds(name: str, speeds: Mapping[str, Sequence[tuple[int, float]]], file: Path) -> None:
    """Draw tokens/s over the depth of a session, a panel for each kind of reading."""
    draw(name, [lambda axis, of=of: _over_depth(axis, *of) for of in speeds.items()], file)  # type: ignore[misc]


def _over_depth(axis: Any, title: str, points: Sequence[tuple[int, float]]) -> None:
    axis.plot(*zip(*points, strict=True), "o-", color=COLORS[0], markersize=4)
    axis.set_xscale("symlog", base=2, linthresh=max(1, min((depth for depth, _ in points if depth), default=1)))
    axis.set_ylim(bottom=0)
    axis.set_title(f"{title}: tokens/s", loc="left", fontsize=9)
    axis.set_xlabel("tokens read before")
    ticker: Any = importlib.import_module("matplotlib.ticker")
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda at, _: console.amount(at)))


def draw(title: str, panels: Sequence[Callable[[Any], None]], file: Path) -> None:
    """Lay out panels, at most four in a row, and write the file."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    columns = 4 if len(panels) > 6 else min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    with pyplot.rc_context({**style, "font.size": 9, "svg.hashsalt": "megalodon"}):
        figure, axes = pyplot.subplots(
            lines, columns, figsize=(4.6 * columns, 3.2 * lines), squeeze=False, layout="constrained"
        )
        figure.suptitle(title, fontsize=11)
        for axis, panel in zip(axes.flat, panels, strict=False):
            panel(axis)
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        try:
            figure.savefig(file, dpi=130)
        finally:
            pyplot.close(figure)


def _thousands(axis: Any) -> None:
    """Write 1,200 and 2.5M on the axis of steps or tokens."""
    ticker: Any = importlib.import_module("matplotlib.ticker")
    axis.xaxis.set_major_formatter(
        ticker.FuncFormatter(lambda at, _: f"{at:,.0f}" if abs(at) < 1e5 else console.amount(at))
    )
    axis.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))


def _noisy(axis: Any, found: Sequence[tuple[int, float]], color: str, label: str | None) -> None:
    """Draw values of every step: as they are in a pale line, their running mean in a strong one."""
    at, values = [x for x, _ in found], [y for _, y in found]
    window = max(1, len(values) // 50)
    if window > 1:
        axis.plot(at, values, color=color, alpha=0.25, linewidth=0.6)
    axis.plot(at, smoothed(values, window), color=color, linewidth=1.4, label=label)


def _losses(axis: Any, runs: Mapping[str, Sequence[Row]], against: str) -> None:
    several = len(runs) > 1
    for number, (name, rows) in enumerate(runs.items()):
        found = points(rows, "train", "loss", against)
        _noisy(axis, found, COLORS[number % len(COLORS)], name if several else "training")
        if not several and (valid := points(rows, "eval", "valid_loss", against)):
            axis.plot(*zip(*valid, strict=True), "o-", color=COLORS[1], markersize=3, linewidth=1, label="validation")
    _finish(axis, "training loss, nats a token" if several else "loss, nats a token", against)


def _valid(axis: Any, runs: Mapping[str, Sequence[Row]]) -> None:
    for number, (name, rows) in enumerate(runs.items()):
        valid = points(rows, "eval", "valid_loss", "tokens")
        if valid:
            axis.plot(*zip(*valid, strict=True), "o-", color=COLORS[number % len(COLORS)], markersize=3, label=name)
    _finish(axis, "validation loss, nats a token", "tokens")


def _bits(axis: Any, rows: Sequence[Row], unigram: float | None) -> None:
    axis.plot(*zip(*points(rows, "eval", "bits_per_byte"), strict=True), "o-", color=COLORS[1], markersize=3)
    if unigram is not None:
        axis.axhline(unigram, color=COLORS[6], linestyle="--", linewidth=1, label="unigram model of the same tokens")
    _finish(axis, "validation, bits a byte", "step")


def _by_position(axis: Any, rows: Sequence[Row]) -> None:
    """The first, the middle and the last evaluation, so that one sees where the model learns to use the past."""
    found = [row for row in rows if row.get("kind") == "eval" and row.get("by_position")]
    chosen = {row["step"]: row for row in (found[0], found[len(found) // 2], found[-1])}
    for number, (step, row) in enumerate(chosen.items()):
        pairs = [(int(end), loss) for end, loss in row["by_position"].items() if loss is not None]
        alpha = 1.0 if number == len(chosen) - 1 else 0.45
        axis.plot(*zip(*pairs, strict=True), "o-", color=COLORS[0], alpha=alpha, markersize=3, label=f"step {step:,}")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(
        importlib.import_module("matplotlib.ticker").FuncFormatter(lambda at, _: f"{at:,.0f}")
    )
    axis.set_title("validation loss by position, nats a token", loc="left", fontsize=9)
    axis.set_xlabel("position, tokens")
    axis.legend(frameon=False, fontsize=8)


def _series(axis: Any, rows: Sequence[Row], key: str, title: str, *, log: bool) -> None:
    found = points(rows, "train", key)
    if key == "lr":  # has no noise that a mean would take away
        axis.plot([at for at, _ in found], [value for _, value in found], color=COLORS[2], linewidth=1.4)
        axis.yaxis.set_major_formatter("{x:.1e}")
        _finish(axis, title, "step")
        return
    _noisy(axis, found, COLORS[2], None)
    if log and all(value > 0 for _, value in found):
        axis.set_yscale("log")
    else:
        axis.yaxis.set_major_formatter(importlib.import_module("matplotlib.ticker").EngFormatter(sep=""))
    _finish(axis, title, "step")


def _memory(axis: Any, health: Sequence[Row]) -> None:
    """How far back the averages of each layer reach: the median over its channels, the largest as a thin line."""
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    layers = range(len(health[-1]["layers"]))
    named = layers if len(layers) <= 6 else (layers[0], layers[len(layers) // 2], layers[-1])
    for number in layers:
        color = pyplot.get_cmap("viridis")(0.9 * number / max(1, layers[-1]))
        for key, width in (("median", 1.4), ("max", 0.6)):
            found = [(row["step"], row["layers"][number]["memory"][key]) for row in health]
            label = f"layer {number}" if key == "median" and number in named else None
            axis.plot(*zip(*found, strict=True), color=color, linewidth=width, label=label)
    axis.set_yscale("log")
    _finish(axis, "memory of CEMA, tokens: median, maximum (thin)", "step")


def _finish(axis: Any, title: str, against: str) -> None:
    axis.set_title(title, loc="left", fontsize=9)
    axis.set_xlabel(against)
    _thousands(axis)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8)
