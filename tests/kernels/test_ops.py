"""What holds for every op: portable = reference in every output and gradient, gradcheck, documents kept apart."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import OP, OP_BF16, OP_BF16_TRUNCATED, assert_close
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

import megalodon_kernels
from megalodon_kernels import KernelError, Statistics
from megalodon_kernels.cases import cases
from megalodon_kernels.chunk_attention.open_chunk import open_lengths
from megalodon_kernels.dispatch import INTERPRETED

OPS = ("cema", "timestep_norm", "chunk_attention")
"""Ops with a state and document starts."""
FAST = {
    "cema": ("portable", "triton"),
    "timestep_norm": ("portable", "triton"),
    "chunk_attention": ("portable", "triton"),
    "rms_norm": ("portable", "triton"),
    "layer_norm": ("portable", "triton"),
    "swiglu": ("portable", "triton"),
    "qk_rope": ("portable", "triton"),
    "linear_cross_entropy": ("portable", "triton"),
}
"""Op -> the implementations that must agree with its reference."""
SEQUENCES = ("x", "q", "k", "v", "z", "turn", "gate", "a", "b", "starts")
"""Inputs whose second dimension is time."""
WITH_STATE = [(op, backend) for op in OPS for backend in ("reference", *FAST[op])]
CASES = [
    (op, backend, name, dtype)
    for op, backends in FAST.items()
    for backend in backends
    for name, _ in cases(op)
    for dtype in (torch.float64, torch.float32)
    # Three seconds each in the interpreter; bfloat16 and chunks of several blocks run them in float32.
    if not (
        (op, backend) == ("chunk_attention", "triton")
        and name.startswith("L150")
        and (name, dtype) != ("L150-state-starts", torch.float64)
    )
]


def case(op: str, name: str, dtype: torch.dtype) -> dict[str, Any]:
    return dict(cases(op, dtype))[name]


def run(
    op: str, inputs: dict[str, Any], backend: str, function: Callable[..., Any] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of every float input for a random cotangent of every float output."""
    function = function or getattr(megalodon_kernels, op)
    leaves, tree = tree_flatten(inputs)
    leaves = [x.clone().requires_grad_() if is_float(x) else x for x in leaves]
    outputs = tree_flatten(function(**tree_unflatten(leaves, tree), backend=backend))[0]
    draw = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=draw, dtype=torch.float64) for y in outputs if is_float(y)]
    total = sum((y * dy).sum() for y, dy in zip(filter(is_float, outputs), cotangents, strict=True))
    inputs_with_gradient = [x for x in leaves if is_float(x)]
    gradients = torch.autograd.grad(total, inputs_with_gradient, allow_unused=True)
    return outputs, [
        torch.zeros_like(x) if g is None else g for x, g in zip(inputs_with_gradient, gradients, strict=True)
    ]


def is_float(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


@pytest.mark.parametrize(("op", "backend", "name", "dtype"), CASES)
def test_each_implementation_is_the_reference(op: str, backend: str, name: str, dtype: torch.dtype) -> None:
    inputs = case(op, name, dtype)
    expected, expected_gradients = run(op, inputs, "reference")
    actual, actual_gradients = run(op, inputs, backend)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == e.dtype
        if is_float(e):
            assert_close(a, e, OP[dtype], f"output {i}")
        else:
            assert torch.equal(a, e), f"output {i}"
    for i, (a, e) in enumerate(zip(actual_gradients, expected_gradients, strict=True)):
        # A token that sees one key has weight 1 whatever its score: the gradient is 0 up to rounding of both sides.
        if e.abs().max() > 1e-6:
            assert_close(a, e, OP[dtype], f"gradient {i}")
        else:
            assert a.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("op", "backend"), [(op, backend) for op, backends in FAST.items() for backend in ("reference", *backends)]
)
def test_gradcheck(op: str, backend: str) -> None:
    """Numerical derivatives in float64 of every input, states included, with document starts."""
    inputs = case(op, "L37-state-starts" if op in OPS else "L37", torch.float64)
    length = 1 if op not in OPS else 7
    short = {k: v[:, :length] if k in SEQUENCES else v for k, v in inputs.items()}
    short |= {k: v[:4] for k, v in inputs.items() if k in ("hidden", "targets")}
    fixed = {"turn": short.pop("turn")} if "turn" in short else {}
    leaves, tree = tree_flatten(short)
    places = [i for i, x in enumerate(leaves) if is_float(x)]

    def function(*floats: Tensor) -> tuple[Tensor, ...]:
        filled = list(leaves)
        for i, x in zip(places, floats, strict=True):
            filled[i] = x
        outputs = getattr(megalodon_kernels, op)(**tree_unflatten(filled, tree), **fixed, backend=backend)
        return tuple(filter(is_float, tree_flatten(outputs)[0]))

    # The interpreter takes 0.2 s a call: there along random directions, not along every axis.
    fast = backend == "triton" and op in OPS
    assert torch.autograd.gradcheck(function, [leaves[i].clone().requires_grad_() for i in places], fast_mode=fast)


