"""Options and weights under the names of the released implementation -> our model.

Our state dict has the same names, so this is a strict check and an assignment. Not here: its checkpoint files
(official_files.py).
"""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from megalodon.errors import CheckpointError
from megalodon.model.megalodon import Megalodon, ModelConfig
from megalodon.model.weights import assign_weights

IGNORED_OPTIONS = ("efficient_attn", "layerwise_ckpt")
"""Options of the released configuration that choose how it computes, not what."""


def from_reference(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Megalodon:
    """Build a model from the options and the state dict of the released implementation.

    Half-precision values are widened to float32; a float64 tensor makes a float64 model. Buffers may be absent. A
    stored float32 `rope.freqs` is used as it is.

    Args:
        config: the options under their released names.
        tensors: name -> tensor; with `share_emb` the output matrix repeats the embedding.
    Raises:
        CheckpointError: an option is unknown or illegal; a tensor is missing, unexpected, of another shape, or a prior
            with a count other than 0. The message names each.
    """
    with torch.device("meta"):
        model = Megalodon(read_options(config, "model options"))
    assign_weights(model, tensors, "reference weights")
    return model


def read_options(config: Mapping[str, Any], source: str) -> ModelConfig:
    """Return our configuration for the options of the released one.

    Args:
        source: where they come from, for messages.
    Raises:
        CheckpointError: an option is unknown or illegal; the message names each.
    """
    try:
        return ModelConfig.model_validate({k: v for k, v in config.items() if k not in IGNORED_OPTIONS})
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'options'}: {e['msg']}" for e in error.errors())
        raise CheckpointError(f"{source}: {problems}") from None
