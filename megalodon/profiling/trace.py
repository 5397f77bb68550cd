"""A trace of some training steps: what ran when, for chrome://tracing or Perfetto, and the slowest operations as text.

    trace = StepTrace(directory, first=5, last=8)
    with trace.around(step): …        # every step; only those from first to last are recorded
    trace.close()                     # writes what a run that stopped early has recorded

Not here: which steps (the command), speed without a recording (training/metrics.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

TOP = 40
"""Operations in the table."""


class StepTrace:
    """Records the steps from `first` to `last`, both included, into one trace.

    Recording slows the steps and changes none of their numbers.

    Args:
        directory: where `steps-A-B.json` (Chrome trace) and `steps-A-B.txt` (table) go; made when they are written.
        first, last: numbers of steps, counted from 1.
    """

    def __init__(self, directory: Path, first: int, last: int) -> None:
        if not 1 <= first <= last:
            raise ValueError(f"steps {first} to {last}: expected 1 <= first <= last")
        self.directory, self.first, self.last = directory, first, last
        self.written: list[Path] = []
        """The files, once they are there."""
        self._recording: Any = None
        self._steps: list[int] = []

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Record what runs inside if the step is one of those wanted."""
        if not self.first <= step <= self.last:
            yield
            return
        if self._recording is None:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._recording = profile(activities=activities, record_shapes=True, acc_events=True)
            self._recording.start()
        with torch.profiler.record_function(f"step {step}"):
            yield
        self._steps.append(step)
        if step == self.last:
            self.close()

    def close(self) -> None:
        """Write the steps recorded so far, if there are any that are not written yet."""
        if self._recording is None:
            return
        recording, self._recording = self._recording, None
        recording.stop()
        if not self._steps:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        name = f"steps-{self._steps[0]}-{self._steps[-1]}"
        trace, table = (self.directory / f"{name}.{kind}" for kind in ("json", "txt"))
        recording.export_chrome_trace(str(trace))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        text = recording.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=TOP)
        table.write_text(text + "\n", encoding="utf-8")
        self.written = [trace, table]
        self._steps = []
