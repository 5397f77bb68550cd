"""When a checkpoint is written: in the loop's own thread, or in another while training goes on. Not here: what is in it
(training/loop.py), how it is committed (store.py).
"""

import copy
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from megalodon.checkpoint.store import CheckpointConfig, Share, retain, save_step
from megalodon.errors import EnvironmentFault


class Commit(NamedTuple):
    """A checkpoint that was committed."""

    path: Path
    step: int
    seconds: float
    """From the call to the commit."""
    waited: float
    """Seconds of it that the caller had to wait."""
    trouble: EnvironmentFault | None
    """What went wrong after the commit, with older checkpoints that were to go."""


class Saver:
    """Commits the checkpoints of a run and removes those that nothing keeps, one save at a time.

        saver.save(step, tensors, state, about, background=True)      copies the tensors, and returns
        commit = saver.poll()                                         None while it is being written

    In the background the caller waits for a copy of the tensors only; writing, hashing, the commit and what follows
    from it (`best`, retention) are one thread's work. Nothing points at a checkpoint before it is committed.
    An exit of the process waits for the save in flight, however it comes about; `abandon` shortens that.
    """

    def __init__(self, root: Path, config: CheckpointConfig) -> None:
        self.root, self.config = root, config
        self.pending: int | None = None
        """The step whose outcome `poll` has not told yet."""
        self._thread: threading.Thread | None = None
        self._outcome: Commit | Exception | None = None
        self._abandoned = threading.Event()
        self._broken: Exception | None = None
        """Why the save that is being made cannot be."""

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        about: Mapping[str, Any],
        *,
        background: bool = False,
        since: float | None = None,
        share: Share | None = None,
    ) -> None:
        """Save a step, or start to; `poll` tells how it went. The save before it must have been told.

        Args:
            tensors, state, about: as for `save_step`; they may change as soon as this returns.
            background: write in a thread of its own.
            since: `time.monotonic()` when the caller began to wait.
            share: if the tensors are those of one of several ranks, which all call this at the same time. How a save
                ended is then known to each.
        """
        assert self.pending is None, "poll(wait=True) comes first"
        begin = time.monotonic() if since is None else since
        self.pending = step
        if not background:
            self._write(step, tensors, state, about, share, begin, None)
            return
        try:
            copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            work = (step, copies, copy.deepcopy(dict(state)), dict(about), share, begin, time.monotonic() - begin)
            thread = threading.Thread(target=self._write, args=work, name=f"save-{step}")
            thread.start()
            self._thread = thread
        except Exception as error:  # no memory, no thread: the other ranks of a share wait to hear of it
            self._broken = error
            self._write(step, tensors, state, about, share, begin, None)

    def _write(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        about: Mapping[str, Any],
        share: Share | None,
        begin: float,
        waited: float | None,
    ) -> None:
        """Commit, then tidy up, and keep the outcome for `poll`."""
        trouble: EnvironmentFault | None = None
        try:
            path = save_step(self.root, step, tensors, state, about, self._go_on, share)
            try:
                if share is None or share.writers.rank == 0:
                    retain(self.root, self.config, step)
            except EnvironmentFault as error:
                trouble = error
            seconds = time.monotonic() - begin
            self._outcome = Commit(path, step, seconds, seconds if waited is None else waited, trouble)
        except Exception as error:  # whatever it is, it is raised where the caller asks
            self._outcome = error

    def poll(self, *, wait: bool = False) -> Commit | None:
        """Return the commit that `save` led to, once; None if there is none to tell yet.

        Args:
            wait: until the save in flight has ended.
        Raises:
            EnvironmentFault: the step could not be saved. Any other exception of the writer too.
        """
        if self._thread is not None:
            if wait:
                self._thread.join()
            if self._thread.is_alive():
                return None
        step, outcome = self.pending, self._outcome
        self.pending = self._thread = self._outcome = self._broken = None
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is None and step is not None:
            raise EnvironmentFault(f"step {step} was not saved: its writer ended without a result")
        return outcome

    def _go_on(self) -> None:
        if self._broken is not None:
            raise self._broken
        if self._abandoned.is_set():
            raise EnvironmentFault("the save was abandoned")

    def abandon(self, grace: float = 2.0) -> None:
        """Give up the save in flight unless it ends soon: after the file being written, and nothing of it stays.

        With several ranks each gives up its own files so; one that was not told to writes all of its own first.

        A thread that is still at work when the interpreter ends would take the process down with an error of its own.

        Args:
            grace: seconds that it still has. If they suffice the checkpoint is committed; nothing is told either way.
        """
        if self._thread is not None:
            self._thread.join(grace)
            self._abandoned.set()
            self._thread.join()
        self.pending = self._thread = self._outcome = self._broken = None
        self._abandoned.clear()
