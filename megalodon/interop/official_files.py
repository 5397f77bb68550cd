"""Checkpoints of the released implementation (XuezheMax/megalodon, reloading.py), read and written.

    config.json                {"model": {…options}, "tokenizer": {"path": …, …}, …}
    consolidate_config.json    {"model_parallel_size": 1, "dtype": "fp32"}
    consolidated.pth           state dict; or one of each tensor-parallel rank: consolidated.00.pth, …01.pth …

Ranks hold slices of most tensors (ParallelEmbedding, ColumnParallelLinear, RowParallelLinear, TimestepNorm, CEMA there)
and whole copies of the others. Files are read by a process of their own (pickled.py); what is written holds plain
tensors only. Not here: names and options (official.py).
"""

import errno
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.serialization import _open_zipfile_writer

from megalodon.checkpoint.store import read_json, write_json
from megalodon.checkpoint.tensor_files import Form, form_of, naming
from megalodon.checkpoint.weight_files import Tensors
from megalodon.data.tokenizer import SENTENCEPIECE_FILE
from megalodon.errors import CheckpointError, one_line
from megalodon.interop.official import IGNORED_OPTIONS, read_options
from megalodon.interop.pickled import PickledFiles
from megalodon.model.megalodon import ModelConfig

CONFIG, ABOUT, WEIGHTS = "config.json", "consolidate_config.json", "consolidated.pth"
_SECOND_AXIS = ("embed.weight", "output.output.weight", "wh2.weight", "fc2.weight", "mega.gamma", "mega.beta")
_FIRST_AXIS = ("wv", "wz", "wr", "wh1", "fc1", "fc3", "cema", "timenorm", "final_norm")
_STORAGES = {torch.float32: "FloatStorage", torch.bfloat16: "BFloat16Storage", torch.int64: "LongStorage"}
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_EXTRA_IDS = 256
"""The released tokenizer takes additional ids in multiples of this alone."""


class Released(NamedTuple):
    """A checkpoint of the released implementation, opened."""

    config: ModelConfig
    tensors: Tensors
    """Whole ones, whatever number of files they lie in."""
    files: list[Path]


def is_released(directory: Path) -> bool:
    """Whether a directory holds a consolidated checkpoint, or was meant to."""
    return (directory / ABOUT).is_file() or any(directory.glob("consolidated*.pth"))


def split_axis(name: str) -> int | None:
    """The axis along which the ranks of a tensor-parallel group share a tensor; None if each has all of it.

    mega.gamma and mega.beta (2, Z) are shared by whole heads, which lie one after the other in Z.
    """
    owner, _, kind = name.rpartition(".")
    module = owner.rpartition(".")[2]
    if kind == "prior_count":
        return None
    if module in _FIRST_AXIS:
        return 0
    return 1 if name.endswith(_SECOND_AXIS) else None


def open_released(directory: Path, stack: ExitStack) -> Released:
    """Open a consolidated checkpoint of one or more tensor-parallel ranks.

    Args:
        stack: ends the process that reads the files.
    Raises:
        CheckpointError: a file is missing, holds code, or is none of this layout; an option is unknown; or the files of
            the ranks do not fit together.
    """
    config_path, about = directory / CONFIG, read_json(directory / ABOUT)
    ranks = about.get("model_parallel_size")
    if type(ranks) is not int or not 1 <= ranks <= 99:
        raise CheckpointError(f"{directory / ABOUT}: model_parallel_size is {ranks!r}; expected a number from 1 on")
    names = [WEIGHTS] if ranks == 1 else [f"consolidated.{rank:02d}.pth" for rank in range(ranks)]
    if extra := sorted({path.name for path in directory.glob("consolidated*.pth")} - set(names)):
        raise CheckpointError(f"{directory} holds {', '.join(extra)}, but {ABOUT} says model_parallel_size {ranks}")
    paths = [directory / name for name in names]
    options = read_json(config_path).get("model")
    if not isinstance(options, dict):
        raise CheckpointError(f"{config_path} has no section model; expected the configuration of the released code")
    files = stack.enter_context(PickledFiles(paths))
    embedding = files.forms[0].get("embed.weight")
    if options.get("vocab_size", -1) == -1 and embedding is not None:  # left to the tokenizer in older ones
        options = {**options, "vocab_size": embedding.shape[0]}
    config = read_options(options, f"{config_path}: model")
    return Released(config, _joined(files, config, directory), paths)


