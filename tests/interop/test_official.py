"""Strict import of weights under the released names: everything is accounted for, and nothing is guessed."""

import re

import pytest
import torch
from factories import random_tokens, tiny_model
from torch import Tensor

import megalodon
from megalodon.errors import CheckpointError


def released(**options: object) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Options and state dict as the released code would hand them over."""
    model = tiny_model(torch.float32, **options)
    config = model.config.model_dump() | {"efficient_attn": None, "layerwise_ckpt": False}
    return config, {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("options", [{}, {"swiglu": True, "rescale_nffn": True}, {"share_emb": True}], ids=str)
def test_round_trip_is_exact(options: dict[str, object]) -> None:
    config, tensors = released(**options)
    model = megalodon.from_reference(config, tensors)
    assert model.state_dict().keys() == tensors.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name])
    tokens = random_tokens(1, 23)
    assert torch.equal(model(tokens)[0], tiny_model(torch.float32, **options)(tokens)[0])
    if "share_emb" in options:
        assert model.output_weight is model.embed.weight


def test_every_missing_parameter_is_named_and_buffers_may_be_absent() -> None:
    config, tensors = released()
    buffers = {n for n in tensors if "prior_" in n or n == "rope.freqs"}
    expected = megalodon.from_reference(config, tensors)
    model = megalodon.from_reference(config, {n: t for n, t in tensors.items() if n not in buffers})
    assert torch.equal(model.rope.freqs, expected.rope.freqs)
    assert model.state_dict().keys() == tensors.keys()
    for name in tensors.keys() - buffers:
        with pytest.raises(CheckpointError, match=re.escape(f"missing {name}")):
            megalodon.from_reference(config, {n: t for n, t in tensors.items() if n != name})


def test_all_problems_are_named_at_once() -> None:
    config, tensors = released()
    tensors["layers.0.mega.wz.weight"] = tensors["layers.0.mega.wz.weight"].T
    tensors["layers.7.mega.gamma"] = torch.zeros(2, 12)
    del tensors["layers.1.mega.beta"]
    tensors["output.final_norm.prior_count"] = torch.tensor(3)
    with pytest.raises(CheckpointError) as error:
        megalodon.from_reference(config, tensors)
    assert "4 tensors do not fit" in str(error.value)
    for part in (
        "layers.0.mega.wz.weight is (24, 12), expected (12, 24)",
        "unexpected layers.7.mega.gamma",
        "missing layers.1.mega.beta",
        "output.final_norm.prior_count is 3",
    ):
        assert part in str(error.value)


def test_integer_weights_are_refused() -> None:
    config, tensors = released()
    tensors["embed.weight"] = tensors["embed.weight"].long()
    with pytest.raises(CheckpointError, match=r"embed\.weight is torch\.int64, expected a float type"):
        megalodon.from_reference(config, tensors)


def test_a_tied_matrix_that_differs_is_refused() -> None:
    config, tensors = released(share_emb=True)
    tensors["output.output.weight"] = tensors["output.output.weight"] + 1
    with pytest.raises(CheckpointError, match="share_emb ties them"):
        megalodon.from_reference(config, tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_dimension": 3}, "model_dimension: Extra inputs are not permitted"),
        ({"num_heads": 5}, "z_dim 12 is not a multiple of num_heads 5"),
        ({"swiglu": "yes"}, "swiglu: Input should be a valid boolean"),
    ],
)
def test_bad_options_are_named(change: dict[str, object], message: str) -> None:
    config, tensors = released()
    with pytest.raises(CheckpointError, match=message):
        megalodon.from_reference(config | change, tensors)


def test_half_precision_is_widened_and_its_frequencies_computed_anew() -> None:
    config, tensors = released()
    half = {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}
    with pytest.warns(UserWarning, match=r"rope\.freqs was stored in half precision; computed anew"):
        model = megalodon.from_reference(config, half)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.embed.weight, half["embed.weight"].float())
    assert torch.equal(model.rope.freqs, tensors["rope.freqs"])
    assert not torch.equal(half["rope.freqs"].float(), tensors["rope.freqs"])


def test_stored_float32_frequencies_are_used_as_they_are() -> None:
    config, tensors = released()
    tensors["rope.freqs"] = tensors["rope.freqs"] * 1.01
    assert torch.equal(megalodon.from_reference(config, tensors).rope.freqs, tensors["rope.freqs"])


def test_the_model_owns_its_weights() -> None:
    config, tensors = released()
    model = megalodon.from_reference(config, tensors)
    tensors["embed.weight"].zero_()
    assert model.embed.weight.any()


def test_public_names() -> None:
    assert sorted(megalodon.__all__) == ["Megalodon", "ModelConfig", "State", "from_reference", "load"]
    assert set(dir(megalodon)) == set(megalodon.__all__)
    for name in megalodon.__all__:
        assert getattr(megalodon, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Megaladon'"):
        megalodon.Megaladon  # noqa: B018