@pytest.mark.parametrize(("op", "backend"), WITH_STATE)
def test_nan_in_one_document_stays_there(op: str, backend: Any) -> None:
    inputs = case(op, "L37-starts", torch.float32)
    rows = len(inputs["starts"])
    inputs["starts"] = torch.zeros(rows, 37, dtype=torch.bool)
    inputs["starts"][:, [0, 13, 29]] = True
    for name in {"x", "q", "k", "v"} & inputs.keys():
        inputs[name][:, 13:29] = float("nan")
    y = getattr(megalodon_kernels, op)(**inputs, backend=backend)[0]
    assert y[:, :13].isfinite().all()
    assert y[:, 13:29].isnan().all()
    assert y[:, 29:].isfinite().all()


@pytest.mark.parametrize(("op", "backend"), WITH_STATE)
def test_a_start_selects_the_state_away(op: str, backend: Any) -> None:
    """Whatever the incoming state holds, a document that begins here must not see it."""
    inputs = case(op, "L37-state-starts", torch.float32)
    inputs["starts"][:, 0] = True
    expected = getattr(megalodon_kernels, op)(**inputs, backend=backend)[0]
    for name in {"h0", "open_k", "open_v"} & inputs.keys():
        inputs[name] = torch.full_like(inputs[name], float("nan"))
    if "state" in inputs:
        count, mean, var = inputs["state"]
        inputs["state"] = Statistics(count, mean * float("nan"), var * float("nan"))
    actual = getattr(megalodon_kernels, op)(**inputs, backend=backend)[0]
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", ["reference", "portable", "triton"])
def test_what_lies_behind_a_rows_open_keys_is_ignored(backend: Any) -> None:
    inputs = case("chunk_attention", "L37-state", torch.float32)
    expected = megalodon_kernels.chunk_attention(**inputs, backend=backend)[0]
    for row, own in enumerate((inputs["position"] % inputs["chunk_size"]).tolist()):
        inputs["open_k"][row, own:] = float("nan")
        inputs["open_v"][row, own:] = float("inf")
    assert torch.equal(megalodon_kernels.chunk_attention(**inputs, backend=backend)[0], expected)


@pytest.mark.parametrize("backend", ["reference", "portable", "triton"])
@pytest.mark.parametrize("name", ["L37", "L37-state", "L37-starts", "L37-state-starts"])
def test_attention_may_be_told_how_long_the_open_chunk_becomes(backend: Any, name: str) -> None:
    inputs = case("chunk_attention", name, torch.float32)
    expected = megalodon_kernels.chunk_attention(**inputs, backend=backend)
    filled, starts, C = inputs.get("position", torch.zeros(3, dtype=torch.int64)), inputs.get("starts"), 16
    lengths = open_lengths(filled % C, starts, C, 37)
    assert int(lengths.max()) == expected[1].shape[1]
    for row, length in enumerate(lengths.tolist()):
        own = expected[1][row].flatten(1).any(1)
        assert own[:length].all() and not own[length:].any()
    actual = megalodon_kernels.chunk_attention(**inputs, longest=int(lengths.max()), backend=backend)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("backend", ["reference", "portable", "triton"])
