"""The cross-entropy behind an output matrix in float64, all logits at once: the meaning of the op. Tests compare."""

import torch
from torch import Tensor

from megalodon_kernels.linear_cross_entropy.gradients import IGNORE


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, block: int, num_classes: int, z_loss: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """See `megalodon_kernels.linear_cross_entropy`. Computes in float64 and rounds once, at the end."""
    scored = targets != IGNORE
    logits = hidden[scored].double() @ weight[:num_classes].double().mT
    log_z = logits.logsumexp(-1)
    loss = (log_z - logits.gather(-1, targets[scored, None])[:, 0]).sum()
    squares = log_z.square().sum()
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (loss + z_loss * squares).to(wide), loss.detach().to(wide), squares.detach().to(wide)
