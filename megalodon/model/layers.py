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