def test_without_a_position_no_key_is_open(backend: Any) -> None:
    inputs = case("chunk_attention", "L37-state-starts", torch.float32)
    del inputs["position"]
    given = megalodon_kernels.chunk_attention(**inputs, backend=backend)
    del inputs["open_k"], inputs["open_v"]
    for a, e in zip(given, megalodon_kernels.chunk_attention(**inputs, backend=backend), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("portable", torch.float64), ("portable", torch.float32), ("triton", torch.float32)]
)
def test_chunks_of_several_blocks(backend: str, dtype: torch.dtype) -> None:
    """Chunks longer than a block of queries, rows at different places in them, a document that begins inside."""
    draw = torch.Generator().manual_seed(0)
    B, L, H, Z, V, C, P = 2, 330, 1, 4, 5, 300, 141
    inputs: dict[str, Any] = {
        name: torch.randn(B, length, H, width, generator=draw, dtype=dtype)
        for name, length, width in (("q", L, Z), ("k", L, Z), ("v", L, V), ("open_k", P, Z), ("open_v", P, V))
    }
    inputs |= {"chunk_size": C, "position": torch.tensor([C + P, 2]), "starts": torch.zeros(B, L, dtype=torch.bool)}
    inputs["starts"][1, 9] = True
    expected, expected_gradients = run("chunk_attention", inputs, "reference")
    actual, gradients = run("chunk_attention", inputs, backend)
    for a, e in zip(actual + gradients, expected + expected_gradients, strict=True):
        assert_close(a, e, OP[dtype])


@pytest.mark.parametrize(("op", "backend"), [(op, backend) for op, backends in FAST.items() for backend in backends])
def test_bfloat16_is_the_reference_rounded(op: str, backend: str) -> None:
    """bf16 inputs; statistics, states and sums in float32 or better: a few roundings of the reference on them."""
    truncated = INTERPRETED and (op, backend) == ("chunk_attention", "triton")
    tolerance = OP_BF16_TRUNCATED if truncated else OP_BF16
    inputs = case(op, "L150-state-starts" if op in OPS else "L150", torch.float32)
    for name in {"x", "q", "k", "v", "open_k", "open_v", "gate", "a", "b", "z", "hidden"} & inputs.keys():
        inputs[name] = inputs[name].bfloat16()
    (expected, expected_gradients), (actual, gradients) = (run(op, inputs, b) for b in ("reference", backend))
    for a, e in zip(actual + gradients, expected + expected_gradients, strict=True):
        assert a.dtype == e.dtype
        assert_close(a, e, tolerance)


def test_a_cache_of_another_precision_takes_that_of_the_call() -> None:
    inputs = case("chunk_attention", "L37-state", torch.float32)
    narrow = {n: inputs[n].bfloat16() for n in ("q", "k", "v")}
    for value in megalodon_kernels.chunk_attention(**(inputs | narrow)):
        assert value.dtype == torch.bfloat16


def test_no_open_chunk_keeps_no_storage() -> None:
    """A view of no keys would keep all keys of the call alive."""
    inputs = case("chunk_attention", "L37", torch.float32) | {"chunk_size": 37}
    _, open_k, open_v = megalodon_kernels.chunk_attention(**inputs)
    assert open_k.shape == (3, 0, 2, 4) and open_v.shape == (3, 0, 2, 5)
    assert open_k.untyped_storage().nbytes() == open_v.untyped_storage().nbytes() == 0


