"""AdamW is the one of the paper, over the groups that were asked for, with a gradient that was clipped."""

import pytest
import torch
from factories import tiny_model
from pydantic import ValidationError
from torch import nn

from megalodon.training.optim import (
    AveragedWeights,
    OptimConfig,
    build_optimizer,
    clip,
    gradient_norms,
    group_of,
)


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_all_decays_everything_and_matrices_only_linear_maps_and_embeddings() -> None:
    model = tiny_model(torch.float32)
    everything = build_optimizer(named(model), OptimConfig(decay="all")).param_groups
    assert [group["weight_decay"] for group in everything] == [0.1]
    assert everything[0]["names"] == [name for name, _ in model.named_parameters()]
    decayed, kept = build_optimizer(named(model), OptimConfig(decay="matrices")).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    matrices = {name for name, module in model.named_modules() if module.__class__.__name__ == "Linear"}
    assert {name.removesuffix(".weight") for name in decayed["names"]} == matrices | {"embed"}


def test_a_step_is_that_of_the_paper() -> None:
    """One parameter, two gradients, decoupled decay: the update written out."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    optimizer = build_optimizer(named(model), OptimConfig(lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1))
    value, mean, square = 2.0, 0.0, 0.0
    for number, gradient in enumerate([0.5, -0.25], start=1):
        model.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        mean, square = 0.9 * mean + 0.1 * gradient, 0.95 * square + 0.05 * gradient**2
        root = (square / (1 - 0.95**number)) ** 0.5
        value = value * (1 - 0.1 * 0.1) - 0.1 * mean / (1 - 0.9**number) / (root + 1e-8)
        assert float(model.weight.detach()) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_on_matrices_are_those_of_separate_operations(dtype: torch.dtype) -> None:
    """Gradients of products, one of a transposed weight: autograd lays them out as the parameters are."""
    models = [nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 7)).to(dtype) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    config = OptimConfig(lr=0.01)
    ours = build_optimizer(named(models[0]), config)
    options = {"lr": 0.01, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    theirs = torch.optim.AdamW(models[1].parameters(), foreach=False, fused=False, **options)
    x = torch.randn(11, 7, dtype=dtype)
    for _ in range(4):
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            optimizer.zero_grad()
            (model(x) @ model[0].weight.T).square().sum().backward()
            optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("betas", [(1.5, 0.9), (0.9, 1.0), (-0.1, 0.9)])
def test_a_mean_that_does_not_decay_is_refused(betas: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match="expected two numbers from 0 to below 1"):
        OptimConfig(betas=betas)
    assert OptimConfig(betas=(0.0, 0.0)).betas == (0, 0)


def test_clipping_scales_the_whole_gradient_to_the_limit() -> None:
    model = tiny_model(torch.float32)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    norm = gradient_norms(gradients(model))[0]
    first = next(model.parameters()).grad
    assert first is not None
    before = first.clone()
    clip(named(model), norm, 0.5)
    assert float(gradient_norms(gradients(model))[0]) == pytest.approx(0.5, rel=1e-5)
    assert torch.allclose(first, before * (0.5 / norm), rtol=1e-5)
    clip(named(model), gradient_norms(gradients(model))[0], 7.0)
    assert float(gradient_norms(gradients(model))[0]) == pytest.approx(0.5, rel=1e-5)


def test_every_parameter_is_in_one_group_and_the_groups_are_the_whole() -> None:
    model = tiny_model(torch.float32, swiglu=True, rescale_nffn=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    total, groups = gradient_norms(gradients(model))
    assert list(groups) == ["embed", "attn", "norm", "cema", "ffn", "head"]
    assert float(total) == pytest.approx(sum(norm**2 for norm in groups.values()) ** 0.5, rel=1e-6)
    of = {name: group_of(name) for name, _ in model.named_parameters()}
    cema = torch.cat([p.grad.flatten() for name, p in model.named_parameters() if of[name] == "cema"])
    assert cema.numel() == 2 * (4 * 24 * 3 + 2 * 24)
    assert groups["cema"] == pytest.approx(float(cema.norm()), rel=1e-6)
    assert of["layers.0.mega.gamma"] == of["layers.0.mega.wv.bias"] == "attn"
    assert of["layers.0.nffn.norm.bias"] == of["output.final_norm.weight"] == "norm"
    assert of["layers.1.nffn.alpha"] == of["layers.1.nffn.fc3.weight"] == "ffn"


def test_averaged_weights_are_a_mean_first_and_then_an_exponential_average() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = AveragedWeights(named(model), 0.75)
    values, expected = [3.0, 5.0, 7.0, 8.0, -2.0, 6.0], 0.0
    for count, value in enumerate(values, start=1):
        nn.init.constant_(model.weight, value)
        average.update(count)
        decay = min(0.75, 1 - 1 / count)
        expected = decay * expected + (1 - decay) * value
        assert float(average.mean["weight"]) == pytest.approx(expected, rel=1e-6)
        if count <= 4:
            assert expected == pytest.approx(sum(values[:count]) / count)


def test_swapping_averages_in_and_out_leaves_every_bit() -> None:
    model = tiny_model(torch.float32, share_emb=True)
    average = AveragedWeights(named(model), 0.9)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    now = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(KeyError), average.swapped_in():
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name])
        assert model.output_weight is model.embed.weight
        raise KeyError
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, now[name])
        assert torch.equal(average.mean[name], before[name])
