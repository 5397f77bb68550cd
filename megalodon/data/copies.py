"""Exact copies of documents: found by 16-byte digests, removed from shards that are already written.

The first of equal texts stays, in the order of the input. Memory: about 70 bytes for each document, in NumPy arrays.
Not here: making the digests (megalodon/data/encode.py).
"""

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megalodon.data.encode import COPIES, PARTS
from megalodon.data.shards import ShardFile, token_dtype


class Removed(NamedTuple):
    """What was removed as copies."""

    documents: int
    bytes: int
    split: int


def is_copy(digests: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return for each document whether an earlier one has the same digest. digests: (documents, 2)."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal ones keep their order
    ordered = digests[order]
    same = (ordered[1:] == ordered[:-1]).all(axis=1)
    found = np.zeros(len(digests), dtype=np.bool_)
    found[order[1:][same]] = True
    return found


def remove_copies(
    files: list[Path | None], shards: list[list[dict[str, Any] | None]], raw: Path, store: Path, vocab_size: int
) -> tuple[list[list[dict[str, Any]]], Removed]:
    """Write the shards of `raw` into `store` without copies; returns their entries for each part, and what is gone.

    files: the digests of each task, in the order of the input, None for none; shards: the entries of each task, one for
    each part.
    """
    known = [np.fromfile(path, dtype=COPIES) if path else np.empty(0, dtype=COPIES) for path in files]
    gone = is_copy(np.concatenate([np.empty((0, 2), dtype=np.uint64), *(part["digest"] for part in known)]))
    entries: list[list[dict[str, Any]]] = [[] for _ in PARTS]
    removed = np.zeros(3, dtype=np.int64)
    start = 0
    for records, of_task in zip(known, shards, strict=True):
        own = gone[start : start + len(records)]
        start += len(records)
        dropped = records[own]
        removed += (len(dropped), int(dropped["bytes"].sum()), int((dropped["flags"] >> 1).sum()))
        for part, entry in enumerate(of_task):
            mine = (records["flags"] & 1) == part
            folders = (raw, store) if part == 0 else (raw / "valid", store / "valid")
            if entry and (kept := _without(entry, own[mine], records["bytes"][mine], folders, vocab_size)):
                entries[part].append(kept)
    return entries, Removed(*removed.tolist())


def _without(
    entry: dict[str, Any],
    gone: NDArray[np.bool_],
    text_bytes: NDArray[Any],
    folders: tuple[Path, Path],
    vocab_size: int,
) -> dict[str, Any] | None:
    """Write one shard without the documents that are `gone`; returns its entry, None if nothing is left."""
    source, target = folders
    if not gone.any():
        for file in entry["files"]:
            _same_file(source / file["name"], target / file["name"])
        return entry
    for file in entry["files"]:  # an earlier, interrupted removal may have linked it: never write into that
        (target / file["name"]).unlink(missing_ok=True)
    if gone.all():
        return None
    binary, index = (source / file["name"] for file in entry["files"])
    tokens, bounds = (
        np.memmap(binary, dtype=token_dtype(vocab_size), mode="r"),
        np.load(index, mmap_mode="r", allow_pickle=False),
    )
    shard = ShardFile(target, entry["name"], entry["source"], vocab_size)
    try:
        for number in np.flatnonzero(~gone).tolist():
            shard.extend(tokens[bounds[number] : bounds[number + 1]])
            shard.end_document(int(text_bytes[number]))
        return shard.close()
    except BaseException:
        shard.discard()
        raise


def _same_file(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
        with target.open("rb") as stream:
            os.fsync(stream.fileno())
