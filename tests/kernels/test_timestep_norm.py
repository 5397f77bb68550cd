"""What only TimestepNorm's kernels must hold: any offset, a prior, odd groups, whole = split, torch.compile.

What holds for every op is in test_ops.py. Kernels run in the interpreter where there is no GPU.
"""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from test_ops import case, run
from tolerances import OP, TIMESTEP_NORM_STATISTICS, TIMESTEP_NORM_Y, assert_close
from torch import Tensor

from megalodon_kernels import KernelError, Statistics, timestep_norm
from megalodon_kernels.timestep_norm.kernel import (
    _before,
    _joined,
    _then,
    timestep_norm_backward,
    timestep_norm_forward,
)


@triton.jit
def _three(x, out_ptr, COMBINE: tl.constexpr, FIRST_TWO: tl.constexpr):
    """Three stretches of five values as one, bracketed to the left or to the right."""
    a1, a2, a3, a4, a5 = tl.load(x).to(tl.int32), tl.load(x + 1), tl.load(x + 2), tl.load(x + 3), tl.load(x + 4)
    x += 5
    b1, b2, b3, b4, b5 = tl.load(x).to(tl.int32), tl.load(x + 1), tl.load(x + 2), tl.load(x + 3), tl.load(x + 4)
    x += 5
    c1, c2, c3, c4, c5 = tl.load(x).to(tl.int32), tl.load(x + 1), tl.load(x + 2), tl.load(x + 3), tl.load(x + 4)
    if FIRST_TWO:
        d1, d2, d3, d4, d5 = COMBINE(a1, a2, a3, a4, a5, b1, b2, b3, b4, b5)
        e1, e2, e3, e4, e5 = COMBINE(d1, d2, d3, d4, d5, c1, c2, c3, c4, c5)
    else:
        d1, d2, d3, d4, d5 = COMBINE(b1, b2, b3, b4, b5, c1, c2, c3, c4, c5)
        e1, e2, e3, e4, e5 = COMBINE(a1, a2, a3, a4, a5, d1, d2, d3, d4, d5)
    tl.store(out_ptr, e1.to(tl.float64))
    tl.store(out_ptr + 1, e2)
    tl.store(out_ptr + 2, e3)
    tl.store(out_ptr + 3, e4)
    tl.store(out_ptr + 4, e5)


@triton.jit
def _joined_of_five(begins1, n1, mean1, w1, x1, begins2, n2, mean2, w2, x2):
    begins, n, mean, w = _joined(begins1, n1, mean1, w1, begins2, n2, mean2, w2)
    return begins, n, mean, w, x2


@triton.jit
def _before_of_five(begins1, a1, b1, c1, x1, begins2, a2, b2, c2, x2):
    begins, a, b, c = _before(begins1, a1, b1, c1, begins2, a2, b2, c2)
    return begins, a, b, c, x2


whole = st.integers(-3, 3)
stretch = st.tuples(st.integers(0, 1), st.integers(0, 3), whole, whole, whole)


@pytest.mark.parametrize("combine", [_joined_of_five, _before_of_five, _then])
@given(stretches=st.lists(stretch, min_size=3, max_size=3))
def test_stretches_join_in_any_order(combine: Any, stretches: list[tuple[int, ...]]) -> None:
    """The interpreter scans in order and would hide a combine that is not associative."""
    values = torch.tensor(stretches, dtype=torch.float64)
    if combine is not _before_of_five:
        values[:, 2:] *= values[:, 1:2] > 0  # without a step there is nothing to sum
    left, right = torch.empty(2, 5, dtype=torch.float64)
    _three[(1,)](values, left, combine, True)
    _three[(1,)](values, right, combine, False)
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def rms_error(actual: Tensor, expected: Tensor, scale: Tensor) -> float:
    """Root mean square of the error over that of `scale`."""
    error = actual.detach().double() - expected.detach().double()
    return (error.square().mean() / scale.detach().double().square().mean()).sqrt().item()


@pytest.mark.parametrize(("offset", "drift"), [(0, 0), (10, 0), (100, 0), (0, 20)])
def test_far_from_zero_and_drifting(offset: float, drift: float) -> None:
    """In standard deviations of the input: neither costs a digit, also of the gradients."""
    length = 200
    path = offset + drift * torch.linspace(0, 1, length)[:, None]
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, length, 8, generator=draw) + path
    weight, bias = (0.1 * torch.randn(8, generator=draw) for _ in range(2))
    inputs = {"x": x, "weight": weight, "bias": bias, "num_groups": 1}
    (expected, gradients), (actual, own_gradients) = (run("timestep_norm", inputs, b) for b in ("reference", "triton"))
    y, _, mean, var = zip(actual, expected, strict=True)
    assert rms_error(*y, scale=y[1]) < TIMESTEP_NORM_Y
    assert rms_error(*mean, scale=var[1].sqrt()) < TIMESTEP_NORM_STATISTICS
    assert rms_error(*var, scale=var[1]) < TIMESTEP_NORM_STATISTICS
    for a, e in zip(own_gradients, gradients, strict=True):
        assert_close(a, e, OP[torch.float32])


