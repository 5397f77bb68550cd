"""--gpus N: one command becomes N processes; rank 0 speaks, the others write log files.

    launch.start_if_asked("2", "auto")        # in the command the user gave: starts ranks, ends with their exit code

The parent passes signals on, ends all ranks when one fails, and names that one. It starts them itself: under torchrun a
Ctrl-C reaches each rank twice, once from the terminal, which means "at once", and its own exit code is always 1.
Not here: what a rank does first (joining.py), what ranks do with one another (megalodon/parallel).
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from megalodon.errors import EnvironmentFault, InputError
from megalodon_cli import console
from megalodon_cli.joining import LOGS, place_in_world

GRACE_SECONDS = 20.0
"""What ranks have to end by themselves once one has failed; a rank that hangs is then named and killed."""
MOST_RANKS = 1 << 20
"""A larger number is a slip of the hand."""


def start_if_asked(gpus: str | None, device: str) -> None:
    """Start the ranks that --gpus asks for and end with their exit code; return if one process is to do it all."""
    if gpus is None:
        return
    world = place_in_world()
    count = _number_of(gpus, device)
    if world is not None:
        if count != world.size:
            raise InputError(
                f"--gpus {gpus}: this process is one of {world.size} that {world.by} started; leave it out"
            )
        return
    if count > 1:
        raise SystemExit(_run_all(count))


def _number_of(gpus: str, device: str) -> int:
    """How many ranks. Raises: InputError for what is no number, EnvironmentFault for more GPUs than there are."""
    import torch

    there = torch.cuda.device_count() if device != "cpu" else 0
    count = count_of(gpus, there)
    if there and count > there:
        raise EnvironmentFault(
            f"--gpus {gpus}: this machine has {there} GPUs",
            "several machines: start the command under torchrun or srun (docs/parallel.md), or --device cpu",
        )
    return count


def count_of(gpus: str, there: int) -> int:
    """Read --gpus on a machine with so many GPUs. Raises: InputError, or EnvironmentFault for `all` of none."""
    if gpus == "all":
        if not there:
            raise EnvironmentFault("--gpus all: no GPU was found here; on a CPU name a number of processes")
        return there
    if not gpus.isdecimal() or not 1 <= int(gpus) <= MOST_RANKS:
        raise InputError(f"--gpus {gpus}: expected a number of processes from 1, or all")
    return int(gpus)


class _Child:
    def __init__(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        self.rank, self.process = rank, process
        self.code: int | None = None


def _run_all(count: int) -> int:
    """Run this command line as so many ranks and return what the whole ends with."""
    threads = str(max(1, (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1) // count))
    logs = Path(tempfile.mkdtemp(prefix="megalodon-ranks-"))
    code, named = _run_ranks(count, threads, logs)
    if not any(log.parent == logs.resolve() for log in named):
        shutil.rmtree(logs)  # else a log was named of a rank that ended before there was a run to keep it in
    return code


def _run_ranks(count: int, threads: str, logs: Path) -> tuple[int, list[Path]]:
    """Start the ranks, wait for them and end them; see `_ended`."""
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(_free_port()), LOGS: str(logs)}
    # Ranks of one machine talk over its loopback alone: what they send one another is unpickled.
    loopback = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
    if loopback:
        shared["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", loopback)
    shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", threads)
    children: list[_Child] = []

    def forward(number: int, frame: object) -> None:
        for child in children:
            # A terminal sends Ctrl-C to rank 0 itself, as it is of our group; twice means "at once".
            told = number == signal.SIGINT and child.rank == 0 and _on_terminal()
            if child.process.poll() is None and not told:
                child.process.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        for rank in range(count):
            env = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-m", "megalodon_cli", *sys.argv[1:]]
            # What is typed or piped, and what a terminal sends, is for rank 0; the others are told by us.
            stdin = subprocess.DEVNULL if rank else None
            process = subprocess.Popen(command, env=env, stdin=stdin, start_new_session=rank > 0)
            children.append(_Child(rank, process))
        return _ended(children, logs)
    finally:
        for child in children:
            if child.process.poll() is None:
                child.process.kill()
                child.process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _ended(children: Sequence[_Child], logs: Path) -> tuple[int, list[Path]]:
    """Wait for all; tell which failed, unless it is rank 0, who has told it; its code, and the logs that were named."""
    failed: list[_Child] = []
    named: list[Path | None] = []
    deadline = float("inf")
    while any(child.code is None for child in children):
        for child in children:
            if child.code is None:
                child.code = child.process.poll()
                if child.code:
                    failed.append(child)
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        for child in children if children[0].code is not None else ():
            # Who has not met rank 0 by now would look for it for half an hour, and has nothing to say.
            if child.code is None and not (logs / f"met-{child.rank}").exists():
                child.process.kill()
                child.code = child.process.wait()
        if time.monotonic() > deadline:
            hanging = [child for child in children if child.code is None]
            named += _tell_hanging(hanging, logs)
            for child in hanging:
                child.process.kill()
                child.code = child.process.wait()
        time.sleep(0.05)
    if not failed:
        return 0, []
    own = [child for child in failed if not (logs / f"lost-{child.rank}").exists()]  # not for want of another rank
    first = (own or failed)[0]
    code = first.code or 0
    agreed = code > 0 and all(child.code == code for child in children)  # such as to stop
    if own and not agreed and not (first.rank == 0 and code > 0):
        named.append(_tell_first(first, logs))
    return code if code > 0 else 128 - code, [log for log in named if log]


def _on_terminal() -> bool:
    """Whether what is typed on a terminal reaches this group of processes; stdin may be a pipe then."""
    try:
        with open("/dev/tty", "rb") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


def _tell_hanging(hanging: Sequence[_Child], logs: Path) -> list[Path | None]:
    """Let each rank that does not end show where it stands, and say which they are. Returns: their logs."""
    for child in hanging:
        child.process.send_signal(signal.SIGUSR2)
    time.sleep(0.5)
    found = [_log_of(child.rank, logs) for child in hanging]
    for child, log in zip(hanging, found, strict=True):
        console.error(
            f"rank {child.rank} did not end within {GRACE_SECONDS:.0f} s after another rank failed; killed. "
            f"Where it stood: {log or 'above'}"
        )
    return found


def _tell_first(first: _Child, logs: Path) -> Path | None:
    """Say which rank failed first, how, and what it said last. Returns: its log."""
    code = first.code or 0
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    log = _log_of(first.rank, logs)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log else []
    said = next((line for line in reversed(lines) if line.startswith("error: ")), "")
    console.error(f"rank {first.rank} {how}" + (f": {said.removeprefix('error: ')}" if said else ""))
    if log:
        console.hint(f"its log: {log}")
    return log


def _log_of(rank: int, logs: Path) -> Path | None:
    """Where a rank writes, which the link it left says."""
    link = logs / f"rank-{rank:05d}.log"
    return link.resolve() if link.exists() else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
