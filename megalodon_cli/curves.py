"""Curves as lines of text, for a terminal. Not here: pictures (figures.py), where values come from (run_files.py)."""

import math
from collections.abc import Mapping, Sequence

Points = Sequence[tuple[int, float]]
BLOCKS = " ▁▂▃▄▅▆▇█"
HEIGHT = 10
MARKS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""What the points of the first, second … curve are drawn with."""


def _columns(points: Points, width: int, first: int, last: int) -> list[float | None]:
    """Return the mean of the values in each of `width` equal parts of first … last."""
    cells: list[list[float]] = [[] for _ in range(width)]
    for at, value in points:
        cells[min(width - 1, (at - first) * width // max(1, last - first + 1))].append(value)
    return [sum(cell) / len(cell) if cell else None for cell in cells]


def _finite(points: Points) -> list[tuple[int, float]]:
    return [(at, value) for at, value in points if math.isfinite(value)]


def _label(value: float) -> str:
    text = f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"
    return text.rjust(8)


def curve(points: Points, width: int, height: int = HEIGHT, unit: str = "step") -> list[str]:
    """Draw values over steps as `height` lines of text, each column the mean of its part of the steps."""
    finite = _finite(points)
    if not finite:
        return []
    first, last = finite[0][0], finite[-1][0]
    means = _columns(finite, max(1, min(width, len(finite))), first, last)
    known = [mean for mean in means if mean is not None]
    low, high = min(known), max(known)
    levels = [None if m is None else 1 + round((m - low) / (high - low or 1) * (height * 8 - 1)) for m in means]
    lines = []
    for row in reversed(range(height)):
        bar = "".join(" " if level is None else BLOCKS[max(0, min(8, level - row * 8))] for level in levels)
        label = _label(high) if row == height - 1 else _label(low) if row == 0 else " " * 8
        lines.append(f"{label} │{bar}".rstrip())
    return [*lines, f"{unit:>8} └ {first:,} to {last:,}"]


def overlay(curves: Mapping[str, Points], width: int, height: int = HEIGHT, unit: str = "tokens") -> list[str]:
    """Draw several curves over one axis, the first of A's, the second of B's, …; `*` where they meet; then a legend."""
    finite = {name: found for name, points in curves.items() if (found := _finite(points))}
    if not finite:
        return []
    width = max(1, width)
    first = min(points[0][0] for points in finite.values())
    last = max(points[-1][0] for points in finite.values())
    drawn = {name: _columns(points, width, first, last) for name, points in finite.items()}
    known = [value for means in drawn.values() for value in means if value is not None]
    low, high = min(known), max(known)
    cells = [[" "] * width for _ in range(height)]
    for mark, name in zip(MARKS, curves, strict=False):
        for column, value in enumerate(drawn.get(name, ())):
            if value is not None:
                row = round((high - value) / (high - low or 1) * (height - 1))
                cells[row][column] = mark if cells[row][column] == " " else "*"
    labels = {0: _label(high), height - 1: _label(low)}
    lines = [f"{labels.get(row, ' ' * 8)} │{''.join(line)}".rstrip() for row, line in enumerate(cells)]
    legend = "  ".join(f"{mark} {name}" for mark, name in zip(MARKS, curves, strict=False))
    return [*lines, f"{unit:>8} └ {first:,} to {last:,}    {legend}"]
