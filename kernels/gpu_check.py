"""Check and time every op on a GPU: parity first, then timings, a layer, a table last; JSON is written all along.

    python kernels/gpu_check.py                        # under ten minutes; exit status 0 only if all parity passed
    python kernels/gpu_check.py --only cema --budget 120 --out before
    python kernels/gpu_check.py --against before/gpu-check.json

Needs torch and triton and nothing else. An entry that raises is recorded and the rest goes on; what the time does not
suffice for is listed as skipped. Without a GPU the small shapes of the parity run in Triton's interpreter.
What an op costs stands in megalodon_kernels/costs.py: an entry there is all that a new op needs to be checked here.
Not here: kernels, peers (gpu_peers.py), how a sample is taken (measuring.py), whole models (`megalodon profile`).
"""

import argparse
import datetime
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, so before the ops are imported

from gpu_peers import PEERS, llama_layer  # noqa: E402
from megalodon_kernels import (  # noqa: E402
    KernelError,
    cema,
    chunk_attention,
    layer_norm,
    qk_rope,
    rms_norm,
    swiglu,
    timestep_norm,
)
from megalodon_kernels.cases import cases  # noqa: E402
from megalodon_kernels.costs import COSTS, Cost, Draw, Inputs, Sizes  # noqa: E402
from megalodon_kernels.measuring import (  # noqa: E402
    Spread,
    compare,
    copy_rate,
    distance,
    floats,
    machine,
    matmul_rate,
    outputs_and_gradients,
    passes_of,
    prepare,
    timed,
)

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SMALL = Sizes(B=1, L=16, D=24, H=2, Z=12, V=34, F=29, N=3, G=4, C=8, vocab_size=53)
"""Only to see which inputs are activations, and whether an op has kernels."""
WIDTH = Sizes()
"""The 7B model; its length is replaced."""
TOLERANCES = {"fp32": {"forward": 1e-5, "backward": 3e-5}, "bf16": {"forward": 5.1e-3, "backward": 2**-6}}
"""rms(error) / rms(reference). float32: sums of some hundred to some thousand terms, 6e-8 each, products of three tf32
parts among them. bfloat16: a rounding of the result is 1.7e-3, of the operands of a product as much, of a gate that the
portable path forms apart once more; backward as in tests/tolerances.py: in attention dP and the row sum taken from it
are each rounded, and where they cancel to a quarter that is eight roundings of 2⁻⁹. The interpreter cuts bfloat16 off
instead of rounding it: twice that."""
SHARES = {"header": 0.08, "parity": 0.43, "timing": 0.89, "system": 1.0}
"""Phase -> the part of the budget at which it ends."""
NARROW = {"D": 1024, "H": 1, "Z": 256, "V": 2048, "F": 2560, "G": 32}
"""The width of the 200M model, timed at one length."""
TOKENS = (32_768, 4096, 16_384, 8192)
"""Timed as (1, L) and as (8, L / 8), in this order."""
FAIL_OVER = 0.1
"""Slowdown against an older run that is a failure."""
GOALS = {
    ("cema", "forward"): 2.0,
    ("cema", "backward"): 2.7,
    ("timestep_norm", "forward"): 1.2,
    ("timestep_norm", "backward"): 1.2,
    ("chunk_attention", "forward"): 1 / 0.60,
    ("chunk_attention", "backward"): 1 / 0.55,
}
"""Time over floor that is aimed for at 32,768 tokens in one row; attention as a share of the rate of a product."""


