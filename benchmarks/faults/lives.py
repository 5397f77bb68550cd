"""One process of the command line whose life may end at any moment: started by fork or by exec, killed by its handle.

    with Life.forked(["pretrain", …], directory, log) as life:     milliseconds: the parent has imported everything
        life.wait(0.3) or life.kill()                               the kernel's handle of this very process, no number
    life.ended                                                      exit code, or minus the signal
    life.text()                                                     what it printed so far, both streams

Forking is sound only from a process of one thread, which `Life.forked` checks each time. Linux only.
Not here: when a life ends and what must hold then (training_kills.py, tokenize_kills.py, power_loss.py).
"""

import os
import secrets
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
"""What keeps NumPy and torch from starting threads when they are imported."""
LONGEST = 300.0
"""Seconds after which a life that should have ended by itself is a failure."""


def preload() -> None:
    """Import what a training run needs, with one thread, so that a forked life starts at once."""
    os.environ.update(ONE_THREAD)
    import torch

    torch.set_num_threads(1)
    import sentencepiece  # noqa: F401

    import megalodon.checkpoint.tensors
    import megalodon.data.prepare
    import megalodon.evaluation.perplexity
    import megalodon.inference.session
    import megalodon.training.loop
    import megalodon.training.metrics
    import megalodon_cli.app
    import megalodon_cli.training_job
    import megalodon_cli.training_screen  # noqa: F401

    with torch.device("meta"):  # the first tensor without memory imports a second's worth of torch
        1.0 / 2 ** torch.arange(2.0)
    # a quarter of a second of every start that measures the machine and writes nothing
    megalodon.training.metrics.matmul_peak = lambda *_: 1e9


class Life:
    """A running command; ends at the latest when the context does."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self.log = pid, log
        self.began = time.time()
        self.ended: int | None = None
        """Exit code, minus the signal that ended it, or None while it lives."""
        self._handle = os.pidfd_open(pid)

    @classmethod
    def forked(
        cls, arguments: Sequence[str], directory: Path, log: Path, before: Callable[[], None] | None = None
    ) -> Self:
        """Start the command line in a fork of this process; `before` is called in the child first.

        Raises: RuntimeError if this process has more than one thread.
        """
        if (count := len(os.listdir("/proc/self/task"))) != 1:
            raise RuntimeError(f"this process has {count} threads; a fork would copy locks without their owners")
        sys.stdout.flush()
        sys.stderr.flush()
        log.write_bytes(b"")
        pid = os.fork()
        if pid == 0:
            _run(arguments, directory, log, before)
        return cls(pid, log)

    @classmethod
    def spawned(cls, arguments: Sequence[str], directory: Path, log: Path) -> Self:
        """Start the command line as a program of its own."""
        command = [sys.executable, "-m", "megalodon_cli", *arguments]
        log.write_bytes(b"")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        here = Path.cwd()
        os.chdir(directory)
        try:
            pid = os.posix_spawn(sys.executable, command, os.environ, file_actions=actions)
        finally:
            os.chdir(here)
        return cls(pid, log)

    def wait(self, seconds: float = LONGEST) -> bool:
        """Wait for the end of the process, at most so long; True if it ended."""
        if self.ended is None:
            ready, _, _ = select.select([self._handle], [], [], max(0.0, seconds))
            if not ready:
                return False
            _, status = os.waitpid(self.pid, 0)
            self.ended = os.waitstatus_to_exitcode(status)
        return True

    def kill(self, number: int = signal.SIGKILL) -> bool:
        """Send a signal and, if it is SIGKILL, wait for the end; False if the process had ended by itself."""
        if self.wait(0):
            return False
        signal.pidfd_send_signal(self._handle, number)
        if number == signal.SIGKILL:
            self.wait()
        return self.ended == -signal.SIGKILL

    def text(self) -> str:
        """What was printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        os.close(self._handle)


def _run(arguments: Sequence[str], directory: Path, log: Path, before: Callable[[], None] | None) -> NoReturn:
    """The child: the command line with its streams in a file, then the end, past everything the parent would do."""
    code = 70
    try:
        os.chdir(directory)
        out, nothing = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        import megalodon.checkpoint.store

        megalodon.checkpoint.store._WRITER = secrets.token_hex(4)  # drawn at import, so by each process of its own
        sys.argv = ["megalodon", *arguments]
        if before is not None:
            before()
        from megalodon_cli.app import app

        app(list(arguments))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        for thread in threading.enumerate():
            if thread is not threading.main_thread() and not thread.daemon:
                thread.join()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
