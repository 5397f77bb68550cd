"""Pictures of evaluations as PNG or SVG: what context is worth. Not here: layout and colours (figures.py)."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megalodon.config import count_name
from megalodon_cli.figures import COLORS, draw


def plot_evaluation(document: Mapping[str, Any], file: Path) -> None:
    """Draw loss by position, loss over context and over the position in a window, recall."""
    models, panels = document["models"], list[Callable[[Any], None]]()
    if "quick" in models[0]:
        panels += [partial(_by_position, models)]
        panels += [partial(_bits, models)] if all(model["quick"]["bits_per_byte"] for model in models) else []
    if "context" in models[0]:
        panels += [partial(_over_context, models), partial(_gain, models)]
        panels += [partial(_in_window, model) for model in models]
    panels += [partial(_recall, model) for model in models if "recall" in model]
    name = Path(document["data"]["name"]).name if document["data"] else "recall"  # a picture goes to other people
    draw(f"{name} · norm_stats {document['norm_stats']}", panels, file)


def _by_position(models: Sequence[Mapping[str, Any]], axis: Any) -> None:
    for number, model in enumerate(models):
        found = model["quick"]["by_position"].items()
        at, values = zip(*((int(end), bucket["loss"]) for end, bucket in found), strict=True)
        axis.plot(at, values, "o-", color=COLORS[number % len(COLORS)], markersize=3, label=model["name"])
        if model["seq_len"]:
            axis.axvline(model["seq_len"], color=COLORS[number % len(COLORS)], linestyle=":", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_title("loss by position, nats a token (dotted: training length)", loc="left", fontsize=9)
    axis.set_xlabel("up to token of the document")
    axis.legend(frameon=False, fontsize=8)


def _bits(models: Sequence[Mapping[str, Any]], axis: Any) -> None:
    for number, model in enumerate(models):
        bits = model["quick"]["bits_per_byte"]
        color = COLORS[number % len(COLORS)]
        axis.plot([bits["value"]], [number], "o", color=color, markersize=5)
        if bits["low"] is not None:
            axis.plot([bits["low"], bits["high"]], [number, number], "-", color=color, linewidth=1.6)
    axis.set_yticks(range(len(models)), [model["name"] for model in models])
    axis.set_ylim(len(models) - 0.5, -0.5)
    axis.set_title("bits a byte, 95 % intervals", loc="left", fontsize=9)


def _context_axis(axis: Any, lengths: Sequence[int]) -> None:
    """Tokens of context in powers of two, the reset at their left."""
    smallest = min((length for length in lengths if length), default=1)
    axis.set_xscale("symlog", base=2, linthresh=smallest, linscale=0.5)
    axis.set_xticks(lengths, ["reset" if not length else count_name(length) for length in lengths])
    axis.set_xlabel("tokens read before the window")


def _over_context(models: Sequence[Mapping[str, Any]], axis: Any) -> None:
    for number, model in enumerate(models):
        rows, color = model["context"]["lengths"], COLORS[number % len(COLORS)]
        axis.plot(*_values(rows, "loss"), "o-", color=color, markersize=4, label=model["name"])
        axis.axhline(rows[0]["loss"]["value"], color=color, linestyle="--", linewidth=1, alpha=0.6)
    _context_axis(axis, [row["context"] for row in models[0]["context"]["lengths"]])
    axis.set_title("loss on the same windows, nats a token (dashed: reset)", loc="left", fontsize=9)
    axis.legend(frameon=False, fontsize=8)


def _gain(models: Sequence[Mapping[str, Any]], axis: Any) -> None:
    for number, model in enumerate(models):
        rows, color = model["context"]["lengths"][1:], COLORS[number % len(COLORS)]
        at, values = _values(rows, "less_reset")
        axis.plot([0, *at], [0.0, *values], "o-", color=color, markersize=4, label=model["name"])
        if all(row["less_reset"]["low"] is not None for row in rows):
            low, high = ([row["less_reset"][end] for row in rows] for end in ("low", "high"))
            axis.fill_between(at, low, high, color=color, alpha=0.2, linewidth=0)
    _context_axis(axis, [row["context"] for row in models[0]["context"]["lengths"]])
    axis.set_title("less the loss after a reset, 95 % intervals", loc="left", fontsize=9)


def _values(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    return [row["context"] for row in rows], [row[key]["value"] for row in rows]


def _in_window(model: Mapping[str, Any], axis: Any) -> None:
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    rows = model["context"]["lengths"]
    for number, row in enumerate(rows):
        at, values = zip(*((int(end), loss) for end, loss in row["by_position"].items()), strict=True)
        color = pyplot.get_cmap("viridis")(0.9 * number / max(1, len(rows) - 1))
        label = count_name(row["context"]) if row["context"] else "reset"
        axis.plot(at, values, "o-", color=color, markersize=3, label=label)
    axis.set_xscale("log", base=2)
    axis.set_title(f"{model['name']}: by position in the window", loc="left", fontsize=9)
    axis.set_xlabel("up to token of the window")
    axis.legend(frameon=False, fontsize=8)


def _recall(model: Mapping[str, Any], axis: Any) -> None:
    """The share of samples whose answer is the likeliest candidate, all depths together, over the length."""
    hits: dict[str, dict[int, list[float]]] = {}
    for cell in model["recall"]["cells"]:
        hits.setdefault(cell["task"], {}).setdefault(cell["length"], []).append(cell["first"]["value"])
    for number, (task, by_length) in enumerate(hits.items()):
        values = [sum(own) / len(own) for own in by_length.values()]
        axis.plot(list(by_length), values, "o-", color=COLORS[number % len(COLORS)], markersize=3, label=task)
    axis.axhline(model["recall"]["chance_first"], color="black", linestyle=":", linewidth=1, label="chance")
    axis.set_xscale("log", base=2)
    axis.set_ylim(-0.03, 1.03)
    axis.set_title(f"{model['name']}: the answer comes first of ten", loc="left", fontsize=9)
    axis.set_xlabel("tokens of the prompt")
    axis.legend(frameon=False, fontsize=8)
