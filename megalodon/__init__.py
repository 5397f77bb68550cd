"""Megalodon: long-context language models to train, tune, convert, run and measure.

    import megalodon

    model = megalodon.Megalodon(megalodon.ModelConfig(vocab_size=256), seed=0)
    logits, state = model(tokens)                 # any length; pass the state on to continue
    model = megalodon.load("runs/quickstart/model")
    model = megalodon.from_reference(config, tensors)

`import megalodon` loads no torch; the names below do when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megalodon.checkpoint.tensors import load_model as load
    from megalodon.interop.official import from_reference
    from megalodon.model.megalodon import Megalodon, ModelConfig
    from megalodon.model.state import State

__all__ = ["Megalodon", "ModelConfig", "State", "from_reference", "load"]

_HOMES = {
    "Megalodon": ("megalodon.model.megalodon", "Megalodon"),
    "ModelConfig": ("megalodon.model.megalodon", "ModelConfig"),
    "State": ("megalodon.model.state", "State"),
    "from_reference": ("megalodon.interop.official", "from_reference"),
    "load": ("megalodon.checkpoint.tensors", "load_model"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'megalodon' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
