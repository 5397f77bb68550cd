"""How far two right answers may lie apart, each with its error model in words. Loosening one is a decision, not a fix.

u is the unit roundoff: 6e-8 in float32, 1.1e-16 in float64. "Relative" is the largest error of a tensor over its
largest element; `assert_close` measures that.
"""

import torch
from torch import Tensor

OP = {
    # Sums of at most a few hundred products in float32: √n to n roundings, 1e-6 to 1e-5.
    torch.float32: 1e-5,
    # The same in float64; powers of q are formed in float64 in both implementations.
    torch.float64: 1e-12,
}
"""portable = reference, op by op, relative: outputs, final states and every gradient."""

OP_BF16 = 2**-6
"""The same on bfloat16 inputs, where a rounding is 2⁻⁹. In the backward of attention dP and the row sum taken from it
are each rounded; where they cancel to a quarter of their size, that is 2 · 4 roundings."""

TIMESTEP_NORM_Y = 2e-6
"""y of the kernels in float32, root mean square over that of y, wherever the mean lies and however it drifts: x minus
the shift is exact, then five roundings of values of about 1 and the error of 1/sqrt(var)."""
TIMESTEP_NORM_STATISTICS = 5e-6
"""Their final mean in standard deviations, their final variance relative: sums of 64 · 64 values in float32, √n to n
roundings, in each tile; tiles are merged in float64."""

OP_BF16_TRUNCATED = 2 * OP_BF16
"""The same where Triton's interpreter runs products on bfloat16: it truncates what is stored, and cutting off is twice
as far as rounding and always to the same side. Attention is off by 2.0e-2 there, 0.8e-2 where stores round."""

LOGITS = {
    # Errors of 2u a layer in a residual stream of values up to 10, absolute. Released float32 against float64: 5.3e-6.
    torch.float32: 2e-5,
    # 100 u times values of 10, with a margin of ten for the order of summation in the split.
    torch.float64: 1e-12,
}
"""Two ways to the same logits (whole, split, packed, streamed), absolute."""

GRADIENTS = {
    # The slowest decays see a sum over the whole sequence of terms of both signs: 2.7e-5 in the released float32.
    torch.float32: 1e-4,
    torch.float64: 1e-12,
}
"""Two ways to the same parameter gradients, relative."""

PARALLEL_LOSS = {torch.float32: 1e-6, torch.float64: 1e-10}
"""Several ranks = one, mean loss, relative: as many sums as one rank forms, in another order."""
PARALLEL_GRADIENTS = {torch.float32: 1e-4, torch.float64: 1e-10}
"""The same for each named gradient; see GRADIENTS for float32."""
PARALLEL_STEPS = 1e-9
"""The same for parameters and moments after three steps of AdamW in float64. It divides a gradient by its own size, so
that an error of 1e-12 in one near zero comes back larger."""

GOLDEN_HIDDEN = 2e-5
"""Recorded hidden values (float32 run), relative; the recording itself is off by 2.4e-6."""
GOLDEN_LOGITS = {torch.float32: 2e-5, torch.float64: 1e-11}
"""Recorded logits, absolute; the float32 recording is off by 5.3e-6."""
GOLDEN_LOSS = {torch.float32: 5e-6, torch.float64: 1e-12}
"""Recorded mean loss, absolute; the float32 recording is off by 5.5e-7."""
GOLDEN_GRADIENTS = {torch.float32: 1e-4, torch.float64: 1e-11}
"""Recorded gradients, relative; the float32 recording is off by 2.7e-5."""
GOLDEN_STATE = {torch.float32: 5e-5, torch.float64: 1e-11}
"""Recorded CEMA states and statistics, relative; the float32 recording is off by 1.1e-5."""
GOLDEN_CACHE = {torch.float32: 2e-5, torch.float64: 1e-11}
"""Recorded keys and values, relative; the float32 recording is off by 3.6e-6."""
GOLDEN_OPS = {torch.float32: 1e-5, torch.float64: 1e-11}
"""Recorded single operations, relative."""
GOLDEN_OPS_HARD = {"cema/long": 1e-3, "timestep_norm/offset": 5e-4, "timestep_norm/long": 1e-5}
"""The same for ill-conditioned float32 cases: 4096 steps of slow decay (recording off by 2.9e-4); a mean of 300 under a
spread of 1 (8.4e-5)."""
ONE_TOKEN_ZERO = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Gradients that are exactly 0 for a document of one token, absolute."""

BF16_LOGITS = 0.1
"""bf16 autocast against float32, golden model A, absolute: 8 bits of mantissa on values up to 10 (released: 0.04)."""


def distance(actual: Tensor, expected: Tensor) -> float:
    """Largest error over the largest element of `expected`."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    if not expected.numel():
        return 0.0
    error = (actual.detach().double() - expected.detach().double()).abs().max()
    return (error / expected.detach().double().abs().max().clamp(min=1e-300)).item()


def assert_close(actual: Tensor, expected: Tensor, relative: float, what: str = "") -> None:
    """Both have the same shape and lie within `relative` of the largest element."""
    error = distance(actual, expected)
    assert error <= relative, f"{what}: relative error {error:.2e} exceeds {relative:.0e}"


def assert_near(actual: Tensor, expected: Tensor, absolute: float, what: str = "") -> None:
    """Both have the same shape and lie within `absolute` everywhere."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    error = (actual.detach().double() - expected.detach().double()).abs().max().item() if expected.numel() else 0.0
    assert error <= absolute, f"{what}: error {error:.2e} exceeds {absolute:.0e}"
