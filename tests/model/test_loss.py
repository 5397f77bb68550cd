"""The loss in blocks = the loss over all logits, in value and gradient."""

import pytest
import torch
from factories import random_tokens, tiny_model
from torch.nn.functional import cross_entropy as plain

from megalodon.model.loss import IGNORE, cross_entropy, loss_sums, token_losses


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.randn(3, 17, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    targets = random_tokens(3, 17, 9)
    targets[0, :4] = IGNORE
    targets[2] = IGNORE
    return hidden, weight, targets


@pytest.mark.parametrize("num_classes", [None, 9])
@pytest.mark.parametrize("block", [1, 7, 51, 4096])
def test_blocks_are_the_whole(block: int, num_classes: int | None) -> None:
    hidden, weight, targets = example()
    total, count = cross_entropy(hidden, weight, targets, block, num_classes=num_classes)
    logits = (hidden @ weight.T)[..., :num_classes]
    expected = plain(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    assert int(count) == int((targets != IGNORE).sum())
    assert total.item() == pytest.approx(expected.item(), rel=1e-13)
    actual = torch.autograd.grad(3 * total, (hidden, weight))
    for a, e in zip(actual, torch.autograd.grad(3 * expected, (hidden, weight)), strict=True):
        assert (a - e).abs().max() < 1e-13
    each = token_losses(hidden, weight, targets, block, num_classes=num_classes)
    assert each.shape == targets.shape
    assert each.sum().item() == pytest.approx(expected.item(), rel=1e-13)
    assert not each[targets == IGNORE].any()


def test_gradcheck() -> None:
    hidden, weight, targets = example()
    assert torch.autograd.gradcheck(lambda h, w: cross_entropy(h, w, targets, 7)[0], (hidden, weight))


def test_without_gradients_none_are_formed() -> None:
    hidden, weight, targets = example()
    with torch.no_grad():
        total, _ = cross_entropy(hidden, weight, targets)
    assert not total.requires_grad and total.grad_fn is None
    assert total.item() == pytest.approx(cross_entropy(hidden, weight, targets)[0].item(), rel=1e-13)


def test_nothing_to_predict_is_zero_not_nan() -> None:
    hidden, weight, targets = example()
    total, count = cross_entropy(hidden, weight, torch.full_like(targets, IGNORE))
    total.backward()
    assert total.item() == 0 and int(count) == 0
    assert not hidden.grad.any() and not weight.grad.any()


def test_tied_matrix_gets_both_gradients() -> None:
    model = tiny_model(share_emb=True)
    tokens = random_tokens(2, 13)
    cross_entropy(model.hidden(tokens)[0], model.output_weight, tokens)[0].backward()
    actual = model.embed.weight.grad.clone()
    model.zero_grad()
    plain(model(tokens)[0].flatten(0, 1), tokens.flatten(), reduction="sum").backward()
    assert (actual - model.embed.weight.grad).abs().max() < 1e-11


@pytest.mark.parametrize("num_classes", [None, 9])
@pytest.mark.parametrize("block", [1, 7, 4096])
def test_the_penalty_on_the_normaliser_is_that_of_autograd(block: int, num_classes: int | None) -> None:
    hidden, weight, targets = example()
    sums = loss_sums(hidden, weight, targets, block, num_classes=num_classes, z_loss=0.3)
    scored = targets != IGNORE
    logits = (hidden @ weight.T)[scored][:, :num_classes]
    squares = logits.logsumexp(-1).square().sum()
    expected = plain(logits, targets[scored], reduction="sum")
    assert sums.loss.item() == pytest.approx(expected.item(), rel=1e-13)
    assert sums.squares.item() == pytest.approx(squares.item(), rel=1e-13)
    assert sums.objective.item() == pytest.approx((expected + 0.3 * squares).item(), rel=1e-13)
    assert not (sums.loss.requires_grad or sums.squares.requires_grad)
    actual = torch.autograd.grad(sums.objective, (hidden, weight))
    for a, e in zip(actual, torch.autograd.grad(expected + 0.3 * squares, (hidden, weight)), strict=True):
        assert (a - e).abs().max() < 1e-12
