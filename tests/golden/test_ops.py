"""Single operations recorded from the released implementation: outputs, states and every gradient of every case."""

from itertools import product
from typing import Any

import pytest
import torch
from golden_files import names, needs_golden, read
from tolerances import GOLDEN_OPS, GOLDEN_OPS_HARD, ONE_TOKEN_ZERO, assert_close
from torch import Tensor, nn

from megalodon.model.attention import Rotary, document_positions
from megalodon.model.cema import Cema
from megalodon.model.feed_forward import FeedForward
from megalodon.model.layers import LayerNorm, RMSNorm
from megalodon_kernels import Statistics, chunk_attention, timestep_norm
from megalodon_kernels.qk_rope.reference import rotate

pytestmark = needs_golden
DTYPES = [torch.float32, torch.float64]
BACKENDS = ["portable", "reference"]
FILE = "ops/ops"


def cases(op: str) -> list[str]:
    return sorted({"/".join(n.split("/")[:2]) for n in names(FILE, f"{op}/")})


def turns(layer: Rotary, position: Tensor, chunk_size: int) -> Tensor:
    return torch.view_as_real(layer(position, chunk_size)[:, :, 0])


class Recorded:
    """The tensors of one case; `check` compares with every run that was recorded and remembers what was compared."""

    def __init__(self, case: str, dtype: torch.dtype) -> None:
        self.case, self.dtype, self.checked = case, dtype, set[str]()

    def input(self, name: str, gradient: bool = False) -> Tensor:
        value = read(FILE)[f"{self.case}/{name}"].clone()
        value = value.to(self.dtype) if value.is_floating_point() else value
        return value.requires_grad_() if gradient else value

    def has(self, name: str) -> bool:
        return f"{self.case}/{name}" in read(FILE)

    def check(self, name: str, actual: Tensor | None) -> None:
        found = False
        for run in ("f64", "f32", ""):
            full = f"{run}/{self.case}/{name}".lstrip("/")
            if full not in read(FILE):
                continue
            found, expected = True, read(FILE)[full]
            self.checked.add(name)
            assert actual is not None, full
            if not expected.is_floating_point():
                assert torch.equal(actual, expected), full
                continue
            hard = GOLDEN_OPS_HARD.get(self.case)
            loose = hard if hard is not None else GOLDEN_OPS[torch.float32]
            tolerance = GOLDEN_OPS[self.dtype] if run == "f64" and self.dtype == torch.float64 else loose
            if expected.numel() and expected.abs().max() < 1e-9:
                assert actual.abs().max() <= ONE_TOKEN_ZERO[self.dtype], full
            else:
                assert_close(actual.reshape(expected.shape), expected, tolerance, full)
        assert found, f"{self.case}/{name} was not recorded"

    def finish(self, inputs: set[str]) -> None:
        """Nothing recorded was left out."""
        recorded = {n.split("/", 3)[3] for run in ("f32", "f64") for n in names(FILE, f"{run}/{self.case}/")}
        recorded |= {n.split("/", 2)[2] for n in names(FILE, f"{self.case}/")} - inputs
        assert recorded == self.checked


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases("cema"))
def test_cema(case: str, backend: Any, dtype: torch.dtype) -> None:
    if case == "cema/long" and backend == "reference":
        pytest.skip("4096 steps of the plain loop and its backward take 10 s; the portable op is checked on this case")
    rec = Recorded(case, dtype)
    x, dy, dh = (rec.input(n).transpose(1, 2) if n != "dh" else rec.input(n) for n in ("x", "dy", "dh"))
    layer = Cema(x.shape[2], rec.input("alpha").shape[1], backend)
    for name, parameter in layer.named_parameters():
        parameter.data = rec.input(name)
    p, log_decay, angle, gamma = layer.coefficients()
    rec.check("p", p)
    rec.check("q", torch.view_as_real(torch.polar(log_decay.exp(), angle)))
    rec.check("gamma_scaled", gamma)
    impulse = torch.zeros(1, *x.shape[1:], dtype=dtype)
    impulse[:, 0] = 1
    skip = torch.zeros_like(impulse)
    skip[:, 0] = layer.omega[:, 0]
    rec.check("kernel", (layer(impulse)[0] - skip)[0].T)
    h_in = rec.input("h_in", gradient=True)
    rec.check("state_bias", layer(torch.zeros_like(x), h_in)[0].transpose(1, 2))
    for kind, state in (("no_state", None), ("with_state", h_in)):
        leaf = x.clone().requires_grad_()
        y, h_out = layer(leaf, state)
        rec.check(f"{kind}/y", y.transpose(1, 2))
        rec.check(f"{kind}/h_out", h_out)
        wanted = {"x": leaf, **dict(layer.named_parameters())} | ({"h_in": state} if state is not None else {})
        gradients = torch.autograd.grad((y * dy).sum() + (h_out * dh).sum(), list(wanted.values()), allow_unused=True)
        for name, gradient in zip(wanted, gradients, strict=True):
            value = torch.zeros_like(wanted[name]) if gradient is None else gradient
            rec.check(f"{kind}/g{name}", value.transpose(1, 2) if name == "x" else value)
    rec.finish({"x", "dy", "dh", "h_in", "alpha", "delta", "theta", "gamma", "omega"})


