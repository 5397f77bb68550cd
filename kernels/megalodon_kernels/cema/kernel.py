"""CEMA in Triton: one pass over x forward, one over dy for dx, one over both for the gradients of the parameters.

A document is cut into rows of T tokens (see portable.py); a *boundary* stands before every row and behind the last.
A program owns a few channels of one batch row and walks the boundaries, M at a time, on tensor cores:

    E = V x'                x' the row before the boundary            V[t, n] = w q^(T-1-t),  w = p
    h = scan of h ← q^T h + E over boundaries                         h the state at each boundary
    y = K x + Re(C h)       x the row behind the boundary             C[n, t] = r q^(t+1),    r = gamma

The adjoint is the same recurrence backwards in time with w and r exchanged. With g = conj(dL/dh), t counted from the
end of a row, and its exponents moved by one (the gradient of a state does not pass through that state's own step):

    E = V dy',  V[t, n] = gamma q^(T-t);      g ← q^T g + E;      dx = K dy + Re(C g),  C[n, t] = p q^t

so that one kernel serves both. Gradients of the parameters need four sums over rows, all products of matrices,

    S = Σ dyᵀ h,   Z = Σ xᵀ g,   P = Σ dyᵀ x,   A = Σ g ⊙ h       h before, g behind each row;  k[τ] = Σ_{i-j=τ} P[i, j]

and then, with c = conj(dL/d log q),

    conj(dgamma) = Σ_t q^(t+1) S[t] + Σ_τ k[τ] p q^τ,      dp = Re(Σ_t q^(T-1-t) Z[t] + Σ_τ k[τ] gamma q^τ),
    c = Σ_t (t+1) gamma q^(t+1) S[t] + p Σ_t (T-1-t) q^(T-1-t) Z[t] + T q^T A + Σ_τ τ k[τ] p gamma q^τ,   domega = k[0]

without a negative power of q or a difference of large terms. Only a document's last row is shorter than T, and nothing
flows out of it but the final state. Powers of q are formed in float64 and rounded once; states, sums and scans are
float32. A product with bfloat16 x takes its table as two bfloat16 (SPLIT), one of float32 as three products of tf32.
Saved for the backward: the arguments and the row table. Not here: the kernels (kernel_walk.py, kernel_parameters.py); a
variant for so few channels that one pass leaves the GPU idle.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megalodon_kernels.cema.kernel_parameters import NUM_SUMS, parameter_gradients, parameter_sums
from megalodon_kernels.cema.kernel_walk import tables, walk
from megalodon_kernels.dispatch import INTERPRETED
from megalodon_kernels.kernel_math import accumulator
from megalodon_kernels.registration import operator

ROW = 8 if INTERPRETED else 32
"""T. Twice as long a row halves the scans and the bytes of g, but its tables no longer fit: compiled for an H100, a
program of eight channels takes 112 KiB of shared memory with 32."""


class Tile(NamedTuple):
    """What a program of a kernel holds: channels, boundaries, and its warps."""

    channels: int
    boundaries: int
    warps: int


WALK = {16: Tile(8, 16, 4), 32: Tile(4, 16, 4)}
"""By the padded N. Two programs fit on a multiprocessor of an H100: registers (at most 255) and shared memory allow no
more. A tensor core takes 16 boundaries at once."""
SUMS = {16: Tile(8, 16, 8), 32: Tile(4, 16, 8)}
"""The sums alone take 112 registers of every thread; for N above 16 some still spill, on every tile that was tried."""
SMALL = Tile(8, 8, 4)
"""For the interpreter: several tiles even in small tests."""
BLOCK = 128
"""Averages a program of `parameter_gradients` works on; there is too little work for it to matter."""

Parameters = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def cema_triton(
    x: Tensor,
    p: Tensor,
    log_decay: Tensor,
    angle: Tensor,
    gamma: Tensor,
    omega: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `megalodon_kernels.cema`."""
    table, num_rows = (None, None) if starts is None else row_table(starts, ROW)
    y, last = _Cema.apply(x, p, log_decay, angle, gamma, omega, h0, table, num_rows)  # type: ignore[no-untyped-call]
    return y, last


