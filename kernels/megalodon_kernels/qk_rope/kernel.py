"""Queries and keys from one projection in Triton: one pass forward, one backward that normalises again.

With r = 1 / sqrt(mean(z²) + eps), ẑ = z r, s = (1 + gamma) / sqrt(2P), means over the features of a head, and R the
rotation of adjacent pairs:

    q = R (ẑ s_q + beta_q),   k = R (ẑ s_k + beta_k)
    e = R⁻¹ dq, f = R⁻¹ dk;   dẑ = e s_q + f s_k,   dz = r (dẑ - ẑ mean(ẑ dẑ))
    dgamma_q = Σ e ẑ / sqrt(2P),   dbeta_q = Σ e,   the same with f for k

A program stays with one head, whose parameters it loads once. One of the backward walks over many tokens and writes
one partial sum of each parameter's gradient; the sum over programs is the last step, so no atomics and the same bits
every time. Saved: z.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megalodon_kernels.dispatch import INTERPRETED
from megalodon_kernels.kernel_math import accumulator
from megalodon_kernels.registration import operator

PARTIALS = 4 if INTERPRETED else 264
"""Programs of the backward for each head at most: two for each of the 132 multiprocessors of an H100 or H200."""
FORWARD_ELEMENTS = 2048
"""Values of z that a program of the forward holds: 16 for each thread of four warps."""
BACKWARD_ELEMENTS = 1024
"""The same in the backward, where each needs four sums besides: 8 for each thread of four warps."""


def qk_rope_triton(
    z: Tensor, gamma: Tensor, beta: Tensor, turn: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `megalodon_kernels.qk_rope`."""
    q, k = _QkRope.apply(z, gamma, beta, turn, eps, dtype)  # type: ignore[no-untyped-call]
    return q, k


