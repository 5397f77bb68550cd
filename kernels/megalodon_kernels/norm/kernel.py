"""RMSNorm and LayerNorm in Triton: one pass forward, one backward that computes the normalised values again.

With x̂ = (x - mean) r (mean = 0 for RMSNorm), g = dy (1 + weight), means over the features of a row:

    dx = r (g - mean(g) - x̂ mean(g x̂))      (without mean(g) for RMSNorm)
    dweight = Σ_rows dy x̂,   dbias = Σ_rows dy

A program of the backward walks many rows and writes one partial sum of dweight and dbias; the sum over programs is the
last step, so no atomics and the same bits every time. Saved: x, and mean and r of each row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megalodon_kernels.kernel_math import accumulator
from megalodon_kernels.registration import operator

PARTIALS = 264
"""Programs of the backward at most: two for each of the 132 multiprocessors of an H100 or H200."""
ELEMENTS = 4096
"""Values of x that a program of the forward holds: 32 for each thread of four warps."""


def norm_triton(x: Tensor, weight: Tensor | None, bias: Tensor | None, centre: bool, eps: float) -> Tensor:
    """See `megalodon_kernels.norm`."""
    y: Tensor = _Norm.apply(x, weight, bias, centre, eps)  # type: ignore[no-untyped-call]
    return y


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor | None, bias: Tensor | None, centre: bool, eps: float
    ) -> Tensor:
        x = x.contiguous()
        weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
        y, mean, rstd = norm_forward(x, weight, bias, centre, eps)
        ctx.save_for_backward(x, weight, mean, rstd)  # type: ignore[arg-type]
        ctx.centre, ctx.bias = centre, None if bias is None else bias.dtype  # type: ignore[attr-defined]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors  # type: ignore[attr-defined]
        centre, bias = ctx.centre, ctx.bias  # type: ignore[attr-defined]
        dx, d_weight, d_bias = norm_backward(dy.contiguous(), x, weight, mean, rstd, centre)
        return (
            dx,
            None if weight is None else d_weight.to(weight.dtype),
            None if bias is None else d_bias.to(bias),
            None,
            None,
        )


@operator("norm_forward")
def norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, centre: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x (..., D) contiguous -> y like x, mean and 1/sqrt(var + eps) of each row: (rows,) float32 or float64."""
    D = x.shape[-1]
    num_rows = x.numel() // D
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty(num_rows, dtype=_wide(x)) for _ in range(2))
    if num_rows:
        block = triton.next_power_of_2(D)
        rows = max(1, min(ELEMENTS // block, triton.next_power_of_2(num_rows)))
        _forward[(triton.cdiv(num_rows, rows),)](
            x, weight, bias, y, mean, rstd, num_rows, eps, D, block, rows, centre, accumulator(x.dtype),
            num_warps=_warps(block * rows),
        )  # fmt: skip
    return y, mean, rstd


@norm_forward.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, centre: bool, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[:-1].numel()
    return torch.empty_like(x), x.new_empty(rows, dtype=_wide(x)), x.new_empty(rows, dtype=_wide(x))


@operator("norm_backward")
def norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, centre: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dy, x (..., D) contiguous -> dx like x, dweight and dbias (D,) in the dtype of `mean`."""
    D, num_rows = x.shape[-1], len(mean)
    dx = torch.empty_like(x)
    programs = max(1, min(PARTIALS, num_rows))
    partials = mean.new_zeros(2, programs, D)
    if num_rows:
        block = triton.next_power_of_2(D)
        _backward[(programs,)](
            dy, x, weight, mean, rstd, dx, partials[0], partials[1], num_rows, D, block, centre, accumulator(x.dtype),
            num_warps=_warps(block),
        )  # fmt: skip
    return dx, partials[0].sum(0), partials[1].sum(0)


@norm_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, centre: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), mean.new_empty(x.shape[-1]), mean.new_empty(x.shape[-1])


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _warps(elements: int) -> int:
    """One for 512 elements, at most 16: the backward keeps six values of each in registers."""
    return max(1, min(16, elements // 512))


@triton.jit
def _forward(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, num_rows, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, CENTRE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    in_rows, in_columns = row < num_rows, column < D
    inside = in_rows[:, None] & in_columns[None, :]
    at = row[:, None] * D + column[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0).to(WIDE)
    mean = tl.zeros((ROWS,), WIDE)
    if CENTRE:
        mean = tl.sum(x, axis=1) / D
        x = tl.where(inside, x - mean[:, None], 0)
    rstd = 1 / tl.sqrt(tl.sum(x * x, axis=1) / D + eps)
    y = x * rstd[:, None]
    if weight_ptr is not None:
        y *= (1 + tl.load(weight_ptr + column, mask=in_columns, other=0).to(WIDE))[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=in_columns, other=0).to(WIDE)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean, mask=in_rows)
    tl.store(rstd_ptr + row, rstd, mask=in_rows)


@triton.jit
def _backward(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr, num_rows,
    D: tl.constexpr, BLOCK: tl.constexpr, CENTRE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    scale = tl.full((BLOCK,), 1, WIDE)
    if weight_ptr is not None:
        scale += tl.load(weight_ptr + column, mask=inside, other=0).to(WIDE)
    d_weight = tl.zeros((BLOCK,), WIDE)
    d_bias = tl.zeros((BLOCK,), WIDE)
    # Neighbouring programs take neighbouring rows, so that they read neighbouring memory.
    for row in range(program, num_rows, tl.num_programs(0)):
        at = row * D + column
        dy = tl.load(dy_ptr + at, mask=inside, other=0).to(WIDE)
        x = tl.load(x_ptr + at, mask=inside, other=0).to(WIDE)
        rstd = tl.load(rstd_ptr + row)
        normed = tl.where(inside, (x - tl.load(mean_ptr + row)) * rstd, 0)
        g = dy * scale
        dx = g - normed * (tl.sum(g * normed, axis=0) / D)
        if CENTRE:
            dx -= tl.sum(g, axis=0) / D
        tl.store(dx_ptr + at, (dx * rstd).to(dx_ptr.dtype.element_ty), mask=inside)
        d_weight += dy * normed
        d_bias += dy
    tl.store(dweight_ptr + program * D + column, d_weight, mask=inside)
    tl.store(dbias_ptr + program * D + column, d_bias, mask=inside)
