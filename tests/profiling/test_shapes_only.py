"""A pass in shape only keeps, and holds at its fullest moment, exactly what a real one does."""

import gc
from typing import NamedTuple

import pytest
import torch
from factories import random_starts, random_tokens, tiny_config
from torch import Tensor

from megalodon.model.architectures import LanguageModel, build_model
from megalodon.model.llama import LlamaConfig
from megalodon.profiling.plan import activations
from megalodon.profiling.shapes_only import LiveBytes, laid_out, shapes_only
from megalodon.training.activations import PARTS, kept_by_part, pass_loss
from megalodon.training.execution import Recompute, recompute
from megalodon_kernels.dispatch import Card

ROWS, LENGTH = 3, 23


class Held(NamedTuple):
    kept: dict[str, int]
    peak: int


def passed(model: LanguageModel, starts: Tensor | None, what: Recompute, bf16: bool = False) -> Held:
    """One pass forward and back."""
    recompute(model.train(), what)
    tokens = random_tokens(ROWS, LENGTH)
    kept = kept_by_part(model, lambda: pass_loss(model, tokens, starts, bf16=bf16, loss_chunk=16))
    gc.collect()
    with LiveBytes() as live:
        loss = pass_loss(model, tokens, starts, bf16=bf16, loss_chunk=16)
        loss.backward()
    return Held(kept, live.peak([p.grad for p in model.parameters() if p.grad is not None]))


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("none", {}),
        ("none", {"swiglu": True, "rescale_nffn": True, "share_emb": True}),
        ("attention", {"swiglu": True}),
        ("block", {}),
        ("block", {"dropout": 0.1, "hidden_dropout": 0.1, "attention_dropout": 0.1}),
    ],
)
def test_what_a_real_pass_keeps_is_predicted_to_the_byte(what: Recompute, options: dict, documents: bool) -> None:
    config = tiny_config(num_layers=1, **options)
    starts = random_starts(ROWS, LENGTH) if documents else None
    real = passed(build_model(config), starts, what)
    with shapes_only(None):
        predicted = passed(laid_out(config), starts, what)
    assert predicted == real
    assert real.peak > sum(real.kept.values()) > 0


def test_so_is_bfloat16_and_every_layer_more() -> None:
    config = tiny_config(num_layers=5)
    starts = random_starts(ROWS, LENGTH)
    real = passed(build_model(config), starts, "none", bf16=True)
    places = tuple(tuple(row.nonzero().flatten().tolist()) for row in starts)
    predicted = activations(config, ROWS, LENGTH, places, bf16=True, loss_chunk=16)
    assert predicted.kept == real.kept
    assert abs(predicted.peak - real.peak) < 0.02 * real.peak  # a small model's last block is not quite like the others


def test_so_is_the_baseline() -> None:
    pytest.importorskip("transformers")
    config = LlamaConfig(num_layers=2, model_dim=24, num_heads=2, ffn_hidden_dim=29, vocab_size=53, max_positions=37)
    starts = random_starts(ROWS, LENGTH)
    real = passed(build_model(config), starts, "none")
    with shapes_only(None):
        assert passed(laid_out(config), starts, "none") == real


def test_kernels_that_are_not_here_say_what_they_would_keep() -> None:
    pytest.importorskip("triton")
    config = tiny_config(num_layers=1, norm_num_groups=3)
    found = {}
    for shared_memory in (227 << 10, 99 << 10):  # the second card has no room for the kernel of CEMA
        with shapes_only(Card((9, 0), shared_memory)):
            found[shared_memory] = passed(laid_out(config), None, "none", bf16=True).kept
    with shapes_only(None):
        portable = passed(laid_out(config), None, "none", bf16=True).kept
    roomy, narrow = found.values()
    assert roomy["ffn"] == narrow["ffn"] and roomy["cema"] < narrow["cema"]
    assert sum(roomy.values()) < sum(portable.values())


def test_every_byte_has_a_part_and_nothing_has_values() -> None:
    with shapes_only(None):
        model = laid_out(tiny_config(num_layers=1))
        held = passed(model, None, "none")
        assert torch.zeros(3, dtype=torch.int64).tolist() == [0, 0, 0]
        with pytest.raises(Exception, match="_local_scalar_dense"):
            torch.ones(3).sum().item()
    assert held.kept.keys() <= PARTS.keys() and {"norm", "cema", "attn", "ffn", "loss", "embed"} <= held.kept.keys()
