"""Helpers inside Triton kernels that several ops share. Not here: kernels, launchers.

Rules for every kernel: upcast what is loaded, downcast what is stored (the interpreter computes bfloat16 wrongly and
says nothing; between bfloat16 and float64 it reinterprets bits, so go by way of float32); products through `mdot`;
every masked load names its `other`; resets and masks select, they never multiply by 0; offsets are int64.
"""

import torch
import triton
import triton.language as tl

from megalodon_kernels.dispatch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
_LOG2_E = tl.constexpr(1.4426950408889634)
_TURN = tl.constexpr(6.283185307179586)


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The dtype in which a kernel computes on inputs of `dtype`: float64 for float64 (tests), else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def mdot(a, b, acc):
    """acc + a @ b on the tensor cores; float32 operands keep the precision of float32 (three tf32 products)."""
    if _INTERPRETED:
        # The interpreter multiplies the bit patterns of bfloat16.
        product = tl.dot(a.to(acc.dtype), b.to(acc.dtype), input_precision="ieee", out_dtype=acc.dtype)
        return acc + product
    elif a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="tf32x3")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def exp(x):
    """e^x. Rounded in the exponent: relative error |x| 6e-8 in float32."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x), without overflow."""
    return 1 / (1 + tl.exp2(-x * _LOG2_E))


@triton.jit
def cos_sin(turns):
    """(cos, sin) of an angle in turns: 2π times as much in radians.

    Reduced to an eighth of a turn, where Taylor's series to degree 17 is exact to rounding in float64, too. `tl.cos`
    would bring a slow reduction of arguments with loops and local memory.
    """
    quarter = tl.floor(turns * 4 + 0.5)
    x = (turns - quarter * 0.25) * _TURN
    z = x * x
    c = _cos_series(z)
    s = x * _sin_series(z)
    quadrant = quarter - 4 * tl.floor(quarter * 0.25)
    odd = (quadrant == 1) | (quadrant == 3)
    cos = tl.where(odd, s, c)
    sin = tl.where(odd, c, s)
    cos = tl.where((quadrant == 1) | (quadrant == 2), -cos, cos)
    sin = tl.where(quadrant >= 2, -sin, sin)
    return cos, sin


@triton.jit
def _cos_series(z):
    """cos(√z) for z ≤ (π/4)²."""
    tail = z * (-1 / 3628800)
    if z.dtype == tl.float64:
        tail = z * (-1 / 3628800 + z * (1 / 479001600 + z * (-1 / 87178291200 + z * (1 / 20922789888000))))
    return 1 + z * (-1 / 2 + z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320 + tail))))


@triton.jit
def _sin_series(z):
    """sin(√z) / √z for z ≤ (π/4)²."""
    tail = z * (-1 / 39916800)
    if z.dtype == tl.float64:
        tail = z * (-1 / 39916800 + z * (1 / 6227020800 + z * (-1 / 1307674368000 + z * (1 / 355687428096000))))
    return 1 + z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880 + tail))))


@triton.jit
def then(a1_re, a1_im, b1_re, b1_im, a2_re, a2_im, b2_re, b2_im):
    """Two steps h ← a h + b, the first before the second, as one: for `tl.associative_scan` over (re, im) pairs."""
    # In this order each line is two fused operations.
    b_re = b2_re + a2_re * b1_re - a2_im * b1_im
    b_im = b2_im + a2_re * b1_im + a2_im * b1_re
    return a1_re * a2_re - a1_im * a2_im, a1_re * a2_im + a1_im * a2_re, b_re, b_im


@triton.jit
def then_selecting(a1_re, a1_im, b1_re, b1_im, a2_re, a2_im, b2_re, b2_im):
    """`then`, where a = 0 forgets by selection: 0 · NaN would carry a NaN of one document into the next.

    Only b needs that: a is a decay, always finite.
    """
    a_re, a_im, b_re, b_im = then(a1_re, a1_im, b1_re, b1_im, a2_re, a2_im, b2_re, b2_im)
    forget = (a2_re == 0) & (a2_im == 0)
    return a_re, a_im, tl.where(forget, b2_re, b_re), tl.where(forget, b2_im, b_im)
