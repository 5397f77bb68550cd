"""What a run no longer needs on disk. Not here: asking, the lock (commands/runs.py)."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megalodon.errors import CheckpointError
from megalodon_cli import run_files


class Removable(NamedTuple):
    """A file or directory that a run can do without, and why."""

    path: Path
    bytes: int
    why: str


def removable(run: Path) -> list[Removable]:
    """Return what could go, checkpoints first; called under the lock of the run.

    Checkpoints are read and compared with their hashes: the newest that verifies stays, and if none does, all stay.
    """
    found = [(path, why) for path, why in _checkpoints(run)]
    root = run / "checkpoints"
    found += [(path, "did not verify when it was needed, or was rolled back") for path in sorted(root.glob(".bad-*"))]
    leftovers = [path for place in (run, root) for kind in (".tmp-*", ".del-*") for path in place.glob(kind)]
    found += [(path, "left by a process that was killed") for path in sorted(leftovers)]
    found += [(path, "traces of `--profile`") for path in [run / "profile"] if path.is_dir()]
    return [Removable(path, run_files.size(path), why) for path, why in found]


def _checkpoints(run: Path) -> list[tuple[Path, str]]:
    from megalodon.checkpoint.store import step_path
    from megalodon.training.rollback import newest_of_run, read_rollbacks

    root = run / "checkpoints"
    try:
        newest, _ = newest_of_run(root, read_rollbacks(run))
    except CheckpointError:
        return []
    if newest is None:
        return []
    steps = run_files.checkpoints(run)
    every = run_files.recipe_values(run).get("checkpoint.keep_every")
    kept = {newest.step, *(entry["step"] for entry in steps if entry["best"])}
    kept |= {entry["step"] for entry in steps if isinstance(every, int) and entry["step"] % every == 0}
    why = {True: f"older than step {newest.step:,}", False: "does not verify, or was rolled back"}
    return [(step_path(root, e["step"]), why[e["step"] < newest.step]) for e in steps if e["step"] not in kept]


def remove(found: Sequence[Removable]) -> None:
    """Remove these; a checkpoint loses its name before its files, so that a kill leaves no half of one behind."""
    for path, _, _ in found:
        if run_files.STEP.fullmatch(path.name):
            doomed = path.with_name(f".del-{path.name}")
            os.rename(path, doomed)
            path = doomed
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