# The kernels take groups of a power of two features; 1500 steps are long for the interpreter.
INTERPRETED = [("timestep_norm/basic", "triton"), ("timestep_norm/offset", "triton")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("case", "backend"), [*product(cases("timestep_norm"), BACKENDS), *INTERPRETED])
def test_timestep_norm(case: str, backend: Any, dtype: torch.dtype) -> None:
    rec = Recorded(case, dtype)
    groups = rec.input("prev_mean").shape[1]

    def run(kind: str, previous: bool, padding: Tensor | None = None) -> None:
        wanted = {name: rec.input(name, gradient=True) for name in ("x", "weight", "bias")}
        state = None
        if previous:
            wanted |= {n: rec.input(n, gradient=True) for n in ("prev_mean", "prev_var")}
            state = Statistics(rec.input("prev_count"), wanted["prev_mean"], wanted["prev_var"])
        y, after = timestep_norm(
            wanted["x"], wanted["weight"], wanted["bias"], groups, state, padding=padding, backend=backend
        )
        for name, value in {"y": y, "mean": after.mean, "var": after.var, "count": after.count}.items():
            rec.check(f"{kind}/{name}", value)
        if padding is not None:
            return
        total = (y * rec.input("dy")).sum() + (after.mean * rec.input("dmean")).sum()
        total = total + (after.var * rec.input("dvar")).sum()
        for name, gradient in zip(wanted, torch.autograd.grad(total, list(wanted.values())), strict=True):
            rec.check(f"{kind}/g{name}", gradient)

    run("no_prev", False)
    run("with_prev", True)
    if rec.has("padded_with_prev/pad"):
        padding = rec.input("padded_with_prev/pad")
        run("padded_with_prev", True, padding)
        run("padded_no_prev", False, padding)
    inputs = {"x", "weight", "bias", "dy", "dmean", "dvar", "prev_mean", "prev_var", "prev_count"}
    if rec.has("prior2_per_feature/weight"):
        learned_prior(rec, backend)
    prior = {f"prior2_per_feature/{n}" for n in ("weight", "bias", "prior_mean", "prior_logv")}
    rec.finish(inputs | prior | {"padded_with_prev/pad"})


def learned_prior(rec: Recorded, backend: Any) -> None:
    """A prior worth two steps; every feature is a group of its own."""
    own = {
        n: rec.input(f"prior2_per_feature/{n}", gradient=True) for n in ("weight", "bias", "prior_mean", "prior_logv")
    }
    wanted = own | {"x": rec.input("x", gradient=True)}
    prior = Statistics(torch.tensor(2), wanted["prior_mean"], wanted["prior_logv"].exp())
    groups = wanted["x"].shape[2]
    y, after = timestep_norm(wanted["x"], wanted["weight"], wanted["bias"], groups, prior=prior, backend=backend)
    for name, value in {"y": y, "mean": after.mean, "var": after.var, "count": after.count}.items():
        rec.check(f"prior2_per_feature/{name}", value)
    gradients = torch.autograd.grad((y * rec.input("dy")).sum(), list(wanted.values()))
    for name, gradient in zip(wanted, gradients, strict=True):
        rec.check(f"prior2_per_feature/g{name}", gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases("attention"))
