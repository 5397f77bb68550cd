"""The verdict on a step before its update: accept it, skip it, roll the run back, or stop it.

Not here: what a skip does (loop.py), where a rollback goes (rollback.py).
"""

import math
import statistics
from collections import deque
from typing import Any, Literal, NamedTuple

from pydantic import Field

from megalodon.config import Config
from megalodon.errors import NumericalError

WINDOW = 128
"""Accepted steps whose loss and norm tell what is usual."""
IN_A_ROW = 3
"""Skipped steps in a row that roll the run back."""
RECENT, RECENT_SHARE = 1000, 0.01
"""More than this share of the recent steps skipped rolls it back too."""


class GuardConfig(Config):
    """What happens to a step that looks wrong (the `train.guard:` section of a recipe)."""

    nonfinite: Literal["skip", "stop"] = "skip"
    """A loss or gradient that is not finite: skip the update (three in a row roll the run back) or stop at once."""
    spike: Literal["log", "skip", "rollback"] = "log"
    """A loss or gradient norm far above the recent ones."""
    max_rollbacks: int = Field(default=3, ge=0)
    """Returns to a checkpoint from before the bad steps, whose samples are then left out, until the run gives up."""


class Verdict(NamedTuple):
    """What to do with a step; `event` is None for a usual step, `reason` says why it is none."""

    accept: bool
    event: Literal["skip", "spike", "rollback"] | None = None
    reason: str = ""
    bad: tuple[int, ...] = ()
    """With `rollback`: the steps that never should have been, in order."""


class StepGuard:
    """Judges each step by its loss and the norm of its gradient, both before clipping.

    A value that is not finite skips the update. A spike is a value above median + 6 x 1.4826 x MAD of the last 128
    accepted steps (MAD, not the deviation: one spike in the window must not raise the bar), with a floor of 1 % of the
    median under the MAD so that a flat loss triggers nothing; inactive until the window is full. Three skips in a row,
    or more than 1 % of the last 1,000 steps, roll the run back to before the first of them.

    Args:
        nonfinite: skip the update, or stop the run at once.
        spike:     log it, skip the update, or roll back to before it.
    """

    def __init__(
        self, nonfinite: Literal["skip", "stop"] = "skip", spike: Literal["log", "skip", "rollback"] = "log"
    ) -> None:
        self.nonfinite, self.spike = nonfinite, spike
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.skipped: list[int] = []
        """Skipped steps among the recent ones."""
        self.row = 0
        """Steps skipped in a row."""
        self.skips, self.spikes = 0, 0
        """Steps skipped, and spikes seen, in the whole run."""

    def judge(self, step: int, loss: float, norm: float) -> Verdict:
        """Return the verdict on a step.

        Raises:
            NumericalError: a value is not finite and `nonfinite` is stop.
        """
        if not (math.isfinite(loss) and math.isfinite(norm)):
            reason = f"loss {loss:g}, gradient norm {norm:g}: not finite"
            if self.nonfinite == "stop":
                raise NumericalError(f"step {step}: {reason}", "train.guard.nonfinite=skip skips such steps")
            return self._skip(step, reason)
        reason = _spike("loss", loss, self.losses) or _spike("gradient norm", norm, self.norms)
        self.spikes += bool(reason)
        if reason and self.spike == "rollback":
            return Verdict(False, "rollback", reason, (step,))
        if reason and self.spike == "skip":
            return self._skip(step, reason)
        self.losses.append(loss)
        self.norms.append(norm)
        self.row = 0
        return Verdict(True, "spike", reason) if reason else Verdict(True)

    def _skip(self, step: int, reason: str) -> Verdict:
        self.row += 1
        self.skips += 1
        self.skipped = [s for s in self.skipped if s > step - RECENT] + [step]
        if self.row >= IN_A_ROW:
            why = f"{reason}; {self.row} steps in a row were skipped"
            return Verdict(False, "rollback", why, tuple(self.skipped[-self.row :]))
        if len(self.skipped) > RECENT * RECENT_SHARE:
            why = f"{reason}; {len(self.skipped)} of the last {RECENT} steps were skipped"
            return Verdict(False, "rollback", why, tuple(self.skipped))
        return Verdict(False, "skip", reason)

    def state(self) -> dict[str, Any]:
        """Return everything the guard remembers, as JSON values."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "skipped": list(self.skipped),
            "row": self.row,
            "skips": self.skips,
            "spikes": self.spikes,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self.losses, self.norms = deque(state["losses"], WINDOW), deque(state["norms"], WINDOW)
        self.skipped, self.row = list(state["skipped"]), int(state["row"])
        self.skips, self.spikes = int(state["skips"]), int(state["spikes"])


def _spike(name: str, value: float, window: deque[float]) -> str:
    """Return what is unusual about a value, or nothing."""
    if len(window) < WINDOW:
        return ""
    median = statistics.median(window)
    mad = max(statistics.median(abs(v - median) for v in window), 0.01 * abs(median))
    limit = median + 6 * 1.4826 * mad
    return f"{name} {value:.4g} is above {limit:.4g} (median {median:.4g} of {WINDOW} steps)" if value > limit else ""
