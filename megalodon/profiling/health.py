"""What `megalodon doctor` runs: versions, devices, every op against its reference, number formats, disk, memory.

Not here: the table on the screen (megalodon_cli/commands/doctor.py), speed of the ops (timing comes with profiling).
"""

import importlib.metadata
import math
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import megalodon_kernels
from megalodon.data.tokenizer import ByteTokenizer, train_sentencepiece
from megalodon.errors import DataError
from megalodon_kernels.cases import STATEFUL, TOKENWISE, cases

DISTRIBUTION = "megalodon-lm"
PYTHON = (3, 11)
"""The oldest Python that is supported."""
OPS: dict[str, Callable[..., Any]] = {name: getattr(megalodon_kernels, name) for name in (*STATEFUL, *TOKENWISE)}
OP_TOLERANCE = 2e-4
"""Largest |difference| / max(1, largest |value|) of float32 sums of some hundred terms, gradients among them."""
DISK_PROBE = 32 << 20
"""Bytes written to measure the disk."""
MIN_FREE_DISK, MIN_FREE_MEMORY = 2 << 30, 1 << 30


class Check(NamedTuple):
    """One line of the report: `ok` is None for what this machine does not have and nothing needs."""

    name: str
    ok: bool | None
    detail: str
    fix: str | None = None
    """What to do; only where `ok` is False."""


def checks() -> list[Check]:
    """Run every check on this machine; a few seconds."""
    with _one_thread():
        ops = [_op(name) for name in OPS]
    return [*_versions(), *_devices(), *ops, _bfloat16(), _tokenizers(), _disk(), _memory()]


@contextmanager
def _one_thread() -> Iterator[None]:
    """The cases are tiny: threads that wait for one another, on a busy machine, take longer than all the sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def supported() -> dict[str, str]:
    """Distribution -> oldest supported version, as the installed package declares it, without extras.

    Raises: importlib.metadata.PackageNotFoundError if megalodon is not installed.
    """
    table = {}
    for requirement in importlib.metadata.requires(DISTRIBUTION) or []:
        wanted, _, marker = (part.strip() for part in requirement.partition(";"))
        if "extra" in marker or ("platform_system" in marker and platform.system() not in marker):
            continue
        name, _, oldest = wanted.partition(">=")
        table[name.strip()] = oldest.strip()
    return table


def _versions() -> Iterator[Check]:
    found, oldest = platform.python_version(), ".".join(map(str, PYTHON))
    fix = None if _release(found) >= PYTHON else f"install Python {oldest} or newer"
    yield Check("python", fix is None, f"{found} (supported: {oldest} or newer)", fix)
    try:
        table = supported()
    except importlib.metadata.PackageNotFoundError:
        yield Check(DISTRIBUTION, False, "not installed", "pip install -c constraints.txt -e . in the checkout")
        return
    yield Check(DISTRIBUTION, True, importlib.metadata.version(DISTRIBUTION))
    for name, wanted in table.items():
        yield _version(name, wanted)


def _version(name: str, wanted: str) -> Check:
    fix = f"pip install -c constraints.txt '{name}>={wanted}'"
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        # Triton only serves GPUs; the portable path runs without it.
        absent = None if name == "triton" else False
        return Check(name, absent, f"not installed (supported: {wanted} or newer)", None if absent is None else fix)
    good = _release(found) >= _release(wanted)
    return Check(name, good, f"{found} (supported: {wanted} or newer)", None if good else fix)


def _devices() -> Iterator[Check]:
    yield Check("cpu", True, f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads")
    if not torch.cuda.is_available():
        yield Check("gpu", None, "none; everything runs on the CPU")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield Check(f"gpu {index}", True, f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")


def _op(name: str) -> Check:
    """The path that `auto` takes in float32, forward and backward, against the reference in float64, for every case."""
    worst, where, count = 0.0, "", 0
    start = time.perf_counter()
    for case, inputs in cases(name):
        expected, got = _run(OPS[name], inputs, torch.float64, "reference"), _run(OPS[name], inputs, None, "auto")
        for part, value in expected.items():
            # A difference is only as meaningful as the largest value of its tensor; NaN counts as infinitely wrong.
            scale = max(1.0, float(value.abs().max())) if value.numel() else 1.0
            error = float((got[part].double() - value).abs().max()) / scale if value.numel() else 0.0
            error = math.inf if math.isnan(error) else error
            if error >= worst:
                worst, where = error, f"{part} of {case}"
        count += 1
    good = worst <= OP_TOLERANCE
    detail = f"{count} cases forward and backward, largest error {worst:.1e} in {time.perf_counter() - start:.1f} s"
    if good:
        return Check(f"op {name}", True, detail)
    fix = "reinstall torch (pip install --force-reinstall -c constraints.txt torch); if it stays, report this line"
    return Check(f"op {name}", False, f"{detail}: {where}; at most {OP_TOLERANCE:.0e} is rounding", fix)


def _run(
    op: Callable[..., Any], inputs: Mapping[str, Any], dtype: torch.dtype | None, backend: str
) -> dict[str, Tensor]:
    """Every floating output and the gradient of every floating input, by name; `dtype` None leaves the inputs' own."""
    leaves: dict[str, Tensor] = {}
    arguments: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            leaves[name] = arguments[name] = value.detach().to(dtype or value.dtype).requires_grad_()
        else:
            arguments[name] = value
    outputs = dict(_tensors(op(**arguments, backend=backend), "output"))
    total = torch.zeros((), dtype=torch.float64)
    for value in outputs.values():
        # Uneven weights, so that errors of opposite sign cannot cancel in the gradients.
        weights = torch.linspace(-1, 1, value.numel(), dtype=torch.float64).view(value.shape)
        total = total + (weights * value.double()).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    results = {name: value.detach() for name, value in outputs.items()}
    return results | {f"gradient of {name}": value for name, value in zip(leaves, gradients, strict=True)}


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
        return
    for number, part in enumerate(value):
        yield from _tensors(part, f"{name}.{number}")


