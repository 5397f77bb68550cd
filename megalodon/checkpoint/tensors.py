"""Model directories: a model with its tokenizer, as files that are verified before anything is built from them.

    config.json         {"model_type": "megalodon", …the fields of ModelConfig}; transformers' own keys in an export
    model.safetensors   under the names of the state dict, float32, matrices perhaps bfloat16; a tied output matrix
                        stands in it twice. Or shards and an index (weight_files.py), or integers (quantised.py)
    megalodon.json      format, weights_sha256, tokenizer_sha256, recipe digest, scores; size and hash of every file
    tokenizer files     as the tokenizer writes them

Code in a model directory is never run, nothing is unpickled. Not here: checkpoints of a run (store.py).
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from megalodon.checkpoint.store import check_files, check_space, describe_file, read_json, staged, write_json
from megalodon.checkpoint.weight_files import (
    WEIGHTS,
    open_weights,
    tensors_in_memory,
    weight_paths,
    weights_sha256,
    write_weights,
)
from megalodon.config import Config
from megalodon.errors import CheckpointError, EnvironmentFault
from megalodon.model.architectures import LanguageModel, LanguageModelConfig, with_weights
from megalodon.model.llama import LlamaConfig
from megalodon.model.megalodon import Megalodon, ModelConfig
from megalodon.model.quantised import Quantisation, assign_quantised, refuse_quantised
from megalodon.model.weights import assign_weights

FORMAT = "megalodon/model/1"
C = TypeVar("C", bound=Config)
OF_TRANSFORMERS = {"architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "pad_token_id"}
OF_TRANSFORMERS |= {"tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache", "_name_or_path"}
"""Keys of config.json that transformers writes and reads, and that say nothing of the function."""
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
    refuse_quantised(model, "the model", "exported again")
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
            finish_directory(aside, write_weights(aside, tensors_in_memory(tensors)), meta)
    except (OSError, SafetensorError) as error:
        raise EnvironmentFault(f"{directory} could not be written: {error}") from error


def finish_directory(aside: Path, weights: Mapping[str, Mapping[str, Any]], meta: Mapping[str, Any]) -> None:
    """Write megalodon.json into a directory that is otherwise whole.

    Args:
        weights: size and hash of each file of weights, as `write_weights` returned them.
        meta:    what it records besides format and hashes.
    """
    paths = [path for path in sorted(aside.iterdir()) if path.is_file() and path.name != "megalodon.json"]
    files = {path.name: weights.get(path.name) or describe_file(path) for path in paths}
    about = {"format": FORMAT, **meta, "weights_sha256": weights_sha256(weights), "files": files}
    write_json(aside / "megalodon.json", about)


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
    if not (directory / "megalodon.json").exists():
        raise CheckpointError(
            f"{directory / 'megalodon.json'} is missing; expected a model directory that megalodon wrote",
            f"a directory that transformers saved: megalodon convert {directory} DIR",
        )
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
    config = _read_any_config(directory)
    try:
        weights = open_weights(directory, _TENSORS * config.num_layers)  # before anything of its size is allocated
        unlisted = [
            path.name for path in weight_paths(directory) if not isinstance(files, dict) or path.name not in files
        ]
        if unlisted:
            raise CheckpointError(f"{directory / 'megalodon.json'} does not list {unlisted[0]}; save the model again")
        tensors = {name: weights.read(name) for name in weights.forms}
    except CheckpointError:
        check_files(directory, files)  # says more where a file is damaged: which, and which size it had
        raise
    # Before the hashes: this names tensors, where a hash only differs.
    source = str(weight_paths(directory)[0])
    quantisation = read_quantisation(directory)
    model: LanguageModel
    if quantisation is not None and isinstance(config, ModelConfig):
        model = _quantised(config, tensors, quantisation, source)
    else:
        model = with_weights(config, tensors, source)
    check_files(directory, files)
    return model


def _quantised(config: ModelConfig, tensors: Mapping[str, Tensor], how: Quantisation, source: str) -> Megalodon:
    with torch.device("meta"):
        model = Megalodon(config)
    assign_weights(model, assign_quantised(model, tensors, how, source), source)
    return model


def _read_any_config(directory: Path) -> LanguageModelConfig:
    path = directory / "config.json"
    fields = read_json(path)
    if fields.get("model_type") != "llama":
        return read_config(directory)
    return _validated(LlamaConfig.from_hugging_face, fields, path)


def read_config(directory: Path) -> ModelConfig:
    """Read config.json of a Megalodon's model directory.

    Raises:
        CheckpointError: it is missing, of another model type, or has an unknown key or an impossible value.
    """
    path = directory / "config.json"
    fields = read_json(path)
    if (kind := fields.pop("model_type", None)) != "megalodon":
        raise CheckpointError(f'{path} has model_type {json.dumps(kind)}; expected "megalodon"')
    fields = {key: value for key, value in fields.items() if key not in OF_TRANSFORMERS | {"quantisation"}}
    if unknown := sorted(fields.keys() - ModelConfig.model_fields.keys()):
        known = ", ".join(ModelConfig.model_fields)
        raise CheckpointError(f"{path} has unknown keys: {', '.join(unknown)}; known are {known}")
    return _validated(ModelConfig.model_validate, fields, path)


def read_quantisation(directory: Path) -> Quantisation | None:
    """Read from config.json how the matrices are held; None if they are plain. Raises: CheckpointError."""
    path = directory / "config.json"
    fields = read_json(path).get("quantisation")
    return None if fields is None else _validated(Quantisation.model_validate, fields, path)


def _validated(read: Callable[[Any], C], fields: Any, path: Path) -> C:
    try:
        return read(fields)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}".lstrip(": ") for e in error.errors())
        raise CheckpointError(f"{path}: {faults}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
