"""A process among those that were started together: who they are, how they meet, and how it ends without one of them.

    with joining.joined("auto", timeout) as team:     # started by --gpus, torchrun or srun; alone otherwise
        job = team.in_turn(prepare)

Not here: who starts them (launch.py), what ranks do with one another (megalodon/parallel), the loop.
"""

import faulthandler
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from megalodon.errors import CheckFailed, EnvironmentFault, InputError, Stopped

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store  # type: ignore[attr-defined]

    from megalodon.parallel.layout import Layout
    from megalodon.parallel.ranks import Ranks

T = TypeVar("T")
MEETING = timedelta(minutes=30)
"""What a rank waits at most for the others to come."""
LOGS = "_MEGALODON_RANK_LOGS"
"""Variable of the folder in which ranks write before the run directory is known."""


class World(NamedTuple):
    """What a launcher says of this process."""

    rank: int
    size: int
    local_rank: int
    address: str
    """Of rank 0, as its port."""
    port: int
    by: str
    """Who says it."""


def place_in_world(environment: Mapping[str, str] = os.environ) -> World | None:
    """Return what torchrun, srun or --gpus says of this process; None if it is alone.

    Raises: EnvironmentFault if some of it is missing, or is no number.
    """
    names, by = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), "a launcher"
    if "RANK" not in environment:
        if environment.get("SLURM_STEP_NUM_TASKS", "1") == "1":
            return None
        names, by = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"), "srun"
    wanted = (*names, "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in wanted if not environment.get(name)]
    if missing and environment.get(names[1]) == "1":
        return None
    if missing:
        raise EnvironmentFault(
            f"started by {by} ({names[0]}={environment.get(names[0])}), but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set; expected the address and port of rank 0 in MASTER_ADDR "
            "and MASTER_PORT, as torchrun sets them",
            "docs/parallel.md has job files for SLURM and Kubernetes",
        )
    numbers = {name: environment[name] for name in (*names, "MASTER_PORT")}
    if bad := [f"{name}={value}" for name, value in numbers.items() if not value.isdecimal()]:
        raise EnvironmentFault(f"{', '.join(bad)}: expected whole numbers")
    rank, size, local, port = (int(value) for value in numbers.values())
    if not rank < size:
        raise EnvironmentFault(f"{names[0]}={rank} and {names[1]}={size}: expected a rank below the number of ranks")
    return World(rank, size, local, environment["MASTER_ADDR"], port, by) if size > 1 else None


def asked() -> list[str]:
    """The option that starts as many ranks again; nothing where --gpus did not start them."""
    world = place_in_world()
    return ["--gpus", str(world.size)] if world and LOGS in os.environ else []


def is_helper() -> bool:
    """Whether this process is one of several, and not rank 0."""
    world = place_in_world()
    return world is not None and world.rank > 0


def everybody() -> "ProcessGroup":
    """The ranks that were joined."""
    import torch.distributed as dist

    group: ProcessGroup = dist.group.WORLD  # type: ignore[assignment]
    return group


class Team:
    """This process among those that train together; alone everything is done at once.

    Args:
        world:    what a launcher said; None for one process.
        store:    where ranks leave word for one another.
        patience: what a rank waits for another.
    """

    def __init__(
        self, world: World | None = None, store: "Store | None" = None, patience: timedelta | None = None
    ) -> None:
        self.world, self._store, self._patience = world, store, patience
        self._turns = 0

    @property
    def main(self) -> bool:
        """Whether this process speaks, and writes all but the parts of a checkpoint."""
        return self.world is None or self.world.rank == 0

    @property
    def size(self) -> int:
        """How many train together."""
        return self.world.size if self.world else 1

    def device(self, asked: str) -> str:
        """The device of this rank: its own GPU of those that were asked for."""
        import torch

        if self.world is None or asked == "cpu" or not torch.cuda.is_available():
            return asked
        if asked not in ("auto", "cuda"):
            raise InputError(f"--device {asked}: {self.size} processes cannot share it; expected auto, cuda or cpu")
        return f"cuda:{self.world.local_rank}"

    def in_turn(self, work: Callable[[], T]) -> T:
        """Call it on rank 0 first and elsewhere when that is done: what is prepared once is then there for all."""
        self._turns += 1
        key = f"turn-{self._turns}"
        if self._store is None:
            return work()
        if self.main:
            done = work()
            self._store.set(key, "done")
            return done
        while not self._store.check([key]):  # asked again and again, so that a signal is heard meanwhile
            time.sleep(0.1)
        return work()

    def ranks(self, layout: "Layout", device: str) -> "Ranks":
        """The ranks as training sees them."""
        from megalodon.parallel.ranks import ALONE

        if self.world is None:
            return ALONE
        from megalodon.parallel.mesh import Mesh
        from megalodon.parallel.several import SeveralRanks

        return SeveralRanks(Mesh(layout, device, self._patience))

    def agree(self, what: Mapping[str, Any]) -> None:
        """Check that all ranks are about to do the same. Raises: CheckFailed naming the ranks that are not."""
        import torch.distributed as dist

        if self.world is None:
            return
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, dict(what))
        differ = {key: [rank for rank, one in enumerate(told) if one.get(key) != told[0].get(key)] for key in what}
        found = [
            f"{key} of rank {', '.join(map(str, ranks[:8]))} is {told[ranks[0]].get(key)}, of rank 0 {told[0].get(key)}"
            for key, ranks in differ.items()
            if ranks
        ]
        if found:
            raise CheckFailed(f"ranks would train different things: {'; '.join(found)}")


