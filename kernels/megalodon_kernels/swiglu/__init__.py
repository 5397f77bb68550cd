"""SiLU, alone or as a gate: what the op promises, and which implementation runs.

Not here: the products before and after it (megalodon/model/feed_forward.py, megalodon.py).
"""

from typing import Any

import torch
from torch import Tensor

from megalodon_kernels.dispatch import Backend, check_shapes, choose
from megalodon_kernels.swiglu.portable import swiglu_portable
from megalodon_kernels.swiglu.reference import swiglu_reference


def swiglu(a: Tensor, b: Tensor | None = None, *, backend: Backend = "auto") -> Tensor:
    """Gate b by the SiLU of a.

        y = a σ(a) ⊙ b,   σ(a) = 1 / (1 + e^-a);    without b, y = a σ(a)

    Shazeer 2020, arXiv 2002.05202.

    Args:
        a:  (..., F) float32 or bfloat16 (or float64); the kernel computes in float32 or better, the portable path
            rounds silu(a) first.
        b:  (..., F) in the dtype of a; None means 1.
    Returns:
        y:  (..., F) in the dtype of a.
    Raises:
        ValueError: a and b differ in shape or dtype; the message shows both.
        KernelError: `backend` cannot run this call.
    """
    check_shapes("swiglu", f"a is {tuple(a.shape)}", {"b": (b, tuple(a.shape))})
    if b is not None and b.dtype != a.dtype:
        raise ValueError(f"swiglu: b is {b.dtype} but a is {a.dtype}; expected the same dtype; cast one of them")
    run = IMPLEMENTATIONS[choose("swiglu", backend, a.device, a.dtype)]
    with torch.autocast(a.device.type, enabled=False):
        y: Tensor = run(a, b)
    return y


def _triton(*args: Any) -> Tensor:
    from megalodon_kernels.swiglu.kernel import swiglu_triton

    return swiglu_triton(*args)


IMPLEMENTATIONS = {"reference": swiglu_reference, "portable": swiglu_portable, "triton": _triton}
