"""What a pass forward keeps for the pass back, counted: the bytes that autograd saves, by the part that saved them.

    kept = kept_by_part(model, lambda: pass_loss(model, tokens, starts, bf16=True, loss_chunk=2048))
    sum(kept.values())

It counts a real pass and one in shape only (megalodon/profiling/shapes_only.py) alike.
Not here: what else a run needs (memory.py), what is computed again instead of kept (execution.py).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megalodon.model.architectures import LanguageModel
from megalodon.model.loss import loss_sums
from megalodon.training.optim import group_of

PARTS = {
    "embed": "embedding",
    "norm": "norms",
    "cema": "CEMA",
    "attn": "attention",
    "ffn": "feed-forward",
    "block": "inputs of blocks",
    "loss": "loss",
}
"""Part of a model -> what it is called."""


def pass_loss(
    model: LanguageModel, tokens: Tensor, starts: Tensor | None, *, bf16: bool, loss_chunk: int, z_loss: float = 0.0
) -> Tensor:
    """Return what a pass minimises, (): as a step of training forms it, with the tokens as their own targets.

    Args:
        tokens: (B, L) int64 ids.
        starts: (B, L) bool on the CPU: True at the first token of a document; None means nowhere.
    """
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
        hidden, _ = model.hidden(tokens, starts=starts)
        weight = model.output_weight
        return loss_sums(hidden, weight, tokens, loss_chunk, z_loss=z_loss, backend=model.backend).objective


def kept_by_part(model: LanguageModel, forward: Callable[[], Tensor]) -> dict[str, int]:
    """Return the bytes that autograd keeps of a forward pass, without the parameters: a key of PARTS -> bytes.

    Each storage counts once, whole, for the part that saved it first.
    """
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, tuple[str, int]] = {}
    alive: list[Tensor] = []  # or a freed storage would lend its place to the next
    inside: list[str] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in kept:
            kept[storage._cdata] = inside[-1] if inside else "loss", storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    blocks = set(model.layers)
    hooks = []
    for name, module in model.named_modules():
        part = "block" if module in blocks else group_of(f"{name}.weight") if name else "embed"
        hooks.append(module.register_forward_pre_hook(_noting(inside, part)))
        hooks.append(module.register_forward_hook(lambda *_: void(inside.pop()), always_call=True))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    found = dict.fromkeys(PARTS, 0)
    for part, size in kept.values():
        found[part] += size
    return {part: size for part, size in found.items() if size}


def _noting(inside: list[str], part: str) -> Callable[[nn.Module, object], None]:
    return lambda module, args: inside.append(part)


def void(_: object) -> None:
    """Return nothing: a hook that returns something replaces what the module returns."""
