"""`megalodon pretrain`: tokens to a model. Puts the parts of a recipe together, trains, says how it went.

Not here: the step and its loop (megalodon/training/loop.py), scores (megalodon/evaluation), tokens (megalodon/data).
"""

import signal
from contextlib import ExitStack, closing
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import typer

from megalodon.errors import InputError, MegalodonError, RecipeError, Stopped
from megalodon_cli import console, recipe_files, training_job
from megalodon_cli.training_job import Job
from megalodon_cli.training_screen import Screen, ending, header

if TYPE_CHECKING:
    from megalodon.training.plan import Plan


def _directory(text: str) -> Path:
    if not text:
        raise InputError("-o/--out-dir: expected a directory such as runs/mine, got an empty name")
    return Path(text)


def pretrain(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE… [key=value …]",
            help="Shipped names or files ending in .yaml (also as -c FILE), and changes such as optim.lr=1e-3.",
            autocompletion=recipe_files.complete,
        ),
    ],
    no_prepare: Annotated[
        bool, typer.Option("--no-prepare", help="Refuse to tokenise missing data.", rich_help_panel="Data")
    ] = False,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N; auto = a GPU if there is one.", rich_help_panel="Run")
    ] = "auto",
    resume: Annotated[
        Literal["auto", "never"],
        typer.Option(help="auto continues the run that is in the directory; never refuses one.", rich_help_panel="Run"),
    ] = "auto",
    max_steps: Annotated[
        str | None, typer.Option(help="Horizon in steps, = train.max_steps.", rich_help_panel="Run")
    ] = None,
    max_tokens: Annotated[
        str | None, typer.Option(help="Horizon in tokens such as 2M, = train.max_tokens.", rich_help_panel="Run")
    ] = None,
    max_time: Annotated[
        str | None, typer.Option(help="Stop and save after this time, such as 90s, 20m or 2h.", rich_help_panel="Run")
    ] = None,
    stop_at_step: Annotated[
        int | None, typer.Option(min=1, help="Stop and save after this step.", rich_help_panel="Run")
    ] = None,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Continue although this frozen key differs.", rich_help_panel="Run"),
    ] = None,
    force_unlock: Annotated[
        bool, typer.Option("--force-unlock", help="Take over a run another host left locked.", rich_help_panel="Run")
    ] = False,
    out_dir: Annotated[
        Path | None,
        typer.Option(
            "--out-dir",
            "--output-dir",
            "-o",
            parser=_directory,
            metavar="DIRECTORY",
            help="The run; runs/NAME if left out.",
            rich_help_panel="Output",
        ),
    ] = None,
) -> None:
    """Train a model from a recipe; text that is not tokenised yet is tokenised first.

    The same command continues a stopped run where it was, bit by bit. Ctrl-C finishes the step, saves and ends with 75.

    Examples:

        megalodon pretrain debug

        megalodon pretrain debug optim.lr=1e-3 -o runs/debug-slow

        megalodon pretrain debug --max-steps 12 -o runs/debug-long
    """
    names, changes = recipe_files.split(arguments)
    if not names:
        raise RecipeError("no recipe; expected a shipped name or a file ending in .yaml", "megalodon recipes ls")
    for option, horizon in (("max-steps", max_steps), ("max-tokens", max_tokens)):
        if horizon == "":
            raise RecipeError(f"--{option}: expected a number such as 2000 or 2M, got nothing")
        changes += [] if horizon is None else [f"train.{option.replace('-', '_')}={horizon}"]
    seconds = _seconds(max_time)
    resolved = recipe_files.load(names, changes)
    with Signals() as signals:
        job = training_job.prepare(resolved, device, resume, out_dir, allow_change or [], no_prepare)
        if job is not None:
            _train(job, signals, seconds, stop_at_step, force_unlock)


def _seconds(text: str | None) -> float | None:
    from megalodon.config import parse_duration

    try:
        seconds = None if text is None else float(str(parse_duration(text)))
    except ValueError as error:
        raise RecipeError(f"--max-time: {error}") from None
    if seconds == 0:
        raise RecipeError(f"--max-time: `{text}` leaves no time for a step; expected a time such as 90s, 20m or 2h")
    return seconds


