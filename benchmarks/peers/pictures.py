"""Two pictures for README: decode speed against depth, training speed against length. Not here: the figures.

Text and axes are of a grey that can be read on white and on black, the ground is transparent, and the same figures give
the same bytes.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from decode import DEEP, DEPTHS
from results import Document, write_whole
from train import BETWEEN, FLAT, TARGETS

GREY = "#7a828e"
COLOURS = {"Megalodon": "#2f81f7", "Llama": "#d9730d", "JAX port": "#8957e5"}
STYLE = {
    "svg.hashsalt": "megalodon",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
Points = Mapping[int, float]


def draw(folder: Path, document: Document) -> None:
    """Write decode_depth.svg and train_length.svg, each if something of it was measured."""
    for name, lines, across, up in (
        ("decode_depth.svg", decode_points(document), "tokens read before", "tokens written a second"),
        ("train_length.svg", train_points(document), "tokens in a row", "tokens trained a second"),
    ):
        if any(lines.values()):
            _draw(folder / name, lines, across, up)


def decode_points(document: Document) -> dict[str, Points]:
    """Side -> depth -> median tokens a second."""
    ours = {depth: _rate(document, f"decode/8M/{depth}", "ours") for depth in DEPTHS}
    ours[DEEP] = _rate(document, "decode/8M/flat", f"depth {DEEP:,}")
    llama = {depth: _rate(document, f"decode/8M/{depth}", "Llama") for depth in DEPTHS}
    return {"Megalodon": _measured(ours), "Llama": _measured(llama)}


def train_points(document: Document) -> dict[str, Points]:
    """Side -> length -> median tokens a second."""
    lengths = sorted({*BETWEEN, *(length for size, length in TARGETS if size == "8M")})
    ours = {length: _rate(document, f"train/8M/{length}/eager", "ours") for length in lengths}
    ours[FLAT[-1]] = _rate(document, "train/8M/flat", f"{FLAT[-1]:,} tokens")
    llama = {length: _rate(document, f"train/8M/{length}/eager", "Llama") for length in lengths}
    port = {length: _rate(document, f"jax/8M/{length}", "JAX port") for length in lengths}
    return {"Megalodon": _measured(ours), "Llama": _measured(llama), "JAX port": _measured(port)}


def _rate(document: Document, key: str, side: str) -> float | None:
    rates = document["entries"].get(key, {}).get("rates", {})
    return rates[side]["median"] if side in rates else None


def _measured(points: Mapping[int, float | None]) -> dict[int, float]:
    return {at: value for at, value in points.items() if value is not None}


def _draw(path: Path, lines: Mapping[str, Points], across: str, up: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(5.2, 2.8), layout="constrained")
        places = sorted({at for points in lines.values() for at in points})
        for name, points in lines.items():
            if points:
                at = [places.index(place) for place in points]
                axes.plot(at, list(points.values()), marker="o", markersize=4, color=COLOURS[name])
                axes.annotate(f" {name}", (at[-1], list(points.values())[-1]), color=COLOURS[name], va="bottom")
        _axes(axes, places, across, up, lowest=min(min(p.values()) for p in lines.values() if p))
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        write_whole(path, text.getvalue())
        pyplot.close(figure)


def _axes(axes: Any, places: list[int], across: str, up: str, lowest: float) -> None:
    """One step to the right for each place: 0 has none on a logarithmic axis."""
    axes.set_xticks(range(len(places)), [_short(place) for place in places])
    axes.set_xlim(-0.2, len(places) - 0.3)
    axes.set_yscale("log" if lowest < 100 else "linear")
    if lowest >= 100:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)


def _short(count: int) -> str:
    if count >= 10**6:
        return f"{count // 10**6}M"
    return f"{count // 1024}K" if count >= 1024 else str(count)
