"""SwiGLU in Triton: one pass forward, one backward.

With s = σ(a):   da = dy b s (1 + a (1 - s)),   db = dy a s   (computed from a and b, nothing else is kept)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megalodon_kernels.kernel_math import accumulator, sigmoid
from megalodon_kernels.registration import operator

BLOCK = 1024
"""Elements of a program: eight for each thread of four warps, so that a bf16 load takes 16 bytes."""


def swiglu_triton(a: Tensor, b: Tensor | None) -> Tensor:
    """See `megalodon_kernels.swiglu`."""
    y: Tensor = _SwiGLU.apply(a, b)  # type: ignore[no-untyped-call]
    return y


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, a: Tensor, b: Tensor | None) -> Tensor:
        a, b = a.contiguous(), None if b is None else b.contiguous()
        ctx.save_for_backward(a, b)  # type: ignore[arg-type]
        return swiglu_forward(a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        a, b = ctx.saved_tensors  # type: ignore[attr-defined]
        da, db = swiglu_backward(dy.contiguous(), a, b)
        return da, None if b is None else db


@operator("swiglu_forward")
def swiglu_forward(a: Tensor, b: Tensor | None) -> Tensor:
    """a, b contiguous and alike -> y like a."""
    y = torch.empty_like(a)
    if size := a.numel():
        _forward[(triton.cdiv(size, BLOCK),)](a, b, y, size, BLOCK, accumulator(a.dtype), num_warps=4)
    return y


@swiglu_forward.register_fake
def _(a: Tensor, b: Tensor | None) -> Tensor:
    return torch.empty_like(a)


@operator("swiglu_backward")
def swiglu_backward(dy: Tensor, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """dy, a, b contiguous and alike -> da, db like a; db is empty without b."""
    da, db = torch.empty_like(a), a.new_empty(0) if b is None else torch.empty_like(a)
    if size := a.numel():
        _backward[(triton.cdiv(size, BLOCK),)](dy, a, b, da, db, size, BLOCK, accumulator(a.dtype), num_warps=4)
    return da, db


@swiglu_backward.register_fake
def _(dy: Tensor, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a), a.new_empty(0) if b is None else torch.empty_like(a)


@triton.jit
def _forward(a_ptr, b_ptr, y_ptr, size, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + at, mask=at < size, other=0).to(WIDE)
    y = a * sigmoid(a)
    if b_ptr is not None:
        y *= tl.load(b_ptr + at, mask=at < size, other=0).to(WIDE)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def _backward(dy_ptr, a_ptr, b_ptr, da_ptr, db_ptr, size, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(dy_ptr + at, mask=at < size, other=0).to(WIDE)
    a = tl.load(a_ptr + at, mask=at < size, other=0).to(WIDE)
    s = sigmoid(a)
    da = dy * (s * (1 + a * (1 - s)))
    if b_ptr is not None:
        da *= tl.load(b_ptr + at, mask=at < size, other=0).to(WIDE)
        tl.store(db_ptr + at, (dy * (a * s)).to(db_ptr.dtype.element_ty), mask=at < size)
    tl.store(da_ptr + at, da.to(da_ptr.dtype.element_ty), mask=at < size)
