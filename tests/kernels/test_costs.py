"""The table of costs and what measures by it: inputs fit the ops, bytes and operations are those of the tensors."""

import math
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import megalodon_kernels
from megalodon_kernels.costs import COSTS, Draw, Sizes
from megalodon_kernels.dispatch import KernelError
from megalodon_kernels.measuring import (
    Spread,
    copy_rate,
    distance,
    errors,
    floats,
    interleaved,
    kept_bytes,
    machine,
    matmul_rate,
    outputs_and_gradients,
    prepare,
    timed,
)

CPU = torch.device("cpu")
SIZES = Sizes(B=2, L=37, D=24, H=2, Z=12, V=34, F=29, N=3, G=4, C=10, vocab_size=53)


@pytest.mark.parametrize("op", COSTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_op_runs_on_its_inputs_and_is_near_its_reference(op: str, dtype: torch.dtype) -> None:
    found = errors(COSTS[op], SIZES, dtype, CPU, "portable")
    # rms of the rounding of a result, with a margin for sums: 2⁻⁹ of bfloat16 is 2e-3
    limit = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
    # Sums of a few dozen losses may agree to the last bit in float64; their gradients do not.
    assert 0 < found.forward <= limit or (op == "linear_cross_entropy" and found.forward == 0)
    if COSTS[op].prepared:
        assert found.backward is None and found.tokens == 1
    else:
        assert found.backward is not None and 0 < found.backward <= limit and found.tokens == 37


@pytest.mark.parametrize("op", [op for op, cost in COSTS.items() if cost.calls and not cost.prepared])
def test_the_bytes_are_at_least_those_of_what_comes_and_goes(op: str) -> None:
    """Activations read and written once, exactly, but for norms over time, which read twice; parameters are small."""
    inputs = COSTS[op].inputs(SIZES, Draw(torch.float32, CPU))
    outputs = list(floats(COSTS[op].op(**inputs)))
    moved = sum(4 * x.numel() for x in [*floats(inputs), *outputs] if x.shape[:2] == (SIZES.B, SIZES.L))
    work = COSTS[op].forward(SIZES, 4)
    extra = moved / 2 if op == "timestep_norm" else 0
    parameters = sum(x.nbytes for x in floats(inputs) if x.shape[:2] != (SIZES.B, SIZES.L))
    assert moved + extra <= work.bytes <= moved + extra + parameters + 4 * SIZES.D * 3
    assert COSTS[op].backward(SIZES, 4).bytes > work.bytes


def test_the_loss_forms_gradients_in_its_forward_pass_and_scales_them_in_its_backward() -> None:
    """In bfloat16, the matrix in float32: both passes read two tensors and write two as large; all products are in the
    forward pass, and PyTorch counts as many operations."""
    cost = COSTS["linear_cross_entropy"]
    inputs = cost.inputs(SIZES, Draw(torch.bfloat16, CPU))
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight")]
    forward, backward = cost.forward(SIZES, 2), cost.backward(SIZES, 2)
    with FlopCounterMode(display=False) as products:
        objective = cost.op(**inputs).objective
    assert forward.flops == products.get_total_flops()
    with FlopCounterMode(display=False) as products:
        gradients = torch.autograd.grad(objective, leaves)
    assert products.get_total_flops() == 0
    assert backward.flops == sum(x.numel() for x in gradients)
    assert forward.bytes == backward.bytes == sum(x.nbytes for x in [*leaves, *gradients])


def test_attention_counts_the_pairs_that_are_seen() -> None:
    """A query of chunk 10 sees 1 … 10 keys: 5.5 on average, in each 2 Z for the score and 2 V for the sum."""
    sizes = Sizes(B=1, L=30, D=24, H=2, Z=12, V=34, G=4, C=10)
    pairs = sum(t % 10 + 1 for t in range(30))
    assert COSTS["chunk_attention"].forward(sizes, 4).flops == pairs * (2 * 12 + 2 * 34)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"L": 0}, "L is 0; expected at least 1"), ({"G": 5}, "D 24 is not a multiple of G 5"), ({"H": 5}, "Z 12 is not")],
)
def test_sizes_that_do_not_fit(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sizes(**(vars(SIZES) | change))


def test_a_backend_that_cannot_run_is_an_error() -> None:
    with pytest.raises(KernelError, match="expected one of auto, reference, portable, triton"):
        prepare(COSTS["rms_norm"], SIZES, torch.float32, CPU, "cuda")


def test_the_passes_of_an_op_are_its_own() -> None:
    passes = prepare(COSTS["rms_norm"], SIZES, torch.float32, CPU, "auto")
    inputs = COSTS["rms_norm"].inputs(SIZES, Draw(torch.float32, CPU))
    assert passes.backend == "portable"
    assert torch.equal(passes.forward(), megalodon_kernels.rms_norm(**inputs))
    dx, dweight = passes.backward()
    assert dx.shape == (2, 37, 24) and dweight.shape == (24,)
    assert all(torch.equal(a, b) for a, b in zip((dx, dweight), passes.backward(), strict=True))  # and again


def test_kept_counts_each_storage_once_and_not_the_inputs() -> None:
    x = torch.randn(50, requires_grad=True)

    def forward() -> torch.Tensor:
        y = x.exp()  # keeps its result, 200 bytes
        return y * y.view(5, 10).view(50) * x  # the same storage twice, then the product: 200 more; x is an input

    assert kept_bytes(forward, [x]) == 400
    assert kept_bytes(forward, []) == 600


def test_distance_is_relative_and_nan_is_infinite() -> None:
    expected = [torch.ones(4), torch.zeros(3)]
    assert distance([torch.ones(4), torch.zeros(3)], expected) == 0
    assert distance([torch.full((4,), 1.5), torch.zeros(3)], expected) == 0.5
    assert distance([torch.full((4,), math.nan), torch.zeros(3)], expected) == math.inf
    assert distance([torch.ones(4), torch.full((3,), 1e-3)], expected) == pytest.approx(1e-3)


def test_times_are_those_of_the_call() -> None:
    found = timed(lambda: time.sleep(0.02), CPU, repeats=3)
    assert 0.02 <= found.low <= found.median <= found.high < 0.2
    calls: list[int] = []
    assert timed(lambda: calls.append(1), CPU, repeats=3, least=1e-4).median < 1e-3
    assert len(calls) > 10  # a short call is repeated within a sample


def test_calls_take_turns_and_the_setup_is_not_counted() -> None:
    order: list[str] = []

    def setup(name: str, seconds: float):
        time.sleep(0.03)
        order.append(name)
        return lambda: time.sleep(seconds)

    short, long = interleaved([lambda: setup("a", 0.0), lambda: setup("b", 0.01)], CPU, repeats=2)
    assert order == ["a", "b"] * 3
    assert short.median < 0.01 <= long.median < 0.03


def test_a_spread_needs_no_second_sample() -> None:
    assert Spread.of([0.5]) == (0.5, 0.5, 0.5)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (3.5, 2.0, 5.0)


def test_the_machine_says_what_it_is() -> None:
    found = machine(CPU)
    assert found["device_type"] == "cpu" and found["threads"] == torch.get_num_threads()
    assert found["torch"] == torch.__version__ and found["device"]
    assert matmul_rate(CPU, torch.float32, 0.0) > 1e8
    assert copy_rate(CPU, 0.0) > 1e8


def test_a_step_reads_its_state_and_writes_what_moves() -> None:
    """In float32: averages read and written, coefficients and the cache of a full chunk read."""
    inputs = COSTS["norm_cema_step"].inputs(SIZES, Draw(torch.float32, CPU))
    state = {name: inputs[name].nbytes for name in ("h", "p", "q", "gamma", "x")}
    assert COSTS["norm_cema_step"].forward(SIZES, 4).bytes == sum(state.values()) + state["h"] + state["x"]
    inputs = COSTS["attention_step"].inputs(SIZES, Draw(torch.float32, CPU))
    assert COSTS["attention_step"].forward(SIZES, 4).bytes == inputs["k_cache"].nbytes + inputs["v_cache"].nbytes


def test_a_step_that_is_compared_leaves_its_state_alone() -> None:
    cost = COSTS["norm_cema_step"]
    inputs = cost.inputs(SIZES, Draw(torch.float32, CPU))
    before = inputs["h"].clone(), inputs["count"].clone()
    first, second = (outputs_and_gradients(cost, inputs, "portable")[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(inputs["h"], before[0]) and torch.equal(inputs["count"], before[1])
