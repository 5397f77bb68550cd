"""AdamW is the one of the paper, over the groups that were asked for, with a gradient that was clipped."""

import pytest
import torch
from factories import tiny_model
from pydantic import ValidationError
from torch import nn

from megalodon.training.optim import OptimConfig, build_optimizer, clip, gradient_norms


def test_all_decays_everything_and_matrices_only_linear_maps_and_embeddings() -> None:
    model = tiny_model(torch.float32)
    everything = build_optimizer(model, OptimConfig(decay="all")).param_groups
    assert [group["weight_decay"] for group in everything] == [0.1]
    assert everything[0]["names"] == [name for name, _ in model.named_parameters()]
    decayed, kept = build_optimizer(model, OptimConfig(decay="matrices")).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    matrices = {name for name, module in model.named_modules() if module.__class__.__name__ == "Linear"}
    assert {name.removesuffix(".weight") for name in decayed["names"]} == matrices | {"embed"}


def test_a_step_is_that_of_the_paper() -> None:
    """One parameter, two gradients, decoupled decay: the update written out."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1))
    value, mean, square = 2.0, 0.0, 0.0
    for number, gradient in enumerate([0.5, -0.25], start=1):
        model.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        mean, square = 0.9 * mean + 0.1 * gradient, 0.95 * square + 0.05 * gradient**2
        root = (square / (1 - 0.95**number)) ** 0.5
        value = value * (1 - 0.1 * 0.1) - 0.1 * mean / (1 - 0.9**number) / (root + 1e-8)
        assert float(model.weight.detach()) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("betas", [(1.5, 0.9), (0.9, 1.0), (-0.1, 0.9)])
def test_a_mean_that_does_not_decay_is_refused(betas: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match="expected two numbers from 0 to below 1"):
        OptimConfig(betas=betas)
    assert OptimConfig(betas=(0.0, 0.0)).betas == (0, 0)


def test_clipping_scales_the_whole_gradient_to_the_limit() -> None:
    model = tiny_model(torch.float32)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    norm = gradient_norms(model)[0]
    first = next(model.parameters()).grad
    assert first is not None
    before = first.clone()
    clip(model, norm, 0.5)
    assert float(gradient_norms(model)[0]) == pytest.approx(0.5, rel=1e-5)
    assert torch.allclose(first, before * (0.5 / norm), rtol=1e-5)
    clip(model, gradient_norms(model)[0], 7.0)
    assert float(gradient_norms(model)[0]) == pytest.approx(0.5, rel=1e-5)
