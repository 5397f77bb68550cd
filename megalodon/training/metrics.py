"""What a run logs: JSON lines, and how fast it is compared with this machine's matrix product.

Not here: what the user sees (the command prints), the values themselves (loop.py).
"""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal

import torch
from pydantic import Field

from megalodon.checkpoint.store import sync_directory
from megalodon.config import Config


class LogConfig(Config):
    """What is written down while training (the `log:` section of a recipe)."""

    every: int = Field(default=10, ge=1)
    """Steps between two progress lines; metrics.jsonl has every step."""
    to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Further places beside metrics.jsonl."""
    health_every: int | None = Field(default=None, ge=1)
    """Steps between two looks at the state of each layer: memory of CEMA, variances, scales; null = never."""


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, in the order of training.

        {"kind": "train", "step": 7, "loss": …, "z": …, "bits_per_byte": …, "lr": …, "tokens": …, "grad_norm": …,
         "norms": {"embed": …, "cema": …, …}, "clip": …, "skips": …, "spikes": …, "rollbacks": …, times…}
        {"kind": "health", "step": 10, "layers": [{"memory": {"median": …, "p99.9": …, "max": …}, …}, …], …}
        {"kind": "eval", "step": 10, "valid_loss": …, "bits_per_byte": …, "by_position": {"1": …, "2": …}}
        {"kind": "sample", "step": 10, "prompt": …, "text": …}
        {"kind": "event", "step": 12, "event": "skip", "reason": …}     skip, spike, empty, rollback, stop

    Losses are nats a token, without the penalty of optim.z_loss; z is the mean of logsumexp² it acts on. Norms are of
    the gradient before clipping, clip is the factor it was then multiplied with (1 = not clipped). skips, spikes and
    rollbacks count from the start of the run. A value that is not finite is null.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def open_at(self, step: int, observed: bool) -> None:
        """Forget what came after a checkpoint, so that the file continues as if the run had never stopped.

        Args:
            step:     of the checkpoint; 0 forgets everything.
            observed: whether evaluation and samples of that very step were done before it was saved.
        """
        self.close()
        kept = [row for row in self.rows() if _belongs(row, step, observed)] if step else []
        aside = self.path.with_name(f".tmp-{self.path.name}")
        with aside.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self.path)
        sync_directory(self.path.parent)  # or what is forced to the disk later would be a file without this name
        self._file = self.path.open("a", encoding="utf-8")

    def rows(self) -> list[dict[str, Any]]:
        """Return every whole line; the torn last line of a killed process is left out."""
        # not splitlines, which also ends a line at characters that the text of a sample may hold, such as U+2028
        lines = self.path.read_text(encoding="utf-8").split("\n") if self.path.exists() else []
        found = []
        for line in filter(None, lines):
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a line; values that are not finite become null."""
        assert self._file is not None, "open_at comes first"
        self._file.write(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Force the lines to the disk; a checkpoint that follows never knows more than this file."""
        if self._file:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()
            self._file = None


def _belongs(row: Mapping[str, Any], step: int, observed: bool) -> bool:
    own = row["kind"] in ("train", "event", "health") or observed
    return bool(row["step"] < step or (row["step"] == step and own))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.25) -> float:
    """Measure this machine's square matrix product with the current number of threads: floating-point operations/s.

    The best of repeated products of 1024 x 1024 (4096 on a GPU) within `seconds`; a multiply-add counts as two.
    """
    size = 1024 if device.type == "cpu" else 4096
    a = torch.ones(size, size, dtype=dtype, device=device)
    best, begin = math.inf, time.perf_counter()
    a @ a  # the first product also starts threads and libraries
    while best == math.inf or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def machine_row(
    tokens: int, begin: float, loaded: float, flops: float, peak_flops: float | None, device: torch.device
) -> dict[str, Any]:
    """Return what a row of kind `train` says of the machine, at the end of a step.

    Args:
        tokens: of the step.
        begin, loaded: when it began and when its batch was there, on the monotonic clock.
        flops: floating-point operations a token.
        peak_flops: operations/s of this machine's matrix product; None if that was not measured.
    """
    seconds = time.monotonic() - begin
    speed = tokens / seconds
    return {
        "tok_per_s": round(speed, 1),
        "seconds": round(seconds, 4),
        "data_seconds": round(loaded - begin, 4),
        "peak_share": round(speed * flops / peak_flops, 4) if peak_flops else None,
        "memory": peak_memory(device),
    }


def peak_memory(device: torch.device) -> int:
    """Return the most memory this process has used so far on `device`, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