class Record:
    """The JSON of a run, written after every entry, and the time that is left."""

    def __init__(self, folder: Path, budget: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "gpu-check.json"
        self.began, self.budget, self.phase = time.monotonic(), budget, "header"
        self.document: dict[str, Any] = {"header": {}, "constants": {}}
        self.document |= {kind: [] for kind in ("parity", "timing", "system", "skipped", "errors")}

    def save(self) -> None:
        """Write everything so far; a run that is cut off leaves a whole file."""
        aside = self.path.with_suffix(".tmp")
        aside.write_text(json.dumps(_finite(self.document), indent=1) + "\n", encoding="utf-8")
        os.replace(aside, self.path)

    def attempt(self, kind: str, what: dict[str, Any], call: Callable[[], list[dict[str, Any]]]) -> None:
        """Record the entries that a call returns, or that it raised, or that there was no time for it."""
        if time.monotonic() - self.began > self.budget * SHARES[self.phase]:
            self.document["skipped"].append(
                {"kind": kind, **what, "reason": f"the budget of phase {self.phase} is used up"}
            )
        else:
            try:
                self.document[kind] += [{**what, **found} for found in call()]
            except Exception as error:  # whatever an entry does wrong, the others are still to be measured
                said = (str(error).splitlines() or [""])[0]
                self.document["errors"].append({"kind": kind, **what, "error": f"{type(error).__name__}: {said}"})
        self.save()

    def passed(self) -> bool:
        """Whether every parity entry is right and none raised."""
        raised = [error for error in self.document["errors"] if error["kind"] == "parity"]
        return bool(self.document["parity"]) and all(entry["ok"] for entry in self.document["parity"]) and not raised


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become text."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all phases. Returns the exit status."""
    given = _options(arguments)
    if given.compile:
        _warm(given.compile)
        return 0
    old = _older(given.against) if given.against else None
    record = Record(given.out, given.budget)
    names = [name for name in COSTS if not given.only or name in given.only]
    if not HAS_GPU:
        _say("no GPU: only the small shapes of the parity, in Triton's interpreter; nothing is timed")
    record.document["header"] = machine(DEVICE) | {
        "date": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds")
    }
    record.save()
    if old and old["header"].get("device") != record.document["header"]["device"]:
        _say(f"error: {given.against} was measured on {old['header'].get('device')}: not comparable")
        return 2
    if HAS_GPU:
        record.document["constants"] = {
            "matmul_tflops": matmul_rate(DEVICE, torch.bfloat16) / 1e12,
            "copy_gb_per_s": copy_rate(DEVICE) / 1e9,
        }
        _compile_all(record, names)
    record.phase = "parity"
    parity(record, names)
    record.phase = "timing"
    timing(record, names)
    record.phase = "system"
    system(record)
    slower = _slower(record.document, old) if old else []
    _table(record.document)
    for line in slower:
        _say(f"slower than {given.against}: {line}")
    _say(f"{'passed' if record.passed() else 'FAILED'}: written to {record.path}")
    return 0 if record.passed() and not slower else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Parity and timings of every op on this machine's GPU.")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), metavar="DIR", help="for gpu-check.json")
    parser.add_argument("--only", action="append", choices=list(COSTS), metavar="OP", help=f"of {', '.join(COSTS)}")
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="in all (default 540)")
    parser.add_argument("--against", type=Path, metavar="OLD.json", help="fail where this run is 10 %% slower")
    parser.add_argument("--compile", choices=list(COSTS), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _older(path: Path) -> dict[str, Any]:
    """An older run. Ends the script with status 2 if the file is none."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        [(entry["op"], entry["ms"]) for entry in found["timing"]]
        found["header"].get("device")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _say(f"error: {path}: {type(error).__name__}: expected the gpu-check.json of an older run")
        raise SystemExit(2) from None
    return found


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


# Phase 0: compilers side by side, so that parity and timings find their kernels in Triton's cache.


def _compile_all(record: Record, names: list[str]) -> None:
    def run() -> list[dict[str, Any]]:
        children = {name: subprocess.Popen([sys.executable, __file__, "--compile", name]) for name in names}
        end = record.began + 0.2 * record.budget
        for child in children.values():
            try:
                child.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
        failed = [name for name, child in children.items() if child.returncode]
        return [{"seconds": time.monotonic() - record.began, "failed": failed}]

    record.attempt("system", {"what": "compile every kernel"}, run)


def _warm(name: str) -> None:
    for dtype in DTYPES.values():
        passes = prepare(COSTS[name], replace(WIDTH, L=4096), dtype, DEVICE, "auto")
        if passes.backward:
            passes.backward()


# Phase 1: parity.


def parity(record: Record, names: list[str]) -> None:
    """Every op against the reference at small shapes and against portable at the 7B width, laws, two runs, compiled."""
    for op in dict.fromkeys(COSTS[name].op.__name__ for name in names):
        cost = next(cost for cost in COSTS.values() if cost.op.__name__ == op)
        _op_parity(record, op, cost, _backend(cost))


def _op_parity(record: Record, op: str, cost: Cost, backend: str) -> None:
    def attempt(case: str, dtype: str, call: Callable[[], list[dict[str, Any]]]) -> None:
        record.attempt("parity", {"op": op, "backend": backend, "case": case, "dtype": dtype}, call)

    for dtype in DTYPES:
        for case, inputs in _chosen(op, cost):
            attempt(case, dtype, lambda i=inputs, d=dtype: _against_reference(cost, i, d, backend))
    if starts := None if cost.prepared else dict(cases(op)).get("L37-starts"):
        attempt("NaN in one document", "fp32", lambda: [_leak(cost, _on_device(starts), backend)])
    if HAS_GPU:
        for dtype in DTYPES:
            attempt(f"D {WIDTH.D}, L 4096", dtype, lambda d=dtype: _at_width(cost, d, backend))
        # the portable path asks the device for numbers, which breaks a graph; a step of decoding is in a graph already
        if backend == "triton" and not cost.prepared:
            attempt("compiled", "bf16", lambda: [_compiled(cost, backend)])


def _backend(cost: Cost) -> str:
    """triton, or portable where the op has no kernel: the table then says so."""
    try:
        cost.call(cost.inputs(SMALL, Draw(torch.float32, DEVICE)), "triton")()
    except KernelError:
        return "portable"
    return "triton"


def _chosen(op: str, cost: Cost) -> Iterator[tuple[str, Inputs]]:
    """All small cases on a GPU; in the interpreter, which takes its time, those of odd length with everything.

    A step of decoding has no length: one case, at small sizes.
    """
    if cost.prepared:
        yield "one token", cost.inputs(SMALL, Draw(torch.float32, DEVICE))
    for case, inputs in () if cost.prepared else cases(op):
        if HAS_GPU or case in ("L37", "L37-state-starts"):
            yield case, _on_device(inputs)


def _on_device(inputs: Inputs) -> Inputs:
    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(DEVICE)
        return type(value)(*map(moved, value)) if isinstance(value, tuple) else value

    return {name: moved(value) for name, value in inputs.items()}


def _in_dtype(cost: Cost, inputs: Inputs, dtype: str) -> Inputs:
    """Activations in a dtype; parameters and states stay as they are."""
    drawn = cost.inputs(SMALL, Draw(torch.bfloat16, torch.device("cpu")))
    narrow = {name for name, x in drawn.items() if isinstance(x, Tensor) and x.dtype == torch.bfloat16}
    narrow.add("gate")  # of attention: an activation that its timing does without
    return {name: x.to(DTYPES[dtype]) if name in narrow else x for name, x in inputs.items()}


def _verdict(metric: str, value: float, tolerance: float) -> dict[str, Any]:
    return {"metric": metric, "value": value, "tol": tolerance, "ok": value <= tolerance}


def _tolerance(dtype: str, metric: str) -> float:
    return TOLERANCES[dtype][metric] * (2 if not HAS_GPU and dtype == "bf16" else 1)


def _against_reference(cost: Cost, inputs: Inputs, dtype: str, backend: str) -> list[dict[str, Any]]:
    found = compare(cost, _in_dtype(cost, inputs, dtype), backend)
    values = {"forward": found.forward, "backward": found.backward}
    return [_verdict(metric, v, _tolerance(dtype, metric)) for metric, v in values.items() if v is not None]


def _at_width(cost: Cost, dtype: str, backend: str) -> list[dict[str, Any]]:
    """Against the portable path in float32, and against itself: two runs give the same bits."""
    inputs = cost.inputs(replace(WIDTH, L=4096), Draw(DTYPES[dtype], DEVICE))
    found = compare(cost, inputs, backend, "portable", torch.float32)
    values = {"forward": found.forward, "backward": found.backward}
    verdicts = [_verdict(metric, v, _tolerance(dtype, metric)) for metric, v in values.items() if v is not None]
    first, second = ([*floats(outputs_and_gradients(cost, inputs, backend))] for _ in range(2))
    different = sum(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return [*verdicts, _verdict("tensors that two runs differ in", different, 0)]


def _leak(cost: Cost, inputs: Inputs, backend: str) -> dict[str, Any]:
    """The second of three documents is NaN: how many values outside of it are not finite."""
    activations = _in_dtype(cost, inputs, "bf16")
    starts = torch.zeros_like(inputs["starts"])
    starts[:, [0, 13, 29]] = True
    poisoned = dict(inputs)
    for name, value in activations.items():
        if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
            poisoned[name] = inputs[name].clone()
            poisoned[name][:, 13:29] = math.nan
    y = next(floats(cost.op(**(poisoned | {"starts": starts}), backend=backend)))
    outside = torch.cat([y[:, :13], y[:, 29:]], dim=1)
    return _verdict("values that leaked", int((~outside.isfinite()).sum()), 0)


def _compiled(cost: Cost, backend: str) -> dict[str, Any]:
    """One graph, without a break, forward and backward; the same numbers as eager."""
    inputs = cost.inputs(Sizes(L=512, D=256, H=2, Z=64, V=512, F=512, G=16, C=128), Draw(torch.bfloat16, DEVICE))
    compiled = Cost(torch.compile(cost.op, fullgraph=True), cost.sizes, cost.inputs, cost.forward, cost.backward)
    eager, found = (list(floats(outputs_and_gradients(c, inputs, backend))) for c in (cost, compiled))
    return _verdict("compiled against eager", distance(found, eager), TOLERANCES["bf16"]["backward"])


# Phase 2: timings.


def timing(record: Record, names: list[str]) -> None:
    """Every op at the 7B width: each pass over its floor, and beside what one would use instead."""
    shapes = [replace(WIDTH, B=rows, L=tokens // rows) for rows in (1, 8) for tokens in TOKENS]
    shapes.append(replace(WIDTH, L=TOKENS[0], **NARROW))
    done: list[dict[str, Any]] = []
    for sizes in shapes:
        for name in names:
            what = {"op": name, "shape": sizes.named(COSTS[name].sizes), "config": "bf16"}
            if what in done:  # a step of decoding has no length
                continue
            done.append(what)
            if HAS_GPU:
                record.attempt("timing", what, lambda n=name, s=sizes: _timings(n, s, record.document["constants"]))
            else:
                record.document["skipped"].append({"kind": "timing", **what, "reason": "there is no GPU"})
        _release()
    record.save()


def _timings(name: str, sizes: Sizes, constants: dict[str, float]) -> list[dict[str, Any]]:
    cost = COSTS[name]
    known = {entry["kernel"] for entry in _kernels()}
    torch.cuda.reset_peak_memory_stats()
    passes = prepare(cost, sizes, torch.bfloat16, DEVICE, "auto")
    found = []
    for what, call, work in (
        ("forward", passes.forward, cost.forward),
        ("backward", passes.backward, cost.backward),
    ):
        if call is None or work is None:
            continue
        least = work(sizes, 2)
        floor = max(least.flops / constants["matmul_tflops"] / 1e9, least.bytes / constants["copy_gb_per_s"] / 1e6)
        spread = timed(call, DEVICE)
        entry: dict[str, Any] = {"pass": what, "backend": passes.backend, **_milliseconds(spread), "floor_ms": floor}
        entry |= {"ratio": 1e3 * spread.median / floor, "bytes": least.bytes, "flops": least.flops}
        if spread.median < 50e-6 and what == "forward":
            entry["graph_ms"] = _graphed(call)
        entry |= {"kept_bytes": passes.kept_bytes, "peak_bytes": torch.cuda.max_memory_allocated()}
        found.append(entry)
    found[0]["kernels"] = [entry for entry in _kernels() if entry["kernel"] not in known]
    del passes, call
    for entry, times in zip(found, _peer_times(name, sizes), strict=False):
        entry |= times if "peer_error" in times else times | {"peer_ratio": times["peer_ms"] / entry["ms"]}
    return found


def _peer_times(name: str, sizes: Sizes) -> list[dict[str, Any]]:
    """Forward and backward of what one would use instead. It may not fit where ours does: that is an answer too."""
    if name not in PEERS:
        return []
    _release()
    try:
        forward, leaves = PEERS[name](sizes, DEVICE)
        passes = passes_of(forward, leaves, leaves, "peer")
        return [{"peer_ms": 1e3 * timed(call, DEVICE).median} for call in (passes.forward, passes.backward) if call]
    except torch.OutOfMemoryError as error:
        return 2 * [{"peer_error": str(error).splitlines()[0]}]


def _milliseconds(spread: Spread) -> dict[str, float]:
    return {"ms": 1e3 * spread.median, "p20": 1e3 * spread.low, "p80": 1e3 * spread.high}


def _graphed(call: Callable[[], Any]) -> float:
    """Milliseconds without the launch: replayed as a CUDA graph."""
    from triton.testing import do_bench_cudagraph

    with torch.no_grad():
        return float(do_bench_cudagraph(call, quantiles=[0.5]))


def _kernels() -> list[dict[str, Any]]:
    """Registers, spills and shared memory of every kernel that was compiled so far."""
    found = []
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("megalodon_kernels.") and module_name.endswith(".kernel"):
            for name, function in vars(module).items():
                for number, kernel in enumerate(_variants(function)):
                    found.append(
                        {
                            "kernel": f"{module_name}:{name}#{number}",
                            "regs": kernel.n_regs,
                            "spill": kernel.n_spills,
                            "smem": kernel.metadata.shared,
                        }
                    )
    return found


def _variants(function: Any) -> list[Any]:
    caches = getattr(function, "device_caches", None)
    return [kernel for cache in caches.values() for kernel in cache[0].values()] if isinstance(caches, dict) else []


def _release() -> None:
    if HAS_GPU:
        torch.cuda.empty_cache()


# Phase 3: a layer.

Weights = dict[str, Tensor]
"""The parameters of a block, under the names of the model's state dict."""


def layer(x: Tensor, w: Weights, sizes: Sizes, rope_base: float = 10_000.0, eps: float = 1e-5) -> Tensor:
    """A block of the model, from the ops alone: (B, L, D) -> (B, L, D), no state, no document starts.

    Products run in the dtype of x. Equal to `megalodon.model.megalodon.Block` with SwiGLU, which a test holds.
    """
    s = sizes

    def product(name: str, y: Tensor) -> Tensor:
        bias = w.get(f"{name}.bias")
        return linear(y, w[f"{name}.weight"].to(y.dtype), None if bias is None else bias.to(y.dtype))

    u, _ = timestep_norm(x, w["mega.timenorm.weight"], w["mega.timenorm.bias"], s.G, eps=eps)
    ema, _ = cema(u, *_coefficients(w), w["mega.cema.omega"][:, 0])
    m = rms_norm(ema, w["mega.rmsnorm.weight"], eps=eps)
    gamma, beta = w["mega.gamma"], w["mega.beta"]
    q, k = qk_rope(product("mega.wz", m), gamma, beta, _turn(s, rope_base, gamma), eps=eps)
    v, gate = (y.unflatten(-1, (s.H, -1)) for y in (swiglu(product("mega.wv", u)), product("mega.wr", m)))
    attended, _, _ = chunk_attention(q, k, v, s.C, gate=gate)
    y = x + product("mega.wh1", m) + product("mega.wh2", attended.flatten(2))
    f = layer_norm(y, w["nffn.norm.weight"], w["nffn.norm.bias"], eps=eps)
    return x + product("nffn.fc2", swiglu(product("nffn.fc1", f), product("nffn.fc3", f)))


def _coefficients(w: Weights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p, log|q|, arg q and gamma / √N; see the README of the kernels."""
    alpha, delta, theta = (w[f"mega.cema.{name}"][..., 0].double() for name in ("alpha", "delta", "theta"))
    gamma = w["mega.cema.gamma"]
    N = gamma.shape[1]
    p = alpha.sigmoid()
    log_decay = torch.log1p(-(p * delta.sigmoid()).clamp(max=1 - 2**-52))
    angle = torch.arange(1, N + 1, device=gamma.device) * (theta.sigmoid() * (2 * math.pi / N))
    return p.to(gamma.dtype), log_decay, angle, gamma / N**0.5


def _turn(s: Sizes, rope_base: float, like: Tensor) -> Tensor:
    """(1, L, Z/H/2, 2): cosine and sine by which queries and keys turn, formed in float64, then as `like`."""
    half = s.Z // s.H // 2
    place = torch.arange(s.L, device=like.device) % s.C
    frequency = 1 / rope_base ** (torch.arange(half, device=like.device).float() / half)
    angle = place[:, None] * frequency.double()
    return torch.stack([angle.cos(), angle.sin()], -1)[None].to(like.dtype)


def _layer_weights(s: Sizes, draw: Draw) -> Weights:
    """Random weights; matrices in the dtype of `draw`, the rest in float32."""
    matrices = {"mega.wv": (s.V, s.D), "mega.wz": (s.Z, s.D), "mega.wr": (s.V, s.D), "mega.wh1": (s.D, s.D)}
    matrices |= {"mega.wh2": (s.D, s.V), "nffn.fc1": (s.F, s.D), "nffn.fc3": (s.F, s.D), "nffn.fc2": (s.D, s.F)}
    w = {f"{n}.weight": draw(*shape) * shape[1] ** -0.5 for n, shape in matrices.items()}
    w |= {f"mega.{n}.bias": draw(matrices[f"mega.{n}"][0]) for n in ("wv", "wz", "wr", "wh1")}
    norms = ("mega.timenorm.weight", "mega.timenorm.bias", "mega.rmsnorm.weight", "nffn.norm.weight", "nffn.norm.bias")
    w |= {name: draw.parameter(s.D, scale=0.1) for name in norms}
    w |= {f"mega.{name}": draw.parameter(2, s.Z, scale=0.1) for name in ("gamma", "beta")}
    w |= {f"mega.cema.{name}": draw.parameter(s.D, s.N, 1, scale=0.2) for name in ("alpha", "delta")}
    w |= {"mega.cema.theta": draw.parameter(s.D, 1, 1), "mega.cema.gamma": draw.parameter(s.D, s.N, 2)}
    w |= {"mega.cema.omega": draw.parameter(s.D, 1)}
    return {name: x.requires_grad_() for name, x in w.items()}


def system(record: Record) -> None:
    """A 7B layer beside a Llama-2-7B layer of as many parameters, forward and backward, and what its products take."""
    for tokens in TOKENS[:2]:
        what = {"what": "layer", "shape": {"B": 1, "L": tokens, "D": WIDTH.D}}
        if HAS_GPU:
            record.attempt("system", what, lambda t=tokens: [_layers(replace(WIDTH, L=t))])
        else:
            record.document["skipped"].append({"kind": "system", **what, "reason": "there is no GPU"})
        _release()
    record.save()


def _layers(sizes: Sizes) -> dict[str, Any]:
    draw = Draw(torch.bfloat16, DEVICE)
    x = draw(1, sizes.L, sizes.D).requires_grad_()
    weights = _layer_weights(sizes, draw)
    torch.cuda.reset_peak_memory_stats()
    ours = _both(lambda: layer(x, weights, sizes), [x, *weights.values()])
    peak = torch.cuda.max_memory_allocated()
    matrices = [w for name, w in weights.items() if w.dim() == 2 and w.dtype == torch.bfloat16]
    inner = {w.shape[1]: draw(sizes.L, w.shape[1]).requires_grad_() for w in matrices}
    products = _both(lambda: [linear(inner[w.shape[1]], w) for w in matrices], [*inner.values(), *matrices])
    attention = prepare(COSTS["chunk_attention"], sizes, torch.bfloat16, DEVICE, "auto")
    pairs = sum(timed(call, DEVICE).median for call in (attention.forward, attention.backward) if call)
    theirs = _both(*llama_layer(sizes, draw))
    return {
        "ms": 1e3 * ours,
        "products_ms": 1e3 * products,
        "attention_ms": 1e3 * pairs,
        "other_share": 1 - (products + pairs) / ours,
        "llama_ms": 1e3 * theirs,
        "over_llama": theirs / ours,
        "tokens_per_s": sizes.L / ours,
        "peak_bytes": peak,
    }


def _both(forward: Callable[[], Any], leaves: list[Tensor]) -> float:
    """Seconds of a forward and a backward pass."""
    passes = passes_of(forward, leaves, leaves, "layer")
    return sum(timed(call, DEVICE).median for call in (passes.forward, passes.backward) if call)


# The end: what became slower, and the table.


def _slower(document: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """A line for each timing that is more than FAIL_OVER slower than in an older run."""
    before = {_key(entry): entry["ms"] for entry in old["timing"]}
    pairs = [(_key(entry), before[_key(entry)], entry["ms"]) for entry in document["timing"] if _key(entry) in before]
    return [f"{key}: {a:.3g} -> {b:.3g} ms ({b / a - 1:+.0%})" for key, a, b in pairs if b > (1 + FAIL_OVER) * a]


def _key(entry: dict[str, Any]) -> str:
    shape = " ".join(f"{name}{size}" for name, size in entry["shape"].items())
    return f"{entry['op']} {entry['pass']} {shape} {entry['config']}"


def _table(document: dict[str, Any]) -> None:
    """Op, parity, time at 32,768 tokens in one row, time over floor, over peer, goal."""
    for entry in document["system"]:
        _say(", ".join(f"{name} {_short(value)}" for name, value in entry.items()))
    for entry in document["errors"]:
        _say(f"error: {entry}")
    if document["skipped"]:
        _say(f"{len(document['skipped'])} entries skipped, the first: {document['skipped'][0]['reason']}")
    rows = [("op", "pass", "backend", "parity", "ms", "time/floor", "peer/time", "goal")]
    for name, cost in COSTS.items():
        own = [entry for entry in document["parity"] if entry["op"] == cost.op.__name__]
        if not own:
            continue
        raised = any(e["kind"] == "parity" and e["op"] == cost.op.__name__ for e in document["errors"])
        right = f"{sum(e['ok'] for e in own)}/{len(own)}" + " and errors" * raised
        for what in ("forward", "backward")[: 1 if cost.prepared else 2]:
            found = [e for e in document["timing"] if e["op"] == name and e["pass"] == what]
            rows.append((name, what, own[0]["backend"], right, *_timed_cells(name, what, found)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        _say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _timed_cells(name: str, what: str, found: list[dict[str, Any]]) -> tuple[str, str, str, str]:
    first = next((e for e in found if e["shape"].get("L", TOKENS[0]) == TOKENS[0] and e["shape"]["B"] == 1), None)
    if first is None:
        return "-", "-", "-", "-"
    goal = GOALS.get((name, what))
    met = "-" if goal is None else f"{'met' if first['ratio'] <= goal else 'not met'} ({goal:.2f})"
    return f"{first['ms']:.3g}", f"{first['ratio']:.2f}", _short(first.get("peer_ratio")), met


def _short(value: Any) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
