"""The directory in which a store is built, and the journal by which a later process goes on with it.

    .work-NAME/             beside the store NAME
      lock                  held by the builder; holds its pid
      workers               held by each of its workers
      request.json          what is built, from which text
      journal.jsonl         a line for each thing that is done, with its files and their hashes; each line is fsynced
      side/, spool/, raw/   what the work needs and the store does not
      store/                becomes NAME at the end: that rename is the commit

Whatever has no line in the journal is done again. Not here: what the records say (megalodon/data/build.py).
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from megalodon.data.places import give_name, make_place, sync
from megalodon.data.shards import canonical, file_sha256
from megalodon.data.tasks import TooManyRejects
from megalodon.errors import DataError, EnvironmentFault, MegalodonError

_REQUEST, _JOURNAL = "request.json", "journal.jsonl"
_FOLDERS = ("side", "spool", "raw", "raw/valid", "store", "store/valid")


def work_path(directory: Path) -> Path:
    """Return where the store of a directory is built."""
    return directory.parent / f".work-{directory.name}"


class Workspace:
    """The work on one store, held by this process alone."""

    def __init__(self, directory: Path, path: Path) -> None:
        self.directory, self.path, self.store = directory, path, path / "store"
        self.note = ""
        """What became of earlier work, for the user."""
        self._done: dict[str, dict[str, Any]] = {}

    def done(self, key: str) -> Any:
        """Return what the journal says of a thing, None if it is not done."""
        return self._done.get(key, {}).get("value")

    def add(self, key: str, value: Any, files: list[dict[str, Any]]) -> None:
        """Write down that a thing is done; its files, with names inside the workspace, are on the disk already."""
        record = {"key": key, "value": value, "files": files}
        with (self.path / _JOURNAL).open("ab") as stream:
            stream.write(canonical(record) + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        self._done[key] = record

    @property
    def worth_keeping(self) -> bool:
        """Whether anything is done."""
        return bool(self._done)

    def commit(self) -> None:
        """Bring the store to the disk and give it its name. Raises: DataError if another has the name meanwhile."""
        for path in (*self.store.rglob("*"), self.store):
            if not path.suffix.startswith((".bin", ".idx")):  # shards were brought to the disk when they were made
                sync(path)
        give_name(self.store, self.directory)

    def remove(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _load(self, request: Mapping[str, Any]) -> None:
        """Keep of earlier work what fits the request and is whole; make the folders."""
        raw = canonical(request)
        known = self.path / _REQUEST
        if not known.is_file() or known.read_bytes() != raw:
            if known.is_file():
                self.note = f"work that was begun on {self.directory} is thrown away: its request or its text differ"
            for path in self.path.iterdir():
                if path.name not in ("lock", "workers"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            _write(known, raw)
        for path in [*self.path.rglob(".tmp-*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for folder in _FOLDERS:
            (self.path / folder).mkdir(exist_ok=True)
        records = _read(self.path / _JOURNAL)
        with ThreadPoolExecutor(2) as pool:
            whole = list(pool.map(self._is_whole, records))
        self._done = {record["key"]: record for record, good in zip(records, whole, strict=True) if good}
        _write(self.path / _JOURNAL, b"".join(canonical(record) + b"\n" for record in self._done.values()))
        sync(self.path)
        if tasks := sum(key.startswith("task") for key in self._done):
            self.note = f"continues earlier work on {self.directory}: {tasks:,} finished tasks are kept"

    def _is_whole(self, record: Mapping[str, Any]) -> bool:
        for file in record["files"]:
            path = self.path / file["name"]
            if not path.is_file() or path.stat().st_size != file["bytes"] or file_sha256(path) != file["sha256"]:
                return False
        return True


def _write(path: Path, raw: bytes) -> None:
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    with temporary.open("wb") as stream:
        stream.write(raw)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a journal up to the first line that is not whole: the last one of a killed process."""
    records: list[dict[str, Any]] = []
    if path.is_file():
        with contextlib.suppress(ValueError, KeyError, TypeError), path.open("rb") as stream:
            for line in stream:
                record = json.loads(line)
                records.append({key: record[key] for key in ("key", "value", "files")})
    return records


def entry(path: Path, name: str) -> dict[str, Any]:
    """Return what the journal says of one file: its name inside the workspace, its size, its hash."""
    return {"name": name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}


@contextlib.contextmanager
def workspace(directory: Path, request: Mapping[str, Any]) -> Iterator[Workspace]:
    """Hold the workspace of a store, with what earlier work left of the same request (JSON) and is whole.

    At the end of the block it is removed. After an interruption, a fault of the environment or too many rejects it
    stays if anything is done, for the same command to go on with.
    Raises: DataError if another process builds the store, or its name is taken.
    """
    make_place(directory)
    path = work_path(directory)
    with _locked(directory, path):
        work = Workspace(directory, path)
        with (path / "workers").open("ab") as held:
            fcntl.flock(held, fcntl.LOCK_EX)  # workers of a killed builder end at once, but not before it
        keep = False
        try:
            work._load(request)
            yield work
        except BaseException as error:
            final = isinstance(error, MegalodonError) and not isinstance(error, EnvironmentFault | TooManyRejects)
            keep = work.worth_keeping and not final
            raise
        finally:
            if not keep:
                work.remove()


@contextlib.contextmanager
def _locked(directory: Path, path: Path) -> Iterator[None]:
    while True:
        path.mkdir(exist_ok=True)
        try:
            stream = (path / "lock").open("a+b")
        except FileNotFoundError:  # another builder has just ended and removed it
            continue
        with stream:
            _lock(stream, directory)
            if _is_there(path / "lock", stream):
                stream.truncate(0)
                stream.write(str(os.getpid()).encode())
                stream.flush()
                yield
                return


def _is_there(path: Path, stream: IO[bytes]) -> bool:
    """Return whether the open file still has its name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


def _lock(stream: IO[bytes], directory: Path) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        stream.seek(0)
        owner = stream.read(20).decode(errors="replace") or "?"
        raise DataError(
            f"{directory} is being built by another process (pid {owner}); wait for it, or choose another directory"
        ) from None


def remove_leftovers(directory: Path) -> None:
    """Remove the workspace that a builder killed right after its commit left, if no one holds it."""
    path = work_path(directory)
    if path.is_dir():
        with contextlib.suppress(DataError), _locked(directory, path):
            shutil.rmtree(path, ignore_errors=True)
