"""Queries and keys from one projection, in float64: the meaning of the op. Tests compare with it."""

import math

import torch
from torch import Tensor


def qk_rope_reference(
    z: Tensor, gamma: Tensor, beta: Tensor, turn: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `megalodon_kernels.qk_rope`. Computes in float64 and rounds once, at the end."""
    heads = (-1, 2 * turn.shape[2])
    z = z.double().unflatten(-1, heads)
    z = z / torch.sqrt(z.square().mean(-1, keepdim=True) + eps)
    scale = (1 + gamma.double()).unflatten(-1, heads) / math.sqrt(z.shape[-1])
    q, k = z * scale[:, None, None] + beta.double().unflatten(-1, heads)[:, None, None]
    return rotate(q, turn).to(dtype), rotate(k, turn).to(dtype)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn each adjacent pair of features: (B, L, H, 2P) by (B or 1, L, P, 2), in float64."""
    even, odd = x.double().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turn.double()[:, :, None].unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
