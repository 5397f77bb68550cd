"""Token losses in blocks: the logits of a whole sequence never exist. Not here: what a step averages over."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

IGNORE = -100
"""A target that does not count."""


class LossSums(NamedTuple):
    """Sums over the targets that count, each () float32 (float64 in a float64 model)."""

    objective: Tensor
    """What is minimised: loss + z_loss x squares; differentiable in hidden and weight."""
    loss: Tensor
    """Of -log softmax(hidden weightᵀ)[target]; outside the graph."""
    squares: Tensor
    """Of logsumexp(hidden weightᵀ)²; outside the graph."""


def loss_sums(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    block: int = 2048,
    *,
    num_classes: int | None = None,
    z_loss: float = 0.0,
) -> LossSums:
    """Sum what a step of training minimises, and the parts it is made of.

    Gradients are formed block by block in the forward pass, where the logits are; the backward pass scales them.

    Args:
        hidden:  (B, L, D), in any float dtype; under autocast the products run in its dtype.
        weight:  (V, D): the output matrix.
        targets: (B, L) int64 below V; -100 is ignored.
        block:   tokens whose logits exist at a time.
        num_classes: rows of `weight` that can be predicted; the rest, padding, gets no probability. None means all.
        z_loss: weight of logsumexp², which holds the normaliser of the softmax near 1.
    """
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()  # or the gradients would be formed all the same
    sums = _LossSums.apply(  # type: ignore[no-untyped-call]
        hidden.flatten(0, -2), weight, targets.flatten(), block, num_classes or len(weight), z_loss
    )
    return LossSums(*sums)


def cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, block: int = 2048, *, num_classes: int | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of the losses, differentiable, and how many targets count, () int64; arguments as in `loss_sums`."""
    return loss_sums(hidden, weight, targets, block, num_classes=num_classes).objective, (targets != IGNORE).sum()


@torch.no_grad()
def token_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, block: int = 2048, *, num_classes: int | None = None
) -> Tensor:
    """The loss of every token, 0 where ignored: (B, L) float32 (float64 in a float64 model). No gradient; see above."""
    pieces = zip(hidden.flatten(0, -2).split(block), targets.flatten().split(block), strict=True)
    losses = [_block_loss(h, weight, t, num_classes or len(weight))[0] for h, t in pieces]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return torch.cat(losses).view(targets.shape) if losses else hidden.new_zeros(targets.shape, dtype=wide)


def _block_loss(h: Tensor, weight: Tensor, targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (T,), logsumexp (T,), both 0 where ignored, and log-probabilities (T, V); all at least float32."""
    logits = torch.nn.functional.linear(h, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits[:, num_classes:] = float("-inf")
    log_probs = logits.log_softmax(-1)
    ignored = targets == IGNORE
    index = targets.masked_fill(ignored, 0)[:, None]
    chosen = log_probs.gather(-1, index)[:, 0]
    log_z = logits.gather(-1, index)[:, 0] - chosen  # what log_softmax subtracted; no second pass over the logits
    return (-chosen).masked_fill(ignored, 0), log_z.masked_fill(ignored, 0), log_probs


class _LossSums(torch.autograd.Function):
    """dlogits = softmax (1 + 2 z_loss logsumexp) - onehot, 0 where ignored; dhidden = dlogits W, dW = dlogitsᵀ hidden.

    Both are summed in float32.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        block: int,
        num_classes: int,
        z_loss: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss, squares = hidden.new_zeros((), dtype=wide), hidden.new_zeros((), dtype=wide)
        need_hidden, need_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        for begin in range(0, len(hidden), block):
            h, t = hidden[begin : begin + block], targets[begin : begin + block]
            losses, log_z, log_probs = _block_loss(h, weight, t, num_classes)
            loss += losses.sum()
            squares += log_z.square().sum()
            if not (need_hidden or need_weight):
                continue
            ignored = t == IGNORE
            d_logits = log_probs.exp_()
            if z_loss:
                d_logits *= (1 + 2 * z_loss * log_z)[:, None]
            d_logits.scatter_add_(-1, t.masked_fill(ignored, 0)[:, None], -torch.ones_like(d_logits[:, :1]))
            d_logits = d_logits.masked_fill_(ignored[:, None], 0).to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[begin : begin + block] = d_logits @ weight
            if d_weight is not None:
                d_weight += d_logits.mT @ h
        ctx.gradients = d_hidden, d_weight  # type: ignore[attr-defined]
        ctx.dtype = weight.dtype  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(loss, squares)
        return loss + z_loss * squares, loss, squares

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        d_hidden, d_weight = ctx.gradients  # type: ignore[attr-defined]
        return (
            None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype),
            None if d_weight is None else (d_weight * grad).to(ctx.dtype),  # type: ignore[attr-defined]
            None,
            None,
            None,
            None,
        )
