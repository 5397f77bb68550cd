"""Laws of CEMA beside what holds for every op: split anywhere, extreme decays and angles, batch rows apart."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import run
from tolerances import OP, assert_close
from torch import Tensor

import megalodon_kernels
from megalodon_kernels.cases import cases
from megalodon_kernels.cema import kernel, portable
from megalodon_kernels.cema.kernel import ROW, row_table
from megalodon_kernels.rows import cut

LENGTHS = (1, ROW - 1, ROW, ROW + 1, 2 * ROW + 3)


def inputs_of(length: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Three channels of two averages, a state, no document starts."""
    inputs = dict(cases("cema", dtype))["L37-state"]
    inputs["x"] = inputs["x"][:, :length]
    narrow = {name: inputs[name][:3, :2] for name in ("p", "log_decay", "angle", "gamma")}
    return inputs | narrow | {"x": inputs["x"][..., :3], "omega": inputs["omega"][:3], "h0": inputs["h0"][:, :3, :2]}


def triton(**inputs: Any) -> tuple[Tensor, Tensor]:
    return megalodon_kernels.cema(**inputs, backend="triton")


@pytest.mark.parametrize("length", LENGTHS)
def test_lengths_around_a_row_are_the_reference(length: int) -> None:
    inputs = inputs_of(length)
    expected, actual = run("cema", inputs, "reference"), run("cema", inputs, "triton")
    for a, e in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
        assert_close(a, e, OP[torch.float64])


def test_several_programs_share_the_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three channels by two, and tiles of four boundaries, the second of which begins in the middle of a document."""
    inputs = inputs_of(37) | {"starts": torch.arange(37).expand(2, 37) == 9}
    expected = run("cema", inputs, "reference")
    monkeypatch.setattr(kernel, "SMALL", kernel.Tile(2, 4, 4))
    actual = run("cema", inputs, "triton")
    for a, e in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
        assert_close(a, e, OP[torch.float64])


def test_the_portable_path_adds_up_over_spans_and_blocks_of_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows a span, two of three channels a block, a document that begins in the middle."""
    draw, starts = torch.Generator().manual_seed(3), torch.arange(6 * 32 + 5).expand(2, -1) == 100
    x = torch.randn(2, 6 * 32 + 5, 3, dtype=torch.float64, generator=draw)
    inputs = inputs_of(37) | {"x": x, "starts": starts}
    expected = run("cema", inputs, "reference")
    monkeypatch.setattr(portable, "SPAN", 2 * 2 * 32)
    monkeypatch.setattr(portable, "CHANNELS", 2)
    actual = run("cema", inputs, "portable")
    for a, e in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
        assert_close(a, e, OP[torch.float64])


@pytest.mark.parametrize("length", [1, 9, 64])
def test_a_final_state_alone_has_its_gradients(length: int) -> None:
    """Ends with a full row or not; the gradient lies as autograd expands a number."""
    inputs = inputs_of(37)
    leaves = ("x", "p", "log_decay", "angle", "gamma", "h0")
    draw = torch.Generator().manual_seed(4)
    inputs["x"] = torch.randn(2, length, 3, dtype=torch.float64, generator=draw)
    found = []
    for backend in ("reference", "portable"):
        given = inputs | {name: inputs[name].detach().clone().requires_grad_() for name in leaves}
        final = megalodon_kernels.cema(**given, backend=backend)[1]
        # gamma has none: 0 by the reference's graph, 0 in numbers by the other.
        gradients = torch.autograd.grad(final.sum(), [given[name] for name in leaves], materialize_grads=True)
        found.append((final.detach(), *gradients))
    for actual, expected in zip(found[1], found[0], strict=True):
        assert_close(actual, expected, OP[torch.float64])


@pytest.mark.parametrize("at", LENGTHS)
def test_two_halves_make_a_whole(at: int) -> None:
    inputs = inputs_of(2 * ROW + 9)
    whole, last = triton(**inputs)
    first, h = triton(**(inputs | {"x": inputs["x"][:, :at]}))
    second, after = triton(**(inputs | {"x": inputs["x"][:, at:], "h0": h}))
    assert_close(torch.cat([first, second], 1), whole, OP[torch.float64])
    assert_close(after, last, OP[torch.float64])


@pytest.mark.parametrize("log_decay", [-36.04, -1e-12, -0.3])
@pytest.mark.parametrize("angle", [0.0, math.pi, -7 * math.pi])
@pytest.mark.parametrize("backend", ["portable", "triton"])
def test_decays_and_angles_at_their_ends(backend: str, log_decay: float, angle: float) -> None:
    """|q| = 2e-16 and 1 - 1e-12; no turn, half a turn, and three and a half turns backwards."""
    inputs = inputs_of(2 * ROW + 3)
    inputs |= {"log_decay": torch.full((3, 2), log_decay).double(), "angle": torch.full((3, 2), angle).double()}
    expected, actual = run("cema", inputs, "reference"), run("cema", inputs, backend)
    for i, (a, e) in enumerate(zip(actual[0] + actual[1], expected[0] + expected[1], strict=True)):
        assert_close(a, e, OP[torch.float64], f"number {i}")


def test_rows_of_a_batch_do_not_see_each_other() -> None:
    inputs = inputs_of(2 * ROW + 3, torch.float32)
    y, last = triton(**inputs)
    turned, turned_last = triton(**(inputs | {"x": inputs["x"].flip(0), "h0": inputs["h0"].flip(0)}))
    assert torch.equal(turned.flip(0), y) and torch.equal(turned_last.flip(0), last)


