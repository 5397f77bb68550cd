"""Every layout of ranks computes what one rank does: loss, each named gradient, their norm, three optimizer steps."""

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from factories import random_starts, random_tokens, tiny_model
from ranks import on_ranks
from tolerances import PARALLEL_GRADIENTS, PARALLEL_LOSS, PARALLEL_STEPS, assert_close

from megalodon.model.loss import loss_sums
from megalodon.parallel.layout import Layout
from megalodon.parallel.mesh import Mesh
from megalodon.parallel.ranks import ALONE
from megalodon.parallel.several import SeveralRanks
from megalodon.training.execution import recompute
from megalodon.training.optim import OptimConfig, build_optimizer, clip, gradient_norms, optimizer_tensors, parameter_of

ROWS, LENGTH, STEPS = 4, 40, 3
LAYOUTS = {
    "fsdp2": Layout(dp_shard=2), "tp2": Layout(tp=2), "cp2": Layout(cp=2), "cp4": Layout(cp=4),
    "fsdp2 x tp2": Layout(dp_shard=2, tp=2), "dp2 x cp2": Layout(dp_replicate=2, cp=2),
    "cp2 x tp2": Layout(cp=2, tp=2), "hsdp 2 x 2": Layout(dp_replicate=2, dp_shard=2),
}  # fmt: skip
CASES = [
    pytest.param(name, *how, marks=() if case == number else pytest.mark.slow)
    for number, name in enumerate(LAYOUTS)
    for case, how in enumerate(itertools.product((False, True), (1, 2), (False, True)))
]
"""Layout, documents isolated, micro-batches of a step, blocks computed again; one of each layout quick."""


class Found(NamedTuple):
    """What a rank found, of whole tensors."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, torch.Tensor]
    """Of the first step, before clipping."""
    tensors: dict[str, torch.Tensor]
    """Parameters and moments after the last."""


def train(
    layout: Layout | None, isolated: bool, accumulate: int, again: bool, dtype: torch.dtype, tied: bool = False
) -> Found:
    """Three steps of a model in which every option is on."""
    ranks = SeveralRanks(Mesh(layout, "cpu")) if layout else ALONE
    model = tiny_model(
        dtype, value_dim=44, ffn_hidden_dim=30, swiglu=True, rescale_nffn=True, scale_emb=True, share_emb=tied
    )
    recompute(model, "block" if again else "none")
    ranks.wrap(model, bf16=False)
    parameters = ranks.parameters(model)
    optimizer = build_optimizer(parameters, OptimConfig(lr=1e-2, decay="matrices"))
    losses, norms, first = [], [], {}
    for step in range(STEPS):
        tokens, targets = random_tokens(ROWS, LENGTH, seed=step), random_tokens(ROWS, LENGTH, seed=step + 9)
        targets[0, :7], targets[1:3, 33:] = -100, -100
        starts = random_starts(ROWS, LENGTH, seed=step) if isolated else None
        mine = slice(ranks.data_rank, ROWS, ranks.layout.data_ranks)
        (total,) = ranks.total(int((targets[mine] != -100).sum()))
        loss = 0.0
        pieces = [
            x[mine].chunk(accumulate) if x is not None else [None] * accumulate for x in (tokens, targets, starts)
        ]
        for number, (t, aims, begins) in enumerate(zip(*pieces, strict=True)):
            ranks.last_pass(model, number == accumulate - 1)
            hidden, aims = ranks.scored(model.hidden(**ranks.piece(model, t, begins))[0], aims)
            sums = loss_sums(hidden, model.output_weight, aims, 17, z_loss=1e-3)
            (sums.objective / total).backward()
            loss += float(sums.loss) / total
        gradients = ranks.gradients(model, parameters)
        losses += ranks.sums([loss])
        norm, _ = gradient_norms(gradients, ranks.copies, ranks.sums)
        norms.append(float(norm))
        first = first or {name: ranks.whole(name, gradient).clone() for name, gradient in gradients.items()}
        clip(parameters, norm.to(dtype), 0.5)
        optimizer.step()
        for parameter in (*parameters.values(), *model.parameters()):
            parameter.grad = None
    tensors: dict[str, Any] = {**parameters, **optimizer_tensors(optimizer)}
    whole = {name: ranks.whole(parameter_of(name), tensor).clone() for name, tensor in tensors.items()}
    return Found(losses, norms, first, whole)


def as_rank(*arguments: Any) -> tuple[Any, ...]:
    return tuple(train(*arguments))


@pytest.mark.parametrize(("name", "isolated", "accumulate", "again"), CASES)
def test_a_layout_computes_what_one_rank_does(name: str, isolated: bool, accumulate: int, again: bool) -> None:
    layout = LAYOUTS[name]
    accumulate = min(accumulate, ROWS // layout.data_ranks)
    for dtype in (torch.float64, torch.float32):
        one = train(None, isolated, 1, False, dtype)
        for rank in on_ranks(layout.world_size, as_rank, layout, isolated, accumulate, again, dtype):
            assert_alike(Found(*rank), one, dtype)


@pytest.mark.parametrize("name", ["fsdp2", "tp2", "dp2 x cp2"])
def test_a_tied_output_matrix(name: str) -> None:
    one = train(None, True, 1, False, torch.float64, tied=True)
    for rank in on_ranks(LAYOUTS[name].world_size, as_rank, LAYOUTS[name], True, 1, False, torch.float64, True):
        assert_alike(Found(*rank), one, torch.float64)


def assert_alike(rank: Found, one: Found, dtype: torch.dtype) -> None:
    loss, norm = (torch.tensor(numbers, dtype=torch.float64) for numbers in (one.losses, one.norms))
    first = slice(None) if dtype == torch.float64 else slice(1)  # after a step in float32 they are of other weights
    assert_close(torch.tensor(rank.losses, dtype=torch.float64)[first], loss[first], PARALLEL_LOSS[dtype], "loss")
    assert_close(torch.tensor(rank.norms, dtype=torch.float64)[first], norm[first], 1e-6, "norm")
    assert rank.gradients.keys() == one.gradients.keys() and rank.tensors.keys() == one.tensors.keys()
    for name, gradient in one.gradients.items():
        assert_close(rank.gradients[name], gradient, PARALLEL_GRADIENTS[dtype], name)
    for name, tensor in one.tensors.items() if dtype == torch.float64 else ():
        assert_close(rank.tensors[name], tensor, PARALLEL_STEPS, name)
