"""The cross-entropy behind an output matrix: the products by PyTorch, what lies between them by one Triton kernel.

A block of logits lies in one buffer, reused for every block. A program of the kernel owns a token and reads its logits
twice: first for the largest and Σ exp(logit - largest), kept up to date together; then to put

    dlogits = softmax (1 + 2 z_loss logsumexp) - onehot,   0 where ignored and beyond num_classes

in their place. The second reading comes from the cache (64 KB at a vocabulary of 32,000 in bfloat16), so that memory
sees the buffer once in each direction. dhidden = dlogits W, dW = dlogitsᵀ hidden, summed in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalodon_kernels.kernel_math import accumulator, exp
from megalodon_kernels.linear_cross_entropy.gradients import IGNORE, Call, add_product, sums
from megalodon_kernels.registration import operator

BLOCK = 4096
"""Logits a program holds at a time: 16 for each thread of eight warps."""


def linear_cross_entropy_triton(
    hidden: Tensor, weight: Tensor, targets: Tensor, block: int, num_classes: int, z_loss: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """See `megalodon_kernels.linear_cross_entropy`."""
    return sums(hidden, weight, targets, Call(block, num_classes, z_loss, dtype), linear_cross_entropy_blocks)


@operator("linear_cross_entropy_blocks")
def linear_cross_entropy_blocks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    block: int,
    num_classes: int,
    z_loss: float,
    dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and squares () float32 or float64, the gradient of hidden in its dtype, that of weight in float32 or better.

    A gradient that is not needed has no rows.
    """
    wide, with_gradient = torch.promote_types(hidden.dtype, torch.float32), need_hidden or need_weight
    losses, log_z = hidden.new_empty(2, len(hidden), dtype=wide)
    d_hidden = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)
    d_weight = torch.zeros_like(weight, dtype=wide) if need_weight else hidden.new_empty(0, dtype=wide)
    classes = weight[:num_classes].to(dtype)
    tile = min(BLOCK, triton.next_power_of_2(num_classes))
    buffer = classes.new_empty(min(block, len(hidden)), num_classes)
    targets = targets.contiguous()
    for begin in range(0, len(hidden), block):
        here = slice(begin, begin + block)
        # An ignored token counts as 0 in every sum: there it has no hidden value, whatever it is.
        h = hidden[here].masked_fill((targets[here] == IGNORE)[:, None], 0).to(dtype)
        logits = torch.mm(h, classes.mT, out=buffer[: len(h)])
        _softmax[(len(h),)](
            logits, targets[here], losses[here], log_z[here], z_loss,
            num_classes, tile, with_gradient, IGNORE, accumulator(wide), num_warps=max(1, min(8, tile // 512)),
        )  # fmt: skip
        if need_hidden:
            d_hidden[here] = logits @ classes
        if need_weight:
            add_product(d_weight[:num_classes], logits, h)
    return losses.sum(), log_z.square().sum(), d_hidden, d_weight


@linear_cross_entropy_blocks.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    block: int,
    num_classes: int,
    z_loss: float,
    dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty((), dtype=wide),
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        torch.empty_like(weight, dtype=wide) if need_weight else hidden.new_empty(0, dtype=wide),
    )


@triton.jit
def _softmax(
    logits_ptr, targets_ptr, losses_ptr, log_z_ptr, z_loss,
    V: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr, IGNORED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + token)
    ignored = target == IGNORED
    row = logits_ptr + token * V
    # What is no class has no loss that could pass for one: NaN.
    is_class = (target >= 0) & (target < V)
    chosen = tl.load(row + target, mask=is_class, other=float("nan")).to(WIDE)
    # Finite, or a block of logits that are all -inf would make it a NaN.
    largest = tl.full((), -1e38, WIDE)
    total = tl.full((), 0, WIDE)
    for begin in range(0, V, BLOCK):
        x = tl.load(row + begin + column, mask=begin + column < V, other=float("-inf")).to(WIDE)
        before = largest
        largest = tl.maximum(before, tl.max(x, axis=0))
        total = total * exp(before - largest) + tl.sum(exp(x - largest), axis=0)
    log_z = largest + tl.log(total)
    tl.store(losses_ptr + token, tl.where(ignored, 0, log_z - chosen))
    tl.store(log_z_ptr + token, tl.where(ignored, 0, log_z))
    if GRADIENT:
        scale = (1 + 2 * z_loss * log_z) / total
        for begin in range(0, V, BLOCK):
            inside = begin + column < V
            x = tl.load(row + begin + column, mask=inside, other=float("-inf")).to(WIDE)
            d = exp(x - largest) * scale - tl.where(begin + column == target, 1, 0)
            d = tl.where(ignored, 0, d)
            tl.store(row + begin + column, d.to(logits_ptr.dtype.element_ty), mask=inside)
