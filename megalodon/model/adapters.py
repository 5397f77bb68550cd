"""Low-rank adapters: small trainable matrices beside the frozen ones of a finished model, by the library peft.

    inject(model, LoraConfig(r=8), seed=1)    # model now trains its adapters alone
    plain = merged(model)                     # an ordinary model with the same function, for decoding and export
    tensors = adapter_tensors(model)          # under the names that peft gives them in a file

peft (the extra `finetune`) is imported when an adapter is asked for, never before.
Not here: directories with adapters (checkpoint/adapter_files.py), what is trained how (training).
"""

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from megalodon.config import Config
from megalodon.errors import CheckpointError, InputError
from megalodon.model.extras import require
from megalodon.model.megalodon import Megalodon, ModelConfig

TARGETS = ("wz", "wv", "wr", "wh1", "wh2", "fc1", "fc2", "fc3")
"""The matrices of a block that may get an adapter; fc3 only with SwiGLU. The output matrix never does."""
_ADAPTER = "default"
_PREFIX = "base_model.model."
"""What peft puts before the names of a model's parameters in a file."""


class LoraConfig(Config):
    """Low-rank adapters: small trainable matrices beside the frozen ones."""

    r: int = Field(16, ge=1)
    """Rank of an adapter."""
    alpha: float = Field(32, gt=0)
    """The adapter's output is scaled by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability, on the adapter's input."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Which matrices of a block get one: all-linear = wz wv wr wh1 wh2 fc1 fc2 fc3."""
    dora: bool = False
    """Decompose weights into magnitude and direction."""
    rslora: bool = False
    """Scale by alpha / sqrt(r)."""

    @field_validator("targets")
    @classmethod
    def _known(cls, targets: Any) -> Any:
        if targets != "all-linear" and (not targets or not set(targets) <= set(TARGETS)):
            unknown = next((name for name in targets if name not in TARGETS), "[]")
            raise ValueError(f"`{unknown}` is not one of {', '.join(TARGETS)}; or all-linear for all of them")
        return targets


def require_peft() -> None:
    """Raises: EnvironmentFault if the extra that adapters need is not installed."""
    require("peft", "model.lora (adapters) needs", "finetune")


def inject(model: Megalodon, config: LoraConfig, seed: int) -> None:
    """Freeze every parameter of a model and put adapters, which do nothing yet, beside its matrices.

    Args:
        model: holds its final weights: with `dora` the adapters start from them.
        seed:  of the adapters' initial values; the global generator is left alone.
    Raises:
        EnvironmentFault: peft is missing.   InputError: the model has adapters, or lacks a matrix that is named.
    """
    require_peft()
    import peft

    if is_adapted(model):
        raise InputError("the model has adapters already; merge them first")
    names = {name.rpartition(".")[2] for name, module in model.layers.named_modules() if isinstance(module, nn.Linear)}
    wanted = [name for name in TARGETS if name in names] if config.targets == "all-linear" else list(config.targets)
    if absent := [name for name in wanted if name not in names]:
        raise InputError(f"model.lora.targets: this model has no {absent[0]}; its matrices: {', '.join(sorted(names))}")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    given = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=config.dropout,
        target_modules=wanted,
        use_dora=config.dora,
        use_rslora=config.rslora,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(given, model, adapter_name=_ADAPTER)


def num_adapter_parameters(config: ModelConfig, lora: LoraConfig) -> int:
    """Return how many parameters the adapters of a model have, without building it."""
    with torch.device("meta"):
        model = Megalodon(config)
    wanted = TARGETS if lora.targets == "all-linear" else lora.targets
    whole = 0
    for name, module in model.layers.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in wanted:
            whole += lora.r * (module.in_features + module.out_features) + lora.dora * module.out_features
    return whole


def is_adapted(model: nn.Module) -> bool:
    """Whether a model holds adapters."""
    return any(hasattr(module, "base_layer") for module in model.modules())


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def merged(model: Megalodon) -> Megalodon:
    """Return an ordinary model that computes what the adapted one does; one without adapters is returned as it is.

    Matrices without an adapter are shared with `model`, merged ones are new.
    """
    if not is_adapted(model):
        return model
    values: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if ".lora_" not in name and ".base_layer." not in name:
            values[name] = tensor.detach()
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            whole = copy.deepcopy(module)
            whole.merge()
            for kind, tensor in whole.base_layer.state_dict().items():
                values[f"{name}.{kind}"] = tensor
    with torch.device("meta"):
        plain = Megalodon(model.config, backend=model.backend)
    plain.load_state_dict(values, assign=True)
    if model.config.share_emb:
        plain.output.output.weight = plain.embed.weight
    return plain.train(model.training)


def adapter_tensors(model: Megalodon) -> dict[str, Tensor]:
    """Return the adapters of a model under the names of a peft file: base_model.model.layers.0.mega.wz.lora_A.weight"""
    import peft

    found = peft.get_peft_model_state_dict(model, adapter_name=_ADAPTER, save_embedding_layers=False)
    return {_PREFIX + name: tensor.detach().to("cpu").contiguous() for name, tensor in found.items()}


@torch.no_grad()
def set_adapter_tensors(model: Megalodon, tensors: Mapping[str, Tensor], source: str) -> None:
    """Give the adapters of a model the values of a file.

    Raises: CheckpointError: the full list of missing, unexpected and different tensors; nothing was changed then.
    """
    import peft

    mine = adapter_tensors(model)
    problems = [f"missing {name}" for name in mine if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in mine]
    for name in mine.keys() & tensors.keys():
        if mine[name].shape != tensors[name].shape:
            problems.append(f"{name} is {tuple(tensors[name].shape)}, expected {tuple(mine[name].shape)}")
    if problems:
        shown = "; ".join(sorted(problems)[:6]) + (f" and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise CheckpointError(f"{source}: {len(problems)} tensors do not fit the adapters of the model: {shown}")
    values = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    peft.set_peft_model_state_dict(model, values, adapter_name=_ADAPTER)


def peft_config(model: Megalodon) -> dict[str, Any]:
    """Return adapter_config.json of a model's adapters, as peft writes it."""
    config: Any = model.peft_config[_ADAPTER]  # type: ignore[index]  # peft leaves it there
    values: dict[str, Any] = config.to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
    return {**plain, "peft_type": "LORA", "inference_mode": True}
