"""The golden models A, B and C: every logit, loss, hidden value, gradient, streamed logit and cache entry recorded."""

from functools import cache
from typing import Any

import pytest
import torch
from golden_files import names, needs_golden, options, read
from tolerances import (
    BF16_LOGITS,
    GOLDEN_CACHE,
    GOLDEN_GRADIENTS,
    GOLDEN_HIDDEN,
    GOLDEN_LOGITS,
    GOLDEN_LOSS,
    GOLDEN_STATE,
    ONE_TOKEN_ZERO,
    OP,
    assert_close,
    assert_near,
)
from torch import Tensor
from torch.nn.functional import silu

import megalodon
from megalodon.inference.norm_window import refreshed
from megalodon.model.loss import cross_entropy, token_losses
from megalodon.model.megalodon import Megalodon
from megalodon.model.state import State, stack_states
from megalodon_kernels import chunk_attention
from megalodon_kernels.qk_rope.reference import rotate

pytestmark = needs_golden
DTYPES = [torch.float32, torch.float64]
MODELS = ["A", "B", "C"]
LENGTHS = [("A", n) for n in ("one", "short", "chunk", "multi")] + [
    (m, n) for m in "BC" for n in ("short", "chunk", "multi")
]
WITH_HIDDEN = [("A", "one"), ("A", "short"), ("A", "multi"), ("B", "short"), ("B", "multi"), ("C", "short")]


@cache
def model(name: str, dtype: torch.dtype) -> Megalodon:
    built = megalodon.from_reference(options(name)["model"], read(f"{name}/params"))
    return built.to(dtype)


def allowed(table: dict[torch.dtype, float], dtype: torch.dtype, exact: bool) -> float:
    """A float64 result can be no closer to a float32 recording than that is to the truth."""
    return table[dtype if exact else torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "length"), LENGTHS)
def test_logits_and_losses(name: str, length: str, dtype: torch.dtype) -> None:
    vectors = read(f"{name}/forward")
    tokens, targets = vectors[f"{length}/tokens"], vectors[f"{length}/targets"]
    net = model(name, dtype)
    logits, _ = net(tokens)
    for run in ("f64", "f32"):
        if f"{run}/{length}/logits" in vectors:
            assert_near(logits, vectors[f"{run}/{length}/logits"], allowed(GOLDEN_LOGITS, dtype, run == "f64"), run)
    hidden, _ = net.hidden(tokens)
    total, count = cross_entropy(hidden, net.output_weight, targets)
    each = token_losses(hidden, net.output_weight, targets)
    for run in ("f64", "f32"):
        exact = run == "f64"
        if f"{run}/{length}/loss_mean" in vectors:
            mean = vectors[f"{run}/{length}/loss_mean"]
            assert_near(total / count, mean.reshape(()), allowed(GOLDEN_LOSS, dtype, exact), f"{run} mean")
            summed = vectors[f"{run}/{length}/loss_sum"]
            assert_near(total / count, summed.reshape(()) / count, allowed(GOLDEN_LOSS, dtype, exact), f"{run} sum")
        if f"{run}/{length}/ce" in vectors:
            assert_near(each, vectors[f"{run}/{length}/ce"], allowed(GOLDEN_LOGITS, dtype, exact), f"{run} ce")


