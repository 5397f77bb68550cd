"""Named tensors -> the parameters of a model, strictly: every name and shape is accounted for. Not here: files."""

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megalodon.errors import CheckpointError, one_line
from megalodon.model.attention import rotary_frequencies
from megalodon.model.megalodon import Megalodon, ModelConfig

_PRIORS = ("prior_count", "prior_mean", "prior_logv")


def is_buffer(name: str) -> bool:
    """Whether a name of the state dict is one of the released buffers, which a file may lack."""
    return name == "rope.freqs" or name.endswith(_PRIORS)


class Misfits(NamedTuple):
    """What is wrong with a set of tensors for a model, one entry a tensor."""

    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]
    """`NAME is (24, 12), expected (12, 24)`."""

    def lines(self) -> list[str]:
        """All of it, for a message."""
        return [f"missing {n}" for n in self.missing] + [f"unexpected {n}" for n in self.unexpected] + self.mismatched


def misfits(expected: Mapping[str, Tensor], found: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> Misfits:
    """Compare names, shapes and dtypes with the state dict of a model; buffers may be absent.

    Args:
        expected: the state dict.
        found:    name -> shape and dtype.
    """
    missing = [name for name in expected if name not in found and not is_buffer(name)]
    unexpected = [name for name in found if name not in expected]
    mismatched = []
    for name in [name for name in expected if name in found]:
        shape, dtype = found[name]
        if tuple(shape) != tuple(expected[name].shape):
            mismatched.append(f"{name} is {tuple(shape)}, expected {tuple(expected[name].shape)}")
        elif expected[name].is_floating_point() and not dtype.is_floating_point:
            mismatched.append(f"{name} is {dtype}, expected a float type")
    return Misfits(missing, unexpected, mismatched)


@torch.no_grad()
def assign_weights(model: Megalodon, tensors: Mapping[str, Tensor], source: str) -> None:
    """Make `tensors` the weights of `model`, which may have been built on the meta device.

    Tensors are copied to one device, that of the embedding; half precision is widened to float32, one float64 tensor
    makes all of them float64. A stored float32 `rope.freqs` is used as it is; stored in half precision it is up to
    0.4 % off and is computed anew, with a warning.

    Args:
        model: its state dict says what is expected.
        tensors: name -> tensor, under the names of the released code; buffers may be absent.
        source: where the tensors come from, for messages.
    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape or not of a float type, a tied output matrix
            differs from the embedding, or a prior has a count other than 0. The message names each.
    """
    expected = model.state_dict()
    problems = misfits(expected, {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}).lines()
    for name in [name for name in tensors if name.endswith("prior_count") and name in expected]:
        if tensors[name].numel() == 1 and (count := tensors[name].item()) != 0:
            problems.append(f"{name} is {count}; a language model has no prior, expected 0")
    tied = model.config.share_emb
    if tied and not problems and not torch.equal(tensors["embed.weight"], tensors["output.output.weight"]):
        problems.append("output.output.weight differs from embed.weight, but share_emb ties them")
    if problems:
        raise CheckpointError(f"{source}: {len(problems)} tensors do not fit the model: {one_line(problems)}")

    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors.values()) else torch.float32
    device = tensors["embed.weight"].device
    values = {n: t.to(device, dtype if t.is_floating_point() else t.dtype, copy=True) for n, t in tensors.items()}
    for name, target in expected.items():
        half = name == "rope.freqs" and name in tensors and tensors[name].itemsize < 4
        if half:
            warnings.warn(f"{source}: rope.freqs was stored in half precision; computed anew", stacklevel=2)
        if half or name not in values:
            kind = dtype if target.is_floating_point() else target.dtype
            values[name] = _buffer(name, target.shape, model.config).to(device, kind)
    model.load_state_dict({name: t.contiguous() for name, t in values.items()}, assign=True)
    if tied:
        model.output.output.weight = model.embed.weight


def _buffer(name: str, shape: torch.Size, config: ModelConfig) -> Tensor:
    """What a released buffer holds in every model: a language model has no prior."""
    if name == "rope.freqs":
        return rotary_frequencies(2 * shape[0], config.rotary_base)
    return torch.zeros(shape)


@torch.no_grad()
def allocate(model: Megalodon, device: torch.device) -> None:
    """Give a model that was built on the meta device its memory: buffers have their values, parameters none yet.

    A model that was sharded there, or split, takes the memory of its parts.
    """
    model.to_empty(device=device)
    if model.config.share_emb:  # moving from meta made two of it
        model.output.output.weight = model.embed.weight
    for name, buffer in model.named_buffers():
        buffer.copy_(_buffer(name, buffer.shape, model.config))


@torch.no_grad()
def copy_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into the parameters of `model`, which stay the objects they are, on their device.

    Args:
        tensors: name -> tensor, exactly the parameters of the model; buffers are ignored, and so is a tied matrix.
        source: where the tensors come from, for messages.
    Raises:
        CheckpointError: the full list of missing, unexpected and different tensors; nothing was changed then.
    """
    parameters = dict(model.named_parameters())
    known = model.state_dict().keys()
    problems = [f"missing {name}" for name in parameters if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in known]
    for name in parameters.keys() & tensors.keys():
        if tensors[name].shape != parameters[name].shape:
            found, wanted = tuple(tensors[name].shape), tuple(parameters[name].shape)
            problems.append(f"{name} is {found}, expected {wanted}")
    if problems:
        raise CheckpointError(f"{source}: {len(problems)} tensors do not fit the model: " + "; ".join(sorted(problems)))
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


@torch.no_grad()
def with_rows(
    config: ModelConfig, tensors: Mapping[str, Tensor], known: int, wanted: int, pad_to: int = 64
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return a model's sizes and weights with rows of embedding and output for ids it has not met.

    The new rows start as the mean of the known ones: the model is as uncertain of them as it can be.

    Args:
        tensors: name -> tensor, the parameters of the model; those that change are copies.
        known:   ids that have a meaning, from 0 on; rows above pad the vocabulary.
        wanted:  ids that are to have one. If the model has fewer rows it gets more, a multiple of `pad_to`.
    """
    size = max(config.vocab_size, -(-wanted // pad_to) * pad_to if wanted > config.vocab_size else 0)
    found = dict(tensors)
    for name in ("embed.weight", "output.output.weight"):
        if name not in tensors:  # a tied matrix may stand in a checkpoint once
            continue
        old = tensors[name]
        rows = old.new_empty(size, old.shape[1])
        rows[: len(old)] = old
        mean = old[:known].mean(0)
        rows[known:wanted] = mean
        rows[len(old) :] = mean
        found[name] = rows
    outputs = config.output_size if config.output_size == -1 else size
    return ModelConfig(**{**config.model_dump(), "vocab_size": size, "output_size": outputs}), found
