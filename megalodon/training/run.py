"""The run directory: whose it is, what it may not change, and what `run.json` says about it.

    run.json           status, step, scores, what to do next; the frozen values
    recipe.yaml        the resolved recipe with origins        command.txt   the command
    environment.json   versions, threads, device               metrics.jsonl, checkpoints/, model/, lock.json

Not here: metrics (metrics.py), checkpoints (checkpoint/store.py), the recipe's own file format.
"""

import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megalodon.checkpoint.store import read_json, replace_json, step_path, steps_in
from megalodon.config import show, suggest
from megalodon.errors import CheckpointError, InputError

FORMAT = "megalodon/run/1"
FROZEN = (
    "model.",
    "tokenizer.",
    "data.",
    "optim.",
    "train.seed",
    "train.batch_tokens",
    "train.precision",
    "train.seq_len_warmup",
)
"""Keys of a recipe that a run keeps for life; `data.dir` is a place, not a value."""


class RunRecord:
    """`run.json` of a run directory: one JSON object, replaced in one move.

    status     running | stopped | finished | failed
    step, steps, tokens, parameters, seconds            of the last save; steps is the horizon
    valid_loss, bits_per_byte, bits_per_byte_at_start, unigram_bits_per_byte
    micro_rows, device    windows of a pass, and the kind of device they were found for
    next       commands that make sense now
    frozen     dotted key -> value that the run keeps for life
    allowed    changes of frozen values that the user asked for
    branched_from    {run, step} whose checkpoint this run began with; only for a branch
    """

    def __init__(self, directory: Path, values: dict[str, Any]) -> None:
        self.directory, self.values = directory, values

    def update(self, **values: Any) -> None:
        """Write the record with these values changed."""
        self.values = {**self.values, **values, "updated": time.strftime("%Y-%m-%d %H:%M:%S")}
        replace_json(self.directory / "run.json", self.values)

    @property
    def finished(self) -> bool:
        """Whether the run reached its horizon."""
        return self.values.get("status") == "finished"


