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
from datetime import timedelta
from typing import TYPE_CHECKING

from megalodon.errors import InputError, MegalodonError, RecipeError, Stopped
from megalodon_cli import console, joining, run_start, training_checks, training_job
from megalodon_cli.job import Asked, Ending, Job
from megalodon_cli.signals import Signals
from megalodon_cli.training_options import How
from megalodon_cli.training_screen import Screen, ending, header

if TYPE_CHECKING:
    from megalodon.data.loader import Samples
    from megalodon.model.architectures import LanguageModelConfig
    from megalodon.parallel.ranks import Ranks
    from megalodon.recipe import Resolved
    from megalodon.training.loop import Result, Run
    from megalodon.training.plan import Plan
    from megalodon.training.run import RunRecord

Prepare = Callable[["Resolved", Asked, bool], Job | None]
"""Checks recipe, directory and data; with True nothing will be kept. None if nothing is left to do, which it said."""


class Started:
    """A run that is ready to train, under its lock."""

    def __init__(
        self, job: Job, run: "Run", record: "RunRecord | None", unigram: float | None, signals: Signals
    ) -> None:
        self.job, self.run, self._record, self._unigram, self._signals = job, run, record, unigram, signals
        self._ended: tuple[Result, Ending | None] | None = None

    @property
    def parts(self) -> "tuple[LanguageModelConfig, Samples, Plan]":
        """What is trained, on what, and how."""
        return self.job.model_config, self.job.loader, self.job.plan

    def end(self, result: "Result") -> None:
        """Export the model and complete the record, where there is one: on the main rank."""
        ended = training_job.finish(self.job, self._record, result, self._unigram) if self._record else None
        self._ended = result, ended

    def say(self) -> None:
        """Print how it ended. Raises: Stopped if a signal, a file or the clock ended it early."""
        assert self._ended is not None
        (result, ended), signals = self._ended, self._signals
        if result.status == "stopped" and result.saved is None and signals.asked():
            raise SystemExit(128 + (signals.number or 0))
        if result.status == "stopped":
            state = "saved" if result.saved else "nothing to save yet"
            raise Stopped(f"{result.reason}: stopping after step {result.step:,}: {state}; the same command continues")
        if ended:
            ending(self.job, result, ended)


@contextmanager
def work(resolved: "Resolved", asked: Asked, how: How, prepare: Prepare) -> Iterator[Started | None]:
    """Prepare a run and yield it; or do the check that was asked for and yield None."""
    patience = timedelta(minutes=resolved.config.parallel.timeout_minutes)
    with Signals() as signals, joining.joined(asked.device, patience) as team:
        if team.size > 1 and how.scratch:
            raise InputError(f"--dry-run and --check-resume are for one process; this is one of {team.size}")
        asked = asked._replace(device=team.device(asked.device), ranks=team.size)
        if resolved.config.train.deterministic:  # cuBLAS reads it when CUDA starts
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        job = team.in_turn(lambda: prepare(resolved, asked, how.scratch))
        if job is None:
            yield None
        elif how.check_resume:
            training_checks.check_resume(job, signals, how.check_resume)
            yield None
        elif how.dry_run:
            training_checks.dry_run(job, signals)
            yield None
        elif not team.main:
            with _beside(job, signals, how, team) as started:
                yield started
            started.say()
        else:
            with _started(job, signals, how, team) as started:
                yield started
            started.say()


@contextmanager
def _beside(job: Job, signals: Signals, how: How, team: joining.Team) -> Iterator[Started]:
    """Take part in the run of rank 0, which alone speaks."""
    from megalodon.training.host import training_here
    from megalodon.training.loop import Run

    plan = job.plan
    bytes_table = training_job.bytes_table(job)
    ranks = _ranks(job, team)
    run = Run(
        directory=job.directory,
        num_classes=job.num_classes,
        bytes_table=bytes_table,
        tasks=training_job.tasks(job, bytes_table, signals.asked, ranks),
        build=job.build,
        initialise=run_start.initialise(job),
        begin=lambda: joining.move_log(job.directory, ranks.rank),
        stop=signals.reason,
        ranks=ranks,
        stop_at_step=how.stop_at_step,
        max_seconds=how.max_seconds,
    )
    signals.training = True
    try:
        with training_here() if plan.device.type == "cpu" else nullcontext():
            yield Started(job, run, None, None, signals)
    finally:
        signals.training = False


def _ranks(job: Job, team: joining.Team) -> "Ranks":
    """The ranks of a run, once they know that they are about to train the same."""
    import hashlib

    from megalodon.recipe import dump

    recipe = hashlib.sha256(dump(job.resolved, origins=False).encode()).hexdigest()[:12]
    data = job.prepared.train.fingerprint[:12], job.prepared.valid.fingerprint[:12]
    what = {"recipe": recipe, "data": data, "code": joining.code_digest(), "micro_batch": job.plan.micro_rows}
    team.agree(what)
    return team.ranks(job.plan.layout, job.plan.device.type)


@contextmanager
def _started(job: Job, signals: Signals, how: How, team: joining.Team) -> Iterator[Started]:
    """Take the lock of a run and yield it; on an error its record says so."""
    from megalodon.checkpoint.lock import RunLock
    from megalodon.checkpoint.store import clean_leftovers, make_directory
    from megalodon.profiling.trace import StepTrace
    from megalodon.recipe import dump
    from megalodon.training.host import training_here
    from megalodon.training.loop import Run
    from megalodon.training.run import drop_unbegun
    from megalodon.training.sinks import Sinks

    config, plan, tokenizer, traced = job.config, job.plan, job.prepared.tokenizer, how.traced
    if traced and traced[0] > plan.horizon:
        raise RecipeError(f"--profile {traced[0]}..{traced[1]}: the run has {plan.horizon:,} steps")
    bytes_table = training_job.bytes_table(job)
    unigram = training_job.unigram(job, bytes_table)
    ranks = _ranks(job, team)
    peak = _peak(plan) * team.size
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
            tasks=training_job.tasks(job, bytes_table, signals.asked, ranks),
            build=job.build,
            initialise=run_start.initialise(job),
            resume_from=run_start.checkpoint_of(job),
            begin=begin,
            report=sinks,
            beat=lock.beat,
            stop=signals.reason,
            around=trace.around if trace else nullcontext,
            ranks=ranks,
            stop_at_step=how.stop_at_step,
            max_seconds=how.max_seconds,
            peak_flops=peak,
        )
        if plan.device.type == "cpu":
            places.enter_context(training_here())
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
