"""Sides that take turns, and the ratios of their speeds: repetition by repetition, as a median with its spread.

    rates = take_turns({"ours": Side(step, 2048), "Llama": Side(other_step, 2048)}, turns=5)
    Ratio("speed over Llama", "ours", "Llama", at_least=1.15).figure(rates)

Neighbouring repetitions share the state of the machine, so a ratio is formed from each pair before the median is taken.
Every other turn runs backwards (ours, peer, peer, ours): who goes first gains nothing from a machine that slows down.
Not here: what a side does (train.py, decode.py, …), how figures are kept and shown (results.py, page.py).
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

LEAST_TURNS = 5
"""Turns below which a spread says little; the page names a figure that has fewer."""

Rates = Mapping[str, Sequence[float]]
"""Side -> its amount per second, one value a repetition."""


class Side(NamedTuple):
    """One of those that take turns."""

    run: Callable[[], object]
    """One repetition."""
    amount: float
    """What a repetition does, in the unit of its contest: tokens, floating-point operations, calls."""


class Contest(NamedTuple):
    """What is measured together: its sides, the figures formed from them, and numbers that need no clock."""

    sides: Mapping[str, Side]
    figures: Sequence["Ratio"]
    constants: Sequence[Mapping[str, Any]] = ()
    units: Mapping[str, str] = {}
    """Of the rates of sides that do not count tokens a second."""


class Ratio(NamedTuple):
    """A comparison of two sides: scale x rate of one / rate of the other."""

    name: str
    side: str
    over: str
    at_least: float | None = None
    at_most: float | None = None
    scale: float = 1.0
    percent: bool = False
    """Shown as a share."""

    def figure(self, rates: Rates) -> dict[str, Any]:
        """Form the ratio of each turn; return the median, the spread and the verdict."""
        pairs = zip(rates[self.side], rates[self.over], strict=True)
        values = [self.scale * one / other for one, other in pairs]
        return figure(self.name, values, self.at_least, self.at_most, "%" if self.percent else "x")


def figure(
    name: str, values: Sequence[float], at_least: float | None = None, at_most: float | None = None, unit: str = "x"
) -> dict[str, Any]:
    """A figure as it stands in the JSON: median, spread, target, whether the median reaches it (None: no target)."""
    median = statistics.median(values)
    reached = None
    if at_least is not None:
        reached = median >= at_least
    if at_most is not None:
        reached = reached is not False and median <= at_most
    return {
        "figure": name,
        "unit": unit,
        **spread(values),
        "at_least": at_least,
        "at_most": at_most,
        "reached": reached,
    }


def constant(name: str, value: float, at_most: float | None = None) -> dict[str, Any]:
    """A figure that was counted: it has no spread."""
    found = figure(name, [value], at_most=at_most)
    del found["low"], found["high"]
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest, to five digits."""
    found = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: float(f"{value:.5g}") for name, value in found.items()}


def take_turns(sides: Mapping[str, Side], turns: int, report: Callable[[str], None]) -> dict[str, list[float]]:
    """Let every side run once unmeasured, then have `turns` turns, every other one backwards. Returns the rates."""
    for side in sides.values():
        side.run()
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns):
        for name, side in list(sides.items())[:: -1 if turn % 2 else 1]:
            begin = time.perf_counter()
            side.run()
            seconds = time.perf_counter() - begin
            rates[name].append(side.amount / seconds)
            report(f"turn {turn + 1} of {turns}: {name} {seconds:.3f} s")
    return rates
