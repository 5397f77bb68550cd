"""Tasks run by spawned processes: one task each at a time, as many processes as memory allows.

    budget = plan(workers, mem)                          how many, and what each may hold
    for task, result in run(tasks, setup, budget.workers, advance): …     as they end, in any order

A worker ends with its parent, however that ends; a worker that ends before its task is an error that names the task.
Workers load neither torch nor datasets. Not here: what a task is (megalodon/data/tasks.py), what is done with it
(megalodon/data/encode.py).
"""

import contextlib
import fcntl
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from megalodon.data.encode import Encoder, Outcome, Setup
from megalodon.data.reading import CHUNK
from megalodon.data.tasks import Task, describe
from megalodon.errors import EnvironmentFault, InputError, MegalodonError

DEFAULT_MEM = 2_000_000_000
_PARENT = 100_000_000
_HUB = 300_000_000
"""What the process that reads the Hub holds besides: `datasets` and its buffers."""
_WORKER = 190_000_000
"""What a worker may need: libraries and tokenizer 70 MB, the largest record read, decoded and encoded 120 MB."""
_TRAINING = 7
"""What SentencePiece needs, as a multiple of the text it is trained on."""
_LARGEST_WHOLE = 16 * CHUNK
_GROWTH = 8
"""Memory of a document that is held, as a multiple of its bytes: text, ids, copies on the way."""


class Budget(NamedTuple):
    """How many processes encode, up to how many bytes a file is held by each, and the memory that all stay under."""

    workers: int
    whole: int
    bound: int

    def describe(self) -> str:
        """Return it in one line."""
        return f"{_many(self.workers)}, at most {self.bound / 1e6:,.0f} MB of memory in all"


def _many(workers: int) -> str:
    return f"{workers} worker{'s' if workers != 1 else ''}"