@contextmanager
def joined(device: str, timeout: timedelta) -> Iterator[Team]:
    """Meet the other ranks, if a launcher started this process as one of several; leave them at the end.

    Args:
        timeout: what a rank waits for another before it gives up.
    Raises:
        EnvironmentFault: they do not come, the port is taken, or one is lost later.
    """
    world = place_in_world()
    if world is None:
        yield Team()
        return
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # the launcher asks where a rank stands that hangs
    if LOGS in os.environ:
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    with _writing_log(world.rank), _met(world, device, timeout) as team:
        yield team


@contextmanager
def _met(world: World, device: str, timeout: timedelta) -> Iterator[Team]:
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    gpu = device != "cpu" and torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(world.local_rank)
    where = f"{world.address}:{world.port}"
    try:
        listening: dict[str, Any] = {}
        if LOGS in os.environ and world.rank == 0:  # by itself the store listens on every interface
            listening["master_listen_fd"] = socket.create_server((world.address, world.port)).detach()
        meeting = min(timeout, MEETING)
        store = TCPStore(world.address, world.port, world.size, world.rank == 0, meeting, **listening)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=PrefixStore("ranks", store),
            rank=world.rank,
            world_size=world.size,
            timeout=timeout,
        )
        if LOGS in os.environ:
            (Path(os.environ[LOGS]) / f"met-{world.rank}").touch()
    except (RuntimeError, OSError) as error:
        said = str(error).splitlines()[0]
        raise EnvironmentFault(
            f"rank {world.rank} of {world.size} did not meet the others at {where}: {said}"
        ) from error
    try:
        yield Team(world, store, timeout)
        dist.barrier()
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        if LOGS in os.environ:
            (Path(os.environ[LOGS]) / f"lost-{world.rank}").touch()
        raise _Lost(
            f"rank {world.rank} lost another rank: {' '.join(str(error).split())[:200]}",
            "the first rank that failed says why; the same command continues from the newest checkpoint",
        ) from error
    finally:
        dist.destroy_process_group()


class _Lost(EnvironmentFault):
    """Another rank is gone: that one knows why."""


def _end_with(launcher: int) -> None:
    """End as a signal would end it once the launcher is gone without a word: nobody would know of this process."""
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def code_digest() -> str:
    """What tells this code from another: a digest of our sources."""
    import hashlib
    from importlib.util import find_spec

    digest = hashlib.sha256()
    for spec in map(find_spec, ("megalodon", "megalodon_kernels", "megalodon_cli")):
        assert spec is not None
        for path in sorted(Path(str(spec.origin)).parent.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _is_lost(error: RuntimeError) -> bool:
    """Whether this is what collectives raise when another rank is gone or does not answer."""
    import torch.distributed as dist

    words = ("Connection closed by peer", "Connection reset", "Timed out", "timed out", "Broken pipe", "gloo", "NCCL")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


@contextmanager
def _writing_log(rank: int) -> Iterator[None]:
    """Let this process, unless it is rank 0, write into a file what it would print, until the run has one for it.

    Where we did not start it, nobody reads that file to tell what went wrong: an error is printed where it can be seen.
    """
    if rank == 0:
        yield
        return
    screen, ours = os.dup(2), LOGS in os.environ
    if ours:
        first = Path(os.environ[LOGS]) / f"rank-{rank:05d}.log"
    else:
        handle, name = tempfile.mkstemp(prefix=f"megalodon-rank-{rank:05d}-", suffix=".log")
        os.close(handle)
        first = Path(name)
    _write_log(first)
    try:
        yield
    except (_Lost, Stopped):
        raise
    except Exception:
        if not ours:
            os.dup2(screen, 2)
        raise
    finally:
        os.close(screen)
        if not ours:
            first.unlink(missing_ok=True)


_log = Path()
"""The file that this process writes into."""


def _write_log(path: Path) -> None:
    """Let this process write into a file what it would print."""
    global _log
    _log = path
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)


def move_log(directory: Path, rank: int) -> None:
    """Go on writing in RUN/logs, and leave a link where the log was."""
    target, before = directory / "logs" / f"rank-{rank:05d}.log", _log
    target.parent.mkdir(exist_ok=True)
    with target.open("ab") as file:
        file.write(before.read_bytes())
    _write_log(target)
    before.unlink()
    if LOGS in os.environ:
        before.symlink_to(target.absolute())
