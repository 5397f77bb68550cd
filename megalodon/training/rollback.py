"""Where a run goes back to when its steps went wrong, and which samples it then leaves out.

    RUN/rollbacks.json   {"rollbacks": [{"from": 152, "to": 100, "samples": [[1200, 1224]], "reason": …, …}, …]}

A rollback is committed by this file, before anything else changes: a checkpoint knows the rollbacks from before it was
saved, so one that is newer than the target of a rollback it does not know is of the abandoned steps. A process killed
at any moment of a rollback therefore continues as if it had finished it.
Not here: when to roll back (guard.py), loading the checkpoint and the files of the run (loop.py).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megalodon.checkpoint.store import Saved, newest_good_step, read_json, replace_json, step_path, steps_in
from megalodon.errors import CheckpointError, EnvironmentFault

FILE = "rollbacks.json"


class Rollback(NamedTuple):
    """One return to an earlier checkpoint."""

    at: int
    """The step that was never finished."""
    to: int
    """The step of the checkpoint that was loaded."""
    samples: list[list[int]]
    """Samples [start, stop) of the bad steps, in order; left out from then on."""
    reason: str
    nonfinite: dict[str, int]
    """Parameter -> values of its gradient that were not finite in the last bad step."""

    def row(self) -> dict[str, Any]:
        """Return what rollbacks.json, state.json and metrics.jsonl hold of it."""
        return {
            "from": self.at,
            "to": self.to,
            "samples": self.samples,
            "reason": self.reason,
            "nonfinite": self.nonfinite,
        }


def read_rollbacks(directory: Path) -> list[Rollback]:
    """Return the rollbacks of a run so far, oldest first. Raises: CheckpointError if the file is none of ours."""
    path = directory / FILE
    return as_rollbacks(read_json(path).get("rollbacks"), path) if path.exists() else []


def as_rollbacks(rows: Any, where: Path) -> list[Rollback]:
    """Return rollbacks from their JSON rows. Raises: CheckpointError naming the file that has others."""
    try:
        return [
            Rollback(
                int(row["from"]),
                int(row["to"]),
                [[int(start), int(stop)] for start, stop in row["samples"]],
                str(row["reason"]),
                {str(name): int(count) for name, count in row["nonfinite"].items()},
            )
            for row in rows
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: rollbacks are {rows!r}; expected those a run writes") from error


def write_rollbacks(directory: Path, rollbacks: Sequence[Rollback]) -> None:
    """Replace rollbacks.json in one move: from here on the last one has happened.

    Raises: EnvironmentFault if it could not be written; nothing has changed then.
    """
    try:
        replace_json(directory / FILE, {"rollbacks": [rollback.row() for rollback in rollbacks]})
    except OSError as error:
        raise EnvironmentFault(f"{directory / FILE} could not be written: {error}") from error


def first_sample(step: int, rows: int, ranges: Iterable[list[int]]) -> tuple[int, list[list[int]]]:
    """Return the first sample of a step and the ranges before it that were jumped over.

    Args:
        step:   from 1.
        rows:   samples of a step.
        ranges: samples [start, stop) to leave out, in any order; each made of whole steps.
    """
    first, jumped = (step - 1) * rows, []
    for start, stop in sorted(ranges):
        if start <= first:
            first += stop - start
            jumped.append([start, stop])
    return first, jumped


def merged(firsts: Iterable[int], rows: int) -> list[list[int]]:
    """Return the samples of steps that begin at `firsts`, as few ranges [start, stop) as possible, in order."""
    found: list[list[int]] = []
    for first in sorted(firsts):
        if found and found[-1][1] == first:
            found[-1][1] = first + rows
        else:
            found.append([first, first + rows])
    return found


def newest_of_run(
    checkpoints: Path, rollbacks: Sequence[Rollback], verify: Literal["full", "fast"] = "full"
) -> tuple[Saved | None, list[str]]:
    """Return the checkpoint a run goes on with, and what is wrong with newer ones: never one that was rolled back.

    Raises: what `newest_good_step` raises.
    """
    abandoned = _abandoned_after(checkpoints, rollbacks)
    return newest_good_step(checkpoints, verify, before=None if abandoned is None else abandoned + 1)


def _abandoned_after(checkpoints: Path, rollbacks: Sequence[Rollback]) -> int | None:
    """Return the step after which the checkpoints are of steps that a rollback abandoned; None if there are none.

    Only those of the last rollback can still be there: each one sets them aside before it trains on.
    """
    if not rollbacks:
        return None
    to = rollbacks[-1].to
    for step in steps_in(checkpoints):
        try:
            state = step_path(checkpoints, step) / "state.json"
            known = as_rollbacks(read_json(state).get("rollbacks"), state)
        except CheckpointError:
            continue  # whoever loads it says what is wrong with it
        if step > to and len(known) < len(rollbacks):
            return to
    return None
