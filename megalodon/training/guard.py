"""The verdict on a step before its update: accept, skip, or stop the run. Not here: what a skip does (loop.py)."""

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
"""Skipped steps in a row that stop the run."""
RECENT, RECENT_SHARE = 1000, 0.01
"""More than this share of the recent steps skipped stops the run too."""


class GuardConfig(Config):
    """What happens to a step that looks wrong (the `train.guard:` section of a recipe)."""

    nonfinite: Literal["skip", "stop"] = "skip"
    """A loss or gradient that is not finite: skip the update (three in a row stop the run) or stop at once."""
    spike: Literal["log", "skip", "rollback"] = "log"
    """A loss or gradient norm far above the recent ones."""
    max_rollbacks: int = Field(default=0, ge=0)
    """Returns to an earlier checkpoint before the run gives up."""


class Verdict(NamedTuple):
    """What to do with a step; `event` is `skip` or `spike`, None for a usual step, `reason` says why."""

    accept: bool
    event: Literal["skip", "spike"] | None = None
    reason: str = ""


class StepGuard:
    """Judges each step by its loss and the norm of its gradient, both before clipping.

    A value that is not finite skips the update. A spike is a value above median + 6 x 1.4826 x MAD of the last 128
    accepted steps (MAD, not the deviation: one spike in the window must not raise the bar), with a floor of 1 % of the
    median under the MAD so that a flat loss triggers nothing; inactive until the window is full.

    Args:
        nonfinite: skip the update, or stop the run at once.
        spike:     log it, or skip the update.
    """

    def __init__(self, nonfinite: Literal["skip", "stop"] = "skip", spike: Literal["log", "skip"] = "log") -> None:
        self.nonfinite, self.spike = nonfinite, spike
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.skipped: list[int] = []
        """Skipped steps among the recent ones."""
        self.row = 0
        """Steps skipped in a row."""

    def judge(self, step: int, loss: float, norm: float) -> Verdict:
        """Return the verdict on a step.

        Raises:
            NumericalError: the run cannot go on: `nonfinite` is stop, or too many steps were skipped.
        """
        if not (math.isfinite(loss) and math.isfinite(norm)):
            reason = f"loss {loss:g}, gradient norm {norm:g}: not finite"
            if self.nonfinite == "stop":
                raise NumericalError(f"step {step}: {reason}", "train.guard.nonfinite=skip skips such steps")
            return self._skip(step, reason)
        reason = _spike("loss", loss, self.losses) or _spike("gradient norm", norm, self.norms)
        if reason and self.spike == "skip":
            return self._skip(step, reason)
        self.losses.append(loss)
        self.norms.append(norm)
        self.row = 0
        return Verdict(True, "spike", reason) if reason else Verdict(True)

    def _skip(self, step: int, reason: str) -> Verdict:
        self.row += 1
        self.skipped = [s for s in self.skipped if s > step - RECENT] + [step]
        hint = "lower optim.lr, or lengthen optim.warmup; the same command continues from the newest checkpoint"
        if self.row >= IN_A_ROW:
            raise NumericalError(f"step {step}: {reason}; {self.row} steps in a row were skipped", hint)
        if len(self.skipped) > RECENT * RECENT_SHARE:
            count = f"{len(self.skipped)} of the last {RECENT} steps were skipped"
            raise NumericalError(f"step {step}: {reason}; {count}", hint)
        return Verdict(False, "skip", reason)

    def state(self) -> dict[str, Any]:
        """Return everything the guard remembers, as JSON values."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "skipped": list(self.skipped),
            "row": self.row,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self.losses, self.norms = deque(state["losses"], WINDOW), deque(state["norms"], WINDOW)
        self.skipped, self.row = list(state["skipped"]), int(state["row"])


def _spike(name: str, value: float, window: deque[float]) -> str:
    """Return what is unusual about a value, or nothing."""
    if len(window) < WINDOW:
        return ""
    median = statistics.median(window)
    mad = max(statistics.median(abs(v - median) for v in window), 0.01 * abs(median))
    limit = median + 6 * 1.4826 * mad
    return f"{name} {value:.4g} is above {limit:.4g} (median {median:.4g} of {WINDOW} steps)" if value > limit else ""
