"""RMSNorm and LayerNorm whose weight is stored minus one: what the ops promise, and which implementation runs.

Not here: the parameters (megalodon/model/layers.py), TimestepNorm.
"""

from typing import Any

import torch
from torch import Tensor

from megalodon_kernels.dispatch import Backend, check_shapes, choose
from megalodon_kernels.norm.portable import norm_portable
from megalodon_kernels.norm.reference import norm_reference

MOST_FEATURES = 16_384
"""A kernel holds a whole row in registers."""


def rms_norm(x: Tensor, weight: Tensor | None, *, eps: float = 1e-5, backend: Backend = "auto") -> Tensor:
    """Divide every vector of features by its root mean square.

        y = x / sqrt(mean(x²) + eps) ⊙ (1 + weight)

    Zhang and Sennrich 2019, arXiv 1910.07467; the weight is stored minus one as in the released Megalodon.

    Args:
        x:       (..., D) float32 or bfloat16 (or float64, then throughout); computed in float32 or better.
        weight:  (D,) float32: the scale minus one; None means 0.
        eps:     added to the mean square inside the root.
    Returns:
        y:       (..., D) in the dtype of x.
    Raises:
        ValueError: two sizes disagree; the message shows both.
        KernelError: `backend` cannot run this call.
    """
    return _norm("rms_norm", x, weight, None, False, eps, backend)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float = 1e-5, backend: Backend = "auto"
) -> Tensor:
    """Give every vector of features mean 0 and variance 1.

        y = (x - mean(x)) / sqrt(var(x) + eps) ⊙ (1 + weight) + bias

    Ba et al. 2016, arXiv 1607.06450; population variance; the weight is stored minus one as in the released Megalodon.

    Args:
        x:       (..., D) float32 or bfloat16 (or float64, then throughout); computed in float32 or better.
        weight:  (D,) float32: the scale minus one; None means 0.
        bias:    (D,) float32; None means 0.
        eps:     added to the variance inside the root.
    Returns:
        y:       (..., D) in the dtype of x.
    Raises:
        ValueError: two sizes disagree; the message shows both.
        KernelError: `backend` cannot run this call.
    """
    return _norm("layer_norm", x, weight, bias, True, eps, backend)


def _norm(
    op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, centre: bool, eps: float, backend: Backend
) -> Tensor:
    if not x.dim() or not x.shape[-1]:
        raise ValueError(f"{op}: x is {tuple(x.shape)}; expected (..., D) with D ≥ 1")
    D = x.shape[-1]
    check_shapes(op, f"x is {tuple(x.shape)}", {"weight": (weight, (D,)), "bias": (bias, (D,))})
    unfit = None if D <= MOST_FEATURES else f"D is {D}, expected at most {MOST_FEATURES}"
    run = IMPLEMENTATIONS[choose(op, backend, x.device, x.dtype, unfit)]
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = run(x, weight, bias, centre, eps)
    return y


def _triton(*args: Any) -> Tensor:
    from megalodon_kernels.norm.kernel import norm_triton

    return norm_triton(*args)


IMPLEMENTATIONS = {"reference": norm_reference, "portable": norm_portable, "triton": _triton}
