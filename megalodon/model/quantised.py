"""Linear maps whose weights stay small integers in memory: int8 with a scale a row, int4 with one for each group.

    layers.0.mega.wv.weight.int8    (out, in) int8                layers.0.mega.wv.weight.scale  (out, 1) float32
    layers.0.mega.wv.weight.int4    (out, ⌈in/2⌉) uint8, two to a byte, low half first
                                                                  layers.0.mega.wv.weight.scale  (out, groups) float32

    weight = integer · scale

Only the linear maps of the blocks are held so. Embedding and output matrix are int8 in the file alone and float32 in
memory, where losses and samplers want them plain; all else is float32 everywhere. Such a model reads and writes, it is
not trained. Not here: the module itself (layers.py), how integers are chosen (megalodon/interop/quantise.py), files.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad

from megalodon.config import Config
from megalodon.errors import CheckpointError, InputError, one_line
from megalodon.model.layers import QuantisedLinear, dequantised
from megalodon.model.megalodon import Megalodon, ModelConfig

Kind = Literal["int8", "int4"]
OUTER = ("embed.weight", "output.output.weight")
"""Matrices outside of the blocks, which are int8 in every kind."""


class Quantisation(Config):
    """How the matrices of a model are held."""

    kind: Kind
    """`int8`, or `int4`: two to a byte."""
    group_size: int = Field(64, ge=2)
    """Values of a row that share a scale, in int4; a row whose length it does not divide has one scale."""


def packed(whole: Tensor) -> Tensor:
    """(out, in) int8 of -8 … 7 -> (out, ⌈in/2⌉) uint8."""
    low, high = pad(whole, (0, whole.shape[1] % 2)).view(torch.uint8).unflatten(1, (-1, 2)).unbind(2)
    both: Tensor = (low & 15) | (high << 4)
    return both


def quantised_matrices(config: ModelConfig) -> list[str]:
    """Names of the matrices that are quantised: the linear maps, the embedding and the output matrix."""
    with torch.device("meta"):
        model = Megalodon(config)
    blocks = [f"layers.{n}.weight" for n, m in model.layers.named_modules() if isinstance(m, nn.Linear)]
    tied = config.share_emb
    return [OUTER[0], *blocks] + ([] if tied else [OUTER[1]])


def kind_of(name: str, quantisation: Quantisation) -> Kind:
    """How one matrix is held."""
    return "int8" if name in OUTER else quantisation.kind


def assign_quantised(
    model: Megalodon, tensors: Mapping[str, Tensor], quantisation: Quantisation, source: str
) -> dict[str, Tensor]:
    """Put quantised linear maps in the place of those of `model`, and return what is left to be assigned.

    Args:
        model: on the meta device; its quantised maps are whole afterwards, apart from their biases.
        tensors: what a file holds, under the names above.
    Returns:
        name -> tensor for the rest of the state dict, embedding and output matrix in float32 among them.
    Raises:
        CheckpointError: integers or scales are missing or have another shape or dtype; the message names each.
    """
    rest = {name: t for name, t in tensors.items() if ".weight." not in name}
    problems, known = [], set[str]()
    for name in quantised_matrices(model.config):
        shape = model.get_parameter(name).shape
        wanted = stored_as(name, tuple(shape), quantisation)
        known |= wanted.keys()
        found = {part: (tuple(tensors[part].shape), tensors[part].dtype) for part in wanted if part in tensors}
        faults = [f"missing {part}" for part in wanted if part not in found]
        for part, held in found.items():
            if (held[0], str(held[1]).removeprefix("torch.")) != wanted[part]:
                faults.append(f"{part} is {held[1]} {held[0]}, expected {wanted[part][1]} {wanted[part][0]}")
        if faults:
            problems += faults
            continue
        integers, scale = (tensors[part] for part in wanted)
        if name in OUTER:
            rest[name] = dequantised(integers, scale, shape[1])
            continue
        module = name.removesuffix(".weight")
        bias = rest.pop(f"{module}.bias", None)
        if (bias is None) != (model.get_submodule(module).bias is None):
            problems.append(f"{'missing' if bias is None else 'unexpected'} {module}.bias")
        wide = None if bias is None else bias.float()
        model.set_submodule(module, QuantisedLinear(integers, scale, wide, shape[1]))
    problems += [f"unexpected {name}" for name in tensors if ".weight." in name and name not in known]
    if problems:
        raise CheckpointError(f"{source}: {len(problems)} tensors do not fit the model: {one_line(problems)}")
    if model.config.share_emb:
        rest["output.output.weight"] = rest["embed.weight"]
    return rest


def stored_as(name: str, shape: tuple[int, ...], quantisation: Quantisation) -> dict[str, tuple[tuple[int, ...], str]]:
    """Names, shapes and dtypes of what a matrix (out, in) is stored as: its integers, then its scales."""
    kind, (rows, columns) = kind_of(name, quantisation), shape
    width, dtype = (columns, "int8") if kind == "int8" else (-(-columns // 2), "uint8")
    groups = num_groups(columns, kind, quantisation)
    return {f"{name}.{kind}": ((rows, width), dtype), f"{name}.scale": ((rows, groups), "float32")}


def num_groups(columns: int, kind: Kind, quantisation: Quantisation) -> int:
    """Scales of a row."""
    size = quantisation.group_size
    return columns // size if kind == "int4" and columns % size == 0 else 1


def num_quantised(model: nn.Module) -> int:
    """Weights of a model that are held as small integers."""
    return sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantisedLinear))


def is_quantised(model: nn.Module) -> bool:
    """Whether a model holds quantised linear maps."""
    return num_quantised(model) > 0


def refuse_quantised(model: nn.Module, source: object, what: str) -> None:
    """Raises: InputError if the model is quantised: it cannot be trained, merged or exported again."""
    if is_quantised(model):
        raise InputError(f"{source} is quantised and cannot be {what}; expected the model it was made from")
