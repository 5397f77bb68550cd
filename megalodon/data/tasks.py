"""The work of a source, cut into tasks of bounded size; the cut depends on the input alone.

    for parts, size in cut(inputs, task_bytes(total)): …     small files together, large ones in parts
    reader = TaskReader(task, inputs); for file, item in reader: …
    documents(inputs)    -> Iterator[Document]: all of a source, one after the other; for tests and looks

A dataset of the Hub is spooled into pieces (`spool`), each of which is one task. Not here: reading one part of one file
(megalodon/data/reading.py), who runs the tasks (megalodon/data/workers.py).
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from megalodon.data.builtin import generated_texts
from megalodon.data.hub import hub_texts
from megalodon.data.ingest import InputFile, Inputs
from megalodon.data.reading import (
    CHUNK,
    Item,
    Long,
    Part,
    PartReader,
    Reject,
    Text,
    checked,
    decoded_chunks,
    place,
    scan,
)
from megalodon.errors import DataError

LARGEST_TASK = 64_000_000
_SMALLEST_TASK = 4_000_000
_TASKS = 64
_MOST_FILES = 4096


class Task(NamedTuple):
    """A piece of the work, which becomes at most one shard of each part; `number` is the name of the shard."""

    number: int
    source: int
    parts: tuple[Part, ...]
    size: int
    """Bytes of input."""
    spool: str = ""
    """Where the rows of a Hub dataset lie."""

    @property
    def name(self) -> str:
        """The name of its shards."""
        return f"{self.number:05d}"


class Document(NamedTuple):
    """One document: its text, the name of its source, and where it stood."""

    text: str
    source: str
    key: str


def task_bytes(total: int) -> int:
    """Return the size of a task: 64 tasks of 4 to 64 MB, more for more text."""
    return min(LARGEST_TASK, max(_SMALLEST_TASK, total // _TASKS))


def cut(inputs: Inputs, limit: int) -> Iterator[tuple[tuple[Part, ...], int]]:
    """Yield the tasks of a source as parts and bytes: consecutive small files together, large ones cut if they can be.

    limit: bytes of a task; one file or row group that cannot be cut may be larger. Raises: DataError for a table that
    cannot be read.
    """
    if inputs.config.builtin == "generated":
        yield (), sum(len(text) for text in generated_texts())
    held: list[Part] = []
    size = 0
    for number, file in enumerate(inputs.files):
        if held and (size + file.size > limit or len(held) == _MOST_FILES):
            yield tuple(held), size
            held, size = [], 0
        parts = list(_parts(file, number, inputs.config.document, limit)) if file.size > limit else []
        if len(parts) > 1:
            yield from (((part,), own) for part, own in parts)
        else:
            held.append(Part(number))
            size += file.size
    if held:
        yield tuple(held), size


def _parts(file: InputFile, number: int, document: str, limit: int) -> Iterator[tuple[Part, int]]:
    """Yield the parts of one large file with their bytes; nothing for one that cannot be cut."""
    if file.format == "parquet":
        yield from _row_groups(file, number, limit)
    elif not file.compression and (file.format == "jsonl" or (file.format == "text" and document != "file")):
        count = -(-file.size // limit)
        bounds = [file.size * i // count for i in range(count + 1)]
        yield from ((Part(number, low, high), high - low) for low, high in itertools.pairwise(bounds))


def _row_groups(file: InputFile, number: int, limit: int) -> Iterator[tuple[Part, int]]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        metadata = pyarrow.parquet.read_metadata(str(file.path))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{file.path}: not a readable parquet file ({reason})") from None
    groups, start, rows, limit_rows = metadata.num_row_groups, 0, 0, metadata.num_rows * limit // file.size
    for group in range(groups):
        rows += metadata.row_group(group).num_rows
        if rows >= limit_rows or group == groups - 1:
            yield Part(number, start, group + 1), file.size * rows // max(1, metadata.num_rows)
            start, rows = group + 1, 0


def describe(task: Task, inputs: Inputs) -> str:
    """Return what a task reads, for messages."""
    if task.spool or not task.parts:
        return f"task {task.name} ({inputs.config.name})"
    first, last = task.parts[0], task.parts[-1]
    path = inputs.files[first.file].path
    if first.stop >= 0:
        unit = "row groups" if inputs.files[first.file].format == "parquet" else "bytes"
        return f"task {task.name} ({path}, {unit} {first.start:,} to {first.stop:,})"
    more = f" to {inputs.files[last.file].path}" if last is not first else ""
    return f"task {task.name} ({path}{more})"


class TaskReader:
    """Iterates over (file, document) of a task; `lines` then holds [file, lines that begin in its part] in order."""

    def __init__(self, task: Task, inputs: Inputs, whole: int = CHUNK) -> None:
        self.lines: list[list[int]] = []
        self._task, self._inputs, self._whole = task, inputs, whole

    def __iter__(self) -> Iterator[tuple[int, Item]]:
        if self._task.spool:
            yield from ((0, item) for item in _spooled(Path(self._task.spool)))
        elif not self._task.parts:
            yield from ((0, Text(text, text.encode())) for text in generated_texts())
        for part in self._task.parts:
            file = self._inputs.files[part.file]
            reader = PartReader(file, part, self._inputs.config, self._whole)
            for item in reader:
                yield part.file, item
            self.lines.append([part.file, reader.lines])
            self._unchanged(file)

    def _unchanged(self, file: InputFile) -> None:
        now = os.stat(file.path)
        if (now.st_size, now.st_mtime_ns) != (file.size, file.modified):
            raise DataError(f"{file.path}: was changed while it was read; start again when it is complete")


# ------------------------------------------------------------------------------------------------ the Hub


class Spooled(NamedTuple):
    """What was written of a Hub dataset: rows, bytes of their text, a digest, and whether it was the rest of it."""

    rows: int
    size: int
    sha256: str
    last: bool


class Spool:
    """Writes the rows of a Hub dataset into files of bounded size."""

    def __init__(self, rows: Iterator[tuple[str, str]]) -> None:
        self._rows = rows
        self._ahead = next(rows, None)

    def skip(self, rows: int) -> None:
        """Pass over rows that were written before."""
        for _ in range(rows):
            self._ahead = next(self._rows, None)

    def write(self, path: Path, limit: int) -> Spooled:
        """Write rows until they hold `limit` bytes of text or end."""
        count, size, digest = 0, 0, hashlib.sha256()
        with path.open("w", encoding="ascii") as stream:
            while self._ahead is not None and size < limit:
                text, reason = self._ahead
                stream.write(json.dumps([text, reason]) + "\n")
                raw = text.encode(errors="surrogatepass")
                digest.update(raw + b"\0")
                size += len(raw)
                count += 1
                self._ahead = next(self._rows, None)
        return Spooled(count, size, digest.hexdigest(), self._ahead is None)


def _spooled(path: Path) -> Iterator[Item]:
    with path.open(encoding="ascii") as stream:
        for number, line in enumerate(stream, 1):
            text, reason = json.loads(line)
            yield Reject(number, "", reason, len(text)) if reason else checked(text, number)


# ------------------------------------------------------------------------------------------------ one after the other


class TooManyRejects(DataError):
    """More documents cannot be read than may be; what is done is of use when more may be."""


def too_many(where: str, reason: str, count: int, limit: int) -> TooManyRejects:
    """Return the error of the first rejected document above the limit."""
    counted = f" (number {count:,} of at most {limit:,})" if limit else ""
    return TooManyRejects(
        f"{where}: {reason}{counted}",
        hint="`data.on_error: skip:100` (--on-error skip:100) would tolerate 100 such documents",
    )


class Rejects:
    """Keeps what cannot be read, up to a limit. Raises: DataError at the first one above it."""

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.records: list[dict[str, str]] = []

    def add(self, where: str, reason: str) -> None:
        """Record one rejected document. Raises: DataError if there are now more than the limit."""
        self.records.append({"place": where, "reason": reason})
        if len(self.records) > self.limit:
            raise too_many(where, reason, len(self.records), self.limit)


def documents(
    inputs: Inputs,
    rejects: Rejects | None = None,
    revision: str | None = None,
    offline: bool = False,
    limit: int = LARGEST_TASK,
) -> Iterator[Document]:
    """Yield the documents of a source in a fixed order, each whole, empty ones included.

    revision: the commit of a Hub dataset. limit: bytes of a task; the documents do not depend on it.
    Raises: DataError above the limit of `rejects` (at the first without one), EnvironmentFault if the Hub is asked for
    and cannot be reached.
    """
    rejects = rejects if rejects is not None else Rejects()
    for where, item in _placed(inputs, revision, offline, limit):
        if isinstance(item, Reject):
            rejects.add(where, item.reason)
        else:
            yield Document(item.text, inputs.config.name, where)


def _placed(inputs: Inputs, revision: str | None, offline: bool, limit: int) -> Iterator[tuple[str, Text | Reject]]:
    if inputs.config.hf is not None:
        for number, (text, reason) in enumerate(hub_texts(inputs.config, revision, offline), 1):
            item = Reject(number, "", reason, 0) if reason else checked(text, number)
            yield f"hf:{inputs.config.hf}: row {number}", item
        return
    lines: dict[int, int] = {}
    for parts, size in cut(inputs, limit):
        reader = TaskReader(Task(0, 0, parts, size), inputs)
        for number, (file, found) in enumerate(reader):
            item = _held(found) if isinstance(found, Long) else found
            if not parts:
                yield f"generated:{number}", item
            else:
                line, at = (item.line, item.at) if isinstance(item, Reject) else (1, "")
                yield place(inputs.files[file], lines.get(file, 0) + line, at), item
        for file, count in reader.lines:
            lines[file] = lines.get(file, 0) + count


def _held(document: Long) -> Text | Reject:
    found = scan(document)
    return found if isinstance(found, Reject) else Text("".join(decoded_chunks(document)), b"")


def total_bytes(sources: Sequence[Inputs]) -> int | None:
    """Return the bytes of all sources; None if one does not know its size."""
    if any(not inputs.files for inputs in sources):
        return None
    return sum(file.size for inputs in sources for file in inputs.files)
