"""What `pretrain` works on: the parts of a recipe, checked and put together, and what is written around the training.

Not here: the step and its loop (megalodon/training/loop.py), signals and the order of things (commands/pretrain.py),
what is shown (training_screen.py).
"""

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from megalodon.errors import DataError
from megalodon_cli import console

if TYPE_CHECKING:
    from megalodon.data.loader import Loader
    from megalodon.data.prepare import Prepared
    from megalodon.model.megalodon import Megalodon, ModelConfig
    from megalodon.recipe import Resolved, RunConfig
    from megalodon.training.loop import Result, Row
    from megalodon.training.plan import Plan
    from megalodon.training.run import RunRecord


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


def prepare(
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
    from megalodon.training.plan import make_plan
    from megalodon.training.run import check_directory, frozen_values, open_record
    from megalodon.training.sinks import require

    config = resolved.pretraining()
    resolved.require_complete()
    parts = (config.train, config.optim, config.checkpoint, config.log, config.parallel)
    with _unsupported(resolved):
        make_plan(*parts, seq_len=config.data.seq_len, windows=1, device=device)
    require(config.log.to)
    directory = out_dir or Path("runs") / config.name
    check_directory(directory, fresh=resume == "never")
    frozen = frozen_values(config.model_dump(mode="json", by_alias=True))
    record = open_record(directory, frozen, allow)
    if record and record.finished and record.values.get("horizon") == _horizon(config):
        console.result(f"{directory} is finished: {record.values['step']:,} steps")
        console.result(f"  next: {' · '.join(_next(directory))}")
        return None
    store = config.data.dir or Path("data") / config.name
    if no_prepare and not (store / "manifest.json").exists():
        raise DataError(f"{store} holds no token store, and --no-prepare forbids to make one", "megalodon tokenize …")
    with console.Progress() as live:
        prepared = prepare_store(
            config.data,
            config.tokenizer,
            store,
            lambda p: live.update(f"{p.stage}: {p.documents:,} documents"),
            offline=console.settings().offline,
        )
    loader = Loader(prepared.train, config.data.seq_len, config.data.isolate, config.train.seed, config.data.weights())
    plan = make_plan(*parts, seq_len=config.data.seq_len, windows=loader.num_samples, device=device)
    model_config = config.model_config_for(prepared.tokenizer.vocab_size)
    return Job(config, resolved, directory, prepared, loader, model_config, plan, frozen, allow)


@contextmanager
def _unsupported(resolved: "Resolved") -> Iterator[None]:
    """Raises: InvalidRecipe with the place of each value that this version would otherwise ignore, the loop's too."""
    from megalodon.config import InvalidRecipe, Place, Problem

    config = resolved.pretraining()
    model = config.model
    chats = any(not isinstance(prompt, str) for prompt in config.eval.samples.prompts)
    values = [
        ("model.arch", model.arch, model.arch != "megalodon", "megalodon"),
        ("model.init_from", model.init_from, model.init_from is not None, "null"),
        ("model.lora", "an adapter", model.lora is not None, "null"),
        ("eval.samples.prompts", "messages", chats, "text"),
    ]
    here = Place(config.name)
    found = [Problem(here, k, f"{v} is not available in pretrain; expected {e}") for k, v, bad, e in values if bad]
    try:
        yield
    except InvalidRecipe as error:
        found += error.problems
    if found:
        nodes = [resolved.tree.find(problem.key.split(".")) for problem in found]
        raise InvalidRecipe(
            [replace(p, place=node.place if node else here) for p, node in zip(found, nodes, strict=True)]
        )


def _horizon(config: "RunConfig") -> dict[str, Any]:
    train = config.train
    return {"max_steps": train.max_steps, "max_tokens": train.max_tokens, "max_epochs": train.max_epochs}


def record_of(job: Job) -> "RunRecord":
    """Return the record of the run in the directory, or of a new one, not yet written. Called under the lock."""
    from megalodon.training.run import new_record, open_record

    return open_record(job.directory, job.frozen, job.allow) or new_record(
        job.directory, job.frozen, name=job.config.name, kind=job.config.kind, step=0, tokens=0
    )


def begin(job: Job, record: "RunRecord", unigram: float | None) -> None:
    """Write down what this run is; says so when it continues with a longer horizon. Called once it can go on."""
    from megalodon.checkpoint.store import write_json
    from megalodon.recipe import dump
    from megalodon.training.run import environment
    from megalodon.training.schedule import learning_rate

    directory, plan = job.directory, job.plan
    before = record.values.get("steps")
    if before is None:
        console.info(f"{directory}: a new run, starting at step 0")
    elif before != plan.horizon:
        step = int(record.values["step"])
        rates = [learning_rate(plan.optim, step + 1, n, plan.batch_tokens) for n in (before, plan.horizon)]
        console.note(
            f"horizon {before:,} -> {plan.horizon:,} steps; lr of step {step + 1:,}: {rates[0]:.3g} -> {rates[1]:.3g}"
        )
    pairs = {key: [record.values["frozen"].get(key), job.frozen.get(key)] for key in job.allow}
    allowed = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    record.update(
        status="running",
        error=None,
        steps=plan.horizon,
        horizon=_horizon(job.config),
        parameters=job.model_config.num_parameters(),
        unigram_bits_per_byte=unigram,
        frozen=dict(job.frozen),
        allowed=[*record.values["allowed"], *([allowed] if allowed else [])],
        next=[shlex.join(["megalodon", "pretrain", str(directory / "recipe.yaml"), "-o", str(directory)])],
    )
    (directory / "recipe.yaml").write_text(dump(job.resolved), encoding="utf-8")
    (directory / "command.txt").write_text(shlex.join(["megalodon", *sys.argv[1:]]) + "\n", encoding="utf-8")
    write_json(directory / "environment.json", environment(plan.device))


def tasks(job: Job, bytes_table: Any, stopping: Callable[[], bool]) -> tuple[Any, ...]:
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
            stop=stopping,
        )
        return None if found is None else [found.row(config.eval.by_position)]

    def write(model: "Megalodon") -> "list[Row] | None":
        found: list[Row] = []
        for number, prompt in enumerate(samples.prompts):
            if stopping():
                return None
            sampling = SamplingConfig(seed=number)
            text = generate_text(model, tokenizer, str(prompt), samples.max_new_tokens, sampling, bos=data.bos)
            found.append({"kind": "sample", "prompt": prompt, "text": text})
        return found

    scores = Task(score, config.eval.every, config.eval.at_start, averaged=True)
    return (scores, Task(write, samples.every)) if samples.prompts else (scores,)


