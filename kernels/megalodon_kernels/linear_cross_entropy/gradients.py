"""The part of the op that its fast implementations share: gradients formed with the sums, and scaled in the backward.

Not here: how the sums and gradients come about (portable.py, kernel.py).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

IGNORE = -100
"""A target that does not count."""


class Call(NamedTuple):
    """What a call asks for besides its tensors."""

    block: int
    num_classes: int
    z_loss: float
    dtype: torch.dtype
    """Of the products."""


Blocks = Callable[
    [Tensor, Tensor, Tensor, int, int, float, torch.dtype, bool, bool], tuple[Tensor, Tensor, Tensor, Tensor]
]
"""(hidden, weight, targets, *call, which gradients are wanted) -> loss and squares, the gradient of hidden in its dtype
and that of weight in float32 or better; one that is not wanted has no rows."""


def sums(hidden: Tensor, weight: Tensor, targets: Tensor, call: Call, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Objective, loss and squares; the objective is differentiable in hidden and weight."""
    objective, loss, squares = _Sums.apply(hidden, weight, targets, call, blocks)  # type: ignore[no-untyped-call]
    return objective, loss, squares


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += aᵀ b, where total has float32 or better; on a CPU, a product of two bfloat16 is rounded before."""
    if total.dtype == a.dtype:
        total.addmm_(a.mT, b)
    elif total.device.type == "cuda":
        torch.addmm(total, a.mT, b, out_dtype=total.dtype, out=total)
    else:
        total += a.mT @ b


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, weight: Tensor, targets: Tensor, call: Call, blocks: Blocks
    ) -> tuple[Tensor, Tensor, Tensor]:
        need_hidden, need_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        loss, squares, d_hidden, d_weight = blocks(hidden, weight, targets, *call, need_hidden, need_weight)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = weight.dtype  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(loss, squares)
        return loss + call.z_loss * squares, loss, squares

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors  # type: ignore[attr-defined]
        need_hidden, need_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        return (
            d_hidden * grad if need_hidden else None,
            (d_weight * grad).to(ctx.dtype) if need_weight else None,  # type: ignore[attr-defined]
            None,
            None,
            None,
        )