@pytest.mark.parametrize(("op", "backend"), [(op, backend) for op, backends in FAST.items() for backend in backends])
def test_inputs_may_lie_in_memory_as_they_like(op: str, backend: str) -> None:
    """Every tensor strided, so that no two neighbours lie side by side: the same bits."""
    inputs = case(op, "L37-state-starts" if op in OPS else "L37", torch.float32)

    def strided(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return torch.stack([x, torch.full_like(x, 3)], dim=-1)[..., 0] if x.dim() else x

    leaves, tree = tree_flatten(inputs)
    expected, expected_gradients = run(op, inputs, backend)
    actual, gradients = run(op, tree_unflatten([strided(x) for x in leaves], tree), backend)
    for a, e in zip(actual + gradients, expected + expected_gradients, strict=True):
        assert_close(a, e, OP[torch.float32])


@pytest.mark.parametrize("target", [-3, 11])
def test_a_target_that_is_no_class_is_named(target: int) -> None:
    inputs = case("linear_cross_entropy", "L37", torch.float32)
    inputs["targets"][5] = target
    classes = inputs.get("num_classes") or len(inputs["weight"])
    assert target < 0 or target >= classes
    with pytest.raises(ValueError, match=rf"a target is {target}; expected 0 … {classes - 1}, or -100"):
        megalodon_kernels.linear_cross_entropy(**inputs)


@pytest.mark.parametrize("backend", ["reference", "portable", "triton"])
def test_swiglu_without_a_second_factor_is_silu(backend: Any) -> None:
    a = case("swiglu", "L37", torch.float64)["a"].requires_grad_()
    y = megalodon_kernels.swiglu(a, backend=backend)
    expected = torch.nn.functional.silu(a)
    assert_close(y, expected, OP[torch.float64])
    (gradient,) = torch.autograd.grad(y.square().sum(), a)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), a)
    assert_close(gradient, expected_gradient, OP[torch.float64])


def test_swiglu_refuses_two_dtypes() -> None:
    a = torch.zeros(3)
    with pytest.raises(ValueError, match=r"swiglu: b is torch\.bfloat16 but a is torch\.float32"):
        megalodon_kernels.swiglu(a, a.bfloat16())