class _QkRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, z: Tensor, gamma: Tensor, beta: Tensor, turn: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        z, gamma, beta, turn = (x.contiguous() for x in (z, gamma, beta, turn))
        ctx.save_for_backward(z, gamma, turn)
        ctx.eps, ctx.beta = eps, beta.dtype  # type: ignore[attr-defined]
        return qk_rope_forward(z, gamma, beta, turn, eps, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        z, gamma, turn = ctx.saved_tensors  # type: ignore[attr-defined]
        dz, d_gamma, d_beta = qk_rope_backward(
            dq.contiguous(),
            dk.contiguous(),
            z,
            gamma,
            turn,
            ctx.eps,  # type: ignore[attr-defined]
        )
        return dz, d_gamma.to(gamma.dtype), d_beta.to(ctx.beta), None, None, None  # type: ignore[attr-defined]


@operator("qk_rope_forward")
def qk_rope_forward(
    z: Tensor, gamma: Tensor, beta: Tensor, turn: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """z (B, L, Z), turn (B or 1, L, P, 2), all contiguous -> q, k (B, L, H, 2P) in `dtype`."""
    (B, L, Z), size = z.shape, 2 * turn.shape[2]
    q, k = (z.new_empty(B, L, Z // size, size, dtype=dtype) for _ in range(2))
    if z.numel():
        block = max(2, triton.next_power_of_2(size))
        rows = max(1, min(FORWARD_ELEMENTS // block, triton.next_power_of_2(B * L)))
        _forward[(triton.cdiv(B * L, rows), Z // size)](  # only the first axis is long: others end at 65,535
            z, gamma, beta, turn, q, k, B * L, len(turn) * L, eps, 1 / math.sqrt(size),
            Z, size, block, rows, accumulator(z.dtype), num_warps=_warps(block * rows),
        )  # fmt: skip
    return q, k


@qk_rope_forward.register_fake
def _(z: Tensor, gamma: Tensor, beta: Tensor, turn: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    size = 2 * turn.shape[2]
    shape = (z.shape[0], z.shape[1], z.shape[2] // size, size)
    return z.new_empty(shape, dtype=dtype), z.new_empty(shape, dtype=dtype)


@operator("qk_rope_backward")
def qk_rope_backward(
    dq: Tensor, dk: Tensor, z: Tensor, gamma: Tensor, turn: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk (B, L, H, 2P), all contiguous -> dz like z, dgamma and dbeta (2, Z) float32 or float64."""
    (B, L, Z), size = z.shape, 2 * turn.shape[2]
    dz = torch.empty_like(z)
    block = max(2, triton.next_power_of_2(size))
    rows = max(1, min(BACKWARD_ELEMENTS // block, triton.next_power_of_2(B * L)))
    programs = min(PARTIALS, triton.cdiv(B * L, rows))
    partials = z.new_zeros(2, 2, programs, Z, dtype=_wide(z))
    if z.numel():
        _backward[(Z // size, programs)](
            dq, dk, z, gamma, turn, dz, partials[0], partials[1], B * L, len(turn) * L, eps, 1 / math.sqrt(size),
            Z, size, block, rows, accumulator(z.dtype), num_warps=_warps(block * rows),
        )  # fmt: skip
    return dz, partials[0].sum(1), partials[1].sum(1)


@qk_rope_backward.register_fake
def _(dq: Tensor, dk: Tensor, z: Tensor, gamma: Tensor, turn: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(z), *(z.new_empty(2, z.shape[2], dtype=_wide(z)) for _ in range(2))  # type: ignore[return-value]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _warps(elements: int) -> int:
    """One for 256 elements, at most 8."""
    return max(1, min(8, elements // 256))


@triton.jit
def _pairs(x):
    """(ROWS, BLOCK) -> even and odd features, (ROWS, BLOCK / 2) each."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def _unpaired(even, odd):
    """The inverse of `_pairs`."""
    return tl.reshape(tl.join(even, odd), (even.shape[0], even.shape[1] * 2))


@triton.jit
def _turned(x, cos, sin):
    even, odd = _pairs(x)
    return _unpaired(even * cos - odd * sin, even * sin + odd * cos)


@triton.jit
def _forward(
    z_ptr, gamma_ptr, beta_ptr, turn_ptr, q_ptr, k_ptr, num_tokens, num_turns, eps, shrink,
    Z: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1) * SIZE
    column = tl.arange(0, BLOCK)
    in_head = column < SIZE
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (token < num_tokens)[:, None] & in_head[None, :]
    at = token[:, None] * Z + head + column[None, :]
    z = tl.load(z_ptr + at, mask=inside, other=0).to(WIDE)
    at_turn = (token % num_turns)[:, None] * SIZE + column[None, :]
    cos, sin = _pairs(tl.load(turn_ptr + at_turn, mask=inside, other=0).to(WIDE))
    normed = z * (1 / tl.sqrt(tl.sum(z * z, axis=1) / SIZE + eps))[:, None]
    for which in tl.static_range(2):
        own = which * Z + head + column
        scale = (1 + tl.load(gamma_ptr + own, mask=in_head, other=0).to(WIDE)) * shrink
        shift = tl.load(beta_ptr + own, mask=in_head, other=0).to(WIDE)
        x = _turned(normed * scale[None, :] + shift[None, :], cos, sin)
        if which == 0:
            tl.store(q_ptr + at, x.to(q_ptr.dtype.element_ty), mask=inside)
        else:
            tl.store(k_ptr + at, x.to(k_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dq_ptr, dk_ptr, z_ptr, gamma_ptr, turn_ptr, dz_ptr, d_gamma_ptr, d_beta_ptr, num_tokens, num_turns, eps, shrink,
    Z: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) * SIZE
    program, programs = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    column = tl.arange(0, BLOCK)
    in_head = column < SIZE
    own = head + column
    scale_q = (1 + tl.load(gamma_ptr + own, mask=in_head, other=0).to(WIDE)) * shrink
    scale_k = (1 + tl.load(gamma_ptr + Z + own, mask=in_head, other=0).to(WIDE)) * shrink
    d_gamma_q = tl.zeros((ROWS, BLOCK), WIDE)
    d_gamma_k = tl.zeros((ROWS, BLOCK), WIDE)
    d_beta_q = tl.zeros((ROWS, BLOCK), WIDE)
    d_beta_k = tl.zeros((ROWS, BLOCK), WIDE)
    for begin in range(program * ROWS, num_tokens, programs * ROWS):
        token = begin + tl.arange(0, ROWS)
        inside = (token < num_tokens)[:, None] & in_head[None, :]
        at = token[:, None] * Z + own[None, :]
        z = tl.load(z_ptr + at, mask=inside, other=0).to(WIDE)
        rate = (1 / tl.sqrt(tl.sum(z * z, axis=1) / SIZE + eps))[:, None]
        normed = z * rate
        at_turn = (token % num_turns)[:, None] * SIZE + column[None, :]
        cos, sin = _pairs(tl.load(turn_ptr + at_turn, mask=inside, other=0).to(WIDE))
        e = _turned(tl.load(dq_ptr + at, mask=inside, other=0).to(WIDE), cos, -sin)
        f = _turned(tl.load(dk_ptr + at, mask=inside, other=0).to(WIDE), cos, -sin)
        d_normed = e * scale_q[None, :] + f * scale_k[None, :]
        along = tl.sum(normed * d_normed, axis=1) / SIZE
        dz = (d_normed - normed * along[:, None]) * rate
        tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=inside)
        d_gamma_q += e * normed
        d_gamma_k += f * normed
        d_beta_q += e
        d_beta_k += f
    at_q = program * Z + own
    at_k = programs * Z + at_q
    tl.store(d_gamma_ptr + at_q, tl.sum(d_gamma_q, axis=0) * shrink, mask=in_head)
    tl.store(d_gamma_ptr + at_k, tl.sum(d_gamma_k, axis=0) * shrink, mask=in_head)
    tl.store(d_beta_ptr + at_q, tl.sum(d_beta_q, axis=0), mask=in_head)
    tl.store(d_beta_ptr + at_k, tl.sum(d_beta_k, axis=0), mask=in_head)
