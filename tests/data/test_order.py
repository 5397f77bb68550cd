"""The order of samples is a permutation, spreads well, and never changes: its values are part of the format."""

import numpy as np
import pytest

from megalodon.data.order import SLOTS, mixture, permute
from megalodon.errors import DataError


@pytest.mark.parametrize("n", [*range(1, 70), 127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 1498, 1499, 100_003])
def test_it_is_a_bijection(n: int) -> None:
    order = permute(np.arange(n), n, seed=3, source="web", epoch=2)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))


def test_mean_displacement_is_a_third() -> None:
    n = 100_003
    for epoch in range(3):
        moved = np.abs(permute(np.arange(n), n, 1, "*", epoch) - np.arange(n)).mean()
        assert abs(moved / (n / 3) - 1) < 0.01


def test_seed_source_and_epoch_matter() -> None:
    base = permute(np.arange(997), 997, 1, "web", 0)
    for other in ((2, "web", 0), (1, "books", 0), (1, "web", 1)):
        assert (permute(np.arange(997), 997, *other) == base).mean() < 0.02


def test_any_part_is_a_part_of_the_whole() -> None:
    whole = permute(np.arange(1001), 1001, 5, "*", 4)
    some = np.array([1000, 3, 3, 512])
    assert np.array_equal(permute(some, 1001, 5, "*", 4), whole[some])
    assert len(permute(np.arange(0), 1001, 5, "*", 4)) == 0


def test_golden_values() -> None:
    assert permute(np.arange(10), 10, 1, "web", 0).tolist() == [0, 9, 6, 7, 5, 2, 4, 3, 1, 8]
    assert permute(np.arange(5), 100_003, 7, "books", 3).tolist() == [59785, 89899, 96445, 50523, 51542]
    assert permute(np.array([2**40]), 2**40 + 7, 0, "*", 0).tolist() == [997104200145]
    assert mixture(["a", "b", "c"], [0.6, 0.3, 0.1]).table[:12].tolist() == [0, 1, 0, 0, 1, 0, 2, 0, 1, 0, 0, 1]


def test_numbers_out_of_range_are_refused() -> None:
    for numbers in ([7], [-1]):
        with pytest.raises(ValueError, match=r"\[0, 7\)"):
            permute(np.array(numbers), 7, 0, "*", 0)


def test_a_mixture_keeps_its_weights_everywhere() -> None:
    mixed = mixture(["web", "books", "code"], [0.7, 0.2, 0.1])
    assert mixed.slots == (2867, 819, 410)
    assert sum(mixed.slots) == SLOTS
    for source, slots in enumerate(mixed.slots):
        assert (mixed.table == source).sum() == slots
        share = np.cumsum(mixed.table == source) - np.arange(1, SLOTS + 1) * slots / SLOTS
        assert np.abs(share).max() < 2, "no source may fall behind its share"


def test_each_source_counts_its_own_samples_without_gaps() -> None:
    mixed = mixture(["a", "b"], [3, 1.5])
    source, number = mixed.locate(np.arange(3 * SLOTS + 17))
    for i in range(2):
        own = number[source == i]
        assert np.array_equal(own, np.arange(len(own)))


def test_weights_that_cannot_be_met_are_named() -> None:
    with pytest.raises(DataError, match=r"data\.sources\.b\.weight is 1e-06"):
        mixture(["a", "b"], [1.0, 1e-6])
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(DataError, match=r"data\.sources\.a\.weight"):
            mixture(["a", "b"], [weight, 1.0])
