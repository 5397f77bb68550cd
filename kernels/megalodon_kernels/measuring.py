"""Measure ops on this machine: time, what a pass keeps, error against the reference, and what the machine can do.

    rates = matmul_rate(device, dtype), copy_rate(device)
    passes = prepare(COSTS["cema"], sizes, torch.float32, device, "auto")
    timed(passes.forward, device)                       # Spread(median, low, high) in seconds

Not here: which shapes, what is made of the numbers (megalodon/profiling, kernels/gpu_check.py).
"""

import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalodon_kernels.costs import Cost, Draw, Inputs, Sizes
from megalodon_kernels.dispatch import KernelError

CHECKED_TOKENS = 256
"""The error is measured on at most so many tokens, at full width: the reference is a loop in float64."""
LEAST_SECONDS = 0.01
"""A sample on a CPU lasts at least so long: short calls are repeated in it."""
GPU_SECONDS = 0.3
"""Samples of a GPU are taken for about so long."""
CACHE_BYTES = 256 << 20
"""Written between two samples of a GPU, so that nothing is found in its second-level cache."""


class Spread(NamedTuple):
    """Seconds of a call: the middle of the samples, and the values that a fifth of them lie below and above."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Return the spread of some samples; of one sample it is nothing."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), fifths[0], fifths[-1])


def timed(call: Callable[[], Any], device: torch.device, repeats: int = 5, least: float = LEAST_SECONDS) -> Spread:
    """Return how long a call takes, after one or more that are not counted.

    Args:
        repeats: samples on a CPU, and at least so many on a GPU, where each finds an empty second-level cache.
        least:   seconds of a sample on a CPU.
    """
    if device.type == "cuda":
        return Spread.of(_gpu_samples(call, device, repeats))
    begin = time.perf_counter()
    call()
    once = time.perf_counter() - begin
    if once < least:  # what starts threads and fills caches says little of how long a call takes
        begin = time.perf_counter()
        call()
        once = time.perf_counter() - begin
    count = max(1, math.ceil(least / max(once, 1e-7)))
    samples = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(count):
            call()
        samples.append((time.perf_counter() - begin) / count)
    return Spread.of(samples)


def _gpu_samples(call: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)
    call()  # compiles
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(3):
        cache.zero_()
        call()
    torch.cuda.synchronize(device)
    once = (time.perf_counter() - begin) / 3
    count = max(repeats, min(200, math.ceil(GPU_SECONDS / once)))
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for before, after in marks:
        cache.zero_()
        before.record()
        call()
        after.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in marks]


def interleaved(setups: Sequence[Callable[[], Callable[[], Any]]], device: torch.device, repeats: int) -> list[Spread]:
    """Time several calls in turns, so that what changes on the machine meanwhile meets them all alike.

    Args:
        setups: each returns the call that is timed, once; what it does before is not counted.
    """
    samples: list[list[float]] = [[] for _ in setups]
    for turn in range(repeats + 1):
        for own, setup in zip(samples, setups, strict=True):
            call = setup()
            _wait(device)
            begin = time.perf_counter()
            call()
            _wait(device)
            if turn:  # the first turn warms up
                own.append(time.perf_counter() - begin)
    return [Spread.of(own) for own in samples]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.25) -> float:
    """Return operations/s of a square matrix product, 1024 wide (8192 on a GPU): the best within `seconds`."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / _best(lambda: a @ a, device, seconds)


def copy_rate(device: torch.device, seconds: float = 0.25) -> float:
    """Return bytes/s, read and written together, of a copy that no cache holds: the best within `seconds`."""
    size = (1 << 30) if device.type == "cuda" else (128 << 20)
    source = torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device, seconds)