@pytest.mark.parametrize(("D", "num_groups"), [(6, 6), (14, 7), (256, 2)])
def test_groups_of_any_width(D: int, num_groups: int) -> None:
    """One feature a group, two, and so many that a tile has one group; a number of groups that is no power of two."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, D, generator=draw, dtype=torch.float64)
    weight, bias = torch.randn(2, D, generator=draw, dtype=torch.float64)
    inputs = {"x": x, "weight": weight, "bias": bias, "num_groups": num_groups}
    (expected, gradients), (actual, own_gradients) = (run("timestep_norm", inputs, b) for b in ("reference", "triton"))
    for a, e in zip(actual + own_gradients, expected + gradients, strict=True):
        assert_close(a, e, OP[torch.float64])


@pytest.mark.parametrize("with_state", [False, True])
def test_a_prior_and_padding_and_documents_at_once(with_state: bool) -> None:
    """Every gradient, also those of the prior, with starts at the edges of a tile and padded first and last steps."""
    inputs = case("timestep_norm", "L37-state-starts", torch.float64)
    draw = torch.Generator().manual_seed(0)
    inputs["starts"] = torch.zeros(2, 37, dtype=torch.bool)
    inputs["starts"][0, [0, 31, 32]] = inputs["starts"][1, [10, 33]] = True
    inputs["padding"] = torch.zeros(2, 37, dtype=torch.bool)
    inputs["padding"][0, [0, 1, 31, 32, 36]] = inputs["padding"][1, [0, 9, 10, 32]] = True
    inputs["prior"] = Statistics(torch.tensor(3), *torch.rand(2, 3, generator=draw, dtype=torch.float64))
    if not with_state:
        del inputs["state"]
    (expected, gradients), (actual, own_gradients) = (run("timestep_norm", inputs, b) for b in ("reference", "triton"))
    for a, e in zip(actual + own_gradients, expected + gradients, strict=True):
        assert_close(a, e, OP[torch.float64])


@pytest.mark.parametrize("cut", [1, 32])
def test_two_halves_make_a_whole(cut: int) -> None:
    inputs = case("timestep_norm", "L37-state-starts", torch.float32)
    whole, after = timestep_norm(**inputs, backend="triton")
    x, starts, state, halves = inputs["x"], inputs["starts"], inputs["state"], []
    for part in (slice(None, cut), slice(cut, None)):
        changed = {"x": x[:, part], "starts": starts[:, part], "state": state}
        y, state = timestep_norm(**(inputs | changed), backend="triton")
        halves.append(y)
    assert_close(torch.cat(halves, dim=1), whole, OP[torch.float32])
    assert torch.equal(state.count, after.count)
    assert_close(state.mean, after.mean, OP[torch.float32])
    assert_close(state.var, after.var, OP[torch.float32])


def test_documents_do_not_move_a_bit_of_each_other() -> None:
    """Outputs and gradients of two documents, when everything in the one between them changes, even to NaN."""
    inputs = case("timestep_norm", "L37-starts", torch.float32)
    inputs["starts"] = torch.zeros(2, 37, dtype=torch.bool)
    inputs["starts"][:, [0, 13, 29]] = True
    changed = inputs["x"].clone()
    changed[:, 13:29] = float("nan")
    (outputs, gradients), (others, other_gradients) = (
        run("timestep_norm", inputs | {"x": x}, "triton") for x in (inputs["x"], changed)
    )
    for a, b in ((outputs[0], others[0]), (gradients[0], other_gradients[0])):
        for part in (slice(None, 13), slice(29, None)):
            assert torch.equal(a[:, part], b[:, part])
    assert torch.equal(outputs[2], others[2]) and torch.equal(outputs[3], others[3])


def test_a_width_that_is_no_power_of_two_is_refused() -> None:
    inputs: dict[str, Any] = case("timestep_norm", "L1", torch.float32) | {"num_groups": 4}
    with pytest.raises(KernelError, match="D/G is 6, expected a power of two up to 1024"):
        timestep_norm(**inputs, backend="triton")


def test_the_operators_keep_the_rules_of_pytorch() -> None:
    inputs = case("timestep_norm", "L1-state-starts", torch.float32)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    known = (*inputs["state"], inputs["starts"], None, None, None, None)
    forward = (x, weight, bias, 3, 1e-5, *known)
    torch.library.opcheck(timestep_norm_forward.op, forward)
    y, mean, rstd, count, final_count, final_mean, final_var = timestep_norm_forward(*forward)
    saved = (x, weight, mean, rstd, count, final_count, final_mean)
    torch.library.opcheck(timestep_norm_backward.op, (y, final_mean, final_var, *saved, *known))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's compiler about PyTorch
def test_one_graph_under_torch_compile() -> None:
    inputs = case("timestep_norm", "L1-state-starts", torch.float32)
    count, mean, var = inputs["state"]

    def step(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, ...]:
        state = Statistics(count, mean, var)
        y, after = timestep_norm(x, weight, bias, 3, state, inputs["starts"], backend="triton")
        return y, after.mean, after.var

    def both(function: Any) -> list[Tensor]:
        leaves = [v.clone().requires_grad_() for v in (inputs["x"], inputs["weight"], inputs["bias"], mean, var)]
        outputs = function(*leaves)
        return [*outputs, *torch.autograd.grad(sum((v * v).sum() for v in outputs), leaves)]

    for a, e in zip(both(torch.compile(step, fullgraph=True)), both(step), strict=True):
        assert_close(a, e, OP[torch.float32])
