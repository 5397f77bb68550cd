"""RMSNorm and LayerNorm in plain PyTorch: the CPU path, and any device without Triton."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import layer_norm, rms_norm

from megalodon_kernels.rows import features_first


def norm_portable(x: Tensor, weight: Tensor | None, bias: Tensor | None, centre: bool, eps: float) -> Tensor:
    """See `megalodon_kernels.norm`."""
    scale = None if weight is None else 1 + weight
    if not centre and not torch.compiler.is_compiling():
        normed: Tensor = _RMSNorm.apply(x, scale, eps)  # type: ignore[no-untyped-call]
        return normed
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    shape = x.shape[-1:]
    y = layer_norm(wide, shape, scale, bias, eps) if centre else rms_norm(wide, shape, scale, eps)
    return y.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """Eager PyTorch makes RMSNorm of single operations, and its gradient too: this takes fewer passes over x.

    With r = 1 / sqrt(mean(x²) + eps), n = x r, g = dy scale:  dx = r (g - n mean(g n)),  dscale = Σ dy n. It works in
    the order in which x lies in memory, features first or last.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, scale: Tensor | None, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        r = torch.rsqrt_(wide.square().mean(-1, keepdim=True).add_(eps))
        y = wide * r
        if scale is not None:
            y *= scale
        ctx.save_for_backward(x, r, scale)  # type: ignore[arg-type]  # it takes None too
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, r, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        normed = x * r
        if x.dim() == 3 and x.stride(-1) != 1:  # features first: dy of the next layer does not lie so
            dy = features_first(dy).permute(1, 2, 0)
        dy = dy.to(normed.dtype)
        both = dy * normed
        d_scale = None if scale is None else both.sum(tuple(range(both.dim() - 1)))
        if scale is not None:
            both *= scale
            dy = dy * scale
        dx = normed.mul_(-both.mean(-1, keepdim=True)).add_(dy).mul_(r)
        return dx.to(x.dtype), d_scale, None