def test_chunk_attention(case: str, backend: Any, dtype: torch.dtype) -> None:
    rec = Recorded(case, dtype)
    heads, chunk = 2, 6
    wanted = {n: rec.input(n, gradient=True) for n in "qkv"}
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in wanted.values())
    cache: dict[str, Any] = {}
    before = torch.zeros(len(q), dtype=torch.int64)
    if rec.has("cache_k"):
        cache = {"open_k": rec.input("cache_k"), "open_v": rec.input("cache_v")}
        before += 4 * chunk + cache["open_k"].shape[1]
        cache["position"] = before
    # The recording begins before the rotation; cached keys are rotated.
    turn = turns(Rotary(8, 10_000.0).to(dtype), document_positions(before, None, q.shape[1]), chunk)
    q, k = rotate(q, turn), rotate(k, turn)
    y, new_k, new_v = chunk_attention(q, k, v, chunk, **cache, backend=backend)
    rec.check("y", y.flatten(2))
    if rec.has("cache_k"):
        rec.check("new_k", new_k)
        rec.check("new_v", new_v)
    gradients = torch.autograd.grad((y.flatten(2) * rec.input("dy")).sum(), list(wanted.values()))
    for name, gradient in zip(wanted, gradients, strict=True):
        rec.check(f"g{name}", gradient)
    rec.finish({"q", "k", "v", "dy", "cache_k", "cache_v"})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases("rope"))
def test_rope(case: str, dtype: torch.dtype) -> None:
    rec = Recorded(case, dtype)
    layer = Rotary(8, 10_000.0)
    if case == "rope/default":
        assert torch.equal(layer.freqs, read(FILE)[f"{case}/freqs"])
    layer.freqs = rec.input("freqs")
    rec.check("cos_sin", turns(layer, torch.arange(12)[None], 100)[0])
    length = rec.input("xq").shape[1]
    turn = turns(layer, torch.arange(3, 3 + length)[None], 100)
    for name in ("q", "k"):
        rec.check(f"y{name}", rotate(rec.input(f"x{name}"), turn))
    rec.finish({"freqs", "xq", "xk"})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases("norm"))
def test_norms(case: str, dtype: torch.dtype) -> None:
    rec = Recorded(case, dtype)
    x, affine = rec.input("x", gradient=True), case.endswith("affine")
    layer = (RMSNorm if "rms" in case else LayerNorm)(18, 1e-2, affine).to(dtype)
    for name, parameter in layer.named_parameters():
        parameter.data = rec.input(name)
    y = layer(x)
    rec.check("y", y)
    wanted = {"x": x, **dict(layer.named_parameters())}
    gradients = torch.autograd.grad((y * rec.input("dy")).sum(), list(wanted.values()))
    for name, gradient in zip(wanted, gradients, strict=True):
        rec.check(f"g{name}", gradient)
    rec.finish({"x", "dy", "weight", "bias"})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases("nffn"))
def test_feed_forward(case: str, dtype: torch.dtype) -> None:
    rec = Recorded(case, dtype)
    layer: nn.Module = FeedForward(
        10,
        14,
        swiglu="swiglu" in case,
        rescale="rescale" in case,
        eps=1e-5,
        affine=True,
        dropout=0.0,
        hidden_dropout=0.0,
    ).to(dtype)
    for name, parameter in layer.named_parameters():
        parameter.data = rec.input(f"param.{name}")
    x, residual = rec.input("x", gradient=True), rec.input("residual", gradient=True)
    y = layer(x, residual)
    rec.check("y", y)
    wanted = {"x": x, "residual": residual} | {f"param.{n}": p for n, p in layer.named_parameters()}
    gradients = torch.autograd.grad((y * rec.input("dy")).sum(), list(wanted.values()))
    for name, gradient in zip(wanted, gradients, strict=True):
        rec.check(f"g{name}", gradient)
    rec.finish({"x", "residual", "dy", *(f"param.{n}" for n, _ in layer.named_parameters())})