def _best(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    call()
    best, begin = math.inf, time.perf_counter()
    while best == math.inf or time.perf_counter() - begin < seconds:
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return best


class Passes(NamedTuple):
    """An op at a shape, ready to be timed."""

    forward: Callable[[], Any]
    backward: Callable[[], Any] | None
    """The gradients of all inputs for a random gradient of every output; None if there are none."""
    kept_bytes: int
    """What the forward pass keeps for the backward pass, beside its inputs."""
    backend: str
    """The implementation that runs."""


def prepare(cost: Cost, sizes: Sizes, dtype: torch.dtype, device: torch.device, backend: str) -> Passes:
    """Make the inputs of an op and run it once. Raises: KernelError if the backend cannot run it."""
    inputs = cost.inputs(sizes, Draw(dtype, device))
    inputs = _with_gradients(inputs) if cost.backward else inputs
    backend = implementation(cost, inputs, backend)
    forward = cost.call(inputs, backend)
    if cost.backward is None:
        forward()
        return Passes(forward, None, 0, backend)
    return passes_of(forward, list(floats(inputs)), inputs, backend)


def passes_of(forward: Callable[[], Any], leaves: Sequence[Tensor], beside: Any, backend: str) -> Passes:
    """Run a forward pass once, and prepare the backward pass from all its outputs to `leaves`.

    Args:
        beside: whatever holds tensors that would be there anyway; they do not count as kept.
    """
    outputs: list[Tensor] = []
    kept = kept_bytes(lambda: outputs.extend(floats(forward())), beside)
    used = [y for y in outputs if y.requires_grad]
    draw = Draw(torch.float32, used[0].device, seed=1)
    cotangents = [draw(*y.shape).to(y.dtype) for y in used]

    def backward() -> Any:
        return torch.autograd.grad(used, leaves, cotangents, retain_graph=True, allow_unused=True)

    return Passes(forward, backward, kept, backend)


def implementation(cost: Cost, inputs: Inputs, backend: str) -> str:
    """Return which implementation a call takes. Raises: KernelError if the one asked for cannot run it."""
    device = next(floats(inputs)).device
    if backend == "auto" and device.type == "cuda":
        try:
            cost.call(inputs, "triton")()
        except KernelError:
            return "portable"
        return "triton"
    return "portable" if backend == "auto" else backend


def kept_bytes(forward: Callable[[], Any], beside: Any) -> int:
    """Return the bytes that autograd keeps of a forward pass, each storage once, without those of `beside`."""
    own = {x.untyped_storage().data_ptr() for x in floats(beside)}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # or a freed storage would lend its address to the next

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(kept.values())


class Errors(NamedTuple):
    """rms(error) / rms(reference), the worst tensor of a pass; NaN counts as infinitely wrong."""

    forward: float
    backward: float | None
    tokens: int
    """A row of the batch had so many."""


def errors(cost: Cost, sizes: Sizes, dtype: torch.dtype, device: torch.device, backend: str) -> Errors:
    """Compare an implementation with the reference in float64, on one row of at most CHECKED_TOKENS tokens."""
    short = replace(sizes, B=1, L=min(sizes.L, CHECKED_TOKENS))
    found = compare(cost, cost.inputs(short, Draw(dtype, device)), backend)
    return found._replace(tokens=1 if cost.prepared else short.L)


def compare(
    cost: Cost, inputs: Inputs, backend: str, against: str = "reference", wide: torch.dtype = torch.float64
) -> Errors:
    """Compare an implementation with another one, the reference in float64, on the same inputs."""
    widened = _floats_mapped(inputs, lambda x: x.to(torch.promote_types(x.dtype, wide)))
    (expected, expected_gradients), (actual, gradients) = (
        outputs_and_gradients(cost, given, name) for given, name in ((widened, against), (inputs, backend))
    )
    return Errors(
        distance(actual, expected), None if gradients is None else distance(gradients, expected_gradients or []), 0
    )


def outputs_and_gradients(cost: Cost, inputs: Inputs, backend: str) -> tuple[list[Tensor], list[Tensor] | None]:
    """Return every float output, and the gradient of every float input for a gradient of each output."""
    # a step of decoding moves its state: those of the caller stay as they are
    inputs = _with_gradients(inputs) if cost.backward else _copied(inputs)
    outputs = list(floats(cost.call(inputs, backend)()))
    if cost.backward is None:
        return outputs, None
    used = [y for y in outputs if y.requires_grad]
    draw = Draw(torch.float64, used[0].device, seed=1)
    cotangents = [draw(*y.shape).to(y.dtype) for y in used]
    leaves = list(floats(inputs))
    found = torch.autograd.grad(used, leaves, cotangents, allow_unused=True, materialize_grads=True)
    return [y.detach() for y in outputs], list(found)


def distance(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest rms(error) / rms(expected) of some tensors.

    A tensor that is zero up to rounding, less than a millionth of the largest, has no scale of its own: its error is
    taken over the largest.
    """
    scales = [float(e.double().square().mean().sqrt()) if e.numel() else 0.0 for e in expected]
    largest = max(scales, default=0.0) or 1.0
    worst = 0.0
    for a, e, scale in zip(actual, expected, scales, strict=True):
        if e.numel():
            error = float((a.double() - e.double()).square().mean().sqrt()) / (
                scale if scale > 1e-6 * largest else largest
            )
            worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def floats(value: Any) -> Iterator[Tensor]:
    """Yield every floating tensor of nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from floats(item)
    elif not isinstance(value, str | int | float | bool | type(None)):
        for item in value:
            yield from floats(item)


def _with_gradients(inputs: Inputs) -> Inputs:
    return _floats_mapped(inputs, lambda x: x.detach().requires_grad_())


def _copied(inputs: Inputs) -> Inputs:
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in inputs.items()}


def _floats_mapped(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    """Apply a function to every floating tensor, those in a tuple such as statistics included."""

    def mapped(value: Any) -> Any:
        if isinstance(value, Tensor):
            return function(value) if value.is_floating_point() else value
        if isinstance(value, tuple) and hasattr(value, "_replace"):
            return type(value)(*map(mapped, value))
        return value

    return {name: mapped(value) for name, value in inputs.items()}


def machine(device: torch.device) -> dict[str, Any]:
    """Return what a measurement was made on: device, versions, threads, commit; what is not known is None."""
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "device_type": device.type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "megalodon": _version("megalodon-lm"),
        "commit": _said("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
    }
    if device.type == "cuda":
        query = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
        said = _said("nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader", f"-i={device.index or 0}")
        found |= {"cuda": torch.version.cuda} | dict(zip(query, (said or "").split(", "), strict=False))
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _said(*command: str) -> str | None:
    """The first line that a program prints; None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None
