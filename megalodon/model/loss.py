"""Token losses in blocks: the logits of a whole sequence never exist. Not here: what a step averages over."""

import torch
from torch import Tensor

from megalodon_kernels import Backend, LossSums, linear_cross_entropy
from megalodon_kernels.linear_cross_entropy.gradients import IGNORE


def loss_sums(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    block: int = 2048,
    *,
    num_classes: int | None = None,
    z_loss: float = 0.0,
    backend: Backend = "auto",
) -> LossSums:
    """Sum what a step of training minimises, and the parts it is made of.

    See `megalodon_kernels.linear_cross_entropy`.

    Args:
        hidden:  (B, L, D), in any float dtype; under autocast the products run in its dtype.
        weight:  (V, D): the output matrix.
        targets: (B, L) int64 below V; -100 is ignored.
        block:   tokens whose logits exist at a time.
        num_classes: rows of `weight` that can be predicted; the rest, padding, gets no probability. None means all.
        z_loss: weight of logsumexp², which holds the normaliser of the softmax near 1.
    """
    return linear_cross_entropy(
        hidden.flatten(0, -2),
        weight,
        targets.flatten(),
        block,
        num_classes=num_classes,
        z_loss=z_loss,
        backend=backend,
    )


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
    losses = [_block_losses(h, weight, t, num_classes or len(weight)) for h, t in pieces]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return torch.cat(losses).view(targets.shape) if losses else hidden.new_zeros(targets.shape, dtype=wide)


def _block_losses(h: Tensor, weight: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Losses (T,), 0 where ignored, at least float32."""
    logits = torch.nn.functional.linear(h, weight)[:, :num_classes]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
