"""`megalodon pretrain`: tokens to a model. Puts the parts of a recipe together, trains, says how it went.

Not here: the step and its loop (megalodon/training/loop.py), scores (megalodon/evaluation), tokens (megalodon/data).
"""

import os
from collections.abc import Mapping
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megalodon.errors import InputError, MegalodonError, RecipeError, Stopped
from megalodon_cli import console, recipe_files, run_start, training_checks, training_job
from megalodon_cli.job import Asked, Job
from megalodon_cli.signals import Signals
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
        str,
        typer.Option(
            metavar="auto|never|STEP_DIR",
            help="auto continues the run that is in the directory; never refuses one; STEP_DIR continues from exactly "
            "that step: in its own run it must be the newest, with another -o it begins a branch.",
            rich_help_panel="Run",
        ),
    ] = "auto",
    init_from: Annotated[
        str | None,
        typer.Option(
            metavar="CKPT",
            help="Weights a new run begins with, = model.init_from: a model directory, RUN, RUN@STEP or RUN@best.",
            rich_help_panel="Run",
        ),
    ] = None,
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
    profile: Annotated[
        str | None,
        typer.Option(metavar="A..B", help="Trace steps A to B into RUN/profile.", rich_help_panel="Run"),
    ] = None,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="Bit by bit the same each time, = train.deterministic=true; slower.",
            rich_help_panel="Run",
        ),
    ] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Continue although this frozen key differs.", rich_help_panel="Run"),
    ] = None,
    force_unlock: Annotated[
        bool, typer.Option("--force-unlock", help="Take over a run another host left locked.", rich_help_panel="Run")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="One real step, evaluation, save, load and export, all removed again.",
            rich_help_panel="Run",
        ),
    ] = False,
    check_resume: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=2,
            help="Prove exact resume: N steps against N/2, save, load, N/2; exit 6 names the first difference.",
            rich_help_panel="Run",
        ),
    ] = None,
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
    # app.spelled writes these three as changes, in their place on the line; they reach a caller from Python as they are
    keys = {"model.init_from": init_from, "train.max_steps": max_steps, "train.max_tokens": max_tokens}
    changes += [f"{key}={value}" for key, value in keys.items() if value is not None]
    changes += ["train.deterministic=true"] if deterministic else []
    seconds, traced = _seconds(max_time), _steps(profile)
    if resume not in ("auto", "never") and any(change.startswith("model.init_from=") for change in changes):
        raise InputError("--resume STEP_DIR and --init-from are both given; a step has its own weights, drop one")
    ways: dict[str, object] = {
        "--dry-run": dry_run,
        "--check-resume": check_resume,
        "--stop-at-step": stop_at_step,
        "--max-time": seconds,
    }
    ways["--profile"] = profile
    _one_of(ways)
    if console.wants_json() and not dry_run and not check_resume:
        raise InputError("--json: pretrain prints a document only with --dry-run or --check-resume")
    resolved = recipe_files.load(names, changes)
    asked = Asked(device, resume, out_dir, allow_change or (), no_prepare)
    with Signals() as signals:
        if resolved.pretraining().train.deterministic:  # cuBLAS reads it when CUDA starts
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        job = training_job.prepare(resolved, asked, scratch=dry_run or check_resume is not None)
        if job is None:
            return
        if check_resume:
            training_checks.check_resume(job, signals, check_resume)
        elif dry_run:
            training_checks.dry_run(job, signals)
        else:
            _train(job, signals, seconds, stop_at_step, force_unlock, traced)


def _one_of(ways: Mapping[str, object]) -> None:
    """Raises: InputError for a check beside another way to end."""
    given = [option for option, value in ways.items() if value]
    if len(given) > 1 and given[0] in ("--dry-run", "--check-resume"):
        raise InputError(f"{given[0]} and {given[1]} are both given; expected one of them")


