"""Text to train a tokenizer on: drawn evenly from the whole corpus, without reading all of a large one.

Each source gives the same share. A large source is looked at in places spread evenly over it, four times as much as is
wanted; of what is read there, lines are taken evenly. Not here: the training (megalodon/data/tokenizer.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from megalodon.data.encode import is_valid, pieces
from megalodon.data.hub import hub_texts
from megalodon.data.ingest import InputFile, Inputs
from megalodon.data.reading import Item, Long, Part, Reject, checked, decoded_chunks, place, scan, text_size
from megalodon.data.tasks import Task, TaskReader, TooManyRejects, cut, too_many

_PLACE = 1 << 20
"""Bytes of the places that are looked at."""
_LOOKED = 4
"""What is read at most, as a multiple of what is wanted; of packed files, as they are on the disk."""
_UNPACKED = 10
"""How many times the size of a packed file its text may have, where an estimate must do."""


def sample_texts(
    sources: Sequence[Inputs],
    budget: int,
    fraction: float,
    offline: bool = False,
    revisions: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Yield about `budget` bytes of lines, the same share from each source, spread over the whole of it.

    fraction: part of the documents that is for validation, which is not looked at. A Hub dataset gives its first part,
    since its size is unknown; it is read at its commit in `revisions`. Lines come in pieces if they are long.
    Documents that cannot be read are left to the tokenization, which counts them. Raises: DataError if there are no
    others, EnvironmentFault for a Hub that cannot be reached.
    """
    share = budget / max(1, len(sources))
    first: TooManyRejects | None = None
    some = False
    for inputs in sources:
        places = list(_places(inputs, share))
        found = _from_hub(inputs, revisions or {}, offline) if inputs.config.hf else _at(inputs, places)
        read = sum(_text_size(inputs, one) for one in places)
        rate = min(1.0, share / read) if read else 1.0
        seen = taken = 0
        for where, item in found:
            if isinstance(item, Reject):
                first = first or too_many(where(item), item.reason, 1, 0)
                continue
            for line in _lines(item, fraction):
                seen += len(line.encode())
                if taken < rate * seen:
                    taken += len(line.encode())
                    some = True
                    yield line
            if taken >= share:
                break
    if first and not some:
        raise first


_Where = Callable[[Reject], str]


def _lines(item: Item, fraction: float) -> Iterator[str]:
    """Yield the lines of a document that is for training."""
    if isinstance(item, Long):
        found = scan(item)
        if isinstance(found, Reject) or int.from_bytes(found.short, "big") < fraction * 2**64:
            return
        for piece, _ in pieces(decoded_chunks(item)):
            yield from piece.splitlines(keepends=True)
    elif not isinstance(item, Reject) and not is_valid(item.raw, fraction):
        yield from item.text.splitlines(keepends=True)


def _from_hub(inputs: Inputs, revisions: Mapping[str, str], offline: bool) -> Iterator[tuple[_Where, Item]]:
    def where(item: Reject) -> str:
        return f"hf:{inputs.config.hf}: row {item.line}"

    rows = hub_texts(inputs.config, revisions.get(inputs.config.name), offline)
    for number, (text, reason) in enumerate(rows, 1):
        yield where, Reject(number, "", reason, 0) if reason else checked(text, number)


def most(sources: Sequence[Inputs], budget: int) -> int:
    """Return how many bytes of text `sample_texts` yields at most: fewer than `budget` if there are not so many."""
    if any(not inputs.files for inputs in sources):
        return budget
    files = [file for inputs in sources for file in inputs.files]
    return min(budget, sum(file.size * (_UNPACKED if _is_packed(file) else 1) for file in files))


def _is_packed(file: InputFile) -> bool:
    return bool(file.compression) or file.format == "parquet"


class _Place(NamedTuple):
    """What is looked at of one file."""

    file: int
    parts: tuple[Part, ...]
    size: int


def _places(inputs: Inputs, share: float) -> Iterator[_Place]:
    """Yield all of a small source; of a large one evenly spread places."""
    size = sum(file.size for file in inputs.files)
    every = max(1.0, size / (_LOOKED * share)) * _PLACE
    position = 0
    for number in range(len(inputs.files)):
        for parts, part_size in cut(inputs._replace(files=inputs.files[number : number + 1]), _PLACE):
            before, position = position, position + part_size
            if size <= _LOOKED * share or position // every > before // every or not before:
                yield _Place(number, parts, part_size)


def _text_size(inputs: Inputs, place: _Place) -> int:
    """Return about how many bytes of text a place holds; a compressed file is unpacked once to know it."""
    file = inputs.files[place.file]
    if not _is_packed(file):
        return place.size
    return sum(text_size(file, part, inputs.config.field) for part in place.parts)


def _at(inputs: Inputs, places: Sequence[_Place]) -> Iterator[tuple[_Where, Item]]:
    if not inputs.files:
        yield from ((str, item) for _, item in TaskReader(Task(0, 0, (), 0), inputs))
    for file, parts, _ in places:
        own = inputs._replace(files=inputs.files[file : file + 1])
        yield from ((_where(own, parts[0]), item) for _, item in TaskReader(Task(0, 0, parts, 0), own))


def _where(inputs: Inputs, part: Part) -> _Where:
    file = inputs.files[0]
    if not part.start:
        return lambda item: place(file, item.line, item.at)
    unit = "row group" if file.format == "parquet" else "byte"
    return lambda item: f"{file.path}: line {item.line} after {unit} {part.start:,}"