def _joined(files: PickledFiles, config: ModelConfig, directory: Path) -> Tensors:
    """The whole tensors of the ranks' files."""
    ranks, first = len(files.forms), files.forms[0]
    for name, count in (("num_heads", config.num_heads), ("norm_num_groups", config.norm_num_groups)):
        if count % ranks:
            raise CheckpointError(f"{directory}: {ranks} ranks do not divide {name} {count}; files of another model?")
    problems = []
    for rank, forms in enumerate(files.forms[1:], 1):
        other = f"consolidated.{rank:02d}.pth"
        problems += [f"{name} is missing in {other}" for name in first if name not in forms]
        problems += [f"{name} is in {other} alone" for name in forms if name not in first]
        differ = [name for name in first if name in forms and forms[name] != first[name]]
        problems += [f"{name} is {first[name]} in rank 0, {forms[name]} in {other}" for name in differ]
    axes = {name: split_axis(name) for name in first}
    problems += [
        f"{n} is {first[n]} and cannot be joined" for n, a in axes.items() if a is not None and a >= len(first[n].shape)
    ]
    if problems:
        raise CheckpointError(f"{directory}: the files of the ranks do not fit together: {one_line(problems)}")

    def read(name: str) -> Tensor:
        axis, part = split_axis(name), files.read(0, name)
        if ranks == 1:
            return part
        if axis is None:
            for rank in range(1, ranks):
                if not torch.equal(files.read(rank, name), part):
                    raise CheckpointError(f"{directory}: {name} is not the same in all ranks, but each has all of it")
            return part
        width = part.shape[axis]
        whole = torch.empty(_whole(form_of(part), axis, ranks).shape, dtype=part.dtype)
        for rank in range(ranks):
            whole.narrow(axis, rank * width, width).copy_(files.read(rank, name) if rank else part)
        return whole

    forms = {name: _whole(form, split_axis(name), ranks) for name, form in first.items()}
    return Tensors(forms, read)


def _whole(form: Form, axis: int | None, ranks: int) -> Form:
    if axis is None or ranks == 1:
        return form
    return Form((*form.shape[:axis], form.shape[axis] * ranks, *form.shape[axis + 1 :]), form.dtype)


def write_released(
    directory: Path, config: ModelConfig, tensors: Tensors, dtype: torch.dtype, vocab_size: int | None
) -> list[str]:
    """Write a consolidated checkpoint of one rank into a directory that may hold `tokenizer.model` already.

    Args:
        tensors:    exactly the state dict of the model.
        dtype:      of the matrices: float32 or bfloat16; the released code builds its model in it.
        vocab_size: ids of the tokenizer; None if it is none that the released code reads.
    Returns:
        what its loader will not take as it is, a line each.
    Raises:
        OSError: a file could not be written.
    """
    extra = None if vocab_size is None else config.vocab_size - vocab_size
    fits = extra is not None and extra % _EXTRA_IDS == 0
    tokenizer = {
        "path": SENTENCEPIECE_FILE,
        "additional_vocab_size": extra if fits else 0,
        "data_tokenized": False,
    }
    options = {**config.model_dump(mode="json"), **dict(zip(IGNORED_OPTIONS, (None, False), strict=True))}
    write_json(directory / CONFIG, {"model": options, "tokenizer": tokenizer})
    write_json(directory / ABOUT, {"model_parallel_size": 1, "dtype": _DTYPES[dtype]})
    with naming(directory / WEIGHTS):
        write_pth(directory / WEIGHTS, tensors, {"output.output.weight": "embed.weight"} if config.share_emb else {})
    if vocab_size is None:
        return [
            "its tokenizer is SentencePiece alone: put a tokenizer.model of as many ids as the model has rows there"
        ]
    if not fits:
        return [
            f"it expects a tokenizer of exactly {config.vocab_size:,} ids (or fewer by a multiple of {_EXTRA_IDS}); "
            f"this one has {vocab_size:,}"
        ]
    return []


class _Storage(NamedTuple):
    """Stands for the bytes of a tensor in what is pickled."""

    kind: Any
    key: str
    num_values: int


class _Place(NamedTuple):
    """Stands for a tensor in what is pickled."""

    storage: _Storage
    form: Form


class _Pickler(pickle.Pickler):
    """Writes for each place what `torch.save` writes for the tensor."""

    def persistent_id(self, value: Any) -> Any:
        """The record of a tensor's bytes."""
        return ("storage", *value[:2], "cpu", value[2]) if isinstance(value, _Storage) else None

    def reducer_override(self, value: Any) -> Any:
        """How a tensor is made of its bytes."""
        if not isinstance(value, _Place):
            return NotImplemented
        stride = torch.empty(value.form.shape, device="meta").stride()
        rebuild = torch._utils._rebuild_tensor_v2
        return rebuild, (value.storage, 0, value.form.shape, stride, False, OrderedDict())


@contextmanager
def _full_disk() -> Iterator[None]:
    """The library's writer knows one error alone."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(
            errno.ENOSPC, f"writing stopped, the disk may be full ({str(error).split('. ')[-1][:80]})"
        ) from error


def write_pth(path: Path, tensors: Tensors, tied: Mapping[str, str]) -> None:
    """Write what `torch.save` of the state dict would, one tensor in memory at a time.

    Args:
        tied: name -> the name whose bytes it shares.
    """
    keys: dict[str, str] = {}
    places = {}
    for name, form in tensors.forms.items():
        key = keys.setdefault(tied.get(name, name), str(len(keys)))
        places[name] = _Place(_Storage(getattr(torch, _STORAGES[form.torch_dtype]), key, form.num_values), form)
    buffer = BytesIO()
    _Pickler(buffer, protocol=2).dump(places)
    pickled, alignment = buffer.getvalue(), "64"
    with _full_disk(), _open_zipfile_writer(str(path)) as file:
        for name, text in (("data.pkl", pickled), (".format_version", "1"), (".storage_alignment", alignment)):
            file.write_record(name, text, len(text))
        file.write_record("byteorder", "little", len("little"))
        for name, key in keys.items():
            tensor = tensors.read(name).contiguous()
            if tensor.untyped_storage().nbytes() != tensor.nbytes:  # a part of something larger
                tensor = tensor.clone()
            file.write_record(f"data/{key}", tensor.untyped_storage(), tensor.nbytes)
