"""The learning rate is a pure function of the step, with the values one can compute by hand."""

import math

import pytest

from megalodon.training.optim import OptimConfig
from megalodon.training.schedule import horizon_steps, learning_rate


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
