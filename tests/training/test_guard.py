"""The guard's verdicts: what is skipped, what is only logged, what rolls the run back."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalodon.errors import NumericalError
from megalodon.training.guard import WINDOW, StepGuard

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, INF)])
def test_anything_not_finite_is_skipped(loss: float, norm: float) -> None:
    verdict = StepGuard().judge(1, loss, norm)
    assert (verdict.accept, verdict.event) == (False, "skip")
    assert "not finite" in verdict.reason


def test_three_skips_in_a_row_roll_the_run_back_but_not_with_a_good_step_between() -> None:
    guard = StepGuard()
    for step, loss in enumerate([NAN, NAN, 1.0, NAN, NAN], start=1):
        guard.judge(step, loss, 1.0)
    verdict = guard.judge(6, NAN, 1.0)
    assert (verdict.accept, verdict.event, verdict.bad) == (False, "rollback", (4, 5, 6))
    assert "3 steps in a row" in verdict.reason


def test_more_than_one_percent_of_skips_rolls_the_run_back() -> None:
    guard = StepGuard()
    for skip in range(10):
        guard.judge(2 * skip, NAN, 1.0)
        guard.judge(2 * skip + 1, 1.0, 1.0)
    verdict = guard.judge(40, NAN, 1.0)
    assert (verdict.event, verdict.bad) == ("rollback", (*range(0, 20, 2), 40))
    assert "11 of the last 1000" in verdict.reason
    late = StepGuard()
    late.restore(guard.state() | {"skipped": list(range(10)), "row": 0})
    assert late.judge(1500, NAN, 1.0).event == "skip"


def test_stop_means_at_once() -> None:
    with pytest.raises(NumericalError, match="step 4: loss nan"):
        StepGuard(nonfinite="stop").judge(4, NAN, 1.0)


def usual(guard: StepGuard) -> None:
    for step in range(WINDOW):
        assert guard.judge(step, 3.0 + 0.1 * (step % 7), 1.0).event is None


def test_a_spike_is_logged_and_accepted_and_one_does_not_hide_the_next() -> None:
    guard = StepGuard()
    usual(guard)
    for step in (200, 201):
        verdict = guard.judge(step, 30.0, 1.0)
        assert (verdict.accept, verdict.event) == (True, "spike")
    assert guard.judge(202, 3.2, 9.0).reason.startswith("gradient norm 9")
    assert guard.judge(203, 3.5, 1.05).event is None


def test_a_spike_is_skipped_on_request_and_nothing_is_a_spike_before_the_window_is_full() -> None:
    guard = StepGuard(spike="skip")
    assert guard.judge(1, 1000.0, 1.0).event is None
    usual(guard)
    assert not guard.judge(300, 30.0, 1.0).accept


def test_a_spike_rolls_back_to_before_it_on_request_and_leaves_no_trace_in_the_window() -> None:
    guard = StepGuard(spike="rollback")
    usual(guard)
    before = list(guard.losses)
    verdict = guard.judge(300, 30.0, 1.0)
    assert (verdict.accept, verdict.event, verdict.bad) == (False, "rollback", (300,))
    assert list(guard.losses) == before


values = st.lists(st.floats(1.0, 10.0), min_size=WINDOW, max_size=WINDOW)
spikes = st.floats(20.0, 1e300)


@given(values, st.integers(0, WINDOW - 1), spikes, spikes, st.floats(0.1, 100.0))
def test_one_spike_in_the_window_does_not_raise_the_bar(
    window: list[float], place: int, spike: float, other: float, value: float
) -> None:
    """The verdict on a value is the same whatever the size of a spike in the window, and its bar has a bound."""

    def stopped(in_window: float, value: float) -> bool:
        guard = StepGuard(spike="skip")
        guard.losses.extend([*window[:place], in_window, *window[place + 1 :]])
        guard.norms.extend([1.0] * WINDOW)
        return guard.judge(WINDOW + 1, value, 1.0).event is not None

    assert stopped(spike, value) == stopped(other, value)
    assert stopped(spike, 10.0 + 6 * 1.4826 * 9.0 + 0.01)  # values lie between 1 and 10, so do median and MAD


def test_a_flat_loss_is_not_made_of_spikes() -> None:
    guard = StepGuard()
    for step in range(WINDOW):
        guard.judge(step, 3.0, 1.0)
    assert guard.judge(200, 3.01, 1.0).event is None


def test_a_restored_guard_judges_as_the_one_that_went_on() -> None:
    guard, copy = StepGuard(), StepGuard()
    usual(guard)
    guard.judge(300, NAN, 1.0)
    copy.restore(guard.state())
    assert copy.state() == guard.state()
    assert copy.judge(301, 30.0, 1.0) == guard.judge(301, 30.0, 1.0)