class Ending(NamedTuple):
    """How a run went: all rows of its metrics, its scores, its training time in seconds, the commands to try next."""

    rows: "list[Row]"
    scores: Mapping[str, Any]
    seconds: float
    following: Sequence[str]


def finish(job: Job, record: "RunRecord", result: "Result", unigram: float | None) -> Ending:
    """Export the model of a finished run and complete `run.json`."""
    import hashlib

    from megalodon.checkpoint.tensors import save_model
    from megalodon.recipe import dump
    from megalodon.training.metrics import MetricsLog

    rows = MetricsLog(job.directory / "metrics.jsonl").rows()
    evaluations = [row for row in rows if row["kind"] == "eval"]
    start = next((row for row in evaluations if row["step"] == 0), {})
    last = evaluations[-1] if evaluations else {}
    scores = {"valid_loss": last.get("valid_loss"), "bits_per_byte": last.get("bits_per_byte")}
    scores |= {key: last[key] for key in ("ema_valid_loss", "ema_bits_per_byte") if key in last}
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
            "weights": "last" if job.plan.optim.ema is None else f"averaged, optim.ema {job.plan.optim.ema:g}",
            "scores": scores,
        }
        save_model(result.model, job.directory / "model", tokenizer.save, meta)
    status = "finished" if result.status == "finished" else "stopped"
    following = _next(job.directory) if exported else record.values["next"]
    seconds = round(result.seconds + float(record.values.get("seconds", 0)), 1)
    record.update(status=status, step=result.step, tokens=result.tokens, seconds=seconds, next=following, **scores)
    return Ending(rows, scores, seconds, following)


def _next(directory: Path) -> list[str]:
    name = directory.name if directory.parent == Path("runs") else str(directory)
    return [shlex.join(["megalodon", *words]) for words in (["generate", name, "-p", "TEXT"], ["runs", "show", name])]
