"""Adapter directories in peft's layout, with what they belong to; and the model that one stands for.

    adapter_config.json         as peft writes it
    adapter_model.safetensors   base_model.model.layers.0.mega.wz.lora_A.weight …
    megalodon.json              format, base {path, weights_sha256}, tokenizer_sha256, scores; size and hash of files;
                                weights_sha256 stands for base and adapter together
    tokenizer files, chat_template.jinja, chat.json

Only safetensors and JSON are read: an adapter_model.bin is refused, whatever peft would do with it.
Not here: adapters in a model (model/adapters.py), a merged model as a directory (interop/conversion.py).
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megalodon.checkpoint.store import check_files, check_space, describe_file, read_json, staged, write_json
from megalodon.checkpoint.tensors import load_model, read_model_info
from megalodon.errors import CheckpointError, EnvironmentFault
from megalodon.model.adapters import (
    LoraConfig,
    adapter_tensors,
    inject,
    merged,
    peft_config,
    require_peft,
    set_adapter_tensors,
)
from megalodon.model.megalodon import Megalodon
from megalodon.model.quantised import refuse_quantised

FORMAT = "megalodon/adapter/1"
CONFIG, WEIGHTS, ABOUT = "adapter_config.json", "adapter_model.safetensors", "megalodon.json"
_OURS = {"r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_dora": "dora", "use_rslora": "rslora"}
_FREE = {"base_model_name_or_path", "inference_mode", "init_lora_weights", "megatron_core", "peft_type", "peft_version"}
_FREE |= {"qalora_group_size", "revision", "target_modules", "task_type"}
"""Keys of adapter_config.json that say nothing of what is computed, or are read by themselves."""


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter."""
    return (directory / CONFIG).is_file()


def save_adapter(
    model: Megalodon,
    directory: Path,
    base: Path,
    beside: Callable[[Path], None] | None,
    meta: Mapping[str, Any],
) -> None:
    """Write the adapters of a model aside and rename the directory; one that is there gives way to a whole one.

    Args:
        base:   the model directory the adapters belong to; its path from `directory` and its hash are recorded.
        beside: writes tokenizer and chat template into a directory.
        meta:   what megalodon.json records besides.
    Raises:
        EnvironmentFault: too little disk space, or a file could not be written; nothing is left behind.
    """
    tensors = adapter_tensors(model)
    where = os.path.relpath(base.resolve(), directory.resolve())
    own = {"path": where, "weights_sha256": read_model_info(base)["weights_sha256"]}
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        check_space(directory.parent, sum(tensor.nbytes for tensor in tensors.values()))
        with staged(directory, replace=True) as aside:
            if beside:
                beside(aside)
            write_json(aside / CONFIG, {**peft_config(model), "base_model_name_or_path": str(base)})
            save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
            files = {path.name: describe_file(path) for path in sorted(aside.iterdir())}
            both = f"{own['weights_sha256']}|{files[WEIGHTS]['sha256']}"
            about = {"format": FORMAT, **meta, "weights_sha256": hashlib.sha256(both.encode()).hexdigest()}
            write_json(aside / ABOUT, {**about, "base": own, "files": files})
    except (OSError, SafetensorError) as error:
        raise EnvironmentFault(f"{directory} could not be written: {error}") from error


def read_adapter_info(directory: Path) -> dict[str, Any]:
    """Return megalodon.json of an adapter directory. Raises: CheckpointError: it is none, or of another format."""
    if not is_adapter(directory):
        raise CheckpointError(f"{directory} is not an adapter directory: {CONFIG} is missing")
    if not (directory / WEIGHTS).is_file():
        other = (
            " (an adapter_model.bin is not read: it is a pickle)" if (directory / "adapter_model.bin").exists() else ""
        )
        raise CheckpointError(f"{directory / WEIGHTS} is missing{other}; expected an adapter in safetensors")
    if not (directory / ABOUT).is_file():
        raise CheckpointError(
            f"{directory / ABOUT} is missing, so the base of this adapter is not known; expected an adapter that "
            "megalodon wrote"
        )
    info = read_json(directory / ABOUT)
    base = info.get("base")
    fits = isinstance(base, dict) and isinstance(base.get("path"), str) and isinstance(base.get("weights_sha256"), str)
    if info.get("format") != FORMAT or not fits or not isinstance(info.get("files"), dict):
        raise CheckpointError(
            f"{directory / ABOUT} has format {info.get('format')!r}; expected {FORMAT!r} with base and files: the "
            "adapter was written by another version of megalodon"
        )
    return info


def base_of(directory: Path, base: Path | None = None) -> Path:
    """Return the model directory that an adapter belongs to: the recorded one, or `base`.

    Raises: CheckpointError if it is not there, or has other weights than the adapter was made for.
    """
    info = read_adapter_info(directory)
    place = base or Path(os.path.normpath(directory / info["base"]["path"]))
    if not (place / "config.json").is_file():
        raise CheckpointError(
            f"{directory}: its base {place} is not there; put the model directory back, or name it: --base DIR"
        )
    found, wanted = read_model_info(place).get("weights_sha256"), info["base"]["weights_sha256"]
    if found != wanted:
        raise CheckpointError(
            f"{directory} belongs to weights {wanted[:8]}, but {place} has {str(found)[:8]}; "
            "expected the model that the adapter was trained on"
        )
    return place


def read_lora_config(directory: Path) -> LoraConfig:
    """Read adapter_config.json, strictly: what would change the function and is not known here is refused.

    Raises: CheckpointError.
    """
    path = directory / CONFIG
    values = read_json(path)
    if (kind := values.get("peft_type")) != "LORA":
        raise CheckpointError(f"{path}: peft_type is {kind!r}; expected 'LORA'")
    for key, value in values.items():
        if key not in _OURS and key not in _FREE and value not in (None, False, {}, [], "none"):
            raise CheckpointError(f"{path}: {key} is {value!r}, which this version cannot honour; expected none")
    try:
        given = {name: values[key] for key, name in _OURS.items() if key in values}
        given["alpha"] = float(given["alpha"])
        return LoraConfig(**given, targets=tuple(values["target_modules"]))
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else repr(error)
        raise CheckpointError(f"{path}: {reason}") from None


def load_adapter(directory: Path, base: Path | None = None) -> Megalodon:
    """Build the model of an adapter directory, its adapter merged into its base, on the CPU; see `load_adapted`."""
    return merged(load_adapted(directory, base))


def load_adapted(directory: Path, base: Path | None = None) -> Megalodon:
    """Build the model of an adapter directory, its adapter beside the matrices of its base, on the CPU.

    Args:
        base: the model directory it belongs to; None takes the recorded one.
    Raises:
        EnvironmentFault: peft is missing.
        CheckpointError: a file is missing or changed, the base is another, or the tensors do not fit.
    """
    require_peft()
    info = read_adapter_info(directory)
    place = base_of(directory, base)
    config = read_lora_config(directory)
    check_files(directory, info["files"])
    try:
        tensors = load_file(directory / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{directory / WEIGHTS} cannot be read: {error}") from error
    for name, tensor in tensors.items():
        if ".lora_A." in name and len(tensor) != config.r:
            shape = tuple(tensor.shape)
            raise CheckpointError(f"{directory}: {name} is {shape}, but {CONFIG} says r {config.r}")
    model = load_model(place)
    refuse_quantised(model, place, "given an adapter")
    inject(model, config, seed=0)
    set_adapter_tensors(model, tensors, str(directory / WEIGHTS))
    return model