@pytest.mark.parametrize("backend", ["portable", "triton"])
@pytest.mark.parametrize(("narrow", "wide"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_queries_and_keys_come_in_the_dtype_asked_for(backend: Any, narrow: torch.dtype, wide: torch.dtype) -> None:
    """Another dtype out than in, both ways; the gradient has that of z."""
    inputs = case("qk_rope", "L37", wide)
    for dtype, asked in ((wide, narrow), (narrow, wide)):
        given = inputs | {"z": inputs["z"].to(dtype), "dtype": asked}
        (expected, _), (actual, gradients) = (run("qk_rope", given, b) for b in ("reference", backend))
        assert [x.dtype for x in actual] == [asked, asked] and gradients[0].dtype != asked
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, OP_BF16 if narrow == torch.bfloat16 else OP[narrow])


@pytest.mark.parametrize("backend", ["portable", "triton"])
def test_an_ignored_token_has_no_part_in_the_loss_whatever_it_is(backend: Any) -> None:
    inputs = case("linear_cross_entropy", "L37", torch.float32)
    scored = inputs["targets"] != -100
    short = inputs | {name: inputs[name][scored] for name in ("hidden", "targets")}
    expected, (d_short, d_weight) = run("linear_cross_entropy", short, backend)
    inputs["hidden"][~scored] = float("nan")
    actual, gradients = run("linear_cross_entropy", inputs, backend)
    for a, e in zip([*actual, gradients[1]], [*expected, d_weight], strict=True):
        assert_close(a, e, OP[torch.float32])
    assert_close(gradients[0][scored], d_short, OP[torch.float32])
    assert not gradients[0][~scored].any()


@pytest.mark.parametrize("backend", ["portable", "triton"])
def test_logits_of_any_size_have_a_loss(backend: Any) -> None:
    """A probability that underflows still has a logarithm, and one gradient alone may be wanted."""
    hidden = torch.tensor([[300.0], [-300.0], [1.0]], requires_grad=True)
    weight, targets = torch.tensor([[1.0], [-1.0], [0.5]]), torch.tensor([1, 1, 2])
    sums = megalodon_kernels.linear_cross_entropy(hidden, weight, targets, backend=backend)
    expected = torch.nn.functional.cross_entropy((hidden @ weight.mT).double(), targets, reduction="sum")
    assert_close(sums.loss, expected, OP[torch.float32])
    (actual,), (wanted,) = (torch.autograd.grad(x, hidden) for x in (sums.objective, expected))
    assert_close(actual, wanted, OP[torch.float32])


def test_operators_are_registered_as_they_behave() -> None:
    """Schemas, fakes and aliasing of the launchers, by PyTorch's own check; a gradient not wanted, too."""
    from megalodon_kernels.linear_cross_entropy.kernel import linear_cross_entropy_blocks
    from megalodon_kernels.qk_rope.kernel import qk_rope_backward, qk_rope_forward

    z, gamma, beta, turn = (case("qk_rope", "L1", torch.float32)[n] for n in ("z", "gamma", "beta", "turn"))
    q, k = qk_rope_forward(z, gamma, beta, turn, 1e-5, torch.float32)
    logits = [case("linear_cross_entropy", "L37", torch.float32)[n] for n in ("hidden", "weight", "targets")]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for operator, arguments in (
        (qk_rope_forward, (z, gamma, beta, turn, 1e-5, torch.float32)),
        (qk_rope_backward, (q, k, z, gamma, turn, 1e-5)),
        (linear_cross_entropy_blocks, (*logits, 16, 9, 0.1, torch.float32, True, True)),
        (linear_cross_entropy_blocks, (*logits, 16, 9, 0.0, torch.float32, True, False)),
    ):
        torch.library.opcheck(operator.op, arguments, test_utils=tests)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile itself does it
@pytest.mark.parametrize("op", [op for op, backends in FAST.items() if "triton" in backends])
def test_kernels_run_inside_one_compiled_graph(op: str) -> None:
    """torch.compile takes each launcher as one operator: no graph break, the same bits as eager, gradients too."""
    # Where a chunk is open, the keys that attention returns have a length that depends on values.
    inputs = case(op, "L37-state-starts" if op in ("cema", "timestep_norm") else "L37", torch.float32)
    expected, expected_gradients = run(op, inputs, "triton")
    compiled = torch.compile(getattr(megalodon_kernels, op), fullgraph=True, backend="aot_eager")
    actual, gradients = run(op, inputs, "triton", compiled)
    for a, e in zip(actual + gradients, expected + expected_gradients, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("op", OPS)
def test_a_backend_asked_for_by_name_runs_or_raises(op: str) -> None:
    with pytest.raises(KernelError, match=f"{op}: backend is 'cuda'; expected one of auto, reference, portable"):
        getattr(megalodon_kernels, op)(**case(op, "L1", torch.float32), backend="cuda")


def without_rows(op: str) -> dict[str, Any]:
    """The inputs of an op with B = 0; of `linear_cross_entropy` with no token, which is what is left of them there."""
    batched = {*SEQUENCES, "hidden", "targets", "h0", "state", "position", "open_k", "open_v"}

    def none(x: Any) -> Any:
        return Statistics(*(field[:0] for field in x)) if isinstance(x, Statistics) else x[:0]

    inputs = case(op, "L37-state-starts" if op in OPS else "L37", torch.float32)
    return {name: none(x) if name in batched else x for name, x in inputs.items()}


@pytest.mark.parametrize("backend", ["reference", "portable", "triton"])
@pytest.mark.parametrize("op", FAST)
def test_no_rows_are_refused_by_ops_with_a_state_and_are_no_rows_to_the_others(op: str, backend: Any) -> None:
    inputs = without_rows(op)
    if op in OPS:
        shape = re.escape(str(tuple(inputs["q" if op == "chunk_attention" else "x"].shape)))
        with pytest.raises(ValueError, match=rf"^{op}: . is {shape}; expected \(B, L, .*\) with B ≥ 1 and L ≥ 1$"):
            getattr(megalodon_kernels, op)(**inputs, backend=backend)
        return
    outputs, gradients = run(op, inputs, backend)
    assert [y.shape for y in outputs] == [y.shape for y in run(op, inputs, "reference")[0]]
    assert all(not y.numel() or not y.any() for y in [*outputs, *gradients])


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("cema", {"p": (4, 3)}, r"cema: p is \(4, 3\) but x is \(2, 37, 5\) with N = 3; expected \(5, 3\)"),
        ("cema", {"h0": (2, 3, 5, 2)}, r"cema: h0 is \(2, 3, 5, 2\)"),
        ("cema", {"x": (2, 0, 5)}, r"cema: x is \(2, 0, 5\); expected \(B, L, D\) with B ≥ 1 and L ≥ 1"),
        ("timestep_norm", {"weight": (23,)}, r"timestep_norm: weight is \(23,\) but x is \(2, 37, 24\)"),
        ("qk_rope", {"gamma": (2, 29)}, r"qk_rope: gamma is \(2, 29\) but z is \(4, 37, 12\); expected \(2, 12\)"),
        ("qk_rope", {"turn": (4, 36, 3, 2)}, r"qk_rope: turn is \(4, 36, 3, 2\) but z is \(4, 37, 12\)"),
        ("qk_rope", {"z": (4, 37, 11)}, r"qk_rope: z is \(4, 37, 11\) and turn \(4, 37, 3, 2\); expected \(B, L, Z\)"),
        (
            "linear_cross_entropy",
            {"weight": (11, 6)},
            r"weight is \(11, 6\) but hidden is \(37, 5\); expected \(11, 5\)",
        ),
        (
            "linear_cross_entropy",
            {"hidden": (2, 37, 5)},
            r"hidden is \(2, 37, 5\) and weight \(11, 5\); expected \(T, D\)",
        ),
        ("chunk_attention", {"v": (3, 36, 2, 5)}, r"chunk_attention: v is \(3, 36, 2, 5\) but q is \(3, 37, 2, 4\)"),
    ],
)
def test_sizes_that_disagree_are_named(op: str, change: dict[str, tuple[int, ...]], message: str) -> None:
    inputs = case(op, "L37", torch.float32) | {name: torch.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        getattr(megalodon_kernels, op)(**inputs)


def test_groups_must_divide_the_features() -> None:
    inputs = case("timestep_norm", "L37", torch.float32) | {"num_groups": 5}
    with pytest.raises(ValueError, match="num_groups is 5; expected a divisor of D = 24"):
        megalodon_kernels.timestep_norm(**inputs)


def test_attention_refuses_a_cache_that_is_too_short() -> None:
    inputs = case("chunk_attention", "L37", torch.float32) | {"position": torch.tensor([5, 0, 3])}
    with pytest.raises(ValueError, match="5 tokens are in the open chunk but open_k holds 0"):
        megalodon_kernels.chunk_attention(**inputs)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("backend", ["reference", "portable", "triton"])
def test_padding_moves_nothing(backend: Any, with_state: bool) -> None:
    """TimestepNorm with padded steps, even of NaN, = without these steps: outputs, statistics and gradients."""
    inputs = case("timestep_norm", "L37-state", torch.float64)
    row = {k: v[:1] if k == "x" else v for k, v in inputs.items() if k != "state"}
    if with_state:
        row["state"] = Statistics(*(field[:1] for field in inputs["state"]))
    padding = torch.zeros(1, 37, dtype=torch.bool)
    padding[0, [0, 1, 9, 20, 36]] = True
    poisoned = row["x"].masked_fill(padding[..., None], float("nan")).requires_grad_()
    kept = row["x"][:, ~padding[0]].clone().requires_grad_()
    weights = [row["weight"].clone().requires_grad_() for _ in range(2)]
    y, after = megalodon_kernels.timestep_norm(
        **(row | {"x": poisoned, "weight": weights[0]}), padding=padding, backend=backend
    )
    z, expected = megalodon_kernels.timestep_norm(**(row | {"x": kept, "weight": weights[1]}), backend=backend)
    assert (y[padding] == 0).all()
    assert_close(y[~padding], z[0], OP[torch.float64])
    assert int(after.count) == int(expected.count)
    assert_close(after.mean, expected.mean, OP[torch.float64])
    assert_close(after.var, expected.var, OP[torch.float64])
    (y.square().sum() + (after.mean * after.var).sum()).backward()
    (z.square().sum() + (expected.mean * expected.var).sum()).backward()
    assert (poisoned.grad[padding] == 0).all()
    assert_close(poisoned.grad[~padding], kept.grad[0], OP[torch.float64])
    assert_close(weights[0].grad, weights[1].grad, OP[torch.float64])


@pytest.mark.parametrize("backend", ["reference", "portable", "triton"])
def test_padding_alone_returns_the_statistics_that_came(backend: Any) -> None:
    inputs = case("timestep_norm", "L37-state", torch.float64)
    padding = torch.ones(2, 37, dtype=torch.bool)
    for state in (inputs["state"], None):
        y, after = megalodon_kernels.timestep_norm(**(inputs | {"state": state}), padding=padding, backend=backend)
        expected = state or megalodon_kernels.no_statistics(3).over(2)
        assert not y.any() and torch.equal(after.count, expected.count)
        seen = expected.count > 0
        assert torch.equal(after.mean[seen], expected.mean[seen])
        assert torch.equal(after.var[seen], expected.var[seen])
        assert after.mean.isfinite().all() and after.var.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "portable", "triton"])
