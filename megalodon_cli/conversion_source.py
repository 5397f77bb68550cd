"""SRC of `megalodon convert` -> an open source: a run, a step of a run, or a directory recognised by what it holds.

Not here: what directories hold (megalodon/interop/sources.py), CKPT of the other commands (checkpoints.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megalodon_cli import checkpoints, console

if TYPE_CHECKING:
    from megalodon.checkpoint.store import Saved
    from megalodon.interop.sources import Source


@contextmanager
def open_given(given: str, base: Path | None = None, *, verify: bool = True) -> Iterator["Source"]:
    """Open what a user names: RUN, RUN@1200, RUN@best, a step, a model, an adapter or a checkpoint of others.

    Raises: InputError, CheckpointError, EnvironmentFault: what is wrong with it.
    """
    from megalodon.interop.sources import open_source

    saved = _step(given)
    if saved is not None:
        yield _of_step(saved)
        return
    with open_source(_directory(given), base, verify=verify) as source:
        yield source


def _directory(given: str) -> Path:
    """The directory that is meant; a finished run stands for its model."""
    for place in (Path(given), checkpoints.RUNS / given):
        if (place / "run.json").is_file():
            return checkpoints.model_directory(given)
        if place.is_dir():
            return place
    return Path(given)


def _step(given: str) -> "Saved | None":
    """The step of a run that is meant, verified; None if it is none."""
    from megalodon.checkpoint.store import verify_step

    place = Path(given)
    if (place / "manifest.json").is_file() and (place / "tensors").is_dir():
        return verify_step(place if place.name.startswith("step-") else place.resolve())
    return checkpoints.step_of(given)


def _of_step(saved: "Saved") -> "Source":
    """A step of a pretraining run as a source; the recipe and the tokenizer beside it say what its model is."""
    from megalodon.interop.sources import BESIDE, STEP, Source, step_tensors

    recipe, store, tokenizer, config = checkpoints.origin_of(saved.path)
    recorded = saved.manifest.get("tokenizer", tokenizer.sha256)
    averaged = recipe.optim.ema is not None
    info = {
        "tokenizer_sha256": recorded,
        "bos": recipe.data.bos,
        "eos": recipe.data.eos,
        "isolate": recipe.data.isolate,
        "seq_len": recipe.data.seq_len,
        "lr": recipe.optim.lr,
        "recipe": {"name": recipe.name},
        "step": saved.step,
        "weights": f"averaged, optim.ema {recipe.optim.ema:g}" if averaged else "last",
        "scores": {"valid_loss": saved.manifest.get("valid_loss")},
    }
    beside = {name: store / "tokenizer" / name for name in BESIDE if (store / "tokenizer" / name).is_file()}
    console.note(f"using step {saved.step:,}: {saved.path}")
    return Source(STEP, saved.path, config, step_tensors(saved), info, beside)
