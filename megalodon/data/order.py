"""The order of samples: a permutation and a mixture that need no memory, pure functions of a few integers.

The permutation is a Feistel network over the smallest even number of bits that holds n, walked until the value is
below n; the round keys come from `sha256("seed|source|epoch")`. The mixture is a periodic table of 4,096 slots.
Both are part of the format: golden values in tests/data/test_order.py pin them.
Not here: what a sample holds (megalodon/data/loader.py).
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megalodon.errors import DataError

ORDER_VERSION = 1
SLOTS = 4096
"""Slots of a mixture table."""
_MULTIPLY_1, _MULTIPLY_2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_SHIFT = np.uint64(33)

Int64s = NDArray[np.int64]
UInt64s = NDArray[np.uint64]


def _mix(value: UInt64s) -> UInt64s:
    """The 64-bit finalizer of MurmurHash3: xorshift, multiply, twice; products wrap modulo 2^64."""
    value = (value ^ (value >> _SHIFT)) * _MULTIPLY_1
    value = (value ^ (value >> _SHIFT)) * _MULTIPLY_2
    return value ^ (value >> _SHIFT)


def permute(numbers: Int64s, n: int, seed: int, source: str, epoch: int) -> Int64s:
    """Return the place of each number in a random order of 0 … n-1, a bijection for each (seed, source, epoch).

    numbers: (K,) int64, each in [0, n). Returns: (K,) int64. Raises: ValueError for a number out of range.
    """
    if n < 1 or (len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < n):
        raise ValueError(f"order: numbers must lie in [0, {n:,})")
    bits = max(2, (n - 1).bit_length())
    half = np.uint64((bits + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.frombuffer(hashlib.sha256(f"{seed}|{source}|{epoch}".encode()).digest(), dtype="<u8").astype(np.uint64)
    values = numbers.astype(np.uint64)
    todo = np.arange(len(values))
    while len(todo):
        left, right = values[todo] >> half, values[todo] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        values[todo] = (left << half) | right
        todo = todo[values[todo] >= np.uint64(n)]
    return values.astype(np.int64)


class Mixture(NamedTuple):
    """A periodic table of sources: slot j of each period belongs to source `table[j]`."""

    table: Int64s
    """(SLOTS,) the source of each slot."""
    earlier: Int64s
    """(SLOTS,) how many earlier slots of the period belong to the same source."""
    slots: tuple[int, ...]
    """Slots of each source; they sum to SLOTS."""

    def locate(self, index: Int64s) -> tuple[Int64s, Int64s]:
        """Return for each global index its source and that source's own sample number. index: (K,) int64."""
        period, slot = np.divmod(index, SLOTS)
        source = self.table[slot]
        return source, period * np.array(self.slots, dtype=np.int64)[source] + self.earlier[slot]

    def counts(self, index: int) -> list[int]:
        """Return for each source how many of the samples [0, index) are its own."""
        periods, slot = divmod(index, SLOTS)
        rest = np.bincount(self.table[:slot], minlength=len(self.slots))
        return [periods * slots + int(more) for slots, more in zip(self.slots, rest, strict=True)]


def mixture(names: Sequence[str], weights: Sequence[float]) -> Mixture:
    """Build the table of a mixture: weights rounded to slots by largest remainder, spread by error diffusion.

    Raises: DataError for weights that are not positive and finite, or too small for one slot.
    """
    for name, weight in zip(names, weights, strict=True):
        if not (np.isfinite(weight) and weight > 0):
            raise DataError(f"data.sources.{name}.weight is {weight}: expected a number above 0")
    total = float(sum(weights))
    exact = [SLOTS * weight / total for weight in weights]
    slots = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (slots[i] - exact[i], i))
    for i in by_remainder[: SLOTS - sum(slots)]:
        slots[i] += 1
    for name, weight, count in zip(names, weights, slots, strict=True):
        if count == 0:
            raise DataError(f"data.sources.{name}.weight is {weight:g} of {total:g}: less than one of {SLOTS:,} slots")
    table = np.empty(SLOTS, dtype=np.int64)
    earlier = np.empty(SLOTS, dtype=np.int64)
    share = np.array(slots, dtype=np.int64)
    credit, used = np.zeros_like(share), np.zeros_like(share)
    for slot in range(SLOTS):
        credit += share
        chosen = int(np.argmax(credit))
        table[slot], earlier[slot] = chosen, used[chosen]
        credit[chosen] -= SLOTS
        used[chosen] += 1
    return Mixture(table, earlier, tuple(slots))
