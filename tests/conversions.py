"""Sources to convert, and what is compared. Not here: the tests."""

from pathlib import Path
from typing import Any

import torch
from factories import tiny_model
from golden_files import options, read
from safetensors.torch import load_file
from torch import Tensor

import megalodon
from megalodon.checkpoint.store import read_json, write_json
from megalodon.checkpoint.tensors import load_model, save_model
from megalodon.data.tokenizer import ByteTokenizer
from megalodon.interop.conversion import Conversion, Options, convert
from megalodon.interop.official_files import split_axis
from megalodon.interop.sources import open_source
from megalodon.model.megalodon import Megalodon

TOKENIZER = ByteTokenizer(reserve=4)
BYTES_VOCAB = TOKENIZER.vocab_size


def save(directory: Path, **changes: Any) -> Megalodon:
    """A tiny model with a byte tokenizer, as a model directory."""
    model = tiny_model(torch.float32, **{"vocab_size": BYTES_VOCAB, **changes})
    about = {"tokenizer_sha256": TOKENIZER.sha256, "bos": True, "recipe": {"name": "tiny"}, "step": 7}
    save_model(model, directory, TOKENIZER.save, about)
    return model


def save_golden(name: str, directory: Path) -> dict[str, Tensor]:
    """A golden model as a model directory; returns its state dict."""
    model = megalodon.from_reference(options(name)["model"], read(f"{name}/params"))
    save_model(model, directory, None, {})
    return {key: tensor.detach() for key, tensor in model.state_dict().items()}


def save_released(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor], ranks: int) -> None:
    """A checkpoint as the released code leaves it: the tensors cut by the table, one file a rank, by `torch.save`."""
    directory.mkdir(parents=True)
    write_json(
        directory / "config.json", {"model": config, "tokenizer": {"path": "tokenizer.model"}, "optim": {"lr": 1}}
    )
    write_json(directory / "consolidate_config.json", {"model_parallel_size": ranks, "dtype": "fp32"})
    for rank in range(ranks):
        part = {name: sliced(name, tensor, rank, ranks) for name, tensor in tensors.items()}
        torch.save(part, directory / ("consolidated.pth" if ranks == 1 else f"consolidated.{rank:02d}.pth"))


def sliced(name: str, tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """The share of one rank."""
    axis = split_axis(name)
    return tensor if axis is None else tensor.chunk(ranks, dim=axis)[rank].clone()


def run(source: Path, target: Path, **changes: Any) -> Conversion:
    """Convert a directory."""
    with open_source(source) as opened:
        return convert(opened, target, Options(**changes))


def stored(directory: Path) -> dict[str, Tensor]:
    """Every tensor in the safetensors files of a directory."""
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal bit by bit."""
    equal = all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in expected.items() if n in found)
    return equal and found.keys() == expected.keys()


def logits(directory: Path, tokens: Tensor) -> Tensor:
    """What our loader makes of a directory."""
    with torch.no_grad():
        found: Tensor = load_model(directory)(tokens)[0]
    return found


def info(directory: Path) -> dict[str, Any]:
    """megalodon.json."""
    return read_json(directory / "megalodon.json")
