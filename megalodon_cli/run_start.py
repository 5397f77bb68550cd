"""Where a run goes and how it begins there: a new one, one that goes on, a branch of another; its record.

Not here: what is trained (training_job.py), the rules of a run directory (megalodon/training/run.py).
"""

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalodon.errors import CheckpointError
from megalodon_cli import checkpoints, console, joining
from megalodon_cli.job import Asked, Job

if TYPE_CHECKING:
    from megalodon.model.architectures import LanguageModel
    from megalodon.recipe import FinetuneConfig, RunConfig
    from megalodon.training.run import RunRecord


def directory_of(config: "RunConfig | FinetuneConfig", asked: Asked) -> Path:
    """Return the directory of the run: -o, else that of the step to resume from, else runs/NAME."""
    if asked.out_dir is None and asked.resume not in ("auto", "never"):
        return Path(asked.resume).parent.parent
    return asked.out_dir or Path("runs") / config.name


def finished(directory: Path, config: "RunConfig | FinetuneConfig", asked: Asked, frozen: dict[str, Any]) -> bool:
    """Check the directory and whether the run in it has nothing left to do, which is said then.

    Raises: CheckpointError for foreign files, another run, or one although none is wanted.
    """
    from megalodon.training.run import check_directory, open_record, start_at

    step = None if asked.resume in ("auto", "never") else Path(asked.resume)
    if step:  # first, as it may also have named the directory
        start_at(step, directory)
    check_directory(directory, fresh=asked.resume == "never")
    _check_kind([directory, *([step.parent.parent] if step else [])], config.kind)
    if step:
        open_record(step.parent.parent, frozen, asked.allow)
    record = open_record(directory, frozen, asked.allow)
    if not record or not record.finished or record.values.get("horizon") != _horizon(config):
        return False
    console.result(f"{directory} is finished: {record.values['step']:,} steps")
    console.result(f"  next: {' · '.join(next_commands(directory))}")
    return True


def _check_kind(runs: Sequence[Path], kind: str) -> None:
    """Raises: CheckpointError for a run of another kind: nearly every frozen value of it would differ."""
    from megalodon.checkpoint.store import read_json

    for run in runs:
        there = read_json(run / "run.json").get("kind", kind) if (run / "run.json").exists() else kind
        if there != kind:
            raise CheckpointError(f"{run} holds a run of {there}, this is a {kind}; choose another -o")


def next_commands(directory: Path) -> list[str]:
    """Return what makes sense once a run is finished."""
    name = directory.name if directory.parent == Path("runs") else str(directory)
    words = [["generate", name, "-p", "TEXT"], ["runs", "show", name]]
    if (directory / "adapter").is_dir():
        words.append(["convert", str(directory / "adapter"), str(directory / "model"), "--merge"])
    return [shlex.join(["megalodon", *line]) for line in words]


def _horizon(config: "RunConfig | FinetuneConfig") -> dict[str, Any]:
    train = config.train
    return {"max_steps": train.max_steps, "max_tokens": train.max_tokens, "max_epochs": train.max_epochs}


def micro_rows(directory: Path, frozen: Mapping[str, Any], device: str) -> int | None:
    """Return the windows of a pass that the run in a directory has; None if it is to be found (again).

    `micro_batch: auto` found them, and a run that goes on keeps them: another number would round its sums otherwise.
    With other steps, other windows, or on another kind of device they would mean nothing, or not fit.
    """
    from megalodon.checkpoint.store import read_json

    path = directory / "run.json"
    values = read_json(path) if path.exists() else {}
    keys, before, found = ("train.batch_tokens", "data.seq_len"), values.get("frozen", {}), values.get("micro_rows")
    same = values.get("device", device) == device and all(before.get(key) == frozen.get(key) for key in keys)
    return found if same and isinstance(found, int) else None


def record_of(job: Job) -> "RunRecord":
    """Return the record of the run in the directory, or of a new one, not yet written. Called under the lock."""
    from megalodon.training.run import branch_point, new_record, open_record

    if record := open_record(job.directory, job.frozen, job.asked.allow):
        return record
    about: dict[str, Any] = {"name": job.config.name, "kind": job.config.kind, "step": 0, "tokens": 0}
    frozen = dict(job.frozen)
    if step := checkpoint_of(job):
        source = open_record(step.parent.parent, frozen, job.asked.allow)
        about |= {"branched_from": branch_point(step), "step": branch_point(step)["step"]}
        frozen = source.values["frozen"] if source else frozen
    return new_record(job.directory, frozen, **about)


