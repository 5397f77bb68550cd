"""The helpers inside kernels, each by itself: angles, and the combine of a scan."""

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_kernels.kernel_math import cos_sin, then, then_selecting


@triton.jit
def _cos_sin(x_ptr, cos_ptr, sin_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    cos, sin = cos_sin(tl.load(x_ptr + at))
    tl.store(cos_ptr + at, cos)
    tl.store(sin_ptr + at, sin)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2.4e-7), (torch.float64, 4.5e-16)])
def test_cos_and_sin_of_turns(dtype: torch.dtype, error: float) -> None:
    """Four roundings of values up to 1, two of them in the argument, which is exact in turns however far it lies."""
    turns = torch.cat([torch.linspace(-3, 3, 1009, dtype=dtype), torch.arange(-7, 8, dtype=dtype) / 8])
    turns = torch.cat([turns, turns.new_tensor([1000.25, -4095.75])])
    turns = torch.nn.functional.pad(turns, (0, 2048 - len(turns)))
    cos, sin = torch.empty_like(turns), torch.empty_like(turns)
    _cos_sin[(1,)](turns, cos, sin, len(turns))
    angle = (turns - turns.round()).double() * (2 * math.pi)
    assert (cos.double() - angle.cos()).abs().max() < error
    assert (sin.double() - angle.sin()).abs().max() < error


@triton.jit
def _apply(step_ptr, out_ptr, SELECTING: tl.constexpr, FIRST_TWO: tl.constexpr):
    """Combine three steps (re, im of a; re, im of b), bracketed to the left or to the right."""
    x = step_ptr
    a1, a2, a3, a4 = tl.load(x), tl.load(x + 1), tl.load(x + 2), tl.load(x + 3)
    b1, b2, b3, b4 = tl.load(x + 4), tl.load(x + 5), tl.load(x + 6), tl.load(x + 7)
    c1, c2, c3, c4 = tl.load(x + 8), tl.load(x + 9), tl.load(x + 10), tl.load(x + 11)
    if FIRST_TWO:
        if SELECTING:
            a1, a2, a3, a4 = then_selecting(a1, a2, a3, a4, b1, b2, b3, b4)
            a1, a2, a3, a4 = then_selecting(a1, a2, a3, a4, c1, c2, c3, c4)
        else:
            a1, a2, a3, a4 = then(a1, a2, a3, a4, b1, b2, b3, b4)
            a1, a2, a3, a4 = then(a1, a2, a3, a4, c1, c2, c3, c4)
    else:
        if SELECTING:
            b1, b2, b3, b4 = then_selecting(b1, b2, b3, b4, c1, c2, c3, c4)
            a1, a2, a3, a4 = then_selecting(a1, a2, a3, a4, b1, b2, b3, b4)
        else:
            b1, b2, b3, b4 = then(b1, b2, b3, b4, c1, c2, c3, c4)
            a1, a2, a3, a4 = then(a1, a2, a3, a4, b1, b2, b3, b4)
    tl.store(out_ptr, a1)
    tl.store(out_ptr + 1, a2)
    tl.store(out_ptr + 2, a3)
    tl.store(out_ptr + 3, a4)


def combined(steps: torch.Tensor, selecting: bool, first_two: bool) -> torch.Tensor:
    out = torch.empty(4, dtype=torch.float64)
    _apply[(1,)](steps, out, selecting, first_two)
    return out


small = st.lists(st.integers(-3, 3), min_size=4, max_size=4)


@pytest.mark.parametrize("selecting", [False, True])
@settings(deadline=None)  # how long the interpreter takes depends on what else the machine does
@given(steps=st.lists(small, min_size=3, max_size=3), forgets=st.integers(0, 7))
def test_the_combine_of_steps_is_associative(selecting: bool, steps: list[list[int]], forgets: int) -> None:
    """In small integers, so that equality is exact; the interpreter scans in order and would hide a fault of this."""
    values = torch.tensor(steps, dtype=torch.float64)
    for i in range(3):
        if forgets >> i & 1:
            values[i, :2] = 0
    left, right = (combined(values, selecting, first_two) for first_two in (True, False))
    assert torch.equal(left, right)
    a, b = (torch.view_as_complex(x.contiguous()) for x in (values[:, :2], values[:, 2:]))
    h = 0
    for i in range(3):
        h = a[i] * h + b[i]
    assert torch.equal(torch.view_as_complex(left[2:].clone()), torch.as_tensor(h))


def test_a_step_that_forgets_stops_a_nan() -> None:
    values = torch.tensor([[1, 0, math.nan, math.nan], [0, 0, 2, 3], [1, 0, 4, 5]], dtype=torch.float64)
    for first_two in (True, False):
        assert combined(values, True, first_two)[2:].tolist() == [6, 8]
    assert combined(values, False, True)[2:].isnan().all()
