"""Named tensors on disk that pass through memory one at a time: `model.safetensors`, or shards with an index.

    model-00001-of-00003.safetensors … and model.safetensors.index.json {"metadata": …, "weight_map": {name: file}}

Files are read by plain reads and not mapped, so that what was read does not count as memory of this process. An index
is as foreign as any other file: the names in it must be those of regular files of the same directory.
Not here: which tensors a model needs (model/weights.py), the directory around them (tensors.py).
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalodon.checkpoint.store import read_json, write_json
from megalodon.checkpoint.tensor_files import (
    ONCE_BYTES,
    Box,
    Form,
    bytes_of,
    check_coverage,
    form_of,
    read_boxes,
    write_file,
)
from megalodon.errors import CheckpointError, one_line

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")


class Tensors(NamedTuple):
    """Tensors that are somewhere else until they are asked for."""

    forms: Mapping[str, Form]
    """Shape and dtype by name."""
    read: Callable[[str], Tensor]
    """Returns one of them, in memory of its own."""


def tensors_in_memory(tensors: Mapping[str, Tensor]) -> Tensors:
    """Return tensors that are in memory already in the same form."""
    return Tensors({name: form_of(tensor) for name, tensor in tensors.items()}, lambda name: tensors[name])


def weight_paths(directory: Path) -> list[Path]:
    """Return the files that hold the weights of a model directory, checked by name and kind.

    Raises: CheckpointError: there is none, an index besides a single file, or an index that names something other than
        a regular file of this directory.
    """
    return list(dict.fromkeys(_weight_map(directory).values())) if _has_index(directory) else [directory / WEIGHTS]


def _has_index(directory: Path) -> bool:
    single, index = directory / WEIGHTS, directory / INDEX
    if single.exists() and index.exists():
        raise CheckpointError(f"{directory} holds {WEIGHTS} and {INDEX}; expected one of them")
    return index.exists()


def _weight_map(directory: Path) -> dict[str, Path]:
    """Name of a tensor -> its file, from the index."""
    index = directory / INDEX
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError(f"{index} has no weight_map; expected the file of each tensor by name")
    paths = {file: _inside(directory, file, index) for file in dict.fromkeys(found.values())}
    return {name: paths[file] for name, file in found.items()}


def _inside(directory: Path, file: str, index: Path) -> Path:
    if not _PLAIN_NAME.fullmatch(file):
        raise CheckpointError(f"{index} names {file!r}; expected the plain name of a .safetensors file beside it")
    path = directory / file
    if path.resolve().parent != directory.resolve():
        raise CheckpointError(f"{path} leads out of {directory}; expected the file itself")
    if not path.is_file():
        kind = "is missing" if not path.exists() else "is no file"
        raise CheckpointError(f"{path} {kind}, but {index.name} names it")
    return path


def open_weights(directory: Path, num_tensors: int) -> Tensors:
    """Return the weights of a model directory, after checking what its files say of themselves.

    Args:
        num_tensors: how many tensors a file may hold; bounds its header before it is read.
    Raises:
        CheckpointError: a file is missing, cut off or no safetensors; or the index and the files disagree: the message
            names every tensor that is missing, stands in two files or is not in the index.
    """
    if not _has_index(directory):
        return of_boxes(read_boxes(directory / WEIGHTS, num_tensors))
    places = _weight_map(directory)
    paths = dict.fromkeys(places.values())
    if extra := sorted(path.name for path in directory.glob("*.safetensors") if path not in paths):
        raise CheckpointError(f"{directory} holds {', '.join(extra)}, which {INDEX} does not name; remove one of them")
    boxes = [box for path in paths for box in read_boxes(path, num_tensors)]
    found: dict[str, list[str]] = {}
    for box in boxes:
        found.setdefault(box.name, []).append(box.path.name)
    problems = [f"{n} stands in {' and '.join(files)}" for n, files in found.items() if len(files) > 1]
    problems += [f"{n} is in {files[0]} but not in the index" for n, files in found.items() if n not in places]
    problems += [f"{n} is missing in {path.name}" for n, path in places.items() if path.name not in found.get(n, ())]
    if problems:
        raise CheckpointError(f"{directory / INDEX} does not fit its files: {one_line(problems)}")
    return of_boxes(boxes)


def of_boxes(boxes: list[Box], forms: Mapping[str, Form] | None = None) -> Tensors:
    """Return the tensors that pieces in files make up.

    Args:
        forms: of the whole tensors; None if every piece is a whole one.
    Raises: CheckpointError: the pieces do not cover each tensor exactly once.
    """
    whole = {box.name: box.form for box in boxes} if forms is None else forms
    if forms is not None:
        check_coverage(boxes, forms, boxes[0].path.parent if boxes else "the checkpoint")
    places: dict[str, list[Box]] = {}
    for box in boxes:
        places.setdefault(box.name, []).append(box)

    def read(name: str) -> Tensor:
        pieces, form = places[name], whole[name]
        if len(pieces) == 1:
            return read_piece(pieces[0])
        target = torch.empty(form.shape, dtype=form.torch_dtype)
        for box in pieces:
            axes = zip(box.offsets, box.form.shape, strict=True)
            target[tuple(slice(start, start + length) for start, length in axes)] = read_piece(box)
        return target

    return Tensors(whole, read)


def read_piece(box: Box) -> Tensor:
    """Read one piece of a tensor. Raises: CheckpointError if its file cannot be read or has become shorter."""
    tensor = torch.empty(box.form.shape, dtype=box.form.torch_dtype)
    view = bytes_of(tensor)
    try:
        with box.path.open("rb", buffering=0) as file:
            file.seek(box.position)
            at = 0
            while at < len(view):
                if not (count := file.readinto(view[at : at + ONCE_BYTES])):
                    raise CheckpointError(f"{box.path} ends inside {box.name}")
                at += count
    except OSError as error:
        raise CheckpointError(f"{box.path} cannot be read: {error.strerror}") from error
    return tensor


def write_weights(
    directory: Path,
    tensors: Tensors,
    shard_bytes: int | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, Any]]:
    """Write tensors one by one into `model.safetensors`, or into shards and their index.

    Args:
        directory:   exists and holds no weights.
        shard_bytes: of the largest file; a larger tensor has one of its own. None writes one file.
        report:      called with a line after each shard.
    Returns:
        the size and hash of each file of weights by name, as a manifest records them; not of the index.
    Raises:
        OSError: a file could not be written; it names it.
    """
    shards = _shards(tensors.forms, shard_bytes)
    single = len(shards) == 1
    names = [WEIGHTS if single else f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    files = {}
    for number, (file, members) in enumerate(zip(names, shards, strict=True), 1):
        files[file] = write_file(directory / file, {name: tensors.forms[name] for name in members}, tensors.read)
        report(f"wrote {file} ({number} of {len(shards)}, {files[file]['bytes'] / 1e9:.2f} GB)")
    if not single:
        sizes = sum(form.num_bytes for form in tensors.forms.values())
        places = {name: file for file, members in zip(names, shards, strict=True) for name in members}
        index = {"metadata": {"total_size": sizes}, "weight_map": {name: places[name] for name in tensors.forms}}
        write_json(directory / INDEX, index)
    return files


def _shards(forms: Mapping[str, Form], shard_bytes: int | None) -> list[list[str]]:
    """The names that stand together in a file, in their order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, form in forms.items():
        if shard_bytes is not None and shards[-1] and size + form.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += form.num_bytes
    return shards


def weights_sha256(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what identifies the weights of a model directory: the hash of its file, or one of those of its shards."""
    hashes = [files[name]["sha256"] for name in sorted(files)]
    return str(hashes[0]) if len(hashes) == 1 else hashlib.sha256("|".join(hashes).encode()).hexdigest()