def _matmul_seconds(a: Tensor) -> float:
    a @ a
    start = time.perf_counter()
    for _ in range(5):
        a @ a
    return (time.perf_counter() - start) / 5


def _bfloat16() -> Check:
    a = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    low = a.bfloat16()
    product = a @ a
    error = float((low @ low - product).abs().max() / product.abs().max())
    # Both factors and the result are rounded to 8 bits: three roundings of 2^-9, and some more in the sum.
    if error > 2e-2:
        fix = "train with train.precision=fp32"
        return Check("bf16", False, f"a product of 512 x 512 is off by {error:.1%}; at most 2% is rounding", fix)
    gain = _matmul_seconds(a) / _matmul_seconds(low)
    advice = "bf16-mixed pays" if gain > 1.2 else "fp32 is the better precision here"
    return Check("bf16", True, f"works; a CPU product runs at {gain:.1f}x the speed of float32: {advice}")


def _tokenizers() -> Check:
    text = "def f(x):\n\treturn  'é🙂' * 12\n"
    try:
        trained = train_sentencepiece([text * 20], vocab_size=300, reserve=2)
        wrong = [t.kind for t in (ByteTokenizer(), trained) if t.decode(t.encode(text)) != text]
    except DataError as error:
        wrong = [str(error)]
    fix = "reinstall sentencepiece: pip install --force-reinstall -c constraints.txt sentencepiece" if wrong else None
    return Check("tokenizer", not wrong, f"round trip fails: {wrong[0]}" if wrong else "trained, round trip exact", fix)


def _disk() -> Check:
    directory = Path(tempfile.gettempdir())
    free, block = shutil.disk_usage(directory).free, os.urandom(1 << 20)
    size = f"{directory}: {free / 1e9:.1f} GB free"
    if free < MIN_FREE_DISK:
        return Check(
            "disk", False, size, f"free at least {MIN_FREE_DISK / 1e9:.0f} GB, or point TMPDIR to another disk"
        )
    try:
        with tempfile.NamedTemporaryFile(dir=directory) as file:
            start = time.perf_counter()
            for _ in range(DISK_PROBE // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - start
    except OSError as error:
        return Check("disk", False, f"{directory}: cannot write: {error.strerror}", "point TMPDIR to another disk")
    return Check("disk", True, f"{size}, writes {DISK_PROBE / 1e6 / seconds:,.0f} MB/s")


def _memory() -> Check:
    try:
        table = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return Check("memory", None, f"not known on {platform.system()}")
    total, free = (int(re.findall(rf"{key}:\s+(\d+) kB", table)[0]) << 10 for key in ("MemTotal", "MemAvailable"))
    detail = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    if free < MIN_FREE_MEMORY:
        return Check("memory", False, detail, "close other programs; small recipes need about 1 GiB")
    return Check("memory", True, detail)
