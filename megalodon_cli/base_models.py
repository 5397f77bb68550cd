"""CKPT -> everything that finetuning takes from the model it begins with: weights, sizes, tokenizer, lengths, template.

Not here: which files CKPT means (checkpoints.py), what becomes of it (finetune_job.py).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megalodon.errors import InputError
from megalodon_cli import checkpoints

if TYPE_CHECKING:
    from torch import Tensor

    from megalodon.data.chat import ChatFormat
    from megalodon.data.tokenizer import Tokenizer
    from megalodon.model.megalodon import ModelConfig
    from megalodon.recipe import FinetuneConfig, RunConfig


class Base(NamedTuple):
    """A model that is to be tuned."""

    source: str
    """As it is spoken of."""
    directory: Path | None
    """Its model directory; None for a step of a run."""
    tensors: "Mapping[str, Tensor]"
    config: "ModelConfig"
    tokenizer: "Tokenizer"
    bos: bool
    seq_len: int | None
    """Tokens of a window in its training; None if that is not on record."""
    lr: float | None
    """Its peak learning rate; None if that is not on record."""
    chat: "ChatFormat | None"
    """How it writes conversations, if it has learnt to."""
    sha256: str
    """Of its weights."""


def read_base(given: str) -> Base:
    """Return a model that is to be tuned, verified. Raises: InputError, CheckpointError, DataError."""
    found = checkpoints.weights(given)
    place = Path(found.source)
    return _of_directory(place, found) if (place / "config.json").is_file() else _of_step(place, found)


def _of_directory(place: Path, found: checkpoints.Weights) -> Base:
    from megalodon.checkpoint.tensors import read_config, read_model_info
    from megalodon.data.chat import ChatFormat
    from megalodon.data.tokenizer import load_tokenizer

    info = read_model_info(place)
    tokenizer = load_tokenizer(place)
    _check_tokenizer(place, tokenizer, found)
    bos, seq_len, lr = bool(info.get("bos", True)), info.get("seq_len"), info.get("lr")
    if lr is None:  # written before the rate was recorded; the run beside it knows
        recipe = _recipe(place.parent)
        lr = recipe.optim.lr if recipe else None
    return Base(
        str(place),
        place,
        found.tensors,
        read_config(place),
        tokenizer,
        bos,
        seq_len if isinstance(seq_len, int) else None,
        lr if isinstance(lr, float) else None,
        ChatFormat.load(place, tokenizer, bos=bos),
        str(info["weights_sha256"]),
    )


def _of_step(place: Path, found: checkpoints.Weights) -> Base:
    from megalodon.data.shards import file_sha256

    recipe, store, tokenizer, config = checkpoints.origin_of(place)
    _check_tokenizer(store, tokenizer, found)
    return Base(
        str(place),
        None,
        found.tensors,
        config,
        tokenizer,
        recipe.data.bos,
        recipe.data.seq_len,
        recipe.optim.lr,
        None,
        file_sha256(place / "manifest.json"),
    )


def _recipe(run: Path) -> "RunConfig | FinetuneConfig | None":
    """The recipe of a run; None if there is none. Raises: RecipeError for one that cannot be read."""
    from megalodon.recipe import load_recipe

    path = run / "recipe.yaml"
    return load_recipe([path]).config if path.is_file() else None


def _check_tokenizer(place: Path, tokenizer: "Tokenizer", found: checkpoints.Weights) -> None:
    if found.tokenizer not in (None, tokenizer.sha256):
        raise InputError(
            f"{place}: the tokenizer is {tokenizer.sha256[:8]}, but {found.source} was trained with "
            f"{str(found.tokenizer)[:8]}; put the tokenizer files of the run back"
        )
