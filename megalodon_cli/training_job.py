"""What `pretrain` works on, and what any training does around its loop: evaluation, samples, export, report.

Not here: the step and its loop (megalodon/training/loop.py), the order of things (training_command.py), examples
(finetune_job.py), what is shown (training_screen.py).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalodon.errors import DataError, NumericalError
from megalodon_cli import console, run_start
from megalodon_cli.job import Asked, Ending, Job

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from megalodon.data.chat import ChatFormat, Message
    from megalodon.inference.sampling import SamplingConfig
    from megalodon.model.architectures import LanguageModel
    from megalodon.parallel.ranks import Ranks
    from megalodon.recipe import Resolved
    from megalodon.training.loop import Result, Row
    from megalodon.training.run import RunRecord


def prepare(resolved: "Resolved", asked: Asked, scratch: bool = False) -> Job | None:
    """Check recipe, directory and data. None if the run is finished already; that was said then.

    Args:
        scratch: nothing will be written into the directory, and what is in it does not matter.
    """
    from megalodon.data.loader import Loader, validation_batches
    from megalodon.data.prepare import prepare_store
    from megalodon.data.shards import open_store
    from megalodon.parallel.tensor import limits_of
    from megalodon.training.memory import available_memory, fitted
    from megalodon.training.plan import make_plan
    from megalodon.training.run import frozen_values
    from megalodon.training.sinks import require

    config = resolved.pretraining()
    resolved.require_complete()
    parts = (config.train, config.optim, config.checkpoint, config.log, config.parallel)
    with _unsupported(resolved):
        make_plan(
            *parts,
            seq_len=config.data.seq_len,
            windows=1,
            device=asked.device,
            world_size=asked.ranks,
            **limits_of(config.model_config_for(config.padded_vocab_size())),
        )
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
    model_config = config.model_config_for(prepared.tokenizer.vocab_size)
    plan = make_plan(
        *parts,
        seq_len=config.data.seq_len,
        windows=loader.num_samples,
        device=asked.device,
        world_size=asked.ranks,
        **limits_of(model_config),
    )
    before = None if scratch else run_start.micro_rows(directory, frozen, plan.device.type)
    plan = fitted(model_config, plan, available_memory(plan.device), before)
    rows = (prepared.valid, config.data.seq_len, config.data.isolate, plan.micro_rows, config.eval.tokens)
    return Job(
        config,
        resolved,
        directory,
        prepared,
        loader,
        model_config,
        plan,
        frozen,
        asked,
        bos=config.data.bos,
        num_classes=prepared.tokenizer.vocab_size,
        validation=lambda: validation_batches(*rows),
    )


@contextmanager
def _unsupported(resolved: "Resolved") -> Iterator[None]:
    """Raises: InvalidRecipe with the place of each value that this version would otherwise ignore, the loop's too."""
    from megalodon.config import InvalidRecipe, Place, Problem

    config = resolved.pretraining()
    model = config.model
    chats = any(not isinstance(prompt, str) for prompt in config.eval.samples.prompts)
    values = [
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


def tasks(job: Job, bytes_table: Any, stopping: Callable[[], bool], ranks: "Ranks") -> tuple[Any, ...]:
    """What the loop asks for between steps: the evaluation, by all ranks, then the samples."""
    from megalodon.evaluation.perplexity import ChatPromptConfig, evaluate
    from megalodon.inference.sampling import SamplingConfig
    from megalodon.inference.session import generate_text
    from megalodon.model.adapters import is_adapted, merged
    from megalodon.model.architectures import as_megalodon
    from megalodon.training.loop import Task

    config, plan, tokenizer = job.config, job.plan, job.prepared.tokenizer
    samples, tuning = config.eval.samples, job.tuning

    def score(model: "LanguageModel") -> "list[Row] | None":
        found = evaluate(
            model,
            job.validation(),
            bytes_table,
            job.num_classes,
            block=config.train.loss_chunk,
            bf16=plan.bf16,
            stop=stopping,
            ranks=ranks,
        )
        return None if found is None else [found.row(config.eval.by_position)]

    def write(model: "LanguageModel") -> "list[Row] | None":
        found: list[Row] = []
        plain = (
            merged(as_megalodon(model, "an adapter")) if is_adapted(model) else model
        )  # a decoder reads the matrices themselves
        for number, prompt in enumerate(samples.prompts):
            sampling, most = SamplingConfig(seed=number), samples.max_new_tokens
            if isinstance(prompt, ChatPromptConfig):
                assert tuning is not None
                turns = [{"role": turn.role, "content": turn.content} for turn in prompt.messages]
                text, ended = answer(plain, tuning.chat, turns, most, sampling, stopping)
                row: Row = {"prompt": turns[-1]["content"], "messages": turns, "text": text, "ended": ended}
            else:
                text = generate_text(plain, tokenizer, prompt, most, sampling, bos=job.bos, given_up=stopping)
                row = {"prompt": prompt, "text": text}
            if stopping():
                return None
            found.append({"kind": "sample", **row})
        return found

    scores = Task(score, config.eval.every, config.eval.at_start, averaged=True, by_all=True)
    # What the base model says before the first step is what the tuned one is compared with.
    return (scores, Task(write, samples.every, at_start=tuning is not None)) if samples.prompts else (scores,)


def answer(
    model: "LanguageModel",
    chat: "ChatFormat",
    messages: "Sequence[Message]",
    max_new_tokens: int,
    sampling: "SamplingConfig",
    given_up: Callable[[], bool] = lambda: False,
) -> tuple[str, bool]:
    """Return what a model answers, and whether it ended its turn itself."""
    from megalodon.inference.sampling import allowed_ids
    from megalodon.inference.session import Session, generate
    from megalodon.inference.stream import TokenStream

    stream, pieces, count = TokenStream(chat.tokenizer), list[str](), 0
    ids = chat.encode(messages, answer=True).ids
    allowed = allowed_ids(chat.tokenizer, model.config.num_outputs, chat.stop_ids)
    for token in generate(Session(model), ids, max_new_tokens, sampling, chat.stop_ids, allowed):
        pieces.append(stream.push(token))
        count += 1
        if given_up():
            break
    return "".join(pieces) + stream.flush(), count < max_new_tokens


def bytes_table(job: Job) -> "NDArray[np.int64]":
    """Return how many bytes of text each id stands for: (num_classes,); the markers of a chat stand for none."""
    import numpy as np

    from megalodon.data.loader import token_bytes_table

    table = token_bytes_table(job.prepared.tokenizer)
    return np.concatenate([table, np.zeros(job.num_classes - len(table), dtype=np.int64)])


def unigram(job: Job, bytes_table: "NDArray[np.int64]") -> float | None:
    """Return the baseline of pretraining; of examples only a part is trained on, and it would say nothing."""
    from megalodon.evaluation.perplexity import unigram_bits_per_byte

    if job.tuning is not None:
        return None
    return unigram_bits_per_byte(job.prepared.train, job.validation(), bytes_table, job.num_classes)


def export(
    job: Job, model: "LanguageModel", directory: Path, progress: Mapping[str, int], scores: Mapping[str, Any]
) -> None:
    """Write a model directory, or one with the adapters: weights, tokenizer, template, and what they came from."""
    import hashlib

    from megalodon.checkpoint.adapter_files import save_adapter
    from megalodon.checkpoint.tensors import save_model
    from megalodon.model.architectures import as_megalodon
    from megalodon.recipe import dump

    config, tokenizer, tuning = job.config, job.prepared.tokenizer, job.tuning
    recipe = {"name": config.name, "sha256": hashlib.sha256(dump(job.resolved, origins=False).encode()).hexdigest()}
    meta = {
        "tokenizer_sha256": tokenizer.sha256,
        "bos": job.bos,
        "eos": tuning is not None or job.resolved.pretraining().data.eos,
        "isolate": config.data.isolate,
        "seq_len": job.loader.seq_len,
        "lr": job.plan.optim.lr,
        "recipe": recipe,
        **progress,
        "weights": "last" if job.plan.optim.ema is None else f"averaged, optim.ema {job.plan.optim.ema:g}",
        "scores": scores,
    }

    def beside(aside: Path) -> None:
        tokenizer.save(aside)
        if tuning is not None:
            tuning.chat.save(aside)

    if tuning is not None and config.model.lora is not None:
        assert tuning.base.directory is not None
        save_adapter(as_megalodon(model, "an adapter"), directory, tuning.base.directory, beside, meta)
    else:
        save_model(model, directory, beside, meta)


def result_name(job: Job) -> str:
    """Return the name of the directory that a finished run leaves."""
    return "adapter" if job.config.model.lora is not None else "model"


def finish(job: Job, record: "RunRecord", result: "Result", unigram: float | None) -> Ending:
    """Export the model of a finished run and complete `run.json`."""
    from megalodon.model.adapters import trainable
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
        loss = scores["valid_loss"]  # there is an evaluation at the end of every finished run
        if loss is None or not math.isfinite(loss):
            raise NumericalError(
                f"step {result.step:,}: the validation loss is not finite, so the model is not exported",
                "lower optim.lr, or go on from an earlier step: --resume STEP_DIR -o DIRECTORY",
            )
        progress = {"step": result.step, "tokens": result.tokens}
        export(job, result.model, job.directory / result_name(job), progress, scores)
    status = "finished" if result.status == "finished" else "stopped"
    following = run_start.next_commands(job.directory) if exported else record.values["next"]
    done: dict[str, Any] = {"trainable": sum(p.numel() for p in trainable(result.model).values())} if job.tuning else {}
    seconds = round(result.seconds + float(record.values.get("seconds", 0)), 1)
    record.update(
        status=status, step=result.step, tokens=result.tokens, seconds=seconds, next=following, **done, **scores
    )
    (job.directory / "report.md").write_text(markdown(job.directory), encoding="utf-8", errors="backslashreplace")
    return Ending(rows, scores, seconds, following)
