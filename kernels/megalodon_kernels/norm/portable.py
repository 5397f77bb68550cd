"""RMSNorm and LayerNorm by PyTorch's own: the CPU path, and any device without Triton."""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm


def norm_portable(x: Tensor, weight: Tensor | None, bias: Tensor | None, centre: bool, eps: float) -> Tensor:
    """See `megalodon_kernels.norm`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = None if weight is None else 1 + weight
    shape = x.shape[-1:]
    y = layer_norm(wide, shape, scale, bias, eps) if centre else rms_norm(wide, shape, scale, eps)
    return y.to(x.dtype)
