"""Flat token shards with a hashed manifest: write, open, verify.

    DIR/manifest.json    canonical JSON (sorted keys, no spaces, dates or paths); its sha256 is the fingerprint
    DIR/00000.bin        tokens, little-endian, no header: uint16 if vocab_size <= 65,536, else uint32
    DIR/00000.idx        .npy int64[documents + 1]: document starts; first 0, strictly increasing, last = token count
    DIR/00000.mask       only where documents carry a mask: uint8 for each token, 1 = counts in the loss

Names of shards increase, but may leave out numbers: they are those of the tasks that the text was cut into.
A shard holds documents of one source. A directory takes its name only when it is complete.
Not here: from a recipe to a store (megalodon/data/prepare.py), windows and batches (megalodon/data/loader.py).
"""

import hashlib
import itertools
import json
import os
import re
import tokenize
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megalodon.data.places import written_aside
from megalodon.errors import CheckFailed, DataError

FORMAT, VERSION = "megalodon-tokens", 1
MANIFEST = "manifest.json"
SHARD_TOKENS = 1 << 27
"""A shard is closed at the end of the document that reaches this many tokens."""

_HELD_TOKENS = 1 << 16
"""Tokens that are held before they are written, and document starts."""

Int64s = NDArray[np.int64]
Reader = Literal["mmap", "pread"]