def test_bfloat16_input_costs_the_state_no_precision() -> None:
    """x is exact in bfloat16 and its table is two of them, good to 2⁻¹⁶ each: far below the rounding of y."""
    inputs = inputs_of(2 * ROW + 3, torch.float32)
    inputs["x"] = inputs["x"].bfloat16()
    expected = megalodon_kernels.cema(**inputs, backend="reference")[1]
    assert_close(triton(**inputs)[1], expected, 2**-15)


def test_nothing_in_nothing_out() -> None:
    inputs = inputs_of(ROW + 1, torch.float32)
    y, last = triton(**(inputs | {"x": torch.zeros_like(inputs["x"]), "h0": None}))
    assert not y.any() and not last.any()


@pytest.mark.parametrize("backward_of", ["y", "last"])
def test_one_output_alone_has_its_gradients(backward_of: str) -> None:
    """The other output's gradient is then missing, not zero."""
    gradients = []
    for backend in ("reference", "triton"):
        inputs = {n: v.clone().requires_grad_() for n, v in inputs_of(ROW + 3).items()}
        y, last = megalodon_kernels.cema(**inputs, backend=backend)
        total = y.square().sum() if backward_of == "y" else last.square().sum()
        names = [n for n in inputs if backward_of == "y" or n not in ("gamma", "omega")]
        gradients.append(torch.autograd.grad(total, [inputs[n] for n in names]))
    for e, a in zip(*gradients, strict=True):
        assert_close(a, e, OP[torch.float64])


def test_parameters_that_need_no_gradient_get_none() -> None:
    inputs = inputs_of(ROW + 3)
    expected = run("cema", inputs, "triton")[1][0]
    inputs["x"] = inputs["x"].clone().requires_grad_()
    draw = torch.Generator().manual_seed(1)
    y, last = triton(**inputs)
    cotangents = [torch.randn(v.shape, generator=draw, dtype=torch.float64) for v in (y, last)]
    (dx,) = torch.autograd.grad([y, last], inputs["x"], cotangents)
    assert torch.equal(dx, expected)


def test_nan_stays_in_its_document_backward_too() -> None:
    inputs = inputs_of(3 * ROW, torch.float32)
    starts = torch.zeros(2, 3 * ROW, dtype=torch.bool)
    starts[:, [0, ROW + 3, 2 * ROW + 1]] = True
    x = inputs["x"].clone()
    x[:, ROW + 3 : 2 * ROW + 1] = float("nan")
    x.requires_grad_()
    y, _ = triton(**(inputs | {"x": x, "starts": starts}))
    inside = torch.zeros(3 * ROW, dtype=torch.bool)
    inside[ROW + 3 : 2 * ROW + 1] = True
    assert y[:, inside].isnan().all() and y[:, ~inside].isfinite().all()
    dy = torch.ones_like(y)
    dy[:, inside] = float("nan")
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx[:, inside].isnan().all() and dx[:, ~inside].isfinite().all()


def test_nothing_is_saved_but_the_arguments_and_the_row_table() -> None:
    """At the 7B width and 32,768 tokens that is at most 3 % of x beyond x."""
    saved: list[Tensor] = []
    inputs = inputs_of(ROW + 3, torch.float32) | {"starts": torch.rand(2, ROW + 3) < 0.2}
    inputs["x"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda v: (saved.append(v), v)[1], lambda v: v):
        triton(**inputs)
    B, L, D, N = 2, ROW + 3, 3, 2
    shapes = sorted(tuple(v.shape) for v in saved)
    tables = [(B, L + 1), (B,)]
    assert shapes == sorted([(B, L, D), (D, N), (D, N), (D, N), (D, N, 2), (D,), (B, D, N, 2), *tables])
    L, D, N = 32_768, 4096, 16
    beyond = D * N * (4 + 8 + 8 + 8 + 8) + 4 * D + 4 * (L + 2)
    assert beyond <= 0.03 * (2 * L * D)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_the_row_table_is_the_cut_of_the_documents(length: int, size: int, seed: int) -> None:
    starts = torch.rand(3, length, generator=torch.Generator().manual_seed(seed)) < 0.3
    table, num_rows = row_table(starts, size)
    rows = cut(starts, size, starts)
    for b in range(3):
        R = int(num_rows[b])
        assert int((rows.length[b] > 0).sum()) == R
        assert (table[b, R:] == 2 * length).all()
        first = table[b, : R + 1] // 2
        assert torch.equal(first.diff(), rows.length[b, :R].int())
        assert torch.equal(table[b, :R] % 2 == 1, rows.begins[b, :R])


def test_the_operators_are_what_they_say() -> None:
    from megalodon_kernels.cema.kernel import cema_backward, cema_backward_parameters, cema_forward

    inputs = inputs_of(ROW + 1, torch.float32)
    x, h0 = inputs.pop("x"), inputs.pop("h0")
    table = row_table(torch.rand(2, ROW + 1) < 0.2, ROW)
    parameters = [inputs[n] for n in ("p", "log_decay", "angle", "gamma", "omega")]
    torch.library.opcheck(cema_forward.op, (x, *parameters, h0, *table))
    dx, d_last, g = cema_backward(x, h0, *parameters, *table, True)
    utils = ("test_schema", "test_faketensor")  # g is undefined where no row needs it: two runs need not agree there
    torch.library.opcheck(cema_backward.op, (x, h0, *parameters, *table, True), test_utils=utils)
    torch.library.opcheck(cema_backward_parameters.op, (x, dx, g, *parameters, h0, d_last, *table))
