"""The learning rate is a pure function of the step, with the values one can compute by hand."""

import math

import pytest

from megalodon.config import Amount
from megalodon.errors import RecipeError
from megalodon.training.optim import OptimConfig
from megalodon.training.schedule import (
    SeqLenWarmupConfig,
    check_warmup,
    horizon_steps,
    learning_rate,
    window_length,
)


def rates(horizon: int = 100, **changes: object) -> list[float]:
    config = OptimConfig(**({"lr": 2.0, "warmup": "10 steps", "final_lr": 0.1} | changes))
    return [learning_rate(config, step, horizon, 64) for step in range(1, horizon + 1)]


def test_warmup_rises_linearly_and_reaches_the_peak_at_its_last_step() -> None:
    assert rates()[:10] == pytest.approx([0.2 * step for step in range(1, 11)])


@pytest.mark.parametrize("unit", ["10%", "10 steps", "640 tokens"])
def test_a_share_steps_and_tokens_of_one_length_are_one_warmup(unit: str) -> None:
    assert rates(warmup=unit) == rates()


def test_cosine_has_its_middle_and_end_where_the_formula_says() -> None:
    found = rates()
    assert found[54] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert found[32] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 23 / 90))))
    assert found[-1] == pytest.approx(0.2)


def test_linear_falls_by_equal_steps() -> None:
    falls = [a - b for a, b in zip(rates(schedule="linear")[9:], rates(schedule="linear")[10:], strict=False)]
    assert falls == pytest.approx([1.8 / 90] * 90)


def test_wsd_stays_until_the_last_fifth() -> None:
    found = rates(schedule="wsd")
    assert found[9:80] == pytest.approx([2.0] * 71)
    assert found[89] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert found[-1] == pytest.approx(0.2)


def test_constant_stays_at_the_peak() -> None:
    assert rates(schedule="constant")[9:] == [2.0] * 91


def test_steps_behind_the_horizon_keep_the_last_rate() -> None:
    config = OptimConfig(lr=2.0, schedule="linear")
    assert learning_rate(config, 150, 100, 64) == learning_rate(config, 100, 100, 64) == pytest.approx(0.2)


def test_horizon_counts_whole_steps() -> None:
    sizes = {"batch_tokens": 64, "epoch_tokens": 1000}
    none: dict[str, None] = dict.fromkeys(["max_steps", "max_tokens", "max_epochs"])
    assert horizon_steps(**(none | {"max_steps": 9}), **sizes) == 9
    assert horizon_steps(**(none | {"max_tokens": 128}), **sizes) == 2
    assert horizon_steps(**(none | {"max_tokens": 129}), **sizes) == 3
    assert horizon_steps(**(none | {"max_epochs": 1.5}), **sizes) == math.ceil(1500 / 64)


def lengths(start: int, over: str, horizon: int = 100) -> list[int]:
    config = SeqLenWarmupConfig(start=start, over=Amount.parse(over))
    return [window_length(config, step, horizon, 64, 4096) for step in range(1, horizon + 1)]


def test_windows_double_evenly_over_the_warmup_and_are_whole_after_it() -> None:
    assert lengths(512, "30%") == [512] * 10 + [1024] * 10 + [2048] * 10 + [4096] * 70
    assert lengths(512, "30 steps") == lengths(512, "1920 tokens") == lengths(512, "30%")
    assert lengths(1024, "5 steps")[:7] == [1024] * 3 + [2048] * 2 + [4096] * 2
    assert lengths(512, "2 steps")[:3] == [512, 1024, 4096]
    assert lengths(512, "0%") == [4096] * 100
    assert window_length(None, 1, 100, 64, 4096) == 4096


@pytest.mark.parametrize(
    ("start", "seq_len", "said"),
    [
        (500, 4096, "start 500 does not lead to data.seq_len 4,096 by doubling; fits: 1, 2, 4, "),
        (24, 96, None),
        (32, 96, "fits: 3, 6, 12, 24, 48"),
        (4096, 4096, "fits: 1, "),
        (8192, 4096, "fits: 1, "),
        (3, 37, "fits: none, as it is odd"),
    ],
)
def test_a_start_that_does_not_double_to_the_window_is_refused(start: int, seq_len: int, said: str | None) -> None:
    config = SeqLenWarmupConfig(start=start, over=Amount(0.1, "share"))
    if said is None:
        check_warmup(config, seq_len)
    else:
        with pytest.raises(RecipeError, match=said):
            check_warmup(config, seq_len)