def row_table(starts: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cut documents into rows of at most `size` tokens, on the device of `starts`, which nobody has to wait for.

    Args:
        starts: (B, L) bool: True at the first token of a document.
    Returns:
        table:    (B, L + 1) int32: twice the first token of each row, plus 1 if a document begins there; 2 L behind the
                  last row. There may be as many rows as tokens.
        num_rows: (B,) int32.
    """
    B, L = starts.shape
    t = torch.arange(L, device=starts.device)
    since = t - torch.where(starts, t, 0).cummax(dim=1).values
    first = starts | (since % size == 0)
    row = first.cumsum(1)
    table = torch.full((B, L + 1), 2 * L, device=starts.device)
    # All that is no first token meets in the last place, where 2 L stands anyway.
    table.scatter_(1, torch.where(first, row - 1, L), torch.where(first, 2 * t + starts, 2 * L))
    return table.int(), row[:, -1].int()


class _Cema(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        p: Tensor,
        log_decay: Tensor,
        angle: Tensor,
        gamma: Tensor,
        omega: Tensor,
        h0: Tensor | None,
        table: Tensor | None,
        num_rows: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        x, p, log_decay, angle, gamma, omega = (v.contiguous() for v in (x, p, log_decay, angle, gamma, omega))
        h0 = None if h0 is None else h0.contiguous()
        ctx.save_for_backward(x, p, log_decay, angle, gamma, omega, h0, table, num_rows)  # type: ignore[arg-type]
        ctx.set_materialize_grads(False)
        return cema_forward(x, p, log_decay, angle, gamma, omega, h0, table, num_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor | None, d_last: Tensor | None) -> tuple[Tensor | None, ...]:
        x, p, log_decay, angle, gamma, omega, h0, table, num_rows = ctx.saved_tensors  # type: ignore[attr-defined]
        needed: tuple[bool, ...] = ctx.needs_input_grad  # type: ignore[attr-defined]
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        d_last = None if d_last is None else d_last.contiguous()
        parameters = (p, log_decay, angle, gamma, omega)
        dx, d_h0, g = cema_backward(dy, d_last, *parameters, table, num_rows, any(needed[1:6]))
        found: tuple[Tensor | None, ...] = (None,) * 5
        if any(needed[1:6]):
            found = cema_backward_parameters(x, dy, g, *parameters, h0, d_last, table, num_rows)
        return dx, *found, None if h0 is None else d_h0.to(h0.dtype), None, None


@operator("cema_forward")
def cema_forward(
    x: Tensor,
    p: Tensor,
    log_decay: Tensor,
    angle: Tensor,
    gamma: Tensor,
    omega: Tensor,
    h0: Tensor | None,
    table: Tensor | None,
    num_rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `cema`; all contiguous. -> y, the last state."""
    y, last, _ = _walk(x, h0, (p, log_decay, angle, gamma, omega), table, num_rows, False, False)
    return y, last


@cema_forward.register_fake
def _(
    x: Tensor,
    p: Tensor,
    log_decay: Tensor,
    angle: Tensor,
    gamma: Tensor,
    omega: Tensor,
    h0: Tensor | None,
    table: Tensor | None,
    num_rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    last = x.new_empty(len(x), *gamma.shape, dtype=_wide(x) if h0 is None else h0.dtype)
    return torch.empty_like(x), last


@operator("cema_backward")
def cema_backward(
    dy: Tensor,
    d_last: Tensor | None,
    p: Tensor,
    log_decay: Tensor,
    angle: Tensor,
    gamma: Tensor,
    omega: Tensor,
    table: Tensor | None,
    num_rows: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y and the last state -> those of x and h0, and, if `keep`, g behind every full row.

    Returns:
        dx:   (B, L, D) in the dtype of dy.
        d_h0: (B, D, N, 2) in float32 or the dtype of d_last.
        g:    (B, rows, 2, D, padded N) in the dtype of dy, undefined where no row needs it; of no rows without `keep`.
    """
    return _walk(dy, d_last, (p, log_decay, angle, gamma, omega), table, num_rows, True, keep)


@cema_backward.register_fake
def _(
    dy: Tensor,
    d_last: Tensor | None,
    p: Tensor,
    log_decay: Tensor,
    angle: Tensor,
    gamma: Tensor,
    omega: Tensor,
    table: Tensor | None,
    num_rows: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    d_h0 = dy.new_empty(len(dy), *gamma.shape, dtype=_wide(dy) if d_last is None else d_last.dtype)
    return torch.empty_like(dy), d_h0, _room_for_g(dy, p, keep)


@operator("cema_backward_parameters")
def cema_backward_parameters(
    x: Tensor,
    dy: Tensor,
    g: Tensor,
    p: Tensor,
    log_decay: Tensor,
    angle: Tensor,
    gamma: Tensor,
    omega: Tensor,
    h0: Tensor | None,
    d_last: Tensor | None,
    table: Tensor | None,
    num_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What came in, what came back, and g of `cema_backward` -> dp, dlog_decay, dangle, dgamma, domega like each."""
    (B, L, D), N = x.shape, p.shape[1]
    BN, wide = _padded(N), accumulator(x.dtype)
    powers, _ = _tables(x, (p, log_decay, angle, gamma, omega))
    sums = x.new_empty(B, NUM_SUMS.value, D, N, dtype=_wide(x))
    d_omega = x.new_empty(B, D, dtype=_wide(x))
    tile = SMALL if INTERPRETED else SUMS[BN]
    parameter_sums[(triton.cdiv(D, tile.channels), B)](
        x, dy, h0, d_last, g, p, powers, table, num_rows, sums, d_omega, L, g.shape[1],
        D, N, tile.channels, BN, tile.boundaries, ROW, x.dtype == torch.bfloat16, wide,
        num_warps=tile.warps, num_stages=1,
    )  # fmt: skip
    d_p, d_log_decay, d_angle, d_gamma = (torch.empty_like(v) for v in (p, log_decay, angle, gamma))
    parameter_gradients[(triton.cdiv(D * N, BLOCK),)](
        sums, d_last, p, gamma, powers, d_p, d_log_decay, d_angle, d_gamma, B, D, N, BN, ROW, BLOCK, wide,
    )  # fmt: skip
    return d_p, d_log_decay, d_angle, d_gamma, d_omega.sum(0).to(omega.dtype)


@cema_backward_parameters.register_fake
def _(
    x: Tensor,
    dy: Tensor,
    g: Tensor,
    p: Tensor,
    log_decay: Tensor,
    angle: Tensor,
    gamma: Tensor,
    omega: Tensor,
    h0: Tensor | None,
    d_last: Tensor | None,
    table: Tensor | None,
    num_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(v) for v in (p, log_decay, angle, gamma, omega))  # type: ignore[return-value]


def _walk(
    x: Tensor,
    h0: Tensor | None,
    parameters: Parameters,
    table: Tensor | None,
    num_rows: Tensor | None,
    backward: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence over x from h0, forward or backward in time -> y, the last state, the states if `keep`."""
    p, gamma = parameters[0], parameters[3]
    (B, L, D), N = x.shape, p.shape[1]
    BN = _padded(N)
    powers, k = _tables(x, parameters)
    y = torch.empty_like(x)
    last = x.new_empty(B, D, N, 2, dtype=_wide(x) if h0 is None else h0.dtype)
    g = _room_for_g(x, p, keep)
    tile = SMALL if INTERPRETED else WALK[BN]
    walk[(triton.cdiv(D, tile.channels), B)](
        x, y, h0, last, g if keep else None, p, gamma, powers, k, table, num_rows, L, g.shape[1],
        D, N, tile.channels, BN, tile.boundaries, ROW, backward, x.dtype == torch.bfloat16, accumulator(x.dtype),
        num_warps=tile.warps, num_stages=1,
    )  # fmt: skip
    return y, last, g


def _tables(x: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor]:
    """q^0 … q^T of every average, (D, 2, T + 1, padded N), and k of every channel, (D, T), in float32 or float64."""
    p, log_decay, angle, gamma, omega = parameters
    D, N = p.shape
    BN = _padded(N)
    powers = x.new_empty(D, 2, ROW + 1, BN, dtype=_wide(x))
    k = x.new_empty(D, ROW, dtype=_wide(x))
    log2_decay, turns = log_decay.double() / math.log(2), angle.double() / (2 * math.pi)
    tables[(D,)](p, gamma, omega, log2_decay, turns, powers, k, N, BN, ROW, accumulator(x.dtype), num_warps=4)
    return powers, k


def _room_for_g(x: Tensor, p: Tensor, keep: bool) -> Tensor:
    B, L, D = x.shape
    return x.new_empty(B, -(-L // ROW) if keep else 0, 2, D, _padded(p.shape[1]))


def _padded(N: int) -> int:
    """N as a power of two; for a tensor core at least 16."""
    power: int = triton.next_power_of_2(N)
    return power if INTERPRETED else max(16, power)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
