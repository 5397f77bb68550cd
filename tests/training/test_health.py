"""The health panel says what a probe of the layer finds, and changes nothing."""

import math

import pytest
import torch
from factories import random_starts, random_tokens, tiny_model

from megalodon.model.cema import Cema
from megalodon.training.health import health_row, memory_tokens


def cema(memories: list[float], gammas: list[float]) -> Cema:
    """One channel whose averages have these time constants and these weights, all with p = 1/2."""
    made = Cema(1, len(memories))
    with torch.no_grad():
        made.alpha.zero_()  # p = σ(alpha) = 1/2
        share = torch.tensor([2 * -math.expm1(-1 / m) for m in memories], dtype=torch.float64)
        made.delta.copy_(torch.logit(share)[None, :, None])
        made.theta.zero_()
        made.gamma.zero_()
        made.gamma[0, :, 0] = torch.tensor(gammas)
    return made


def test_the_memory_of_one_average_is_its_time_constant() -> None:
    assert float(memory_tokens(cema([50.0], [0.3]))) == pytest.approx(50.0, rel=1e-5)
    assert float(memory_tokens(cema([50.0, 2000.0], [0.3, 0.0]))) == pytest.approx(50.0, rel=1e-5)


def test_the_memory_of_several_is_the_mean_age_of_what_is_heard() -> None:
    """The integral, summed up: ages weighted by the envelope of the response."""
    layer = cema([20.0, 300.0], [1.0, 0.1])
    j = torch.arange(0, 20_000, 0.05, dtype=torch.float64)
    envelope = 1.0 * torch.exp(-j / 20) + 0.1 * torch.exp(-j / 300)
    assert float(memory_tokens(layer)) == pytest.approx(float((j * envelope).sum() / envelope.sum()), rel=1e-3)


def test_the_row_holds_what_the_state_and_the_parameters_hold() -> None:
    model = tiny_model(torch.float32)
    hidden, state = model.hidden(random_tokens(2, 23), starts=random_starts(2, 23))
    state = state.detach()
    row = health_row(model, state)
    assert row["kind"] == "health" and len(row["layers"]) == 2
    for layer, after, block in zip(row["layers"], state.layers, model.layers, strict=True):
        mega = block.get_submodule("mega")
        assert layer["variance"]["min"] == pytest.approx(float(after.norm.var.min()))
        assert layer["variance"]["max"] == pytest.approx(float(after.norm.var.max()))
        assert layer["cema_state"] == pytest.approx(float(after.cema.square().sum(-1).sqrt().max()))
        assert layer["gamma"] == pytest.approx(float(mega.get_parameter("cema.gamma").detach().norm()))
        assert layer["query"] == pytest.approx(float((1 + mega.get_parameter("gamma")[0].detach()).norm()))
        assert 0 < layer["decay"]["p99.9"] <= layer["decay"]["max"] < 1
        assert 0 < layer["memory"]["median"] <= layer["memory"]["p99.9"] <= layer["memory"]["max"]
    assert hidden.requires_grad
    assert not any("variance" in layer for layer in health_row(model, None)["layers"])


def test_a_variance_below_eps_is_counted() -> None:
    model = tiny_model(torch.float32)
    _, state = model.hidden(random_tokens(2, 23))
    state.layers[1].norm.var[0, :3] = 1e-7
    assert health_row(model, state)["layers"][1]["variance"]["below_eps"] == 3 / 8
