"""The guard's verdicts: what is skipped, what is only logged, what stops the run."""

import math

import pytest

from megalodon.errors import NumericalError
from megalodon.training.guard import WINDOW, StepGuard

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, INF)])
def test_anything_not_finite_is_skipped(loss: float, norm: float) -> None:
    verdict = StepGuard().judge(1, loss, norm)
    assert (verdict.accept, verdict.event) == (False, "skip")
    assert "not finite" in verdict.reason


def test_three_skips_in_a_row_stop_the_run_but_not_with_a_good_step_between() -> None:
    guard = StepGuard()
    for step, loss in enumerate([NAN, NAN, 1.0, NAN, NAN], start=1):
        guard.judge(step, loss, 1.0)
    with pytest.raises(NumericalError, match=r"step 6: .*3 steps in a row"):
        guard.judge(6, NAN, 1.0)


def test_more_than_one_percent_of_skips_stops_the_run() -> None:
    guard = StepGuard()
    for skip in range(10):
        guard.judge(2 * skip, NAN, 1.0)
        guard.judge(2 * skip + 1, 1.0, 1.0)
    with pytest.raises(NumericalError, match="11 of the last 1000"):
        guard.judge(40, NAN, 1.0)
    late = StepGuard()
    late.restore(guard.state() | {"skipped": list(range(10))})
    assert not late.judge(1500, NAN, 1.0).accept


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
