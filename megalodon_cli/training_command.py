"""What happens around the training of `pretrain` and `finetune`: signals, checks, lock, record, and what is said.

    with work(resolved, asked, how, prepare) as started:     # None: a check was asked for, or nothing is left to do
        if started:
            started.end(train(*started.parts, started.run))

The command itself calls the loop, so that the walk from a verb to a kernel stays short.
Not here: the loop (megalodon/training/loop.py), what is trained (training_job.py, finetune_job.py).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from typing import TYPE_CHECKING

from megalodon.errors import MegalodonError, RecipeError, Stopped
from megalodon_cli import console, run_start, training_checks, training_job
from megalodon_cli.job import Asked, Ending, Job
from megalodon_cli.signals import Signals
from megalodon_cli.training_options import How
from megalodon_cli.training_screen import Screen, ending, header

if TYPE_CHECKING:
    from megalodon.data.loader import Samples
    from megalodon.model.architectures import LanguageModelConfig
    from megalodon.recipe import Resolved
    from megalodon.training.loop import Result, Run
    from megalodon.training.plan import Plan
    from megalodon.training.run import RunRecord

Prepare = Callable[["Resolved", Asked, bool], Job | None]
"""Checks recipe, directory and data; with True nothing will be kept. None if nothing is left to do, which it said."""


class Started:
    """A run that is ready to train, under its lock."""

    def __init__(self, job: Job, run: "Run", record: "RunRecord", unigram: float | None, signals: Signals) -> None:
        self.job, self.run, self._record, self._unigram, self._signals = job, run, record, unigram, signals
        self._ended: tuple[Result, Ending] | None = None

    @property
    def parts(self) -> "tuple[LanguageModelConfig, Samples, Plan]":
        """What is trained, on what, and how."""
        return self.job.model_config, self.job.loader, self.job.plan

    def end(self, result: "Result") -> None:
        """Export the model and complete the record."""
        self._ended = result, training_job.finish(self.job, self._record, result, self._unigram)

    def say(self) -> None:
        """Print how it ended. Raises: Stopped if a signal, a file or the clock ended it early."""
        assert self._ended is not None
        (result, ended), signals = self._ended, self._signals
        if result.status == "stopped" and result.saved is None and signals.asked():
            raise SystemExit(128 + (signals.number or 0))
        if result.status == "stopped":
            state = "saved" if result.saved else "nothing to save yet"
            raise Stopped(f"{result.reason}: stopping after step {result.step:,}: {state}; the same command continues")
        ending(self.job, result, ended)


@contextmanager
def work(resolved: "Resolved", asked: Asked, how: How, prepare: Prepare) -> Iterator[Started | None]:
    """Prepare a run and yield it; or do the check that was asked for and yield None."""
    with Signals() as signals:
        if resolved.config.train.deterministic:  # cuBLAS reads it when CUDA starts
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        job = prepare(resolved, asked, how.scratch)
        if job is None:
            yield None
        elif how.check_resume:
            training_checks.check_resume(job, signals, how.check_resume)
            yield None
        elif how.dry_run:
            training_checks.dry_run(job, signals)
            yield None
        else:
            with _started(job, signals, how) as started:
                yield started
            started.say()


@contextmanager
def _started(job: Job, signals: Signals, how: How) -> Iterator[Started]:
    """Take the lock of a run and yield it; on an error its record says so."""
    from megalodon.checkpoint.lock import RunLock
    from megalodon.checkpoint.store import clean_leftovers, make_directory
    from megalodon.profiling.trace import StepTrace
    from megalodon.recipe import dump
    from megalodon.training.host_memory import keep_freed_memory
    from megalodon.training.loop import Run
    from megalodon.training.run import drop_unbegun
    from megalodon.training.sinks import Sinks

    config, plan, tokenizer, traced = job.config, job.plan, job.prepared.tokenizer, how.traced
    if traced and traced[0] > plan.horizon:
        raise RecipeError(f"--profile {traced[0]}..{traced[1]}: the run has {plan.horizon:,} steps")
    if plan.device.type == "cpu":
        keep_freed_memory()
    bytes_table = training_job.bytes_table(job)
    unigram = training_job.unigram(job, bytes_table)
    peak = _peak(plan)
    header(job, peak)
    made = make_directory(job.directory)
    with RunLock(job.directory, force=how.force_unlock) as lock, console.Progress() as live, ExitStack() as places:
        if lock.taken_over:
            console.note(f"{job.directory} was left by {lock.taken_over}, which is gone; taking over")
        clean_leftovers(job.directory)
        record = run_start.record_of(job)
        console.settings().run = (job.directory, dump(job.resolved))
        screen = Screen(live, plan.horizon, config.log.every, record)
        sinks = places.enter_context(closing(Sinks(config.log.to, job.directory, screen)))

        trace = StepTrace(job.directory / "profile", *traced) if traced else None
        if trace:
            places.callback(trace.close)

        def begin() -> None:
            run_start.begin(job, record, unigram)
            sinks.open(job.frozen, offline=console.settings().offline)

        run = Run(
            directory=job.directory,
            num_classes=job.num_classes,
            bytes_table=bytes_table,
            about={"frozen": dict(job.frozen), "tokenizer": tokenizer.sha256, "horizon": plan.horizon},
            tasks=training_job.tasks(job, bytes_table, signals.asked),
            build=job.build,
            initialise=lambda model: run_start.initialise(job, model),
            resume_from=run_start.checkpoint_of(job),
            begin=begin,
            report=sinks,
            beat=lock.beat,
            stop=signals.reason,
            around=trace.around if trace else nullcontext,
            stop_at_step=how.stop_at_step,
            max_seconds=how.max_seconds,
            peak_flops=peak,
        )
        signals.training = True
        try:
            yield Started(job, run, record, unigram, signals)
        except BaseException as error:
            drop_unbegun(job.directory, made)
            if record.values.get("status") == "running":  # a run that was refused before it began keeps its record
                kind = "failed" if isinstance(error, Exception) else "stopped"
                record.update(status=kind, error=str(error) if isinstance(error, MegalodonError) else repr(error))
            raise
        finally:
            signals.training = False


def _peak(plan: "Plan") -> float:
    import torch

    from megalodon.training.metrics import matmul_peak

    return matmul_peak(plan.device, torch.bfloat16 if plan.bf16 else torch.float32)
