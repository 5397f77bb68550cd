"""What a measurement is made of: rows, the rates of this machine, the meter that times, a Chrome trace of it.

Not here: what is measured (timing.py, model_timing.py), how a sample is taken (megalodon_kernels/measuring.py).
"""

import functools
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megalodon_kernels.costs import Work
from megalodon_kernels.measuring import Spread, copy_rate, matmul_rate, timed

REST = "rest"
"""Name of the row of what a step takes beyond its parts: no measurement, but a difference of some."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class Row:
    """One measurement. What does not apply is None, and left out of JSON."""

    section: str
    """kernels, layers, …"""
    name: str
    """Op, module, or what is measured."""
    what: str
    """forward, backward, step, read."""
    shape: Mapping[str, int]
    dtype: str
    backend: str
    """The implementation that ran; auto where each op of a model chose its own."""
    ms: float
    """Median, milliseconds."""
    ms_low: float
    """A fifth of the samples lie below."""
    ms_high: float
    """A fifth of the samples lie above."""
    step_share: float | None = None
    """Of a training step (section layers: of a block), 0 to 1."""
    flops: float | None = None
    """Operations, the least there can be."""
    bytes: float | None = None
    """Bytes moved, the least there can be."""
    floor_ms: float | None = None
    """What these take at the measured rates, the slower of the two."""
    tflops: float | None = None
    matmul_share: float | None = None
    """Of the measured rate of a matrix product."""
    gb_per_s: float | None = None
    copy_share: float | None = None
    """Of the measured rate of a copy; above 1 where a cache helped."""
    tokens_per_s: float | None = None
    flatness: float | None = None
    """Tokens/s over those at the least depth of the same kind."""
    kept_bytes: int | None = None
    """What the forward pass keeps for the backward pass, beside inputs and parameters."""
    peak_bytes: int | None = None
    """On a GPU the most allocated meanwhile; on a CPU the largest resident size of this process so far."""
    state_bytes: int | None = None
    """What a session remembers after it."""
    error: float | None = None
    """rms(error) / rms(reference) of the worst tensor, reference in float64."""
    error_tokens: int | None = None
    """Tokens on which the error was measured."""

    @property
    def key(self) -> str:
        """What two measurements must share to be compared."""
        return " ".join([self.section, self.name, self.what, self.sizes, self.dtype, self.backend])

    @property
    def sizes(self) -> str:
        """The shape as text: `B1 L4096 D512`."""
        return " ".join(f"{name}{size}" if len(name) == 1 else f"{name} {size:,}" for name, size in self.shape.items())

    def document(self) -> dict[str, Any]:
        """Return the row for JSON, rounded to what was measured; what is not finite is the text `inf`."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: _rounded(v) if isinstance(v, float) else v for name, v in values.items()}


def _rounded(value: float) -> float | str:
    return float(f"{value:.5g}") if math.isfinite(value) else "inf"


class Meter:
    """Times calls on a device, and records each in a trace if one is wanted.

    Args:
        repeats: samples of a measurement.
        report:  told what is being measured.
        traced:  whether a Chrome trace is kept; every timed call is then run once more, under the profiler.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, repeats: int, report: Callable[[str], None], traced: bool
    ) -> None:
        self.device, self.dtype, self.repeats, self.report = device, dtype, repeats, report
        self._events: dict[str, Any] | None = {"traceEvents": []} if traced else None

    @functools.cached_property
    def matmul(self) -> float:
        """Operations/s of a matrix product in the dtype."""
        return matmul_rate(self.device, self.dtype)

    @functools.cached_property
    def copy(self) -> float:
        """Bytes/s of a copy."""
        return copy_rate(self.device)

    def constants(self) -> dict[str, float]:
        """Return the measured rates of this machine, as the document has them."""
        return {"matmul_tflops": round(self.matmul / 1e12, 4), "copy_gb_per_s": round(self.copy / 1e9, 2)}

    def time(self, name: str, call: Callable[[], Any]) -> Spread:
        """Say what is measured, time it, trace it."""
        self.report(name)
        spread = timed(call, self.device, self.repeats)
        self.trace(name, call)
        return spread

    def trace(self, name: str, call: Callable[[], Any]) -> None:
        """Record one call, if a trace is wanted."""
        if self._events is None:
            return
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        with profile(activities=activities, acc_events=True) as recording, record_function(name):
            call()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            recording.export_chrome_trace(str(path))
            found = json.loads(path.read_text(encoding="utf-8"))
        self._events = {**found, "traceEvents": [*self._events["traceEvents"], *found["traceEvents"]]}

    def write_trace(self, path: Path) -> None:
        """Write all that was recorded as one Chrome trace."""
        path.write_text(json.dumps(self._events), encoding="utf-8")

    def roofline(self, work: Work, spread: Spread) -> dict[str, Any]:
        """Return what the rows of a pass say of its work and the time it took."""
        seconds = spread.median
        return {
            "flops": work.flops,
            "bytes": work.bytes,
            "floor_ms": 1e3 * max(work.flops / self.matmul, work.bytes / self.copy),
            "tflops": work.flops / seconds / 1e12,
            "matmul_share": work.flops / seconds / self.matmul,
            "gb_per_s": work.bytes / seconds / 1e9,
            "copy_share": work.bytes / seconds / self.copy,
        }


def milliseconds(spread: Spread) -> dict[str, Any]:
    """Return a spread as the fields of a row."""
    return {"ms": 1e3 * spread.median, "ms_low": 1e3 * spread.low, "ms_high": 1e3 * spread.high}


def dtype_name(dtype: torch.dtype) -> str:
    """Return `fp32` for torch.float32."""
    return next(name for name, known in DTYPES.items() if known == dtype)
