"""The small parts every block is made of: linear maps, norms, and which parameters never leave float32.

Not here: TimestepNorm (timestep_norm.py), the values parameters start from (megalodon.initialise).
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from megalodon_kernels import Backend, layer_norm, rms_norm


class Float32Module(nn.Module):
    """A module whose own parameters and buffers ignore casts to half precision.

    Statistics, decays and rotations lose their meaning there: bf16 frequencies are off by up to 0.4 %. So
    `model.bfloat16()` rounds the large matrices only; float64 is taken as asked.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_wide(x: Tensor) -> Tensor:
            moved = fn(x)
            return x.to(moved.device) if moved.dtype in (torch.bfloat16, torch.float16) else moved

        for child in self.children() if recurse else ():
            child._apply(fn)
        super()._apply(keep_wide, recurse=False)  # type: ignore[no-untyped-call]
        return self


class Embedding(nn.Module):
    """One vector for each token id; the weight (vocab, dim) is left uninitialised like that of `Linear`."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, L, dim)."""
        return embedding(tokens, self.weight)


class RMSNorm(Float32Module):
    """x / sqrt(mean(x²) + eps) · (1 + weight), over the last axis; see `megalodon_kernels.rms_norm`."""

    def __init__(self, dim: int, eps: float, affine: bool, backend: Backend = "auto") -> None:
        super().__init__()
        self.eps, self.backend = eps, backend
        self.weight = nn.Parameter(torch.empty(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return rms_norm(x, self.weight, eps=self.eps, backend=self.backend)


class LayerNorm(Float32Module):
    """(x - mean) / sqrt(var + eps) · (1 + weight) + bias, over the last axis; see `megalodon_kernels.layer_norm`."""

    def __init__(self, dim: int, eps: float, affine: bool, backend: Backend = "auto") -> None:
        super().__init__()
        self.eps, self.backend = eps, backend
        self.weight = nn.Parameter(torch.empty(dim)) if affine else None
        self.bias = nn.Parameter(torch.empty(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return layer_norm(x, self.weight, self.bias, eps=self.eps, backend=self.backend)


class Linear(nn.Linear):
    """x Wᵀ + b with weight (out, in), left uninitialised: megalodon.initialise fills every parameter.

    It is one of torch's so that adapters (adapters.py) know it.
    """

    weight: nn.Parameter

    def __init__(self, in_dim: int, out_dim: int, bias: bool) -> None:
        super().__init__(in_dim, out_dim, bias)

    def reset_parameters(self) -> None:
        """Draw nothing: the global generator is left alone."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        # As a matrix, whatever the order in memory: the product takes x with features first as it lies.
        y: Tensor = linear(x.reshape(-1, x.shape[-1]), self.weight, self.bias).view(*x.shape[:-1], -1)
        return y


class QuantisedLinear(Float32Module):
    """x Wᵀ + b, W = integers · scales (out, in); the integers never change.

    Args:
        integers: (out, in) int8, or (out, ⌈in/2⌉) uint8 that hold two int4 each.
        scale:    (out, groups) float32; 1 group a row in int8.
        bias:     (out,) or None.
        in_features: in.
    """

    integers: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, integers: Tensor, scale: Tensor, bias: Tensor | None, in_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, len(integers)
        for name, value in (("integers", integers), ("scale", scale), ("bias", bias)):
            self.register_buffer(name, value, persistent=False)  # a state dict holds what can be trained

    @property
    def num_parameters(self) -> int:
        """Values it stands for, the bias among them."""
        return self.in_features * self.out_features + (0 if self.bias is None else self.out_features)

    @property
    def weight(self) -> Tensor:
        """The matrix as it acts, (out, in) float32; formed at each use."""
        return dequantised(self.integers, self.scale, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y: Tensor = linear(x.reshape(-1, x.shape[-1]), self.weight.to(x.dtype))
        y = y if self.bias is None else y + self.bias.to(x.dtype)
        return y.view(*x.shape[:-1], -1)


def dequantised(integers: Tensor, scale: Tensor, in_features: int) -> Tensor:
    """Integers and scales -> the matrix they stand for, (out, in_features) float32."""
    whole = integers if integers.dtype == torch.int8 else unpacked(integers)[:, :in_features]
    groups = scale.shape[1]
    if groups == 1:
        return whole * scale
    matrix: Tensor = (whole.unflatten(1, (groups, -1)) * scale[..., None]).flatten(1)
    return matrix


def unpacked(halves: Tensor) -> Tensor:
    """(out, bytes) uint8 -> (out, 2 · bytes) int8 of -8 … 7."""
    both = torch.stack([halves << 4, halves], dim=2).flatten(1)
    signed: Tensor = both.view(torch.int8) >> 4  # the sign comes along
    return signed