class Signals:
    """The first SIGINT, SIGTERM or SIGUSR1 asks the run to stop after its step, the second ends the process at once.

    Before training starts there is nothing to save, so the first one ends it too.
    """

    def __init__(self) -> None:
        self.training = False
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None or not self.training:
            raise SystemExit(128 + number)
        self.number = number

    def reason(self) -> str | None:
        """Why the run is to stop, or None."""
        return None if self.number is None else signal.Signals(self.number).name


def _train(job: Job, signals: Signals, max_seconds: float | None, stop_at_step: int | None, force_unlock: bool) -> None:
    """Train, export, and print the result. Raises: Stopped if a signal, a file or the clock ended it early."""
    from megalodon.checkpoint.lock import RunLock
    from megalodon.checkpoint.store import clean_leftovers
    from megalodon.data.loader import token_bytes_table, validation_batches
    from megalodon.evaluation.perplexity import unigram_bits_per_byte
    from megalodon.training.host_memory import keep_freed_memory
    from megalodon.training.loop import Run, train
    from megalodon.training.run import drop_unbegun
    from megalodon.training.sinks import Sinks

    config, plan, tokenizer = job.config, job.plan, job.prepared.tokenizer
    if plan.device.type == "cpu":
        keep_freed_memory()
    bytes_table = token_bytes_table(tokenizer)
    rows = (job.prepared.valid, config.data.seq_len, config.data.isolate, plan.micro_rows, config.eval.tokens)
    unigram = unigram_bits_per_byte(job.prepared.train, validation_batches(*rows), bytes_table, tokenizer.vocab_size)
    peak = _peak(plan)
    header(job, peak)
    job.directory.mkdir(parents=True, exist_ok=True)
    with RunLock(job.directory, force=force_unlock) as lock, console.Progress() as live, ExitStack() as places:
        if lock.taken_over:
            console.note(f"{job.directory} was left by {lock.taken_over}, which is gone; taking over")
        clean_leftovers(job.directory)
        record = training_job.record_of(job)
        screen = Screen(live, plan.horizon, config.log.every, record)
        sinks = places.enter_context(closing(Sinks(config.log.to, job.directory, screen)))

        def begin() -> None:
            training_job.begin(job, record, unigram)
            sinks.open(job.frozen, offline=console.settings().offline)

        run = Run(
            directory=job.directory,
            num_classes=tokenizer.vocab_size,
            bytes_table=bytes_table,
            about={"frozen": dict(job.frozen), "tokenizer": tokenizer.sha256, "horizon": plan.horizon},
            tasks=training_job.tasks(job, bytes_table, lambda: signals.number is not None),
            begin=begin,
            report=sinks,
            beat=lock.beat,
            stop=signals.reason,
            stop_at_step=stop_at_step,
            max_seconds=max_seconds,
            peak_flops=peak,
        )
        signals.training = True
        try:
            result = train(job.model_config, job.loader, plan, run)
            ended = training_job.finish(job, record, result, unigram)
        except BaseException as error:
            drop_unbegun(job.directory)
            if record.values.get("status") == "running":  # a run that was refused before it began keeps its record
                kind = "failed" if isinstance(error, Exception) else "stopped"
                record.update(status=kind, error=str(error) if isinstance(error, MegalodonError) else repr(error))
            raise
        finally:
            signals.training = False
    if result.status == "stopped" and result.saved is None and signals.number is not None:
        raise SystemExit(128 + signals.number)
    if result.status == "stopped":
        state = "saved" if result.saved else "nothing to save yet"
        raise Stopped(f"{result.reason}: stopping after step {result.step:,}: {state}; the same command continues")
    ending(job, result, ended)


def _peak(plan: "Plan") -> float:
    import torch

    from megalodon.training.metrics import matmul_peak

    return matmul_peak(plan.device, torch.bfloat16 if plan.bf16 else torch.float32)
