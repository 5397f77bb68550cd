"""SwiGLU in float64: the meaning of the op. Tests compare with it."""

from torch import Tensor


def swiglu_reference(a: Tensor, b: Tensor | None) -> Tensor:
    """See `megalodon_kernels.swiglu`. Computes in float64 and rounds once, at the end."""
    y = a.double() * a.double().sigmoid()
    return (y if b is None else y * b.double()).to(a.dtype)
