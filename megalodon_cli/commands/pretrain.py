"""`megalodon pretrain`: tokens to a model. Puts the parts of a recipe together, trains, says how it went.

Not here: the step and its loop (megalodon/training/loop.py), scores (megalodon/evaluation), tokens (megalodon/data).
"""

import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import typer

from megalodon.errors import DataError, MegalodonError, RecipeError, Stopped
from megalodon_cli import console, recipe_files
from megalodon_cli.training_screen import Screen, ending, header

if TYPE_CHECKING:
    from megalodon.data.loader import Loader
    from megalodon.data.prepare import Prepared
    from megalodon.model.megalodon import Megalodon, ModelConfig
    from megalodon.recipe import Resolved, RunConfig
    from megalodon.training.loop import Plan, Result, Row
    from megalodon.training.run import RunRecord


def pretrain(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE… [key=value …]",
            help="Shipped names or files ending in .yaml, and changes such as optim.lr=1e-3.",
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
            "--out-dir", "--output-dir", "-o", help="The run; runs/NAME if left out.", rich_help_panel="Output"
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
    changes += [f"train.max_steps={max_steps}"] if max_steps else []
    changes += [f"train.max_tokens={max_tokens}"] if max_tokens else []
    resolved = recipe_files.load(names, changes)
    with Signals() as signals:
        job = _prepare(resolved, device, resume, out_dir, allow_change or [], no_prepare)
        if job is not None:
            _train(job, signals, _seconds(max_time), stop_at_step, force_unlock)


def _seconds(text: str | None) -> float | None:
    from megalodon.config import parse_duration

    try:
        return None if text is None else float(str(parse_duration(text)))
    except ValueError as error:
        raise RecipeError(f"--max-time: {error}") from None


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


@dataclass(frozen=True)
class Job:
    """Everything a run needs, checked; nothing of the run is written yet."""

    config: "RunConfig"
    resolved: "Resolved"
    directory: Path
    prepared: "Prepared"
    loader: "Loader"
    model_config: "ModelConfig"
    plan: "Plan"
    frozen: Mapping[str, Any]
    allow: Sequence[str]


def _prepare(
    resolved: "Resolved",
    device: str,
    resume: Literal["auto", "never"],
    out_dir: Path | None,
    allow: Sequence[str],
    no_prepare: bool,
) -> Job | None:
    """Check recipe, directory and data. None if the run is finished already; that was said then."""
    from megalodon.data.loader import Loader
    from megalodon.data.prepare import prepare_store
    from megalodon.training.loop import make_plan
    from megalodon.training.run import check_directory, frozen_values, open_record

    config = resolved.pretraining()
    resolved.require_complete()
    _refuse_unsupported(config)
    parts = (config.train, config.optim, config.checkpoint, config.log, config.parallel)
    make_plan(*parts, seq_len=config.data.seq_len, windows=1, device=device)
    directory = out_dir or Path("runs") / config.name
    check_directory(directory, fresh=resume == "never")
    frozen = frozen_values(config.model_dump(mode="json", by_alias=True))
    record = open_record(directory, frozen, allow)
    if record and record.finished and record.values.get("horizon") == _horizon(config):
        console.result(f"{directory} is finished: {record.values['step']:,} steps")
        console.result(f"  next: {_next(directory)}")
        return None
    store = config.data.dir or Path("data") / config.name
    if no_prepare and not (store / "manifest.json").exists():
        raise DataError(f"{store} holds no token store, and --no-prepare forbids to make one", "megalodon tokenize …")
    with console.Progress() as live:
        prepared = prepare_store(
            config.data, config.tokenizer, store, lambda p: live.update(f"{p.stage}: {p.documents:,} documents")
        )
    loader = Loader(prepared.train, config.data.seq_len, config.data.isolate, config.train.seed, config.data.weights())
    plan = make_plan(*parts, seq_len=config.data.seq_len, windows=loader.num_samples, device=device)
    model_config = config.model_config_for(prepared.tokenizer.vocab_size)
    return Job(config, resolved, directory, prepared, loader, model_config, plan, frozen, allow)


def _refuse_unsupported(config: "RunConfig") -> None:
    """Raises: RecipeError with a line for each value that this version would otherwise ignore."""
    model = config.model
    chats = [prompt for prompt in config.eval.samples.prompts if not isinstance(prompt, str)]
    refused = [
        ("model.arch", model.arch, model.arch != "megalodon", "megalodon"),
        ("model.init_from", model.init_from, model.init_from is not None, "null"),
        ("model.lora", "r", model.lora is not None, "null"),
        ("eval.samples.prompts", "messages", bool(chats), "text"),
    ]
    lines = [f"{k} {v} is not available in this version of pretrain; expected {e}" for k, v, bad, e in refused if bad]
    if lines:
        raise RecipeError("\n".join(lines))


def _horizon(config: "RunConfig") -> dict[str, Any]:
    train = config.train
    return {"max_steps": train.max_steps, "max_tokens": train.max_tokens, "max_epochs": train.max_epochs}


def _train(job: Job, signals: Signals, max_seconds: float | None, stop_at_step: int | None, force_unlock: bool) -> None:
    """Train, export, and print the result. Raises: Stopped if a signal, a file or the clock ended it early."""
    from megalodon.checkpoint.store import RunLock, clean_leftovers
    from megalodon.data.loader import token_bytes_table, validation_batches
    from megalodon.evaluation.perplexity import unigram_bits_per_byte
    from megalodon.training.host_memory import keep_freed_memory
    from megalodon.training.loop import Run, train

    config, plan, tokenizer = job.config, job.plan, job.prepared.tokenizer
    if plan.device.type == "cpu":
        keep_freed_memory()
    bytes_table = token_bytes_table(tokenizer)
    rows = (job.prepared.valid, config.data.seq_len, config.data.isolate, plan.micro_rows, config.eval.tokens)
    unigram = unigram_bits_per_byte(job.prepared.train, validation_batches(*rows), bytes_table, tokenizer.vocab_size)
    peak = _peak(plan)
    header(job, peak)
    job.directory.mkdir(parents=True, exist_ok=True)
    with RunLock(job.directory, force=force_unlock) as lock, console.Progress() as live:
        if lock.taken_over:
            console.note(f"{job.directory} was left by {lock.taken_over}, which is gone; taking over")
        clean_leftovers(job.directory)
        record = _begin(job, unigram)
        screen = Screen(live, plan.horizon, config.log.every, record)
        run = Run(
            directory=job.directory,
            num_classes=tokenizer.vocab_size,
            bytes_table=bytes_table,
            about={"frozen": dict(job.frozen), "tokenizer": tokenizer.sha256, "horizon": plan.horizon},
            tasks=_tasks(job, bytes_table, signals),
            report=screen,
            stop=signals.reason,
            stop_at_step=stop_at_step,
            max_seconds=max_seconds,
            peak_flops=peak,
        )
        signals.training = True
        try:
            result = train(job.model_config, job.loader, plan, run)
            _finish(job, record, result, unigram)
        except BaseException as error:
            if not isinstance(error, Stopped):
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


def _peak(plan: "Plan") -> float:
    import torch

    from megalodon.training.metrics import matmul_peak

    return matmul_peak(plan.device, torch.bfloat16 if plan.bf16 else torch.float32)


def _begin(job: Job, unigram: float | None) -> "RunRecord":
    """Write down what this run is; says so when it continues with a longer horizon. Called under the lock."""
    import shlex

    from megalodon.checkpoint.store import write_json
    from megalodon.recipe import dump
    from megalodon.training.run import environment, new_record, open_record
    from megalodon.training.schedule import learning_rate

    directory, plan = job.directory, job.plan
    record = open_record(directory, job.frozen, job.allow)
    if record is None:
        console.info(f"{directory}: a new run, starting at step 0")
        record = new_record(directory, job.frozen, name=job.config.name, kind=job.config.kind, step=0, tokens=0)
    elif (before := record.values.get("steps")) not in (None, plan.horizon):
        step = int(record.values["step"])
        rates = [learning_rate(plan.optim, step + 1, n, plan.batch_tokens) for n in (before, plan.horizon)]
        console.note(
            f"horizon {before:,} -> {plan.horizon:,} steps; lr of step {step + 1:,}: {rates[0]:.3g} -> {rates[1]:.3g}"
        )
    allowed = {key: [record.values["frozen"].get(key), job.frozen.get(key)] for key in job.allow}
    record.update(
        status="running",
        error=None,
        steps=plan.horizon,
        horizon=_horizon(job.config),
        parameters=job.model_config.num_parameters(),
        unigram_bits_per_byte=unigram,
        frozen=dict(job.frozen),
        allowed=[*record.values["allowed"], *([allowed] if allowed else [])],
        next=[f"megalodon pretrain {directory / 'recipe.yaml'} -o {directory}"],
    )
    (directory / "recipe.yaml").write_text(dump(job.resolved), encoding="utf-8")
    (directory / "command.txt").write_text(shlex.join(["megalodon", *sys.argv[1:]]) + "\n", encoding="utf-8")
    write_json(directory / "environment.json", environment(plan.device))
    return record


def _tasks(job: Job, bytes_table: Any, signals: Signals) -> tuple[Any, ...]:
    """What the loop asks for between steps: the evaluation, then the samples."""
    from megalodon.data.loader import validation_batches
    from megalodon.evaluation.perplexity import evaluate
    from megalodon.inference.sampling import SamplingConfig
    from megalodon.inference.session import generate_text
    from megalodon.training.loop import Task

    config, plan, tokenizer = job.config, job.plan, job.prepared.tokenizer
    data, samples = config.data, config.eval.samples

    def score(model: "Megalodon") -> "list[Row] | None":
        batches = validation_batches(
            job.prepared.valid, data.seq_len, data.isolate, plan.micro_rows, config.eval.tokens
        )
        found = evaluate(
            model,
            batches,
            bytes_table,
            tokenizer.vocab_size,
            block=config.train.loss_chunk,
            bf16=plan.bf16,
            stop=lambda: signals.number is not None,
        )
        return None if found is None else [found.row(config.eval.by_position)]

    def write(model: "Megalodon") -> "list[Row] | None":
        found: list[Row] = []
        for number, prompt in enumerate(samples.prompts):
            if signals.number is not None:
                return None
            sampling = SamplingConfig(seed=number)
            text = generate_text(model, tokenizer, str(prompt), samples.max_new_tokens, sampling, bos=data.bos)
            found.append({"kind": "sample", "prompt": prompt, "text": text})
        return found

    scores = Task(score, config.eval.every, config.eval.at_start)
    return (scores, Task(write, samples.every)) if samples.prompts else (scores,)


def _finish(job: Job, record: "RunRecord", result: "Result", unigram: float | None) -> None:
    """Export the model of a finished run, complete `run.json`, and print how it went."""
    import hashlib

    from megalodon.checkpoint.tensors import save_model
    from megalodon.recipe import dump
    from megalodon.training.metrics import MetricsLog

    rows = MetricsLog(job.directory / "metrics.jsonl").rows()
    evaluations = [row for row in rows if row["kind"] == "eval"]
    start = next((row for row in evaluations if row["step"] == 0), {})
    last = evaluations[-1] if evaluations else {}
    scores = {"valid_loss": last.get("valid_loss"), "bits_per_byte": last.get("bits_per_byte")}
    scores |= {"bits_per_byte_at_start": start.get("bits_per_byte"), "unigram_bits_per_byte": unigram}
    exported = result.status == "finished" and job.config.checkpoint.export
    if exported:
        tokenizer = job.prepared.tokenizer
        meta = {
            "tokenizer_sha256": tokenizer.sha256,
            "bos": job.config.data.bos,
            "isolate": job.config.data.isolate,
            "seq_len": job.config.data.seq_len,
            "recipe": {
                "name": job.config.name,
                "sha256": hashlib.sha256(dump(job.resolved, origins=False).encode()).hexdigest(),
            },
            "step": result.step,
            "tokens": result.tokens,
            "scores": scores,
        }
        save_model(result.model, job.directory / "model", tokenizer.save, meta)
    status = "finished" if result.status == "finished" else "stopped"
    following = _next(job.directory) if exported else record.values["next"][0]
    seconds = round(result.seconds + float(record.values.get("seconds", 0)), 1)
    record.update(
        status=status, step=result.step, tokens=result.tokens, seconds=seconds, next=following.split(" · "), **scores
    )
    if result.status == "stopped":
        return
    ending(job, result, rows, scores, seconds)
    console.result(f"  next: {following}")


def _next(directory: Path) -> str:
    name = directory.name if directory.parent == Path("runs") else str(directory)
    return f"megalodon generate {name} -p TEXT · megalodon runs show {name}"
