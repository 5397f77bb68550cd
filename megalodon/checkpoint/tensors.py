"""Model directories: a model with its tokenizer, as files that are verified before anything is built from them.

    config.json         {"model_type": "megalodon", …the fields of ModelConfig}
    model.safetensors   float32, under the names of the state dict; a tied output matrix stands in it twice
    megalodon.json      format, weights_sha256, tokenizer_sha256, recipe digest, scores; size and hash of every file
    tokenizer files     as the tokenizer writes them

Code in a model directory is never run, nothing is unpickled. Not here: checkpoints of a run (store.py).
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalodon.checkpoint.store import check_files, check_space, describe_file, read_json, staged, write_json
from megalodon.checkpoint.tensor_files import read_boxes
from megalodon.errors import CheckpointError, EnvironmentFault
from megalodon.model.architectures import LanguageModel, LanguageModelConfig, with_weights
from megalodon.model.llama import LlamaConfig
from megalodon.model.megalodon import Megalodon, ModelConfig

FORMAT = "megalodon/model/1"
WEIGHTS = "model.safetensors"
_TENSORS = 60
"""More than a block and all outside the blocks have between them."""


def save_model(
    model: LanguageModel, directory: Path, tokenizer_save: Callable[[Path], None] | None, meta: Mapping[str, Any]
) -> None:
    """Write a model directory aside and rename it; one that stands there already gives way when the new one is whole.

    Args:
        model:          parameters are written as float32.
        directory:      the model directory.
        tokenizer_save: writes the tokenizer's files into a directory; None for a model without a tokenizer.
        meta:           what megalodon.json records besides format and hashes: tokenizer_sha256, recipe, scores.
    Raises:
        EnvironmentFault: too little disk space, or a file could not be written; nothing is left behind.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        value = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype).contiguous()
        shared = any(value.data_ptr() == other.data_ptr() for other in tensors.values())
        tensors[name] = value.clone() if shared else value
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        check_space(directory.parent, sum(tensor.nbytes for tensor in tensors.values()))
        with staged(directory, replace=True) as aside:
            if tokenizer_save:
                tokenizer_save(aside)
            write_json(aside / "config.json", _config_json(model.config))
            save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
            files = {path.name: describe_file(path) for path in sorted(aside.iterdir())}
            about = {"format": FORMAT, **meta, "weights_sha256": files[WEIGHTS]["sha256"], "files": files}
            write_json(aside / "megalodon.json", about)
    except (OSError, SafetensorError) as error:
        raise EnvironmentFault(f"{directory} could not be written: {error}") from error


def read_model_info(path: str | Path) -> dict[str, Any]:
    """Return megalodon.json of a model directory: format, hashes, recipe digest, scores.

    Raises:
        CheckpointError: there is no model directory, or it is of another format.
    """
    directory = Path(path)
    if not directory.is_dir():
        kind = "is a file" if directory.exists() else "does not exist"
        raise CheckpointError(f"{directory} {kind}; expected a model directory with config.json and {WEIGHTS}")
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} is not a model directory: config.json is missing")
    info = read_json(directory / "megalodon.json")
    if info.get("format") != FORMAT:
        raise CheckpointError(
            f"{directory / 'megalodon.json'} has format {info.get('format')!r}; expected {FORMAT!r}: "
            "the model was written by another version of megalodon"
        )
    return info


def _config_json(config: LanguageModelConfig) -> dict[str, Any]:
    if isinstance(config, LlamaConfig):
        return config.hugging_face()
    return {"model_type": "megalodon", **config.model_dump(mode="json")}


def load_model(path: str | Path) -> Megalodon:
    """The same for a Megalodon. Raises: CheckpointError for a baseline of arch llama, and as `load_language_model`."""
    read_model_info(path)
    read_config(Path(path))
    return cast(Megalodon, load_language_model(path))


def load_language_model(path: str | Path) -> LanguageModel:
    """Build the model of a model directory, in float32 on the CPU, after verifying every file.

    Raises:
        CheckpointError: a file is missing, truncated or changed (weights or tokenizer), a configuration key is unknown,
            or a tensor is missing, unexpected or of another shape; the message names it, what came and what was
            expected.
        EnvironmentFault: the model is a Llama and the extra `hf` is missing.
    """
    directory = Path(path)
    info = read_model_info(directory)
    files = info.get("files")
    if not isinstance(files, dict) or WEIGHTS not in files:
        raise CheckpointError(f"{directory / 'megalodon.json'} does not list {WEIGHTS}; save the model again")
    config = _read_any_config(directory)
    try:
        read_boxes(directory / WEIGHTS, _TENSORS * config.num_layers)  # before anything of its size is allocated
        tensors = load_file(directory / WEIGHTS)
    except CheckpointError:
        check_files(directory, files)
        raise
    except (SafetensorError, OSError) as error:
        check_files(directory, files)  # says more than the library does: which file, which size
        raise CheckpointError(f"{directory / WEIGHTS} cannot be read: {error}") from error
    # Before the hashes: this names tensors, where a hash only differs.
    model = with_weights(config, tensors, str(directory / WEIGHTS))
    check_files(directory, files)
    return model


def _read_any_config(directory: Path) -> LanguageModelConfig:
    path = directory / "config.json"
    fields = read_json(path)
    if fields.get("model_type") != "llama":
        return read_config(directory)
    try:
        return LlamaConfig.from_hugging_face(fields)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_config(directory: Path) -> ModelConfig:
    """Read config.json of a Megalodon's model directory.

    Raises:
        CheckpointError: it is missing, of another model type, or has an unknown key or an impossible value.
    """
    path = directory / "config.json"
    fields = read_json(path)
    if (kind := fields.pop("model_type", None)) != "megalodon":
        raise CheckpointError(f'{path} has model_type {json.dumps(kind)}; expected "megalodon"')
    if unknown := sorted(fields.keys() - ModelConfig.model_fields.keys()):
        known = ", ".join(ModelConfig.model_fields)
        raise CheckpointError(f"{path} has unknown keys: {', '.join(unknown)}; known are {known}")
    try:
        return ModelConfig.model_validate(fields)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}".lstrip(": ") for e in error.errors())
        raise CheckpointError(f"{path}: {faults}") from None
