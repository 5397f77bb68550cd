"""One task -> at most one shard of each part, with all that was counted: the work of a worker process.

    encoder = Encoder(setup)
    outcome = encoder.run(task, progress)       files under setup.work, complete and on the disk; a plain record

A document's tokens are those of its pieces (`pieces`), a matter of its text alone: it makes no difference whether it is
held or streamed. Not here: reading (megalodon/data/tasks.py), processes (megalodon/data/workers.py), what is done with
the records (megalodon/data/build.py).
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from megalodon.data.ingest import Inputs
from megalodon.data.places import sync
from megalodon.data.reading import CHUNK, Item, Long, Reject, Text, decoded_chunks, digest_of, scan
from megalodon.data.shards import ShardFile, file_sha256
from megalodon.data.tasks import Task, TaskReader
from megalodon.data.tokenizer import load_tokenizer

PIECE = 1 << 16
"""Characters after which a long text is cut at the next chance, and twice which it is cut anywhere."""
REPORT_BYTES = 1 << 20
PARTS = ("train", "valid")
COPIES = np.dtype([("digest", "<u8", (2,)), ("bytes", "<u8"), ("flags", "u1")])
"""What is kept of each document while copies are sought; flags: 1 it is of the validation part, 2 it is split."""
_SPACE = re.compile("(?<! ) ")

Advance = Callable[[int, int, int], None]
"""Told now and then: documents, bytes of text, tokens, since it was told last."""


class Setup(NamedTuple):
    """What every task of a store has in common."""

    sources: tuple[Inputs, ...]
    work: Path
    """Holds side/ and the parts' folders."""
    tokenizer: Path
    parts: tuple[Path, Path]
    """Where the shards of training and validation go."""
    bos: bool
    eos: bool
    fraction: float
    """Part of the documents that is kept for validation."""
    valid_source: str
    """The source that is all for validation, or nothing."""
    limit: int
    """Rejected documents after which reading on is of no use."""
    dedup: bool
    whole: int = CHUNK
    """Bytes up to which a file is held as one text."""


class Outcome(NamedTuple):
    """What became of a task; all of it is JSON."""

    number: int
    counts: dict[str, int]
    """Documents and bytes: read, kept, empty, rejected, split, bytes_read, bytes, bytes_empty, bytes_rejected."""
    lines: list[list[int]]
    """[file, lines of it] in the order read, from which line numbers are made."""
    shards: list[dict[str, Any] | None]
    """The manifest's entries of the training and the validation shard."""
    side: list[dict[str, Any]]
    """Files beside the store: rejects, digests."""
    over: bool = False
    """More documents were rejected than may be: reading ended there, and the shards are not kept."""


_COUNTS = ("read", "kept", "empty", "rejected", "split", "bytes_read", "bytes", "bytes_empty", "bytes_rejected")


def is_valid(text: str | bytes, fraction: float) -> bool:
    """Return whether a document is kept for validation: a matter of its text alone."""
    raw = text.encode() if isinstance(text, str) else text
    return _falls(hashlib.blake2b(raw, digest_size=8).digest(), fraction)


def _falls(digest: bytes, fraction: float) -> bool:
    return int.from_bytes(digest, "big") < fraction * 2**64


