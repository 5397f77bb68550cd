"""The step of decoding: every backend = the reference, which composes the ops of any length; states move in place."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tolerances import OP, assert_close
from torch import Tensor

from megalodon_kernels import KernelError
from megalodon_kernels.decode import attention_step, norm_cema_step, norm_step

Inputs = dict[str, Any]
STEPS = 23
NORM_STEPS = 9
BACKENDS = ("portable", "triton")


def norm_state(wide: torch.dtype) -> Inputs:
    """Four rows, 15 features in 3 groups; the last row has seen nothing."""
    B, D, G = 4, 15, 3
    draw = torch.Generator().manual_seed(1)
    count = torch.tensor([7, 1, 30, 0])
    empty = (count == 0)[:, None]
    return {
        "count": count,
        "mean": (3 + torch.randn(B, G, generator=draw, dtype=wide)).masked_fill(empty, 0),
        "var": (0.5 + torch.rand(B, G, generator=draw, dtype=wide)).masked_fill(empty, 1),
        "scale": 1 + 0.1 * torch.randn(D, generator=draw, dtype=wide),
        "bias": 0.1 * torch.randn(D, generator=draw, dtype=wide),
    }


def cema_state(wide: torch.dtype) -> Inputs:
    B, D, N = 4, 15, 5
    draw = torch.Generator().manual_seed(2)
    decay, angle, p = (torch.rand(D, N, generator=draw, dtype=wide) for _ in range(3))
    return norm_state(wide) | {
        "h": torch.randn(B, D, N, 2, generator=draw, dtype=wide),
        "p": p,
        "q": torch.view_as_real(torch.polar(0.999 * decay, 3 * angle)),
        "gamma": torch.randn(D, N, 2, generator=draw, dtype=wide),
        "omega": torch.randn(D, generator=draw, dtype=wide),
    }


def tokens(dtype: torch.dtype) -> Iterator[Tensor]:
    draw = torch.Generator().manual_seed(3)
    for _ in range(NORM_STEPS):
        yield (3 + torch.randn(4, 15, generator=draw)).to(dtype)


def run(prepare: Callable[..., Any], inputs: Inputs, dtype: torch.dtype, backend: str) -> tuple[list[Tensor], Inputs]:
    """Outputs of all steps one behind the other, and the state after them."""
    inputs = {name: x.clone() for name, x in inputs.items()}
    step = prepare(**inputs, dtype=dtype, backend=backend)
    outputs = []
    for x in tokens(dtype):
        y = step(x)
        outputs.append(torch.cat([piece.clone() for piece in (y if isinstance(y, tuple) else (y,))], dim=-1))
    return outputs, inputs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.float64, torch.float64), (torch.float32, torch.float64), (torch.float32, torch.float32)],
)
@pytest.mark.parametrize(("prepare", "state"), [(norm_step, norm_state), (norm_cema_step, cema_state)])
def test_norm_and_cema_are_the_ops_with_one_token(prepare, state, dtype, wide, backend) -> None:
    inputs = state(wide)
    expected, expected_state = run(prepare, inputs, dtype, "reference")
    actual, actual_state = run(prepare, inputs, dtype, backend)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        assert_close(a, e, OP[dtype])
    assert torch.equal(actual_state["count"], inputs["count"] + NORM_STEPS)
    for name in {"mean", "var", "h"} & inputs.keys():
        assert_close(actual_state[name], expected_state[name], OP[dtype], name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_rounded_where_the_reference_is(backend) -> None:
    """Statistics and averages take x as it is, so the states agree; outputs may differ in the last bit of bfloat16."""
    inputs = cema_state(torch.float64)
    expected, expected_state = run(norm_cema_step, inputs, torch.bfloat16, "reference")
    actual, actual_state = run(norm_cema_step, inputs, torch.bfloat16, backend)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.bfloat16
        # Triton's interpreter cuts off what a GPU rounds.
        assert_close(a, e, 2**-6 if backend == "triton" else 2**-7)
    assert_close(actual_state["mean"], expected_state["mean"], 1e-6)


def attention_inputs(dtype: torch.dtype, rows: int = 3, heads: int = 2) -> tuple[Inputs, list[tuple[Tensor, ...]]]:
    """Rows at different places of chunks of 7, one of them about to begin one; enough steps to wrap three times."""
    C, Z, V = 7, 4, 10
    draw = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(rows, heads, *shape, generator=draw).to(dtype)

    state = {"k_cache": normal(C, Z), "v_cache": normal(C, V), "slot": torch.tensor([5, 0, 2])[:rows]}
    return state, [(normal(Z), normal(Z), normal(V)) for _ in range(STEPS)]


def attend(state: Inputs, calls: list[tuple[Tensor, ...]], backend: str, known: bool) -> tuple[list[Tensor], Inputs]:
    state = {name: x.clone() for name, x in state.items()}
    step, slot, C = attention_step(**state, backend=backend), state["slot"], state["k_cache"].shape[2]
    outputs = []
    for q, k, v in calls:
        outputs.append(step(q, k, v, int(slot.max()) + 1 if known else None).clone())
        slot.add_(1).remainder_(C)
    return outputs, state


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("rows", "heads"), [(3, 2), (3, 1), (1, 2), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_is_the_op_with_one_token(dtype, rows, heads, known, backend) -> None:
    state, calls = attention_inputs(dtype, rows, heads)
    expected, expected_state = attend(state, calls, "reference", known)
    actual, actual_state = attend(state, calls, backend, known)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        assert_close(a, e, OP[dtype])
    for name in state:
        assert torch.equal(actual_state[name], expected_state[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_behind_the_slot_does_not_matter(backend) -> None:
    state, calls = attention_inputs(torch.float32)
    expected, _ = attend(state, calls[:2], backend, False)
    for row, own in enumerate(state["slot"].tolist()):
        state["k_cache"][row, :, own:] = 1e4
        state["v_cache"][row, :, own:] = 1e4
    actual, _ = attend(state, calls[:2], backend, False)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_two_threads_share_the_values_of_one_head() -> None:
    state, calls = attention_inputs(torch.float32, 1, 1)
    expected, _ = attend(state, calls, "reference", True)
    torch.set_num_threads(2)
    try:
        actual, _ = attend(state, calls, "portable", True)
    finally:
        torch.set_num_threads(1)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, OP[torch.float32])


def test_sizes_that_disagree_are_named() -> None:
    inputs = cema_state(torch.float64)
    with pytest.raises(ValueError, match=r"norm_cema_step: h is \(4, 15, 3, 2\) but p is \(15, 5\) with 4 rows"):
        norm_cema_step(**(inputs | {"h": torch.zeros(4, 15, 3, 2)}), dtype=torch.float32)
    with pytest.raises(ValueError, match="norm_step: mean has 4 groups; expected a divisor of D = 15"):
        norm_step(**(norm_state(torch.float64) | {"mean": torch.zeros(4, 4)}), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"attention_step: slot is \(2,\) but k_cache is \(3, 2, 7, 4\)"):
        attention_step(**(attention_inputs(torch.float32)[0] | {"slot": torch.zeros(2, dtype=torch.int64)}))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_no_rows_are_refused(backend) -> None:
    of_row = ("count", "mean", "var", "h", "k_cache", "v_cache", "slot")

    def none(inputs: Inputs) -> Inputs:
        return {name: x[:0] if name in of_row else x for name, x in inputs.items()}

    with pytest.raises(ValueError, match=r"norm_step: mean is \(0, 3\); expected \(B, G\) with B ≥ 1"):
        norm_step(**none(norm_state(torch.float64)), dtype=torch.float32, backend=backend)
    with pytest.raises(ValueError, match=r"norm_cema_step: mean is \(0, 3\); expected \(B, G\) with B ≥ 1"):
        norm_cema_step(**none(cema_state(torch.float64)), dtype=torch.float32, backend=backend)
    with pytest.raises(ValueError, match=r"attention_step: k_cache is \(0, 2, 7, 4\); expected .* with B ≥ 1"):
        attention_step(**none(attention_inputs(torch.float32)[0]), backend=backend)


def test_a_state_that_does_not_lie_whole_is_refused() -> None:
    """Written through a copy, it would stay what it was."""
    caches = attention_inputs(torch.float32)[0]
    turned = caches["v_cache"].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match=r"attention_step: v_cache has strides .*; expected it contiguous"):
        attention_step(**(caches | {"v_cache": turned}))
    inputs = cema_state(torch.float64)
    turned = inputs["h"].transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(ValueError, match="norm_cema_step: h has strides"):
        norm_cema_step(**(inputs | {"h": turned}), dtype=torch.float32)


def test_a_backend_asked_for_by_name_runs_or_raises() -> None:
    with pytest.raises(KernelError, match="attention_step: backend is 'cuda'; expected one of auto, reference"):
        attention_step(**attention_inputs(torch.float32)[0], backend="cuda")


def large_norm(D: int) -> Callable[[str], Any]:
    row, features = torch.ones(1, 1, dtype=torch.float64), torch.zeros(D)
    count = torch.zeros(1, dtype=torch.int64)
    return lambda backend: norm_step(count, row, row, features, features, torch.float32, backend=backend)


def large_cema(D: int, N: int) -> Callable[[str], Any]:
    row, features, count = torch.ones(1, 1), torch.zeros(D), torch.zeros(1, dtype=torch.int64)
    p, pairs = torch.zeros(D, N), torch.zeros(D, N, 2)
    state, coefficients = (count, row, row, pairs[None]), (features, features, p, pairs, pairs, features)
    return lambda backend: norm_cema_step(*state, *coefficients, torch.float32, backend=backend)


def large_attention(C: int, Z: int) -> Callable[[str], Any]:
    slot = torch.zeros(1, dtype=torch.int64)
    return lambda backend: attention_step(torch.zeros(1, 1, C, Z), torch.zeros(1, 1, C, 2), slot, backend=backend)


@pytest.mark.parametrize(
    ("prepare", "largest", "beyond", "message"),
    [
        (large_norm, (16_384,), (16_385,), "norm_step: .*: D/G is 16385, expected at most 16384"),
        (large_cema, (512, 16), (513, 16), "norm_cema_step: .*: D/G is 513 and N 16, 16384 states a group, expected"),
        (large_cema, (512, 16), (512, 17), "norm_cema_step: .*: D/G is 512 and N 17, 16384 states a group, expected"),
        (large_attention, (32_768, 1), (32_769, 1), "attention_step: .*: C is 32769, expected at most 32768"),
        (large_attention, (3, 1024), (3, 1025), "attention_step: .*: Z is 1025, expected at most 1024"),
    ],
)
def test_what_does_not_fit_one_program_is_refused_by_name(prepare, largest, beyond, message) -> None:
    prepare(*largest)("triton")
    with pytest.raises(KernelError, match=message):
        prepare(*beyond)("triton")
    prepare(*beyond)("auto")


def test_kernels_write_what_their_schema_says_and_nothing_else() -> None:
    from megalodon_kernels.decode.kernel import attend, move_norm

    inputs = {name: x.clone() for name, x in cema_state(torch.float64).items()}
    x, u, ema = (torch.randn(4, 15, dtype=torch.float64) for _ in range(3))
    state, coefficients = [inputs[n] for n in ("count", "mean", "var", "scale", "bias")], ("p", "q", "gamma", "omega")
    torch.library.opcheck(move_norm.op, (x, *state, u, inputs["h"], *[inputs[n] for n in coefficients], ema, 1e-5))
    caches, calls = attention_inputs(torch.float32)
    scores, y = torch.zeros(3, 2, 7), torch.zeros(3, 2, 10)
    torch.library.opcheck(attend.op, (*calls[0], caches["slot"], caches["k_cache"], caches["v_cache"], scores, y))
