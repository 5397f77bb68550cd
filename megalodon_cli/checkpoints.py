"""CKPT -> model directory or weights: a model directory, a run directory, or the name of a run under runs/.

Weights may also come from a step: RUN@1200, RUN@best, or the newest verified step of a run that has no model yet.
Not here: loading and verifying (megalodon/checkpoint/tensors.py).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megalodon.errors import CheckpointError, InputError
from megalodon_cli import console

if TYPE_CHECKING:
    from torch import Tensor

    from megalodon.checkpoint.store import Saved
    from megalodon.data.tokenizer import Tokenizer
    from megalodon.model.megalodon import ModelConfig
    from megalodon.recipe import RunConfig

RUNS = Path("runs")


class Weights(NamedTuple):
    """The parameters of a checkpoint by name, in memory."""

    tensors: "Mapping[str, Tensor]"
    source: str
    tokenizer: str | None
    """sha256 of the tokenizer they were trained with, if it is on record."""


def weights(given: str) -> Weights:
    """Return the verified weights of CKPT. Raises: InputError or CheckpointError for what is missing or damaged."""
    from megalodon.checkpoint.tensors import load_language_model, read_model_info
    from megalodon.model.quantised import refuse_quantised

    if (saved := step_of(given)) is not None:
        return _of_step(saved)
    directory = model_directory(given)
    if (directory / "adapter_config.json").is_file():
        merge = f"megalodon convert {directory} DIR --merge"
        raise InputError(f"{given}: {directory} is an adapter; expected a model, merge it first", merge)
    info = read_model_info(directory)
    model = load_language_model(directory)
    refuse_quantised(model, directory, "trained")
    return Weights(model.state_dict(), str(directory), info.get("tokenizer_sha256"))


def step_of(given: str) -> "Saved | None":
    """Return the verified step that RUN@1200 or RUN@best names, or the newest one of a run that has no model yet.

    Raises: InputError or CheckpointError for what is missing or damaged.
    """
    from megalodon.checkpoint.store import read_json, step_path, verify_step
    from megalodon.training.rollback import newest_of_run, read_rollbacks

    name, at, step = given.rpartition("@")
    if at and not Path(given).exists():
        run = _run_of(name)
        if step != "best" and not step.isdecimal():
            raise InputError(f"{given}: expected a step or `best` behind the @, such as {name}@1200")
        number = int(step) if step.isdecimal() else int(read_json(run / "checkpoints/best")["step"])
        return verify_step(step_path(run / "checkpoints", number))
    for place in (Path(given), RUNS / given):
        if (place / "run.json").is_file() and not _result(place):
            saved, _ = newest_of_run(place / "checkpoints", read_rollbacks(place))
            if saved:
                return saved
    return None


class Origin(NamedTuple):
    """What a step of a pretraining run does not say itself."""

    recipe: "RunConfig"
    store: Path
    tokenizer: "Tokenizer"
    config: "ModelConfig"


def origin_of(step: Path) -> Origin:
    """Return what the run of a step was. Raises: InputError: no pretraining of a Megalodon, or its recipe is gone."""
    from megalodon.data.tokenizer import load_tokenizer
    from megalodon.model.megalodon import ModelConfig
    from megalodon.recipe import RunConfig, load_recipe

    run = step.parent.parent
    if not (run / "recipe.yaml").is_file():
        raise InputError(f"{step}: {run / 'recipe.yaml'} is missing, so its model is not known")
    recipe = load_recipe([run / "recipe.yaml"]).config
    if not isinstance(recipe, RunConfig):
        raise InputError(f"{step}: a step of a finetuning run; expected its finished model, such as {run / 'model'}")
    store = recipe.data.dir or Path("data") / recipe.name
    tokenizer = load_tokenizer(store / "tokenizer")
    config = recipe.model_config_for(tokenizer.vocab_size)
    if not isinstance(config, ModelConfig):
        raise InputError(f"{step}: a step of arch {recipe.model.arch}, the baseline; expected one of a Megalodon")
    return Origin(recipe, store, tokenizer, config)


def _run_of(name: str) -> Path:
    for place in (Path(name), RUNS / name):
        if (place / "run.json").is_file():
            return place
    raise InputError(f"{name}: no run {Path(name)} and no run {RUNS / name}; megalodon runs ls shows them")


def _of_step(saved: "Saved") -> Weights:
    import torch

    from megalodon.checkpoint.store import load_tensors

    listed = saved.manifest["tensors"]
    targets = {name: torch.empty(e["shape"], dtype=getattr(torch, e["dtype"])) for name, e in listed.items()}
    load_tensors(saved, targets)
    tensors = {name.removeprefix("model."): t for name, t in targets.items() if name.startswith("model.")}
    return Weights(tensors, str(saved.path), saved.manifest.get("tokenizer"))


def model_directory(given: str | None) -> Path:
    """Return the model directory that the user means; without CKPT that of the newest finished run, named on stderr.

    A folder that holds neither a model nor a run does not hide the run of that name.
    Raises: InputError if there is none, with what is there.
    """
    if given is None:
        return _newest()
    if not given:
        raise InputError("CKPT is empty; expected a model directory or a run, or leave it out")
    places = (Path(given), RUNS / given)
    for place in places:
        if (place / "run.json").is_file():
            return _model_of(place)
        if (place / "config.json").is_file() or (place / "adapter_config.json").is_file():
            return place
    for place in places:
        if place.is_dir():
            return place
    hint = ", ".join(_finished()) or "none"
    raise InputError(
        f"{given}: no such directory, and no run {RUNS / given}; "
        f"expected a model directory or a run (finished runs here: {hint})"
    )


def complete(incomplete: str) -> list[str]:
    """Return the finished runs whose name begins so, for shell completion; `runs/` may stand before it."""
    prefix = f"{RUNS}/" if incomplete.startswith(f"{RUNS}/") else ""
    return [text for name in _finished() if (text := prefix + name).startswith(incomplete)]


def _model_of(run: Path) -> Path:
    found = _result(run)
    if found is None:
        command = run / "command.txt"
        how = command.read_text(encoding="utf-8", errors="replace").strip() if command.is_file() else ""
        raise InputError(
            f"{run} has no finished model (no {run / 'model'}); expected a run that has ended: the command that "
            f"started it continues it{': ' + how if how else ''}"
        )
    console.note(f"{run}: using {found}")
    return found


def _result(run: Path) -> Path | None:
    """What a finished run left: its model, else its adapter. A model merged from an adapter before it is not it."""
    model, adapter = run / "model", run / "adapter"
    if not adapter.is_dir():
        return model if model.is_dir() else None
    return model if model.is_dir() and _is_merged(model, adapter) else adapter


def _is_merged(model: Path, adapter: Path) -> bool:
    """Whether a model directory is the base of an adapter with this very adapter merged."""
    from megalodon.checkpoint.adapter_files import WEIGHTS
    from megalodon.checkpoint.store import read_json

    try:
        merged, own = (read_json(place / "megalodon.json") for place in (model, adapter))
        same: bool = merged["merged_from"]["adapter"] == own["files"][WEIGHTS]["sha256"]
    except (CheckpointError, KeyError, TypeError):
        return False
    return same


def _finished() -> list[str]:
    """Names of the runs that have a model, oldest first."""
    found = [(result, run.parent) for run in RUNS.glob("*/run.json") if (result := _result(run.parent))]
    return [run.name for _, run in sorted(found, key=lambda pair: pair[0].stat().st_mtime_ns)]


def _newest() -> Path:
    if not (names := _finished()):
        raise InputError(
            f"no CKPT given and no finished run under {RUNS}; expected a model directory or a run: "
            "megalodon generate CKPT -p TEXT"
        )
    model = _result(RUNS / names[-1])
    assert model is not None
    console.note(f"no CKPT given: using the newest finished run, {model}")
    return model