def test_constant_input_has_variance_zero(backend: Any) -> None:
    inputs = case("timestep_norm", "L37", torch.float32)
    constant = torch.full_like(inputs["x"], 2.5)
    y, after = megalodon_kernels.timestep_norm(**(inputs | {"x": constant}), backend=backend)
    assert torch.equal(y, inputs["bias"].expand_as(y))
    assert (after.var == 0).all()


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 128, 200])
def test_decay_of_zero_and_of_almost_one(length: int) -> None:
    """|q| = 0 remembers nothing, |q| → 1 sums everything, and both have finite gradients."""
    x = torch.randn(2, length, 3, dtype=torch.float64)
    p, gamma = torch.ones(3, 1, dtype=torch.float64), torch.zeros(3, 1, 2, dtype=torch.float64)
    gamma[..., 0] = 1
    angle, omega = torch.zeros(3, 1, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    log_decay = torch.tensor([[-36.04], [-1e-12], [-36.04]], dtype=torch.float64, requires_grad=True)
    y, _ = megalodon_kernels.cema(x, p, log_decay, angle, gamma, omega)
    assert_close(y[..., 0], x[..., 0], 1e-12)
    assert_close(y[..., 1], x[..., 1].cumsum(1), 1e-9)
    (gradient,) = torch.autograd.grad(y.square().sum(), log_decay)
    assert gradient.isfinite().all()


def test_attention_dropout_keeps_the_mean_and_differentiates() -> None:
    """E[y] over masks is the y without dropout; the gradient is that of the masks that were drawn."""
    inputs = case("chunk_attention", "L37", torch.float64)
    plain = megalodon_kernels.chunk_attention(**inputs)[0]
    mean = torch.stack([megalodon_kernels.chunk_attention(**inputs, dropout=0.3)[0] for _ in range(3000)]).mean(0)
    # Standard error of the mean of 3000 draws with values near 1: 0.65 / 55 = 0.012, five of them.
    assert (mean - plain).abs().max() < 0.06

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(3)
        return megalodon_kernels.chunk_attention(q, k, v, 4, dropout=0.4)[0]

    leaves = [inputs[name][:1, :6].clone().requires_grad_() for name in "qkv"]
    assert torch.autograd.gradcheck(function, leaves)