def canonical(value: Any) -> bytes:
    """Return the one JSON text of a value: UTF-8, sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type tokens are stored in: little-endian uint16 up to 65,536 ids, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


# ------------------------------------------------------------------------------------------------ writing


class TokenDocument(NamedTuple):
    """One document as ids, BOS and EOS included, with the name of its source and the bytes of its text."""

    source: str
    ids: Int64s
    text_bytes: int
    mask: NDArray[np.bool_] | None = None
    """Which tokens count in the loss, one value for each id; all documents of a store have one, or none has."""


class ShardFile:
    """One shard while it is written: under names of its own, which a killed process leaves; `close` gives it its name.

    Tokens come in pieces of any size: `extend`, then `end_document`. Memory is bounded, whatever the shard's size.
    """

    def __init__(self, directory: Path, name: str, source: str, vocab_size: int, *, masked: bool = False) -> None:
        self.name, self.source, self.vocab_size = name, source, vocab_size
        self.tokens = self.documents = 0
        self._dtype = token_dtype(vocab_size)
        self._text_bytes, self._max_id, self._hash = 0, -1, hashlib.sha256()
        self._held: list[NDArray[Any]] = []
        self._num_held = 0
        self._starts = [0]
        self._finals = [directory / f"{name}.{kind}" for kind in ("bin", "idx", *(["mask"] if masked else []))]
        self._paths = [directory / f".tmp-{os.getpid()}-{final.name}" for final in self._finals]
        self._streams = [path.open("wb") for path in self._paths]
        self._binary, self._index = self._streams[:2]
        self._write_header(0)  # it keeps its length when the number of documents is known

    @property
    def tokens_so_far(self) -> int:
        """Ids appended, also those that are not yet written."""
        return self.tokens + self._num_held

    def _write_header(self, rows: int) -> None:
        header = {"descr": "<i8", "fortran_order": False, "shape": (rows,)}
        np.lib.format.write_array_header_1_0(self._index, header)

    def extend(self, ids: NDArray[Any]) -> None:
        """Append ids, an integer array, to the open document. Raises: DataError for an id outside the vocabulary."""
        self._held.append(ids)
        self._num_held += len(ids)
        if self._num_held >= _HELD_TOKENS:
            self._flush()

    def write_mask(self, mask: NDArray[np.bool_]) -> None:
        """Append the mask of the ids of one document; a shard that is not `masked` has no place for it."""
        self._streams[2].write(mask.astype(np.uint8).tobytes())

    def end_document(self, text_bytes: int) -> None:
        """End the open document, a text of so many bytes. Raises: DataError if it has no ids."""
        end = self.tokens_so_far
        if end == self._starts[-1]:
            raise _no_fit(self.source, 0, -1, self.vocab_size)
        self._starts.append(end)
        self.documents += 1
        self._text_bytes += text_bytes
        if len(self._starts) >= _HELD_TOKENS:
            self._flush_starts()

    def _flush(self) -> None:
        if not self._num_held:
            return
        ids = np.concatenate(self._held)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            raise _no_fit(self.source, low, high, self.vocab_size)
        raw = ids.astype(self._dtype).tobytes()
        self._binary.write(raw)
        self._hash.update(raw)
        self._max_id = max(self._max_id, high)
        self.tokens += self._num_held
        self._held, self._num_held = [], 0

    def _flush_starts(self) -> None:
        self._index.write(np.array(self._starts[:-1], dtype="<i8").tobytes())
        del self._starts[:-1]

    def close(self) -> dict[str, Any]:
        """Bring the shard to the disk and give it its name; returns its entry of the manifest."""
        self._flush()
        self._flush_starts()
        self._index.write(np.array(self._starts, dtype="<i8").tobytes())
        self._index.seek(0)
        self._write_header(self.documents + 1)
        sizes = []
        for stream in self._streams:
            stream.flush()
            os.fsync(stream.fileno())
            sizes.append(os.fstat(stream.fileno()).st_size)
            stream.close()
        hashes = [self._hash.hexdigest(), *map(file_sha256, self._paths[1:])]
        for path, final in zip(self._paths, self._finals, strict=True):
            os.replace(path, final)
        return {
            "name": self.name,
            "source": self.source,
            "tokens": self.tokens,
            "documents": self.documents,
            "text_bytes": self._text_bytes,
            "max_id": self._max_id,
            "files": [
                {"name": final.name, "bytes": size, "sha256": sha}
                for final, size, sha in zip(self._finals, sizes, hashes, strict=True)
            ],
        }

    def discard(self) -> None:
        """Remove what was written."""
        for stream, path in zip(self._streams, self._paths, strict=True):
            stream.close()
            path.unlink(missing_ok=True)


def _no_fit(source: str, low: int, high: int, vocab_size: int) -> DataError:
    return DataError(
        f"source {source}: token ids {low:,} to {high:,} of a document do not fit a vocabulary of "
        f"{vocab_size:,}; expected one or more ids in 0 to {vocab_size - 1:,}"
    )


class ShardWriter:
    """Writes documents into the shards of one part, one at a time, in bounded memory."""

    def __init__(self, directory: Path, vocab_size: int, shard_tokens: int = SHARD_TOKENS) -> None:
        self.directory, self.vocab_size, self.shard_tokens = directory, vocab_size, shard_tokens
        self._entries: list[dict[str, Any]] = []
        self._shard: ShardFile | None = None
        self._written = 0
        directory.mkdir(parents=True, exist_ok=True)

    def add(self, document: TokenDocument) -> None:
        """Append one document. Raises: DataError for an id outside the vocabulary, before anything is cast."""
        low, high = int(document.ids.min(initial=0)), int(document.ids.max(initial=-1))
        if not len(document.ids) or low < 0 or high >= self.vocab_size:
            raise _no_fit(document.source, low, high, self.vocab_size)
        if document.mask is not None and len(document.mask) != len(document.ids):
            raise ValueError(f"a mask of {len(document.mask):,} values for a document of {len(document.ids):,} ids")
        if self._shard and (self._shard.source != document.source or self._written >= self.shard_tokens):
            self.close()
        if self._shard is None:
            self._written = 0
            name, masked = f"{len(self._entries):05d}", document.mask is not None
            self._shard = ShardFile(self.directory, name, document.source, self.vocab_size, masked=masked)
        self._shard.extend(document.ids)
        if document.mask is not None:
            self._shard.write_mask(document.mask)
        self._shard.end_document(document.text_bytes)
        self._written += len(document.ids)

    def close(self) -> None:
        """Close the open shard, if any; safe to call after an error."""
        if self._shard is not None:
            self._entries.append(self._shard.close())
            self._shard = None

    def finish(self, about: Mapping[str, Any]) -> str:
        """Write the manifest, last; returns the fingerprint. about: what else it records (tokenizer, sources …)."""
        self.close()
        return write_manifest(self.directory, self._entries, self.vocab_size, about)


def write_manifest(
    directory: Path, shards: Sequence[Mapping[str, Any]], vocab_size: int, about: Mapping[str, Any]
) -> str:
    """Write the manifest of a part from the entries of its shards; returns the fingerprint."""
    sums = {key: sum(int(shard[key]) for shard in shards) for key in ("tokens", "documents", "text_bytes")}
    manifest = canonical(
        {
            **about,
            "format": FORMAT,
            "version": VERSION,
            "dtype": token_dtype(vocab_size).name,
            "vocab_size": vocab_size,
            **sums,
            "shards": list(shards),
        }
    )
    (directory / MANIFEST).write_bytes(manifest)
    return hashlib.sha256(manifest).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_store(
    directory: Path,
    documents: Iterable[TokenDocument],
    vocab_size: int,
    about: Mapping[str, Any] | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> "Store":
    """Write documents as one part and open it; the directory appears only when it is complete. Raises: DataError."""
    with written_aside(directory) as aside:
        writer = ShardWriter(aside, vocab_size, shard_tokens)
        try:
            for document in documents:
                writer.add(document)
        finally:
            writer.close()
        writer.finish(about or {})
    return open_store(directory)


# ------------------------------------------------------------------------------------------------ reading


class Shard(NamedTuple):
    """One open shard."""

    entry: Mapping[str, Any]
    """What the manifest says of it."""
    tokens: Any
    """Its tokens, of which slices are read: mapped from disk, or read from its file (`PreadTokens`)."""
    bounds: Int64s
    """Where each document begins, and at last where the last one ends."""
    mask: Any = None
    """Which tokens count in the loss, uint8, as `tokens` lie; None where all do."""


class PreadTokens:
    """The tokens of a file, each slice read with `pread`: a file that is cut later is an error, not a SIGBUS."""

    def __init__(self, path: Path, dtype: np.dtype[Any], length: int) -> None:
        self._path, self._dtype, self._length = path, dtype, length
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> NDArray[Any]:
        """Return tokens [start, stop). Raises: DataError if the file no longer holds them."""
        start, stop, _ = part.indices(self._length)
        size, offset = (stop - start) * self._dtype.itemsize, start * self._dtype.itemsize
        raw = b""
        try:
            while len(raw) < size and (more := os.pread(self._descriptor, size - len(raw), offset + len(raw))):
                raw += more
        except OSError as error:
            raise DataError(f"{self._path}: {(error.strerror or str(error)).lower()} while it was read") from None
        if len(raw) < size:
            raise DataError(
                f"{self._path}: ends at {offset + len(raw):,} bytes, {self._length * self._dtype.itemsize:,} were "
                "there when it was opened; it was cut meanwhile, tokenize again"
            )
        return np.frombuffer(raw, dtype=self._dtype)


class Store:
    """Tokens of one part (training or validation) as one stream over its shards, left on the disk."""

    def __init__(self, path: Path, manifest: Mapping[str, Any], fingerprint: str, shards: tuple[Shard, ...]) -> None:
        self.path, self.manifest, self.fingerprint, self._shards = path, manifest, fingerprint, shards
        self.vocab_size = int(manifest["vocab_size"])
        self.dtype = token_dtype(self.vocab_size)
        self._bases = np.cumsum([0, *(len(shard.tokens) for shard in shards)], dtype=np.int64)
        self.num_tokens = int(self._bases[-1])
        self.num_documents = sum(int(shard.entry["documents"]) for shard in shards)
        self.text_bytes = sum(int(shard.entry["text_bytes"]) for shard in shards)
        self.max_id = max((int(shard.entry["max_id"]) for shard in shards), default=-1)
        self.sources = tuple(dict.fromkeys(str(shard.entry["source"]) for shard in shards))
        self.masked = bool(shards) and all(shard.mask is not None for shard in shards)

    def source(self, name: str) -> "Store":
        """Return the tokens of one source alone. Raises: DataError if the store has no such source."""
        shards = tuple(shard for shard in self._shards if shard.entry["source"] == name)
        if not shards:
            raise DataError(f"{self.path}: has no tokens of source `{name}`; its sources: {', '.join(self.sources)}")
        return Store(self.path, self.manifest, self.fingerprint, shards)

    def tokens(self, start: int, stop: int) -> Int64s:
        """Return the tokens [start, stop) of the stream as a fresh int64 array. Raises: ValueError out of range."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"tokens [{start:,}, {stop:,}) lie outside a store of {self.num_tokens:,}")
        out = np.empty((1, stop - start), dtype=np.int64)
        self.fill(out, np.zeros(1, dtype=np.int64), np.array([start]))
        return out.reshape(-1)

    def mask(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Return which of the tokens [start, stop) count in the loss, all in a store without masks: (stop - start,)."""
        whole = [np.empty(0, dtype=np.bool_)]
        for shard, _, low, high in self._pieces(np.array([start]), stop - start):
            part = self._shards[shard].mask
            first, last = int(low[0]), int(high[0])
            whole.append(np.ones(last - first, dtype=np.bool_) if part is None else np.asarray(part[first:last]) != 0)
        return np.concatenate(whole)

    def fill(self, out: NDArray[Any], rows: Int64s, begins: Int64s) -> None:
        """Write the tokens from `begins[i]` on into `out[rows[i]]`, as many as fit.

        out: (R, L), of `dtype` or wider. rows, begins: (K,) int64. Raises: ValueError for a window outside the store.
        """
        for shard, which, low, high in self._pieces(begins, out.shape[1]):
            base, tokens = int(self._bases[shard]), self._shards[shard].tokens
            columns = (base + low - begins[which]).tolist()
            for row, first, last, column in zip(
                rows[which].tolist(), low.tolist(), high.tolist(), columns, strict=True
            ):
                out[row, column : column + last - first] = tokens[first:last]

    def starts_in(self, begins: Int64s, length: int) -> tuple[Int64s, Int64s]:
        """Return (window, column) of every document that begins in one of the windows [begin, begin + length).

        begins: (K,) int64. Returns: two (S,) int64, in no promised order. Raises: ValueError as `fill`.
        """
        windows, columns = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        for shard, which, low, high in self._pieces(begins, length):
            places = self._shards[shard].bounds[:-1]
            first, last = np.searchsorted(places, low), np.searchsorted(places, high)
            count = last - first
            # Counts upwards from `first` in each window: a place in the whole, less where its window begins there.
            index = np.arange(int(count.sum())) + np.repeat(first - (np.cumsum(count) - count), count)
            window = np.repeat(which, count)
            windows.append(window)
            columns.append(places[index] + self._bases[shard] - begins[window])
        return np.concatenate(windows), np.concatenate(columns)

    def _pieces(self, begins: Int64s, length: int) -> Iterator[tuple[int, Int64s, Int64s, Int64s]]:
        """Yield (shard, windows, low, high): which windows it has a part of, and the part [low, high) of each in it."""
        if len(begins) and not 0 <= int(begins.min()) <= int(begins.max()) <= self.num_tokens - length:
            raise ValueError(f"windows of {length:,} tokens reach outside a store of {self.num_tokens:,}")
        first = np.searchsorted(self._bases, begins, side="right") - 1
        last = np.searchsorted(self._bases, begins + length)
        for shard in sorted({n for a, b in zip(first.tolist(), last.tolist(), strict=True) for n in range(a, b)}):
            which = np.flatnonzero((first <= shard) & (shard < last))
            base = self._bases[shard]
            low = np.maximum(begins[which] - base, 0)
            yield shard, which, low, np.minimum(begins[which] + length, self._bases[shard + 1]) - base

    def starts(self, start: int = 0, stop: int | None = None) -> Int64s:
        """Return where documents begin in [start, stop), as positions in the stream."""
        length = (self.num_tokens if stop is None else stop) - start
        return self.starts_in(np.array([start]), length)[1] + start

    def documents(self, count: int) -> Iterator[tuple[int, int]]:
        """Yield (begin, end) in the stream of the first documents, `count` at most."""
        for base, shard in zip(self._bases.tolist(), self._shards, strict=False):
            yield from itertools.pairwise((shard.bounds[: count + 1] + base).tolist())
            count -= min(count, len(shard.bounds) - 1)

    def bad_token(self, position: int) -> DataError:
        """Return the error of a token outside the vocabulary: its file, shard, place and value."""
        number = int(np.searchsorted(self._bases, position, side="right")) - 1
        entry, place = self._shards[number].entry, position - int(self._bases[number])
        return DataError(
            f"{self.path / entry['files'][0]['name']}: shard {entry['name']}: token {place:,} is "
            f"{int(self.tokens(position, position + 1)[0]):,}, expected an id below {self.vocab_size:,}; "
            "the file was changed, tokenize again"
        )

    def lengths(self) -> Int64s:
        """Return the tokens of each document."""
        return np.concatenate([np.empty(0, dtype=np.int64), *(np.diff(shard.bounds) for shard in self._shards)])

    def verify(self, threads: int = 1) -> None:
        """Hash every file and scan every id. Raises: CheckFailed naming shard, file and both values.

        threads: files read at once; hashing leaves Python's lock to others.
        """
        files = [(shard, file) for shard in self._shards for file in shard.entry["files"]]
        with ThreadPoolExecutor(threads, "verify") as pool:
            waiting = [pool.submit(self._verify_file, shard, file) for shard, file in files]
            waiting += [pool.submit(self._verify_ids, shard) for shard in self._shards]
            try:
                for check in waiting:  # in order, so that of several faults always the same one is told
                    check.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _verify_file(self, shard: Shard, file: Mapping[str, Any]) -> None:
        path = self.path / file["name"]
        if (got := file_sha256(path)) != file["sha256"]:
            raise CheckFailed(
                f"{path}: shard {shard.entry['name']}: sha256 is {got[:16]}, the manifest says "
                f"{file['sha256'][:16]}; the file was changed, tokenize again"
            )

    def _verify_ids(self, shard: Shard) -> None:
        blocks = range(0, len(shard.tokens), 1 << 24)
        got_max = max(int(shard.tokens[start : start + (1 << 24)].max()) for start in blocks)
        if got_max != shard.entry["max_id"]:
            raise CheckFailed(
                f"{self.path}: shard {shard.entry['name']}: the largest id is {got_max:,}, the manifest says "
                f"{shard.entry['max_id']:,}"
            )


def open_store(path: Path, vocab_size: int | None = None, reader: Reader = "mmap") -> Store:
    """Open one part and check sizes, index order and end, and ids; hashes are left to `Store.verify`.

    vocab_size: the model's; every id must be below it. reader: `mmap`, or `pread` for network disks, where a file that
    is cut while it is mapped ends the process with SIGBUS; it keeps 8 bytes of memory a document.
    Raises: DataError naming shard, file and both values.
    """
    try:
        raw = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: not a token store ({MANIFEST}: {(error.strerror or str(error)).lower()})") from None
    manifest = _checked_manifest(path / MANIFEST, raw)
    shards = tuple(_open_shard(path, manifest, entry, reader) for entry in manifest["shards"])
    store = Store(path, manifest, hashlib.sha256(raw).hexdigest(), shards)
    for key, got in (("tokens", store.num_tokens), ("documents", store.num_documents)):
        if got != manifest[key]:
            raise DataError(f"{path / MANIFEST}: {key} is {manifest[key]:,}, but its shards sum to {got:,}")
    if vocab_size is not None and store.max_id >= vocab_size:
        raise DataError(f"{path}: holds token id {store.max_id:,}, but the model's vocabulary has {vocab_size:,} ids")
    return store


_FILE = {"name": str, "bytes": int, "sha256": str}
_SHARD = {"name": str, "source": str, "tokens": int, "documents": int, "text_bytes": int, "max_id": int}
_PART = {
    **{"version": int, "vocab_size": int, "tokens": int, "documents": int, "text_bytes": int},
    "shards": [{**_SHARD, "files": [_FILE]}],
}
_NAMES = {str: "text", int: "a count", bool: "true or false", dict: "an object", list: "a list"}


def check_shape(path: Path, value: object, shape: Any, key: str = "") -> None:
    """Compare JSON with a shape: a type (int is a count, from 0), {key: shape} or [shape of each entry].

    Keys that the shape does not name are free. Raises: DataError naming file and key, what came and what was expected.
    """
    kind = shape if isinstance(shape, type) else type(shape)
    if type(value) is not kind or (isinstance(value, int) and value < 0):
        got = "missing" if value is None else json.dumps(value)[:60]
        raise DataError(f"{path}: {key} is {got}, expected {_NAMES[kind]}; tokenize again")
    entries: Iterable[tuple[object, object, Any]] = ()
    if isinstance(shape, dict) and isinstance(value, dict):
        entries = [(name, value.get(name), inner) for name, inner in shape.items()]
    elif isinstance(shape, list) and isinstance(value, list):
        entries = [(number, item, shape[0]) for number, item in enumerate(value)]
    for name, item, inner in entries:
        check_shape(path, item, inner, f"{key}.{name}".lstrip("."))


def _checked_manifest(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); tokenize again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path}: expected format `{FORMAT}`; this is not a token store")
    if manifest.get("version") != VERSION:
        raise DataError(f"{path}: version is {manifest.get('version')}, this program reads {VERSION}; tokenize again")
    check_shape(path, manifest, _PART)
    last = -1
    for number, entry in enumerate(manifest["shards"]):
        names = [entry["name"], *(file["name"] for file in entry["files"])]
        task = int(entry["name"]) if re.fullmatch("[0-9]{5,}", entry["name"]) else -1
        name = f"{max(task, last + 1):05d}"  # a shard is named after its task; a task may have no shard in this part
        wanted = [name, f"{name}.bin", f"{name}.idx"]
        if task <= last or names not in (wanted, [*wanted, f"{name}.mask"]):
            raise DataError(f"{path}: shards.{number} names {names}, expected {wanted}; tokenize again")
        last = task
    if manifest.get("dtype") != (expected := token_dtype(manifest["vocab_size"]).name):
        raise DataError(
            f"{path}: dtype is {manifest.get('dtype')}, expected {expected} for its vocab_size; tokenize again"
        )
    return manifest


def _open_shard(path: Path, manifest: Mapping[str, Any], entry: Mapping[str, Any], reader: Reader) -> Shard:
    def bad(file: str, what: str, got: object, expected: object) -> DataError:
        return DataError(f"{path / file}: shard {entry['name']}: {what} is {got}, expected {expected}; tokenize again")

    for file in entry["files"]:
        if not (path / file["name"]).is_file():
            raise DataError(f"{path / file['name']}: shard {entry['name']}: the file is missing; tokenize again")
        if (size := (path / file["name"]).stat().st_size) != file["bytes"]:
            raise bad(file["name"], "the size", f"{size:,} bytes", f"{file['bytes']:,} by the manifest")
    dtype = token_dtype(manifest["vocab_size"])
    binary, index_name, *mask_name = (file["name"] for file in entry["files"])
    if entry["files"][0]["bytes"] != entry["tokens"] * dtype.itemsize or not entry["tokens"]:
        raise bad(
            binary, "the size", f"{entry['files'][0]['bytes']:,} bytes", f"{entry['tokens']:,} {dtype.name} tokens"
        )
    try:
        index = np.load(path / index_name, mmap_mode="r" if reader == "mmap" else None, allow_pickle=False)
    except (ValueError, EOFError, TypeError, SyntaxError, tokenize.TokenError) as error:  # of numpy's header parser
        raise DataError(f"{path / index_name}: shard {entry['name']}: not a .npy file ({error})") from None
    index = np.asarray(index)  # a plain view: slices of a np.memmap cost ten times as much
    if index.dtype != np.dtype("<i8") or index.shape != (entry["documents"] + 1,):
        raise bad(index_name, "the index", f"{index.dtype}{index.shape}", f"int64({entry['documents'] + 1},)")
    if index[0] != 0 or index[-1] != entry["tokens"]:
        raise bad(index_name, "first and last start", f"{index[0]}, {index[-1]}", f"0, {entry['tokens']}")
    if not (np.diff(index) > 0).all():
        raise bad(index_name, "the order of document starts", "not increasing", "strictly increasing")
    if not 0 <= entry["max_id"] < manifest["vocab_size"]:
        raise bad(binary, "max_id", f"{entry['max_id']:,}", f"below vocab_size {manifest['vocab_size']:,}")
    if mask_name and entry["files"][2]["bytes"] != entry["tokens"]:
        raise bad(
            mask_name[0], "the size", f"{entry['files'][2]['bytes']:,} bytes", f"{entry['tokens']:,}, one a token"
        )

    def opened(name: str, kind: np.dtype[Any]) -> Any:
        if reader == "pread":
            return PreadTokens(path / name, kind, entry["tokens"])
        return np.asarray(np.memmap(path / name, dtype=kind, mode="r"))

    mask = opened(mask_name[0], np.dtype(np.uint8)) if mask_name else None
    return Shard(entry, opened(binary, dtype), index, mask)
