"""The step of decoding from the ops of any length, called with one token: its meaning. Slow; tests compare with it."""

from collections.abc import Callable

import torch
from torch import Tensor

from megalodon_kernels.cema import cema
from megalodon_kernels.chunk_attention import chunk_attention
from megalodon_kernels.timestep_norm import timestep_norm
from megalodon_kernels.timestep_norm.statistics import Statistics


def norm_step_reference(
    count: Tensor, mean: Tensor, var: Tensor, scale: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """See `megalodon_kernels.decode.norm_step`."""

    def run(x: Tensor) -> Tensor:
        before = Statistics(count, mean, var)
        y, after = timestep_norm(x[:, None], scale - 1, bias, mean.shape[1], before, eps=eps, backend="reference")
        for state, new in zip(before, after, strict=True):
            state.copy_(new)
        return y[:, 0].to(dtype)

    return run


def norm_cema_step_reference(
    count: Tensor,
    mean: Tensor,
    var: Tensor,
    h: Tensor,
    scale: Tensor,
    bias: Tensor,
    p: Tensor,
    q: Tensor,
    gamma: Tensor,
    omega: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """See `megalodon_kernels.decode.norm_cema_step`."""
    norm, log_q = norm_step_reference(count, mean, var, scale, bias, eps, dtype), torch.view_as_complex(q).log()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        u = norm(x)
        y, after = cema(u[:, None], p, log_q.real, log_q.imag, gamma, omega, h, backend="reference")
        h.copy_(after)
        return u, y[:, 0]

    return run


def attention_step_reference(
    k_cache: Tensor, v_cache: Tensor, slot: Tensor
) -> Callable[[Tensor, Tensor, Tensor, int | None], Tensor]:
    """See `megalodon_kernels.decode.attention_step`."""
    C = k_cache.shape[2]

    def run(q: Tensor, k: Tensor, v: Tensor, longest: int | None) -> Tensor:
        before = [cache[:, :, : C - 1].transpose(1, 2) for cache in (k_cache, v_cache)]
        y, _, _ = chunk_attention(q[:, None], k[:, None], v[:, None], C, slot, *before, backend="reference")
        row = torch.arange(len(slot), device=slot.device)
        k_cache[row, :, slot], v_cache[row, :, slot] = k.to(k_cache.dtype), v.to(v_cache.dtype)
        return y[:, 0]

    return run
