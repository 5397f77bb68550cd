"""Queries and keys from one projection, in few passes of PyTorch: the CPU path, and any device without Triton.

A pair of features is one complex number. Works in place where it can: on a CPU a fresh tensor costs more than what is
computed into it. Saved: z, and one number for each head of a token.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def qk_rope_portable(
    z: Tensor, gamma: Tensor, beta: Tensor, turn: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `megalodon_kernels.qk_rope`."""
    heads = (-1, 2 * turn.shape[2])
    z, gamma, beta = (x.unflatten(-1, heads) for x in (z, gamma, beta))
    q, k = _QkRope.apply(z, gamma, beta, turn, eps, dtype)  # type: ignore[no-untyped-call]
    return q, k


class _QkRope(torch.autograd.Function):
    """With e = R⁻¹ dq or R⁻¹ dk and r = 1 / sqrt(mean(z²) + eps), ẑ = z r, means over the features of a head:

    dẑ = Σ_qk e (1 + gamma) / sqrt(2P),   dz = r (dẑ - ẑ mean(ẑ dẑ));   dgamma = Σ e ẑ / sqrt(2P),   dbeta = Σ e
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, z: Tensor, gamma: Tensor, beta: Tensor, turn: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        size = wide.shape[-1]
        rate = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(size).add_(eps).rsqrt_()
        scale = (1 + gamma) / math.sqrt(size)
        normed, by = wide * rate, torch.view_as_complex(turn)[:, :, None]
        q, k = (torch.addcmul(b, normed, s) for b, s in zip(beta, scale, strict=True))
        for x in (q, k):
            _complex(x).mul_(by)
        ctx.save_for_backward(z, rate, scale, turn)
        return q.to(dtype), k.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *d_qk: Tensor) -> tuple[Tensor | None, ...]:
        z, rate, scale, turn = ctx.saved_tensors  # type: ignore[attr-defined]
        normed, back = z * rate, torch.view_as_complex(turn)[:, :, None].conj().resolve_conj()
        e, d_normed = torch.empty_like(normed), torch.zeros_like(normed)
        d_gamma, d_beta = torch.empty_like(scale), torch.empty_like(scale)
        for i, d in enumerate(d_qk):
            _complex(e.copy_(d)).mul_(back)
            d_beta[i] = e.sum((0, 1))
            d_normed.addcmul_(e, scale[i])
            d_gamma[i] = e.mul_(normed).sum((0, 1)) / math.sqrt(z.shape[-1])
        along = torch.mul(normed, d_normed, out=e).mean(-1, keepdim=True)
        d_z = d_normed.addcmul_(normed, along, value=-1).mul_(rate)
        return d_z.to(z.dtype), d_gamma, d_beta, None, None, None


def _complex(x: Tensor) -> Tensor:
    """(..., 2P) -> a view of it, (..., P) complex."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
