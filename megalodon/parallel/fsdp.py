"""Sharding by FSDP2: every rank of a copy holds a part of each weight and gathers a block when that block runs.

    names = shard_model(model, mesh, bf16=False)         # after tensor.split_layers
    sum_islands(islands, split, mesh)                    # after the backward pass of the last micro-batch

A block is a unit over dp_shard x cp; embedding and output matrix are the root unit, over tp too. Gradients are summed,
never averaged: the loss was divided by the targets of the whole step. Islands, what `Float32Module` keeps wide, are
whole on every rank (fully_shard knows one dtype a unit, and they are 0.1 % of a model); their gradients are summed in
one bucket. Not here: groups of ranks (mesh.py), what a rank's part of a weight is (several.py).
"""

import warnings
from collections.abc import Mapping
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from megalodon.model.architectures import LanguageModel
from megalodon.model.layers import Float32Module
from megalodon.parallel.mesh import Mesh


def island_names(model: nn.Module) -> list[str]:
    """Parameters that stay whole and in float32: of norms, CEMA, queries and keys, scales; not of linear maps."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, Float32Module)
        for name, parameter in module.named_parameters(recurse=False)
    ]


def shard_model(model: LanguageModel, mesh: Mesh, *, bf16: bool) -> list[str]:
    """Shard a model in place, wherever it is; return the names of its islands.

    Args:
        bf16: gather the weights of blocks in bfloat16, in which autocast multiplies; gradients are summed in float32.
              Embedding and output matrix are gathered as they are, as one device uses them.
    """
    # It warns of every view that leaves a unit, lest someone changes it in place; nothing here is changed in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    islands = island_names(model)
    ignored = {model.get_parameter(name) for name in islands}
    replicated = mesh.layout.dp_replicate > 1
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = half if bf16 else MixedPrecisionPolicy(cast_forward_inputs=False)
    blocks = mesh.storage["dp_replicate", "fsdp"] if replicated else mesh.storage["fsdp"]
    for block in model.layers:
        fully_shard(block, mesh=blocks, mp_policy=policy, ignored_params=ignored)
    rest = mesh.copy if replicated else mesh.copy["copy"]
    wide = MixedPrecisionPolicy(cast_forward_inputs=False)
    fully_shard(model, mesh=rest, mp_policy=wide, ignored_params=ignored)
    register_fsdp_forward_method(model, "hidden")
    for unit in units(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo knows no other way to leave out the division
    return islands


def units(model: nn.Module) -> list[FSDPModule]:
    """The sharded modules, the model itself first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def sum_islands(islands: Mapping[str, nn.Parameter], split: Mapping[str, int], mesh: Mesh) -> None:
    """Sum the gradients of islands over the ranks that hold the same features; of those not split, over all.

    Where tp splits a layer, a norm over all features stands on every rank of it, and each rank's gradient of its scale
    is from the products that follow there: a part of the whole.
    """
    for group, names in (
        (mesh.alike, [name for name in islands if name in split]),
        (cast(dist.ProcessGroup, dist.group.WORLD), [name for name in islands if name not in split]),
    ):
        grads = [grad for name in names if (grad := islands[name].grad) is not None]
        if not grads:
            continue
        bucket = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(bucket, group=group)
        for grad, total in zip(grads, bucket.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(total.view_as(grad))
