"""The models a recipe or a file can name: Megalodon, and the Llama it is compared with. One place knows both.

    model = build_model(config, seed=1)       # of either, by the class of its configuration

Training, evaluation and generation use what both have: config, backend, layers, hidden, output_weight, empty_state.
Not here: either model (megalodon.py, llama.py), their files (checkpoint/tensors.py).
"""

from collections.abc import Mapping
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from megalodon.errors import InputError
from megalodon.model.decoder import Decoder
from megalodon.model.llama import Llama, LlamaConfig, LlamaDecoder
from megalodon.model.megalodon import Block, Megalodon, ModelConfig
from megalodon.model.weights import assign_weights, copy_weights
from megalodon_kernels import Backend

LanguageModel = Megalodon | Llama
LanguageModelConfig = ModelConfig | LlamaConfig
ModelState = Any
"""State or LlamaState, whichever the model has: opaque to all but the model, except `position`, `rows()` and
`num_bytes()`."""


@overload
def build_model(config: ModelConfig, seed: int = 0, backend: Backend = "auto") -> Megalodon: ...
@overload
def build_model(config: LlamaConfig, seed: int = 0, backend: Backend = "auto") -> Llama: ...
def build_model(config: LanguageModelConfig, seed: int = 0, backend: Backend = "auto") -> LanguageModel:
    """Return the model of a configuration with initial weights. Raises: EnvironmentFault without the extra it needs."""
    if isinstance(config, LlamaConfig):
        return Llama(config, seed, backend)
    return Megalodon(config, seed, backend)


def make_decoder(model: LanguageModel, state: ModelState) -> Decoder | LlamaDecoder:
    """Return what reads tokens one by one, from a state of this model."""
    if isinstance(model, Llama):
        return LlamaDecoder(model, state)
    return Decoder(model, state)


def as_megalodon(model: LanguageModel, what: str) -> Megalodon:
    """Return the model as what it must be for `what`. Raises: InputError for the baseline."""
    if not isinstance(model, Megalodon):
        raise InputError(f"{what} is not available with arch llama, the baseline; expected a Megalodon")
    return model


def attention_half(block: nn.Module) -> nn.Module:
    """Return the part of a block that mixes tokens."""
    return block.mega if isinstance(block, Block) else cast(nn.Module, block.self_attn)


def pointwise_parts(block: nn.Module) -> list[nn.Module]:
    """Return the parts of a block that treat each token alone, and so compile without a graph break."""
    if isinstance(block, Block):
        return [block.nffn, block.mega.rmsnorm]
    return cast(list[nn.Module], [block.mlp, block.input_layernorm, block.post_attention_layernorm])


def with_weights(config: LanguageModelConfig, tensors: Mapping[str, Tensor], source: str) -> LanguageModel:
    """Return the model of a configuration with these weights, strictly checked, in float32.

    Args:
        source: where the tensors come from, for messages.
    Raises:
        CheckpointError: with every tensor that is missing, unexpected or of another shape.
    """
    if isinstance(config, ModelConfig):
        with torch.device("meta"):
            model = Megalodon(config)
        assign_weights(model, tensors, source)
        return model
    llama = Llama(config)
    copy_weights(llama, tensors, source)
    return llama