def hidden_values(net: Megalodon, tokens: Tensor) -> dict[str, Tensor]:
    """The values the recording names, taken from the running model by hooks."""
    found: dict[str, Tensor] = {}

    def keep(name: str, which: int | None = None) -> Any:
        def hook(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            found[name] = output if which is None else output[which]

        return hook

    handles = []
    for i, block in enumerate(net.layers):
        mega, prefix = block.mega, f"layer{i}."
        named = {"timenorm": (mega.timenorm, 0), "cema": (mega.cema, 0), "rmsnorm": (mega.rmsnorm, None)}
        named |= {
            "gated": (mega.attention, 0),
            "mega": (mega, 0),
            "nffn_norm": (block.nffn.norm, None),
            "out": (block, 0),
        }
        handles += [part.register_forward_hook(keep(prefix + n, which)) for n, (part, which) in named.items()]

        def before(_module: torch.nn.Module, inputs: tuple[Tensor, ...], prefix: str = prefix) -> None:
            q, k, found[prefix + "v"], found[prefix + "r"], place = inputs[:5]
            # The op gates as it attends, so the recorded value before the gate is formed here, of what the op is given.
            chunk = net.config.chunk_size
            found[prefix + "attn"], _, _ = chunk_attention(q, k, found[prefix + "v"], chunk, starts=place.starts)
            back = place.turn * place.turn.new_tensor([1, -1])  # recorded before the rotation
            found[prefix + "q"], found[prefix + "k"] = (rotate(x, back) for x in (q, k))

        handles.append(mega.attention.register_forward_pre_hook(before))
        if i == 0:
            handles.append(block.register_forward_pre_hook(lambda _m, inputs: found.update(embed=inputs[0])))
    final, _ = net.hidden(tokens)
    for handle in handles:
        handle.remove()
    found["final_norm"] = final
    for i, block in enumerate(net.layers):
        attended, r = found[f"layer{i}.attn"].flatten(2), found[f"layer{i}.r"]
        assert_close(found[f"layer{i}.gated"], silu(r) * attended, OP[final.dtype], f"layer{i}.gated")
        # znorm is not a value of ours: the affine maps of q and k are folded into one step. Undo the one of q.
        mega, heads = block.mega, net.config.num_heads
        scale = (1 + mega.gamma[0]).unflatten(-1, (heads, -1)) / (net.config.z_dim // heads) ** 0.5
        found[f"layer{i}.znorm"] = (found[f"layer{i}.q"] - mega.beta[0].unflatten(-1, (heads, -1))) / scale
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "length"), WITH_HIDDEN)
def test_hidden_values(name: str, length: str, dtype: torch.dtype) -> None:
    prefix = f"f32/{length}/hidden/"
    wanted = names(f"{name}/forward", prefix)
    vectors, net = read(f"{name}/forward"), model(name, dtype)
    found = hidden_values(net, vectors[f"{length}/tokens"])
    assert wanted
    for full in wanted:
        what, expected = full.removeprefix(prefix), vectors[full]
        assert_close(found[what].reshape(expected.shape), expected, GOLDEN_HIDDEN, what)


def test_no_recorded_hidden_value_is_left_out() -> None:
    recorded = {(m, n.split("/")[1]) for m in MODELS for n in names(f"{m}/forward", "f32/") if "/hidden/" in n}
    assert recorded == set(WITH_HIDDEN)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_gradients(name: str, dtype: torch.dtype) -> None:
    net, vectors = model(name, dtype), read(f"{name}/forward")
    file = f"{name}/grads"
    cases = sorted({tuple(n.split("/")[:2]) for n in names(file, "f")})
    assert cases
    for run, length in cases:
        net.zero_grad()
        hidden, _ = net.hidden(vectors[f"{length}/tokens"])
        total, count = cross_entropy(hidden, net.output_weight, vectors[f"{length}/targets"])
        (total / count).backward()
        tolerance = allowed(GOLDEN_GRADIENTS, dtype, run == "f64")
        seen = set()
        for full in names(file, f"{run}/{length}/"):
            parameter, _, part = full.split("/", 2)[2].partition("#")
            seen.add(parameter)
            gradient, expected = net.get_parameter(parameter).grad, read(file)[full]
            if expected.abs().max() == 0 or (length == "one" and expected.abs().max() < 1e-9):
                assert gradient.abs().max() <= ONE_TOKEN_ZERO[dtype], full
                continue
            assert_close(projected(gradient, part).reshape(expected.shape), expected, tolerance, full)
        assert seen == {n for n, _ in net.named_parameters()}


def projected(gradient: Tensor, part: str) -> Tensor:
    """What was recorded of a large matrix: its first rows, a projection of each side, its norm."""
    wide = gradient.double()
    rows, columns = (torch.cos(torch.arange(1, n + 1, dtype=torch.float64)) for n in (*wide.shape, 1)[:2])
    if part == "rowproj":
        return wide @ columns
    if part == "colproj":
        return rows @ wide
    return {"": lambda: gradient, "first4rows": lambda: gradient[:4], "fro": wide.norm}[part]()


