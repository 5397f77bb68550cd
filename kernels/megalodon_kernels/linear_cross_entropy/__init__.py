"""An output matrix and the cross-entropy behind it in one op: the logits of all tokens never exist at once.

Not here: what a step averages over (megalodon/model/loss.py), losses without a gradient, token by token (there, too).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalodon_kernels.dispatch import Backend, check_shapes, choose
from megalodon_kernels.linear_cross_entropy.gradients import IGNORE
from megalodon_kernels.linear_cross_entropy.portable import linear_cross_entropy_portable
from megalodon_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference


class LossSums(NamedTuple):
    """Sums over the targets that count, each () float32 (float64 in a float64 model)."""

    objective: Tensor
    """What is minimised: loss + z_loss x squares; differentiable in hidden and weight."""
    loss: Tensor
    """Of -log softmax(hidden weightᵀ)[target]; outside the graph."""
    squares: Tensor
    """Of logsumexp(hidden weightᵀ)²; outside the graph."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    block: int = 2048,
    *,
    num_classes: int | None = None,
    z_loss: float = 0.0,
    backend: Backend = "auto",
) -> LossSums:
    """Sum the losses of next-token prediction, block by block, with their gradients.

        logits = hidden weightᵀ;   loss = Σ logsumexp(logits) - logits[target];   squares = Σ logsumexp(logits)²

    Gradients are formed in the forward pass, where the logits are; the backward pass scales them. The penalty on the
    squares is that of PaLM (Chowdhery et al. 2022, arXiv 2204.02311, section 5).

    Args:
        hidden:  (T, D) in any float dtype; the products run in it, or in that of autocast.
        weight:  (V, D): the output matrix.
        targets: (T,) int64 below num_classes; -100 is ignored.
        block:   tokens whose logits exist at a time.
        num_classes: rows of `weight` that can be predicted; the rest, padding, gets no probability. None means all.
        z_loss:  weight of logsumexp², which holds the normaliser of the softmax near 1.
    Returns:
        objective: () loss + z_loss x squares; differentiable in hidden and weight.
        loss:      () outside the graph.
        squares:   () outside the graph.
    Raises:
        ValueError: two sizes disagree; the message shows both. On a CPU also: a target is no class; on a GPU, which
            is not asked, the loss of such a target is NaN.
        KernelError: `backend` cannot run this call.
    """
    if hidden.dim() != 2 or weight.dim() != 2:
        raise ValueError(
            f"linear_cross_entropy: hidden is {tuple(hidden.shape)} and weight {tuple(weight.shape)}; "
            "expected (T, D) and (V, D); flatten batch and length"
        )
    num_classes = len(weight) if num_classes is None else num_classes
    if not 1 <= num_classes <= len(weight) or block < 1:
        raise ValueError(
            f"linear_cross_entropy: num_classes is {num_classes} and block {block}; "
            f"expected 1 to {len(weight)} classes, one for a row of weight, and blocks of at least one token"
        )
    (T, D), V = hidden.shape, len(weight)
    check_shapes(
        "linear_cross_entropy",
        f"hidden is {tuple(hidden.shape)}",
        {"weight": (weight, (V, D)), "targets": (targets, (T,))},
    )
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    # On a GPU this would wait for the device at every step; there such a loss is NaN.
    if targets.device.type == "cpu" and targets.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in targets.masked_fill(targets == IGNORE, 0).aminmax())
        if low < 0 or high >= num_classes:
            bad = low if low < 0 else high
            raise ValueError(
                f"linear_cross_entropy: a target is {bad}; expected 0 … {num_classes - 1}, or {IGNORE} to ignore it"
            )
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()  # or the gradients would be formed all the same
    run = IMPLEMENTATIONS[choose("linear_cross_entropy", backend, hidden.device, dtype)]
    with torch.autocast(device, enabled=False):
        sums = run(hidden, weight, targets, block, num_classes, z_loss, dtype)
    return LossSums(*sums)


def _triton(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from megalodon_kernels.linear_cross_entropy.kernel import linear_cross_entropy_triton

    return linear_cross_entropy_triton(*args)


IMPLEMENTATIONS = {
    "reference": linear_cross_entropy_reference,
    "portable": linear_cross_entropy_portable,
    "triton": _triton,
}
