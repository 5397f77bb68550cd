"""RMSNorm and LayerNorm in float64: the meaning of the ops. Tests compare with it."""

import torch
from torch import Tensor


def norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, centre: bool, eps: float) -> Tensor:
    """See `megalodon_kernels.norm`. Computes in float64 and rounds once, at the end."""
    y = x.double()
    if centre:
        y = y - y.mean(-1, keepdim=True)
    y = y / torch.sqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (1 + weight.double())
    if bias is not None:
        y = y + bias.double()
    return y.to(x.dtype)