def frozen_values(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dotted keys and values of a recipe (as plain data) that a run keeps for life."""
    free = ("data.dir", "data.reader")
    return {key: value for key, value in _leaves(recipe) if key.startswith(FROZEN) and key not in free}


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of everything that is not a section; entries of a list of sections by their name."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{prefix}.{item.get('name', number)}")
    else:
        yield prefix, list(value) if isinstance(value, tuple) else value


def check_directory(directory: Path, *, fresh: bool = False) -> None:
    """Refuse a directory that holds something else than a run, before anything is written into it.

    Args:
        fresh: a run that is there already is refused too (`--resume never`).
    Raises:
        CheckpointError: the path is a file or lies below one, holds foreign files, or a run although none is wanted.
    """
    there = next(path for path in (directory, *directory.parents) if path.exists())
    if not there.is_dir():
        raise CheckpointError(f"{there} is a file; expected a run directory, or a path that does not exist yet")
    if (directory / "run.json").exists():
        if fresh:
            raise CheckpointError(f"{directory} holds a run; --resume never needs another -o, or leave --resume out")
        return
    ours = (".tmp-", "lock.json", "recipe.yaml", "command.txt", "environment.json")
    names = sorted(path.name for path in directory.iterdir()) if directory.exists() else []
    if foreign := [name for name in names if not name.startswith(ours)]:
        shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise CheckpointError(f"{directory} is not a run (no run.json) and holds {shown}; choose another -o")


def open_record(directory: Path, frozen: Mapping[str, Any], allow: Sequence[str] = ()) -> RunRecord | None:
    """Return the record of the run in a directory, None if there is none yet; called under its lock.

    Args:
        frozen: the values this run would have.
        allow:  dotted keys whose change the user wants; recorded by the caller.
    Raises:
        CheckpointError: the directory holds another run; the message lists every difference with both values.
        InputError: a key in `allow` is none that a run keeps for life.
    """
    path = directory / "run.json"
    values = read_json(path) if path.exists() else None
    if values is not None and values.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {show(values.get('format'))}; expected {FORMAT}")
    there = values.get("frozen", {}) if values else frozen
    if unknown := [key for key in allow if key not in frozen and key not in there]:
        near = suggest(unknown[0], [*frozen, *there])
        meant = f"did you mean {near}?" if near else "expected a key that a run keeps for life, such as optim.lr"
        raise InputError(f"--allow-change {unknown[0]}: {meant}")
    if values is None:
        return None
    keys = [key for key in (*there, *(k for k in frozen if k not in there)) if there.get(key) != frozen.get(key)]
    refused = [key for key in keys if key not in allow]
    if refused:
        differences = ", ".join(f"{k} is {show(there.get(k))} there, {show(frozen.get(k))} here" for k in refused)
        change = " ".join(f"--allow-change {key}" for key in refused)
        raise CheckpointError(f"{directory} holds another run: {differences}; choose another -o, or {change}")
    return RunRecord(directory, values)


def start_at(step: Path, directory: Path) -> Path | None:
    """Return the checkpoint that a run in `directory` is to begin or go on with; None if its own newest one is it.

    In the run that the step belongs to it must be the newest one: nothing that was saved is ever lost to an older step.
    In any other directory it begins a branch, which is continued from its own checkpoints once it has some.

    Args:
        step: a step directory such as runs/x/checkpoints/step-00001000.
    Raises:
        CheckpointError: no step directory, newer steps in its run, or a directory that holds another run.
    """
    run = step.parent.parent
    number = step.name.removeprefix("step-")
    if not number.isdecimal() or step != step_path(run / "checkpoints", int(number)) or not step.is_dir():
        expected = "auto, never, or a step directory such as runs/mine/checkpoints/step-00001000"
        raise CheckpointError(f"--resume {step}: expected {expected}")
    if directory.resolve() == run.resolve():
        if newer := [n for n in steps_in(step.parent) if n > int(number)]:
            steps = ", ".join(f"{n:,}" for n in reversed(newer))
            raise CheckpointError(f"--resume {step}: {run} has newer steps ({steps}); choose another -o to branch off")
        return step
    if (directory / "run.json").exists():
        if read_json(directory / "run.json").get("branched_from") != branch_point(step):
            raise CheckpointError(f"{directory} holds a run that did not branch off {step}; choose another -o")
        if steps_in(directory / "checkpoints"):
            return None
    return step


def branch_point(step: Path) -> dict[str, Any]:
    """Return what the record of a branch says of the step it began with."""
    return {"run": str(step.parent.parent), "step": int(step.name.removeprefix("step-"))}


def new_record(directory: Path, frozen: Mapping[str, Any], **values: Any) -> RunRecord:
    """Return the record of a run that begins; nothing is written yet."""
    return RunRecord(directory, {"format": FORMAT, **values, "frozen": dict(frozen), "allowed": []})


def drop_unbegun(directory: Path, made: Sequence[Path] = ()) -> None:
    """Remove the directory of a run that failed before it began: no run.json, nothing but its lock, which is ours.

    Args:
        made: directories that were made for it, the innermost first; they go too, up to one that holds something else.
    """
    with suppress(OSError):  # it runs while an error is on its way, which must not be hidden by one of its own
        if [path.name for path in directory.iterdir()] == ["lock.json"]:
            (directory / "lock.json").unlink()
            directory.rmdir()
            for place in made:
                if place != directory:
                    place.rmdir()


def environment(device: torch.device) -> dict[str, Any]:
    """Return what could explain a difference between two runs: versions, processor, threads. No names, no paths."""
    packages = {name: _version(name) for name in ("megalodon-lm", "torch", "numpy", "sentencepiece", "safetensors")}
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "python": platform.python_version(),
        **packages,
        "system": f"{platform.system()} {platform.machine()}",
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "accelerator": accelerator,
        "byteorder": sys.byteorder,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
