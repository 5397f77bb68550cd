"""Two trainers never share a run directory: the lock of a run. Not here: what the run writes (store.py)."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from megalodon.errors import CheckpointError, EnvironmentFault

STALE_SECONDS = 600.0
"""A lock of another host whose heart has not beaten for so long may be taken over by force."""
BEAT_SECONDS = 30.0
"""At least so long lies between two heartbeats."""


class RunLock:
    """Holds `lock.json` of a run directory while the context lasts.

        {"pid": 4711, "host": "a", "boot": "0f3c…", "started": "2026-01-31 12:00:00"}     empty once it was let go

    The kernel's file lock decides; the content only tells who it is. A process of this host that died holds nothing, so
    its lock is taken over. Another host may not see the kernel's lock: its name in the file counts until its heart has
    not beaten for ten minutes, and then gives way to `force` only. A heartbeat is the file's time of change, which the
    owner renews and which is compared with that of a file written now, by the clock of the same disk.

    Raises (on entering):
        CheckpointError: a live process holds the run, or another host left its name in the file.
        EnvironmentFault: the file cannot be written or locked here.
    """

    def __init__(self, directory: Path, *, force: bool = False) -> None:
        self.path, self.force = directory / "lock.json", force
        self.taken_over: str | None = None
        """Who left the run without unlocking it; None if nobody did."""
        self._file: IO[str] | None = None
        self._beaten = 0.0

    def __enter__(self) -> Self:
        try:
            self._file = self._take()
        except OSError as error:
            raise EnvironmentFault(f"{self.path} cannot be locked: {error.strerror or error}") from error
        return self

    def _take(self) -> IO[str]:
        file = self.path.open("a+", encoding="utf-8")
        try:
            self._claim(file)
        except BaseException:
            file.close()
            raise
        return file

    def _claim(self, file: IO[str]) -> None:
        """Write this process into the locked file. Raises: CheckpointError if another one may live."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = False
        except BlockingIOError:
            held = True
        owner = _owner(file)
        who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')} since {owner.get('started', '?')}"
        if held:
            raise CheckpointError(f"{self.path.parent} is held by {who}; one trainer per run")
        if owner.get("host", socket.gethostname()) != socket.gethostname():
            self._check_elsewhere(who)
        self.taken_over = who if owner else None
        mine = {"pid": os.getpid(), "host": socket.gethostname(), "boot": _boot()}
        file.truncate(0)
        file.write(json.dumps({**mine, "started": time.strftime("%Y-%m-%d %H:%M:%S")}) + "\n")
        file.flush()
        self._beaten = time.monotonic()

    def _check_elsewhere(self, who: str) -> None:
        probe = self.path.with_name(f".tmp-lock-{os.getpid()}")
        before = self.path.stat().st_mtime
        probe.touch()
        age = probe.stat().st_mtime - before
        probe.unlink()
        left = f"{self.path.parent} was left locked by {who}, whose last heartbeat is {max(0.0, age):,.0f} s old"
        if age < STALE_SECONDS:
            raise CheckpointError(
                f"{left}; one trainer per run",
                f"if that process is gone: --force-unlock, from {STALE_SECONDS:.0f} s after its last heartbeat on",
            )
        if not self.force:
            raise CheckpointError(f"{left}; one trainer per run", "if that process is gone: --force-unlock")

    def beat(self) -> None:
        """Show that the owner lives; called as often as one likes, it touches the file every half minute."""
        now = time.monotonic()
        if self._file is not None and now - self._beaten >= BEAT_SECONDS:
            os.utime(self._file.fileno())
            self._beaten = now

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file:
            self._file.truncate(0)
            self._file.close()
            self._file = None


def _owner(file: IO[str]) -> dict[str, Any]:
    """Return who wrote the file; nothing if it is empty or torn."""
    file.seek(0)
    try:
        owner = json.loads(file.read() or "{}")
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _boot() -> str | None:
    """Return what tells this start of the machine from another, None where the system has no such name."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else None