def pieces(chunks: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (piece, cut): text in pieces of at most 2 x PIECE characters, and where each ends.

    cut: `line` after a newline, `space` before a space, `hard` anywhere, nothing at the end of the text. It makes no
    difference where the chunks end.
    """
    rest, start = "", 0
    for chunk in chunks:
        rest, start = rest[start:] + chunk, 0
        while len(rest) - start > 2 * PIECE:
            end, kind = _border(rest, start + PIECE, start + 2 * PIECE)
            yield rest[start:end], kind
            start = end
    if rest := rest[start:]:
        yield rest, ""


def _border(text: str, low: int, high: int) -> tuple[int, str]:
    newline = text.find("\n", low, high)
    if newline >= 0:
        return newline + 1, "line"
    if found := _SPACE.search(text, low, high):
        return found.start(), "space"
    return high, "hard"


class _Side:
    """A file beside the store, written under a temporary name; nothing appears if nothing was written."""

    def __init__(self, folder: Path, name: str) -> None:
        self._final, self._temporary = folder / name, folder / f".tmp-{os.getpid()}-{name}"
        self._stream: IO[bytes] | None = None

    def write(self, raw: bytes) -> None:
        if self._stream is None:
            self._stream = self._temporary.open("wb")
        self._stream.write(raw)

    def close(self) -> list[dict[str, Any]]:
        """Bring it to the disk; returns its entry, or nothing."""
        if self._stream is None:
            return []
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        os.replace(self._temporary, self._final)
        size = self._final.stat().st_size
        return [{"name": f"side/{self._final.name}", "bytes": size, "sha256": file_sha256(self._final)}]

    def discard(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._temporary.unlink(missing_ok=True)


class Encoder:
    """Encodes tasks one after the other; loads the tokenizer once."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.tokenizer = load_tokenizer(setup.tokenizer)

    def run(self, task: Task, advance: Advance) -> Outcome:
        """Read, encode and write one task. Raises: DataError for input that cannot be read at all."""
        job = _Job(self, task, advance)
        try:
            return job.run()
        finally:
            job.discard()


class _Job:
    """One task at work."""

    def __init__(self, encoder: Encoder, task: Task, advance: Advance) -> None:
        self.setup, self.tokenizer, self.task, self.advance = encoder.setup, encoder.tokenizer, task, advance
        self.inputs = self.setup.sources[task.source]
        self.counts = dict.fromkeys(_COUNTS, 0)
        side = self.setup.work / "side"
        self.rejects, self.digests = _Side(side, f"{task.name}.rejects"), _Side(side, f"{task.name}.digests")
        self.shards: list[ShardFile | None] = [None, None]
        self.tokens = 0
        ends = self.tokenizer.bos_id, self.tokenizer.eos_id
        self._bos, self._eos = (np.array([token], dtype=np.int32) for token in ends)
        self._told = (0, 0, 0)

    def run(self) -> Outcome:
        reader = TaskReader(self.task, self.inputs, self.setup.whole)
        for file, item in reader:
            self._take(file, item)
            if self.counts["rejected"] > self.setup.limit:
                return Outcome(self.task.number, self.counts, reader.lines, [None, None], self.rejects.close(), True)
        shards = [shard.close() if shard else None for shard in self.shards]
        side = self.rejects.close() + self.digests.close()
        for folder in (*self.setup.parts, self.setup.work / "side"):
            sync(folder)
        self._tell()
        self.shards = [None, None]
        return Outcome(self.task.number, self.counts, reader.lines, shards, side)

    def discard(self) -> None:
        """Remove what an error left."""
        for unfinished in (*self.shards, self.rejects, self.digests):
            if unfinished is not None:
                unfinished.discard()

    def _take(self, file: int, item: Item) -> None:
        """Count one document, and encode it if it holds text."""
        self.counts["read"] += 1
        fraction = self.setup.fraction
        valid, digest, size = False, b"", 0
        if isinstance(item, Long):
            found = scan(item)
            if isinstance(found, Reject):
                return self._reject(file, found)
            size, blank, digest, valid = found.size, found.blank, found.digest, _falls(found.short, fraction)
        elif isinstance(item, Reject):
            return self._reject(file, item)
        else:
            size, blank = len(item.raw), not item.text or item.text.isspace()
            if not blank:
                valid = fraction > 0 and is_valid(item.raw, fraction)
                digest = digest_of(item.raw) if self.setup.dedup else b""
        self.counts["bytes_read"] += size
        if blank:
            self.counts["empty"] += 1
            self.counts["bytes_empty"] += size
            return None
        part = self.inputs.config.name == self.setup.valid_source or valid
        split = self._encode(item, int(part), size)
        self.counts["kept"] += 1
        self.counts["bytes"] += size
        self.counts["split"] += split
        if self.setup.dedup:
            self.digests.write(digest + size.to_bytes(8, "little") + bytes([part | split << 1]))
        if self.counts["bytes"] - self._told[1] >= REPORT_BYTES:
            self._tell()
        return None

    def _reject(self, file: int, item: Reject) -> None:
        self.counts["rejected"] += 1
        self.counts["bytes_read"] += item.size
        self.counts["bytes_rejected"] += item.size
        record = {"file": file, "line": item.line, "at": item.at, "reason": item.reason}
        self.rejects.write(json.dumps(record).encode() + b"\n")

    def _encode(self, item: Text | Long, part: int, size: int) -> bool:
        """Write one document; returns whether it was cut where an id might have spanned the cut."""
        shard = self.shards[part]
        if shard is None:
            name = self.inputs.config.name
            shard = ShardFile(self.setup.parts[part], self.task.name, name, self.tokenizer.vocab_size)
            self.shards[part] = shard
        split, begins, before = False, True, shard.tokens_so_far
        if self.setup.bos:
            shard.extend(self._bos)
        if isinstance(item, Text) and len(item.text) <= 2 * PIECE:
            shard.extend(self.tokenizer.encode_array(item.text))
        else:
            chunks = [item.text] if isinstance(item, Text) else decoded_chunks(item)
            for text, cut in pieces(chunks):
                shard.extend(self.tokenizer.encode_array(text, begins))
                split = split or cut == "hard" or (cut == "line" and self.tokenizer.spans_lines)
                begins = False
                self._tell(len(text), shard.tokens_so_far - before)
        if self.setup.eos:
            shard.extend(self._eos)
        shard.end_document(size)
        self.tokens += shard.tokens_so_far - before
        return split

    def _tell(self, open_bytes: int = 0, open_tokens: int = 0) -> None:
        """Report what is new, what is done of the open document included."""
        documents, size, tokens = self.counts["read"], self._told[1] + open_bytes, self.tokens + open_tokens
        if not open_bytes:
            size = self.counts["bytes"]
        self.advance(documents - self._told[0], size - self._told[1], tokens - self._told[2])
        self._told = (documents, size, tokens)
