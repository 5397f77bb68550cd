"""The cross-entropy behind an output matrix in PyTorch: the CPU path, and any device without Triton.

One buffer takes the logits of each block in turn and becomes their gradient in place: on a CPU, fresh pages for a large
tensor cost as much as a pass over it.
"""

import torch
from torch import Tensor

from megalodon_kernels.linear_cross_entropy.gradients import IGNORE, Call, add_product, sums


def linear_cross_entropy_portable(
    hidden: Tensor, weight: Tensor, targets: Tensor, block: int, num_classes: int, z_loss: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """See `megalodon_kernels.linear_cross_entropy`."""
    return sums(hidden, weight, targets, Call(block, num_classes, z_loss, dtype), _blocks)


def _blocks(
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
    """dlogits = softmax (1 + 2 z_loss logsumexp) - onehot, 0 if ignored; dhidden = dlogits W, dW = dlogitsᵀ hidden."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss, squares = hidden.new_zeros((), dtype=wide), hidden.new_zeros((), dtype=wide)
    d_hidden = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)
    d_weight = torch.zeros_like(weight, dtype=wide) if need_weight else hidden.new_empty(0)
    classes = weight[:num_classes].to(dtype)
    products = classes.new_empty(min(block, len(hidden)), num_classes)
    logits = products if dtype == wide else torch.empty_like(products, dtype=wide)
    for begin in range(0, len(hidden), block):
        t = targets[begin : begin + block]
        ignored = t == IGNORE
        # An ignored token counts as 0 in every sum: there it has no hidden value, whatever it is.
        h = hidden[begin : begin + block].masked_fill(ignored[:, None], 0).to(dtype)
        products, logits = products[: len(h)], logits[: len(h)]
        torch.mm(h, classes.mT, out=products)
        if logits is not products:
            logits.copy_(products)
        index = t.masked_fill(ignored, 0)[:, None]
        losses, log_z = _softmax_(logits, index)
        loss += losses.masked_fill_(ignored, 0).sum()
        squares += log_z.masked_fill_(ignored, 0).square().sum()
        if not (need_hidden or need_weight):
            continue
        if z_loss:
            logits *= (1 + 2 * z_loss * log_z)[:, None]
        logits.scatter_add_(-1, index, logits.new_full(index.shape, -1))
        if logits is not products:
            products.copy_(logits)
        if need_hidden:
            d_hidden[begin : begin + block] = (products @ classes).masked_fill_(ignored[:, None], 0)
        if need_weight:
            add_product(d_weight[:num_classes], products, h)
    return loss, squares, d_hidden, d_weight


def _softmax_(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (T, V) become probabilities; return -log of those at `index` (T, 1) and logsumexp, (T,) each."""
    chosen, largest = logits.gather(-1, index)[:, 0], logits.amax(-1)
    torch.softmax(logits, -1, out=logits)
    # The largest probability is 1 / Σ exp(logits - largest): never so small that its logarithm is lost.
    log_z = largest - logits.amax(-1).log()
    return log_z - chosen, log_z