def _seconds(text: str | None) -> float | None:
    from megalodon.config import parse_duration

    try:
        seconds = None if text is None else float(str(parse_duration(text)))
    except ValueError as error:
        raise RecipeError(f"--max-time: {error}") from None
    if seconds == 0:
        raise RecipeError(f"--max-time: `{text}` leaves no time for a step; expected a time such as 90s, 20m or 2h")
    return seconds


def _steps(text: str | None) -> tuple[int, int] | None:
    """Read `A..B`. Raises: RecipeError for anything but 1 <= A <= B."""
    if text is None:
        return None
    first, _, last = text.partition("..")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise RecipeError(f"--profile: expected steps A..B with 1 <= A <= B such as 5..8, got `{text}`")
    return int(first), int(last)


def _train(
    job: Job,
    signals: Signals,
    max_seconds: float | None,
    stop_at_step: int | None,
    force_unlock: bool,
    traced: tuple[int, int] | None,
) -> None:
    """Train, export, and print the result. Raises: Stopped if a signal, a file or the clock ended it early."""
    from megalodon.checkpoint.lock import RunLock
    from megalodon.checkpoint.store import clean_leftovers, make_directory
    from megalodon.data.loader import token_bytes_table, validation_batches
    from megalodon.evaluation.perplexity import unigram_bits_per_byte
    from megalodon.profiling.trace import StepTrace
    from megalodon.recipe import dump
    from megalodon.training.host_memory import keep_freed_memory
    from megalodon.training.loop import Run, train
    from megalodon.training.run import drop_unbegun
    from megalodon.training.sinks import Sinks

    config, plan, tokenizer = job.config, job.plan, job.prepared.tokenizer
    if traced and traced[0] > plan.horizon:
        raise RecipeError(f"--profile {traced[0]}..{traced[1]}: the run has {plan.horizon:,} steps")
    if plan.device.type == "cpu":
        keep_freed_memory()
    bytes_table = token_bytes_table(tokenizer)
    rows = (job.prepared.valid, config.data.seq_len, config.data.isolate, plan.micro_rows, config.eval.tokens)
    unigram = unigram_bits_per_byte(job.prepared.train, validation_batches(*rows), bytes_table, tokenizer.vocab_size)
    peak = _peak(plan)
    header(job, peak)
    made = make_directory(job.directory)
    with RunLock(job.directory, force=force_unlock) as lock, console.Progress() as live, ExitStack() as places:
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
            num_classes=tokenizer.vocab_size,
            bytes_table=bytes_table,
            about={"frozen": dict(job.frozen), "tokenizer": tokenizer.sha256, "horizon": plan.horizon},
            tasks=training_job.tasks(job, bytes_table, signals.asked),
            initialise=lambda model: run_start.initialise(job, model),
            resume_from=run_start.checkpoint_of(job),
            begin=begin,
            report=sinks,
            beat=lock.beat,
            stop=signals.reason,
            around=trace.around if trace else nullcontext,
            stop_at_step=stop_at_step,
            max_seconds=max_seconds,
            peak_flops=peak,
        )
        signals.training = True
        try:
            result = train(job.model_config, job.loader, plan, run)
            ended = training_job.finish(job, record, result, unigram)
        except BaseException as error:
            drop_unbegun(job.directory, made)
            if record.values.get("status") == "running":  # a run that was refused before it began keeps its record
                kind = "failed" if isinstance(error, Exception) else "stopped"
                record.update(status=kind, error=str(error) if isinstance(error, MegalodonError) else repr(error))
            raise
        finally:
            signals.training = False
    if result.status == "stopped" and result.saved is None and signals.asked():
        raise SystemExit(128 + (signals.number or 0))
    if result.status == "stopped":
        state = "saved" if result.saved else "nothing to save yet"
        raise Stopped(f"{result.reason}: stopping after step {result.step:,}: {state}; the same command continues")
    ending(job, result, ended)


def _peak(plan: "Plan") -> float:
    import torch

    from megalodon.training.metrics import matmul_peak

    return matmul_peak(plan.device, torch.bfloat16 if plan.bf16 else torch.float32)
