"""Intervals of means and of their differences by the bootstrap: units are drawn again with replacement, many times.

A unit is what may be taken as drawn on its own: a document, a block of text, a window, a question. Differences of two
models are paired: both get the same draws, so what is hard for both cancels.
Not here: what a unit is (scoring.py, context.py, recall.py).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
LEVEL = 0.95
LEAST = 6
"""Units from which on an interval is drawn: of 5 all lie on one side of zero by chance in 2 of 32 cases, over 5 %."""
_SEED = 20240412
_HELD = 1 << 22
"""Numbers that are drawn at a time."""

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A value with how far chance may have moved it."""

    value: float
    low: float
    high: float
    """Ends of the 95 % interval: percentiles of the draws; NaN of fewer than 6 units."""
    error: float
    """Standard error: standard deviation of the draws; NaN of one unit. All are NaN if a draw may hold none of what
    the value is over, such as words."""

    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0

    def document(self) -> dict[str, float | None]:
        """As JSON, which has no NaN."""
        return {key: value if np.isfinite(value) else None for key, value in self._asdict().items()}


def ratio(numerators: Floats, denominators: Floats) -> Interval:
    """Sum of the numerators over sum of the denominators, such as bits over bytes: (U,) and (U,), a value a unit."""
    return ratios(numerators[:, None], denominators[:, None])[0]


def mean(values: Floats) -> Interval:
    """Mean of (U,) values, a value a unit."""
    return ratio(values, np.ones(len(values)))


def ratios(numerators: Floats, denominators: Floats) -> list[Interval]:
    """The same for K ratios that share their draws: (U, K) and (U, K)."""
    values = numerators.sum(0) / denominators.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = [_sums(numerators, rows) / _sums(denominators, rows) for rows in _draws(len(numerators))]
    return _intervals(values, np.concatenate(drawn), len(numerators))


def difference(a: Floats, over_a: Floats, b: Floats, over_b: Floats) -> Interval:
    """Ratio of `a` less ratio of `b`, paired: (U,) each, the same units in the same order."""
    value = a.sum() / over_a.sum() - b.sum() / over_b.sum()
    columns = np.stack([a, over_a, b, over_b], 1)
    sums = np.concatenate([_sums(columns, rows) for rows in _draws(len(a))])
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3]
    return _intervals(np.array([value]), drawn[:, None], len(a))[0]


def _draws(count: int) -> Iterator[NDArray[np.int64]]:
    """Yield (R, count) numbers of units, R draws at a time, always the same ones."""
    random, left = np.random.default_rng(_SEED), DRAWS
    while left:
        rows = min(left, max(1, _HELD // count))
        yield random.integers(0, count, (rows, count))
        left -= rows


def _sums(values: Floats, rows: NDArray[np.int64]) -> Floats:
    """(U, K) values summed over (R, U) draws: (R, K)."""
    return np.stack([column[rows].sum(1) for column in values.T], 1)


def _intervals(values: Floats, drawn: Floats, units: int) -> list[Interval]:
    tail = (1 - LEVEL) / 2
    drawn = np.where(np.isfinite(drawn).all(0) & (units > 1), drawn, np.nan)
    low, high = np.quantile(drawn if units >= LEAST else np.full_like(drawn, np.nan), [tail, 1 - tail], axis=0)
    return [Interval(*map(float, row)) for row in zip(values, low, high, drawn.std(0, ddof=1), strict=True)]
