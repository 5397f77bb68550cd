"""Small, legal things to test with; no two of their dimensions are equal, so that a transposed tensor is noticed."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from megalodon.model.megalodon import Megalodon, ModelConfig
from megalodon_kernels import Backend


def tiny_config(**changes: Any) -> ModelConfig:
    """Two layers, 24 features, two heads, chunks of 10 tokens; every option may be changed."""
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "model_dim": 24,
        "num_heads": 2,
        "z_dim": 12,
        "value_dim": 34,
        "ffn_hidden_dim": 29,
        "cema_ndim": 3,
        "norm_num_groups": 4,
        "chunk_size": 10,
        "vocab_size": 53,
    }
    return ModelConfig(**(sizes | changes))


def tiny_model(
    dtype: torch.dtype = torch.float64, seed: int = 0, backend: Backend = "auto", **changes: Any
) -> Megalodon:
    """A model whose parameters are all random, also those that start at zero, so that nothing hides behind a zero."""
    model = Megalodon(tiny_config(**changes), seed, backend)
    draw = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=draw)
    return model.to(dtype)


def random_tokens(batch: int, length: int, vocab_size: int = 53, seed: int = 0) -> Tensor:
    """(batch, length) ids."""
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_starts(batch: int, length: int, seed: int = 0) -> Tensor:
    """(batch, length) document starts: documents of very different lengths, one token long among them."""
    starts = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.07
    starts[:, 0] = True
    if length > 3:
        starts[0, length // 3 : length // 3 + 2] = True
    return starts


@torch.no_grad()
def endless(model: Megalodon, ends: Iterable[int]) -> Megalodon:
    """The model with logits of 0 for the ids that end a text: greedily it writes on for ever."""
    model.output_weight[list(ends)] = 0
    return model
