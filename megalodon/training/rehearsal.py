"""One real step and all that follows a run's last one, to see that it works and what it costs.

    phases = rehearse(model_config, loader, plan, run, export)        # step, evaluation …, save, load, export

Not here: removing what was written (the caller's scratch directory), the loop (loop.py).
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

from megalodon.data.loader import Samples
from megalodon.model.architectures import LanguageModel, LanguageModelConfig
from megalodon.training.loop import Row, Run, Task, train
from megalodon.training.metrics import peak_memory
from megalodon.training.plan import Plan


class Phase(NamedTuple):
    """What a part of the rehearsal took."""

    name: str
    seconds: float
    memory: int
    """The most this process has used by its end, in bytes."""


class _Clock:
    """Notes a phase whenever one ends; the time since the one before is its own."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.phases = plan, list[Phase]()
        self._last = time.monotonic()

    def __call__(self, name: str) -> None:
        now = time.monotonic()
        self.phases.append(Phase(name, now - self._last, peak_memory(self.plan.device)))
        self._last = now


def rehearse(
    model_config: LanguageModelConfig,
    loader: Samples,
    plan: Plan,
    run: Run,
    tasks: Mapping[str, Task],
    export: Callable[[LanguageModel], None] | None,
) -> list[Phase] | None:
    """Take one step, run every task, save, load what was saved, export; all in `run.directory`.

    Args:
        run:    its tasks and its milestone are replaced.
        tasks:  name -> task, called once each after the step whatever their interval is.
        export: writes the model; None if the run would not.
    Returns:
        The phases in their order; None if a stop was asked for.
    Raises: what training raises.
    """
    clock, told = _Clock(plan), run.report

    def report(row: Row) -> None:
        if row["kind"] == "train":
            clock("step")
        told(row)

    def timed(name: str, task: Task) -> Task:
        def call(model: LanguageModel) -> list[Row] | None:
            rows = task.call(model)
            clock(name)
            return rows

        return task._replace(call=call, every=1, at_start=False)

    run = replace(run, report=report, stop_at_step=1, begin=lambda: clock("build"))
    observed = replace(run, tasks=tuple(timed(name, task) for name, task in tasks.items()))
    result = train(model_config, loader, plan, observed)
    clock("save")
    if result.status == "stopped":
        return None
    result = train(model_config, loader, plan, replace(run, begin=lambda: None, tasks=()))
    clock("load")
    if export is not None:
        export(result.model)
        clock("export")
    return clock.phases