def checkpoint_of(job: Job) -> Path | None:
    """Return the one checkpoint to continue from; None for the newest good one of the run. Called under the lock."""
    from megalodon.training.run import start_at

    resume = job.asked.resume
    return None if resume in ("auto", "never") else start_at(Path(resume), job.directory)


def begin(job: Job, record: "RunRecord", unigram: float | None) -> None:
    """Write down what this run is; says how it begins. Called once it can go on, before anything else is written."""
    from megalodon.checkpoint.store import write_json
    from megalodon.recipe import dump
    from megalodon.training.run import environment

    directory, plan = job.directory, job.plan
    _say_how(job, record)
    pairs = {key: [record.values["frozen"].get(key), job.frozen.get(key)] for key in job.asked.allow}
    allowed = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    again = ["megalodon", job.config.kind, str(directory / "recipe.yaml"), "-o", str(directory)]
    record.update(
        status="running",
        error=None,
        steps=plan.horizon,
        horizon=_horizon(job.config),
        parameters=job.model_config.num_parameters(),
        micro_rows=plan.micro_rows,
        device=plan.device.type,
        unigram_bits_per_byte=unigram,
        data={
            "train": job.prepared.train.fingerprint,
            "valid": job.prepared.valid.fingerprint,
            "tokenizer": job.prepared.tokenizer.sha256,
        },
        **({"examples": str(job.prepared.train.path)} if job.tuning else {}),
        frozen=dict(job.frozen),
        allowed=[*record.values["allowed"], *([allowed] if allowed else [])],
        next=[shlex.join([*again, *joining.asked()])],
    )
    _take_curve(directory, record)
    recipe = dump(job.resolved)
    command = shlex.join(["megalodon", *sys.argv[1:]]) + "\n"
    for name, text in (("recipe.yaml", recipe), ("command.txt", command)):  # names in another encoding keep their bytes
        (directory / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    write_json(directory / "environment.json", environment(plan.device))


def _take_curve(directory: Path, record: "RunRecord") -> None:
    """Give a branch the rows of the run it left; those after its first step are cut off when the file is opened.

    The record comes before them: a directory that holds rows and no record belongs to nobody.
    """
    from megalodon.checkpoint.store import steps_in

    origin, own = record.values.get("branched_from"), directory / "metrics.jsonl"
    if not origin or own.exists() or steps_in(directory / "checkpoints"):
        return
    curve, aside = Path(origin["run"]) / "metrics.jsonl", directory / ".tmp-metrics.jsonl"
    if curve.exists():
        shutil.copyfile(curve, aside)
        os.replace(aside, own)


def _say_how(job: Job, record: "RunRecord") -> None:
    from megalodon.checkpoint.store import steps_in
    from megalodon.training.schedule import learning_rate

    directory, plan, before = job.directory, job.plan, record.values.get("steps")
    origin = record.values.get("branched_from")
    unsaved = not steps_in(directory / "checkpoints")
    if before is None and origin:
        console.info(f"{directory}: a new run, a branch of {origin['run']} from step {origin['step']:,} on")
    elif before is None:
        console.info(f"{directory}: a new run, starting at step 0")
    elif unsaved and not origin:
        console.info(f"{directory}: the run ended before its first save; starting at step 0")
    if before is not None and before != plan.horizon:
        step = int(record.values["step"])
        rates = [learning_rate(plan.optim, step + 1, n, plan.batch_tokens) for n in (before, plan.horizon)]
        console.note(
            f"horizon {before:,} -> {plan.horizon:,} steps; lr of step {step + 1:,}: {rates[0]:.3g} -> {rates[1]:.3g}"
        )


def initialise(job: Job) -> "Callable[[LanguageModel], None] | None":
    """Return what gives a new run weights from elsewhere, those of model.init_from; None if it draws its own."""
    if job.weights is None and (job.config.model.init_from is None or job.tuning is not None):
        return None
    return lambda model: _initialise(job, model)


def _initialise(job: Job, model: "LanguageModel") -> None:
    """Raises: CheckpointError if the weights do not fit."""
    from megalodon.model.weights import copy_weights

    given = str(job.config.model.init_from)
    if job.weights is not None:
        copy_weights(model, job.weights, given)
        return
    found = checkpoints.weights(given)
    if found.tokenizer not in (None, job.prepared.tokenizer.sha256):
        console.warning(f"{found.source} was trained with another tokenizer; its embeddings mean other tokens")
    copy_weights(model, found.tensors, found.source)
    console.info(f"{job.directory}: weights from {found.source}")
