"""What `pretrain` works on: the parts of a recipe, checked and put together, and what is written around the training.

Not here: the step and its loop (megalodon/training/loop.py), signals and the order of things (commands/pretrain.py),
what is shown (training_screen.py).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalodon.errors import DataError
from megalodon_cli import console, run_start
from megalodon_cli.job import Asked, Ending, Job

if TYPE_CHECKING:
    from megalodon.model.megalodon import Megalodon
    from megalodon.recipe import Resolved
    from megalodon.training.loop import Result, Row
    from megalodon.training.run import RunRecord


def prepare(resolved: "Resolved", asked: Asked, *, scratch: bool = False) -> Job | None:
    """Check recipe, directory and data. None if the run is finished already; that was said then.

    Args:
        scratch: nothing will be written into the directory, and what is in it does not matter.
    """
    from megalodon.data.loader import Loader
    from megalodon.data.prepare import prepare_store
    from megalodon.data.shards import open_store
    from megalodon.training.memory import available_memory, fitted
    from megalodon.training.plan import make_plan
    from megalodon.training.run import frozen_values
    from megalodon.training.sinks import require

    config = resolved.pretraining()
    resolved.require_complete()
    parts = (config.train, config.optim, config.checkpoint, config.log, config.parallel)
    with _unsupported(resolved):
        make_plan(*parts, seq_len=config.data.seq_len, windows=1, device=asked.device)
    require(config.log.to)
    directory = run_start.directory_of(config, asked)
    frozen = frozen_values(config.model_dump(mode="json", by_alias=True))
    if not scratch and run_start.finished(directory, config, asked, frozen):
        return None
    store = config.data.dir or Path("data") / config.name
    if asked.no_prepare and not (store / "manifest.json").exists():
        raise DataError(f"{store} holds no token store, and --no-prepare forbids to make one", "megalodon tokenize …")
    with console.Progress() as live:
        prepared = prepare_store(
            config.data,
            config.tokenizer,
            store,
            lambda p: live.update(f"{p.stage}: {p.documents:,} documents"),
            offline=console.settings().offline,
        )
    if (reader := config.data.reader) != "mmap":
        train, valid = (open_store(part.path, reader=reader) for part in (prepared.train, prepared.valid))
        prepared = prepared._replace(train=train, valid=valid)
    loader = Loader(prepared.train, config.data.seq_len, config.data.isolate, config.train.seed, config.data.weights())
    plan = make_plan(*parts, seq_len=config.data.seq_len, windows=loader.num_samples, device=asked.device)
    model_config = config.model_config_for(prepared.tokenizer.vocab_size)
    before = None if scratch else run_start.micro_rows(directory, frozen, plan.device.type)
    plan = fitted(model_config, plan, available_memory(plan.device), before)
    return Job(config, resolved, directory, prepared, loader, model_config, plan, frozen, asked)


@contextmanager
def _unsupported(resolved: "Resolved") -> Iterator[None]:
    """Raises: InvalidRecipe with the place of each value that this version would otherwise ignore, the loop's too."""
    from megalodon.config import InvalidRecipe, Place, Problem

    config = resolved.pretraining()
    model = config.model
    chats = any(not isinstance(prompt, str) for prompt in config.eval.samples.prompts)
    values = [
        ("model.arch", model.arch, model.arch != "megalodon", "megalodon"),
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
            sampling = SamplingConfig(seed=number)
            text = generate_text(
                model, tokenizer, str(prompt), samples.max_new_tokens, sampling, bos=data.bos, given_up=stopping
            )
            if stopping():
                return None
            found.append({"kind": "sample", "prompt": prompt, "text": text})
        return found

    scores = Task(score, config.eval.every, config.eval.at_start, averaged=True)
    return (scores, Task(write, samples.every)) if samples.prompts else (scores,)


def export(
    job: Job, model: "Megalodon", directory: Path, progress: Mapping[str, int], scores: Mapping[str, Any]
) -> None:
    """Write a model directory: weights, tokenizer, and what they came from."""
    import hashlib

    from megalodon.checkpoint.tensors import save_model
    from megalodon.recipe import dump

    config, tokenizer = job.config, job.prepared.tokenizer
    recipe = {"name": config.name, "sha256": hashlib.sha256(dump(job.resolved, origins=False).encode()).hexdigest()}
    meta = {
        "tokenizer_sha256": tokenizer.sha256,
        "bos": config.data.bos,
        "isolate": config.data.isolate,
        "seq_len": config.data.seq_len,
        "recipe": recipe,
        **progress,
        "weights": "last" if job.plan.optim.ema is None else f"averaged, optim.ema {job.plan.optim.ema:g}",
        "scores": scores,
    }
    save_model(model, directory, tokenizer.save, meta)


def finish(job: Job, record: "RunRecord", result: "Result", unigram: float | None) -> Ending:
    """Export the model of a finished run and complete `run.json`."""
    from megalodon.training.metrics import MetricsLog
    from megalodon_cli.run_report import markdown

    rows = MetricsLog(job.directory / "metrics.jsonl").rows()
    evaluations = [row for row in rows if row["kind"] == "eval"]
    start = next((row for row in evaluations if row["step"] == 0), {})
    last = evaluations[-1] if evaluations else {}
    scores = {"valid_loss": last.get("valid_loss"), "bits_per_byte": last.get("bits_per_byte")}
    scores |= {key: last[key] for key in ("ema_valid_loss", "ema_bits_per_byte") if key in last}
    scores |= {"bits_per_byte_at_start": start.get("bits_per_byte"), "unigram_bits_per_byte": unigram}
    exported = result.status == "finished" and job.config.checkpoint.export
    if exported:
        export(job, result.model, job.directory / "model", {"step": result.step, "tokens": result.tokens}, scores)
    status = "finished" if result.status == "finished" else "stopped"
    following = run_start.next_commands(job.directory) if exported else record.values["next"]
    seconds = round(result.seconds + float(record.values.get("seconds", 0)), 1)
    record.update(status=status, step=result.step, tokens=result.tokens, seconds=seconds, next=following, **scores)
    (job.directory / "report.md").write_text(markdown(job.directory), encoding="utf-8", errors="backslashreplace")
    return Ending(rows, scores, seconds, following)