def entries(state: State) -> dict[str, Tensor]:
    """A state under the recorded names."""
    found: dict[str, Tensor] = {}
    for i, layer in enumerate(state.layers):
        found |= {f"layer{i}.k": layer.k, f"layer{i}.v": layer.v, f"layer{i}.cema_h": layer.cema}
        found[f"layer{i}.kv_count"] = torch.tensor(layer.k.shape[1])
    for prefix, norm in [(f"layer{i}.", layer.norm) for i, layer in enumerate(state.layers)] + [("out.", state.norm)]:
        found |= {f"{prefix}norm_count": norm.count, f"{prefix}norm_mean": norm.mean, f"{prefix}norm_var": norm.var}
    return found


def check_state(state: State, name: str, snapshot: str, dtype: torch.dtype) -> None:
    """Compare with every entry recorded of one snapshot, e.g. `mixed/after_seg0`."""
    found, file = entries(state), f"{name}/stream"
    recordings = names(file, f"f32/{snapshot}/") + names(file, f"f64/{snapshot}/")
    assert {full.split("/")[-1] for full in recordings} == set(found)
    for full in recordings:
        expected, what = read(file)[full], full.split("/")[-1]
        if expected.is_floating_point():
            table = GOLDEN_CACHE if what.endswith((".k", ".v")) else GOLDEN_STATE
            assert_close(found[what], expected, allowed(table, dtype, full.startswith("f64")), full)
        else:
            assert torch.equal(found[what].reshape(expected.shape), expected), full


def check_logits(logits: Tensor, name: str, scenario: str, dtype: torch.dtype) -> None:
    for run in ("f32", "f64"):
        if (full := f"{run}/{scenario}/logits") in read(f"{name}/stream"):
            assert_near(logits, read(f"{name}/stream")[full], allowed(GOLDEN_LOGITS, dtype, run == "f64"), full)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "scenario"),
    [("A", "prefill_decode"), ("B", "prefill_decode"), ("C", "prefill_decode"), ("A", "mixed"), ("B", "mixed")],
)
@torch.no_grad()
def test_streaming(name: str, scenario: str, dtype: torch.dtype) -> None:
    vectors, net, state, pieces = read(f"{name}/stream"), model(name, dtype), None, []
    segments = vectors[f"{scenario}/segments"].tolist()
    snapshots = {n.split("/")[2] for n in names(f"{name}/stream", f"f32/{scenario}/")} - {"logits"}
    for i, piece in enumerate(vectors[f"{scenario}/tokens"].split(segments, dim=1)):
        logits, state = net(piece, state)
        pieces.append(logits)
        reached = {f"after_seg{i}"} | ({"after_prefill"} if i == 0 else set())
        for snapshot in reached & snapshots:
            check_state(state, name, f"{scenario}/{snapshot}", dtype)
            snapshots.remove(snapshot)
    check_state(state, name, f"{scenario}/final", dtype)
    assert snapshots == {"final"}
    check_logits(torch.cat(pieces, dim=1), name, scenario, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_replaced_statistics(dtype: torch.dtype) -> None:
    """`truncate`: the statistics of a fresh pass over the second chunk take the place of the current ones."""
    tokens, net = read("A/stream")["truncate/tokens"], model("A", dtype)
    C = net.config.chunk_size
    _, state = net(tokens[:, : 2 * C])
    chunks = [tuple(row.tolist()) for row in tokens[:, C : 2 * C]]
    rows = [refreshed(net, state.rows([row]), [chunk], piece=7) for row, chunk in enumerate(chunks)]
    state = stack_states(rows)
    check_state(state, "A", "truncate/after_truncate", dtype)
    logits, state = net(tokens[:, 2 * C :], state)
    check_state(state, "A", "truncate/final", dtype)
    check_logits(logits, "A", "truncate", dtype)


def test_bf16_stays_near_float32() -> None:
    vectors = read("A/forward")
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = model("A", torch.float32)(vectors["multi/tokens"])
    assert_near(logits, vectors["f64/multi/logits"], BF16_LOGITS)