def plan(workers: int | None, mem: int, hub: bool = False, sample: int = 0) -> Budget:
    """Share out `mem` bytes; workers None takes all cores, or as many as fit.

    hub: whether a source lies on the Hub. sample: bytes of text that a tokenizer is trained on, before the rest begins.

    Raises: InputError if `mem` does not suffice, with both numbers.
    """
    base = _PARENT + hub * _HUB
    fitting = max(1, (mem - base) // _WORKER)
    count = min(fitting, len(os.sched_getaffinity(0))) if workers is None else workers
    needed = base + count * _WORKER
    if mem < needed:
        fewer = f"give fewer workers (-j {fitting}) or more memory" if count > 1 else "give more memory"
        raise InputError(
            f"--mem is {mem / 1e6:,.0f} MB, and {_many(count)} need{'s' if count == 1 else ''} "
            f"{needed / 1e6:,.0f} MB; {fewer}"
        )
    training = base + sample * _TRAINING
    if mem < training:
        raise InputError(
            f"--mem is {mem / 1e6:,.0f} MB, and a tokenizer trained on {sample / 1e6:,.0f} MB of text needs "
            f"{training / 1e6:,.0f} MB; give more memory, or a smaller tokenizer.sample"
        )
    whole = max(CHUNK, min(_LARGEST_WHOLE, (mem - needed) // (count * _GROWTH)))
    return Budget(count, whole, max(training, needed + count * _GROWTH * (whole - CHUNK)))


Result = Outcome | MegalodonError | OSError
"""What a task ends with; an error is for the caller to raise when all tasks before it are done."""


class _Worker:
    """One process and what it works on."""

    def __init__(self, setup: Setup) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(setup, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.task: Task | None = None

    def give(self, task: Task) -> None:
        self.task = task
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died: `wait` finds that
            self.connection.send(task)


def run(
    tasks: Iterator[Task], setup: Setup, workers: int, advance: Callable[[int, int, int], None]
) -> Iterator[tuple[Task, Result]]:
    """Run tasks and yield each with what it ended with, as they end; after the first error none is begun.

    advance: told documents, bytes and tokens as they are done. A single task, or one worker, runs in this process.
    Raises: EnvironmentFault if a worker was killed.
    """
    ahead = [task for _, task in zip(range(2), tasks, strict=False)]
    if workers == 1 or len(ahead) < 2:
        yield from _run_here(_chained(ahead, tasks), setup, advance)
    else:
        yield from _run_spawned(_chained(ahead, tasks), setup, workers, advance)


def _chained(first: list[Task], rest: Iterator[Task]) -> Iterator[Task]:
    yield from first
    first.clear()
    yield from rest


def _run_here(
    tasks: Iterator[Task], setup: Setup, advance: Callable[[int, int, int], None]
) -> Iterator[tuple[Task, Result]]:
    encoder: Encoder | None = None
    for task in tasks:
        encoder = encoder or Encoder(setup)
        result: Result
        try:
            result = encoder.run(task, advance)
        except MegalodonError as error:
            result = error
        yield task, result
        if not isinstance(result, Outcome) or result.over:
            return


def _run_spawned(
    tasks: Iterator[Task], setup: Setup, workers: int, advance: Callable[[int, int, int], None]
) -> Iterator[tuple[Task, Result]]:
    crew: list[_Worker] = []
    stopped = False
    try:
        while True:
            while not stopped and (idle := next((w for w in crew if w.task is None), None) or len(crew) < workers):
                task = next(tasks, None)
                if task is None:
                    stopped = True
                else:
                    worker = idle if isinstance(idle, _Worker) else _Worker(setup)
                    crew += [] if worker in crew else [worker]
                    worker.give(task)
            busy = {worker.connection: worker for worker in crew if worker.task is not None}
            if not busy:
                return
            for ready in wait(list(busy)):
                worker = busy[ready]  # type: ignore[index]
                message = _receive(worker, setup)
                if message[0] == "advance":
                    advance(*message[1])
                    continue
                task, worker.task = worker.task, None
                assert task is not None
                stopped = stopped or not isinstance(message[1], Outcome) or message[1].over
                yield task, message[1]
    finally:
        for worker in crew:
            worker.process.kill()
        for worker in crew:
            worker.process.join()
            worker.connection.close()


def _receive(worker: _Worker, setup: Setup) -> Any:
    """Return the next message of a worker. Raises: EnvironmentFault if it is dead, RuntimeError for a bug in it."""
    try:
        message = worker.connection.recv()
    except (EOFError, OSError):  # OSError: it died in the middle of a message
        worker.process.join()
        code, task = worker.process.exitcode or 0, worker.task
        assert task is not None
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        raise EnvironmentFault(
            f"a worker {how} at {describe(task, setup.sources[task.source])}; nothing of it was kept",
            hint="if memory ran out, give fewer workers (-j 1); the same command continues",
        ) from None
    if message[0] == "bug":
        raise RuntimeError(f"in a worker: {message[1]}")
    return message


# ------------------------------------------------------------------------------------------------ in the worker


def _serve(setup: Setup, connection: Connection) -> None:
    """Work until there is no more: the whole life of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal; the parent decides
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    with (setup.work / "workers").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_SH)  # the next builder waits until no worker of a killed one is left
        if wait([parent.sentinel], 0):  # it may have waited already
            return
        encoder = None
        with contextlib.suppress(EOFError, BrokenPipeError):
            while True:
                task = connection.recv()
                encoder = encoder or Encoder(setup)
                connection.send(_result(encoder, task, connection))


def _result(encoder: Encoder, task: Task, connection: Connection) -> tuple[str, Any]:
    try:
        return "result", encoder.run(task, lambda *done: connection.send(("advance", done)))
    except BrokenPipeError:
        raise
    except (MegalodonError, OSError) as error:
        return "result", error
    except Exception:
        return "bug", " ".join(traceback.format_exc().split())


def _end_with(parent: int) -> None:
    wait([parent])
    os._exit(1)
