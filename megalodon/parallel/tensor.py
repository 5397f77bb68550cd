"""Tensor parallelism: the ranks of a group hold the features of a layer between them (the mesh axis `tp`).

    split = split_layers(model, mesh)          # name of a parameter -> the axis it was cut along

The residual stream is split by features, as in the released code: TimestepNorm (whole groups) and CEMA see their own
alone. What needs all features gathers them; the products back into the stream leave a partial sum on every rank, of
which each takes its own features:

    u, m = TimestepNorm(x), CEMA(u)     own features
    RMSNorm(gather m) -> wz, wr, wh1    own rows: whole heads, own features
    gather u -> wv                      own rows: whole heads
    wh2, fc2                            own columns, then the sum, scattered
    LayerNorm(gather y) -> fc1, fc3     own rows

Modules run as they are on their part of each weight; collectives are hooks around them. The final hidden states are
gathered, and every rank takes the loss of its part of the tokens with the whole output matrix, so that embedding and
output matrix are not split; FSDP shards them over these ranks too. Not here: FSDP (fsdp.py).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from megalodon.model.architectures import LanguageModelConfig
from megalodon.model.megalodon import Block, Megalodon, ModelConfig
from megalodon.parallel.collectives import all_gather, reduce_scatter
from megalodon.parallel.mesh import Mesh

ROWS = ("wz", "wr", "wv", "wh1", "fc1", "fc3", "timenorm", "final_norm", "cema")
"""Modules whose parameters are cut along their first axis, the one of their output features."""
COLUMNS = ("wh2", "fc2")
"""Linear maps that are cut along their input features."""


def limits_of(config: LanguageModelConfig) -> dict[str, Any]:
    """What of a model bounds its layout over ranks, as `check_layout` takes it; nothing of the baseline."""
    if not isinstance(config, ModelConfig):
        return {}
    names = ("num_heads", "norm_num_groups", "model_dim", "z_dim", "value_dim", "ffn_hidden_dim")
    split = {name: getattr(config, name) for name in names}
    return {"chunk_size": config.chunk_size, "split": split, "dropout": config.has_dropout}


def split_axis(name: str) -> int | None:
    """The axis along which tp cuts the parameter of this name; None: every rank has it whole."""
    owner, kind = name.split(".")[-2:]
    if owner in ROWS or (owner == "nffn" and kind == "alpha"):
        return 0
    if owner in COLUMNS or owner == "mega":  # gamma and beta of queries and keys: (2, Z)
        return 1
    return None


def split_layers(model: Megalodon, mesh: Mesh) -> dict[str, int]:
    """Leave this rank's part of every weight in the model, and let its modules exchange features; see above."""
    tp, rank, group = mesh.layout.tp, mesh.tp_rank, mesh.features
    split = {}
    for name, parameter in list(model.named_parameters()):
        axis = split_axis(name)
        if axis is None:
            continue
        split[name] = axis
        owner, _, kind = name.rpartition(".")
        mine = parameter.detach().chunk(tp, axis)[rank].clone()
        setattr(model.get_submodule(owner), kind, nn.Parameter(mine, parameter.requires_grad))

    def gather(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return _Exchange.apply(args[0], group, True), *args[1:]  # type: ignore[no-untyped-call]

    def scatter(_: nn.Module, __: object, out: Tensor) -> Tensor:
        return _Exchange.apply(out, group, False)  # type: ignore[no-untyped-call, no-any-return]

    for block in model.layers:
        assert isinstance(block, Block)
        mega, nffn = block.mega, block.nffn
        mega.num_heads //= tp
        mega.timenorm.num_groups //= tp
        for module in (mega.rmsnorm, mega.wv, nffn.norm):
            module.register_forward_pre_hook(gather)
        for module in (mega.wh2, nffn.fc2):
            module.register_forward_hook(scatter)
    model.embed.register_forward_hook(lambda _, __, out: out.chunk(tp, -1)[rank])
    final = model.output.final_norm
    final.num_groups //= tp
    final.register_forward_hook(
        lambda _, __, out: (_Exchange.apply(out[0], group, True), out[1])  # type: ignore[no-untyped-call]
    )
    return split


class _Exchange(torch.autograd.Function):
    """Gather features, (…, D/ranks) of every rank -> (…, D), or the other way: parts of a sum (…, D) -> (…, D/ranks).

    Each is the transpose of the other: what all say of the features of a rank is summed there.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: dist.ProcessGroup, gathers: bool) -> Tensor:
        ctx.group, ctx.gathers = group, gathers  # type: ignore[attr-defined]
        return _gathered(x, group) if gathers else _scattered(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        back = _scattered if ctx.gathers else _gathered  # type: ignore[attr-defined]
        return back(grad, ctx.group), None, None  # type: ignore[attr-defined]


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return torch.cat(all_gather(x, group).unbind(0), dim=-1)


def _scattered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return reduce_scatter(torch.stack(x.chunk(dist.get_world_size(group), -1)), group)
