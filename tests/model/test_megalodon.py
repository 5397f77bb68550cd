"""Configuration, names, counts, initial values, and what the model refuses."""

import re

import pytest
import torch
from factories import random_tokens, tiny_config, tiny_model
from pydantic import ValidationError

from megalodon.model.attention import Rotary
from megalodon.model.cema import Cema
from megalodon.model.megalodon import PRESETS, Megalodon, ModelConfig, initialise

PRESET_PARAMETERS = {
    "mega200M": 220_627_968,
    "mega1.3B": 1_342_832_640,
    "mega1.3B_pg19": 1_327_628_288,
    "mega7.1B": 7_117_381_632,
    "mega7.3B": 7_385_817_088,
    "paper-7b": 7_385_817_088,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_their_parameters(name: str) -> None:
    config = ModelConfig(vocab_size=32_000, **PRESETS[name])
    assert config.num_parameters() == PRESET_PARAMETERS[name]
    with torch.device("meta"):
        assert Megalodon(config).num_parameters() == PRESET_PARAMETERS[name]


@pytest.mark.parametrize(
    "options",
    [{}, {"swiglu": True, "rescale_nffn": True}, {"share_emb": True}, {"norm_affine": False}, {"output_size": 7}],
    ids=str,
)
def test_the_formula_counts_what_is_built(options: dict[str, object]) -> None:
    config = tiny_config(**options)
    assert config.num_parameters() == Megalodon(config).num_parameters()


def test_names_are_the_released_ones() -> None:
    names = set(tiny_model(swiglu=True, rescale_nffn=True).state_dict())
    norm = {"weight", "bias", "prior_count", "prior_mean", "prior_logv"}
    mega = {f"timenorm.{n}" for n in norm} | {f"cema.{n}" for n in ("alpha", "delta", "theta", "gamma", "omega")}
    mega |= {f"{m}.{n}" for m in ("wv", "wz", "wr", "wh1") for n in ("weight", "bias")}
    mega |= {"rmsnorm.weight", "wh2.weight", "gamma", "beta"}
    nffn = {"norm.weight", "norm.bias", "fc1.weight", "fc2.weight", "fc3.weight", "alpha"}
    block = {f"mega.{n}" for n in mega} | {f"nffn.{n}" for n in nffn}
    expected = {f"layers.{i}.{n}" for i in range(2) for n in block} | {f"output.final_norm.{n}" for n in norm}
    assert names == expected | {"embed.weight", "output.output.weight", "rope.freqs"}


def test_plain_names_lack_what_options_add() -> None:
    names = set(tiny_model(norm_affine=False).state_dict())
    absent = ("rmsnorm", "nffn.norm", "fc3", "nffn.alpha")
    assert not [n for n in names if any(part in n for part in absent)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_num_groups": 7}, "model_dim 24 is not a multiple of norm_num_groups 7"),
        ({"num_heads": 5}, "z_dim 12 is not a multiple of num_heads 5; value_dim 34 is not a multiple of num_heads 5"),
        ({"z_dim": 6}, "z_dim 6 / num_heads 2 is odd"),
        ({"norm_num_groups": 24}, "norm_num_groups 24 equals model_dim"),
        ({"model_dim": 1}, "greater than or equal to 2"),
        ({"num_layers": 0}, "greater than or equal to 1"),
        ({"dropout": 1.0}, "less than 1"),
        ({"output_size": 0}, "output_size is 0"),
        ({"share_emb": True, "output_size": 9}, "output_size 9 differs from vocab_size 53 with share_emb"),
        ({"init_mode": "gauss"}, "'he', 'bert', 'xavier' or 'none'"),
        ({"modeldim": 3}, "Extra inputs are not permitted"),
    ],
    ids=str,
)
def test_impossible_configurations_are_refused_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        tiny_config(**options)


def test_initial_values_are_as_specified() -> None:
    model = Megalodon(
        ModelConfig(
            num_layers=2, model_dim=256, z_dim=64, value_dim=512, num_heads=1, ffn_hidden_dim=320, vocab_size=1000,
            norm_num_groups=8, swiglu=True, rescale_nffn=True,
        )
    )  # fmt: skip
    p = dict(model.named_parameters())
    for name in ("embed.weight", "output.output.weight"):
        # Cut at 3 standard deviations, which leaves 0.9866 of the spread.
        assert p[name].std().item() == pytest.approx(0.9866 / 16, rel=0.02)
        assert p[name].abs().max() <= 3 / 16
    for name in ("wv", "wz", "wr", "wh1"):
        assert p[f"layers.0.mega.{name}.weight"].std().item() == pytest.approx((1 / (3 * 256)) ** 0.5, rel=0.02)
        assert not p[f"layers.0.mega.{name}.bias"].any()
    assert p["layers.1.mega.wh2.weight"].std().item() == pytest.approx((1 / (3 * 512)) ** 0.5, rel=0.02)
    assert p["layers.1.nffn.fc2.weight"].std().item() == pytest.approx((1 / (3 * 320)) ** 0.5, rel=0.02)
    cema = model.layers[0].mega.cema
    assert cema.alpha.std().item() == pytest.approx(0.2, rel=0.05)
    assert cema.delta.std().item() == pytest.approx(0.2, rel=0.05)
    assert cema.gamma[..., 0].std().item() == pytest.approx(1.0, rel=0.05)
    assert not cema.gamma[..., 1].any()
    assert cema.omega.abs().max() <= 1
    expected = torch.sort(256.0 ** (-torch.arange(1, 257).double() / 256)).values
    assert torch.allclose(cema.theta.sigmoid().flatten().sort().values.double(), expected, rtol=1e-5)
    assert not torch.equal(cema.theta.flatten(), cema.theta.flatten().sort().values)
    assert torch.allclose(p["layers.0.nffn.alpha"], torch.tensor(0.1))
    assert torch.allclose(p["layers.1.nffn.alpha"], torch.tensor(0.05))
    for name in ("mega.gamma", "mega.beta", "mega.timenorm.weight", "mega.timenorm.bias", "mega.rmsnorm.weight"):
        assert not p[f"layers.0.{name}"].any()


@pytest.mark.parametrize(("mode", "std"), [("bert", 0.02), ("xavier", (2 / (24 + 29)) ** 0.5)])
def test_init_modes(mode: str, std: float) -> None:
    weight = Megalodon(tiny_config(init_mode=mode)).layers[0].nffn.fc1.weight
    assert weight.std().item() == pytest.approx(std, rel=0.1)


def test_init_mode_none_cannot_be_forgotten() -> None:
    assert Megalodon(tiny_config(init_mode="none"))(random_tokens(1, 3))[0].isnan().all()


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    state = torch.get_rng_state()
    a, b, c = (Megalodon(tiny_config(), seed=s) for s in (1, 1, 2))
    deeper = Megalodon(tiny_config(num_layers=3), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for name, p in a.named_parameters():
        assert torch.equal(p, b.get_parameter(name))
        assert torch.equal(p, deeper.get_parameter(name))
    assert not torch.equal(a.embed.weight, c.embed.weight)
    assert not torch.equal(a.layers[0].nffn.fc1.weight, a.layers[1].nffn.fc1.weight)


def test_dropout_acts_in_training_only() -> None:
    model = tiny_model(dropout=0.2, hidden_dropout=0.1, attention_dropout=0.3)
    tokens = random_tokens(2, 13)
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    model.eval()
    assert torch.equal(model(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"tokens are \(3,\) torch.int64; expected \(B, L\) torch.int64"),
        (torch.zeros(1, 3), r"tokens are \(1, 3\) torch.float32"),
        (torch.zeros(0, 3, dtype=torch.int64), r"tokens are \(0, 3\) torch.int64; expected .* with B ≥ 1"),
        (torch.zeros(0, 0, dtype=torch.int64), r"tokens are \(0, 0\) torch.int64; expected .* with B ≥ 1"),
        (torch.tensor([[0, 53]]), r"token id 53 is outside the vocabulary 0 … 52"),
        (torch.tensor([[0, -1]]), r"token id -1 is outside"),
    ],
)
def test_tokens_that_do_not_fit(tokens: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model()(tokens)


def test_a_state_of_another_depth_does_not_fit() -> None:
    _, state = tiny_model(num_layers=3)(random_tokens(2, 5))
    with pytest.raises(ValueError, match="the state has 3 layers but the model has 2"):
        tiny_model()(random_tokens(2, 5), state)


def test_saturated_decays_are_finite() -> None:
    """σ(alpha) σ(delta) rounds to 1: without the clamp before log1p, decay and gradient are not finite."""
    layer = Cema(5, 3)
    for parameter in layer.parameters():
        parameter.data.fill_(50.0)
    y, h = layer(torch.randn(2, 37, 5))
    y.square().sum().backward()
    assert y.isfinite().all() and h.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_rotations_are_exact_late_in_a_chunk() -> None:
    """Angles formed in float64: in float32 they are off by 1.2e-4 rad near position 4096."""
    layer = Rotary(8, 10_000.0)
    position = torch.arange(4000, 4096)[None]
    angle = position[..., None, None].double() * layer.freqs.double()
    assert (layer(position, 4096).real.double() - angle.cos()).abs().max() < 1e-7
    assert (layer(position, 4096).imag.double() - angle.sin()).abs().max() < 1e-7


def test_drawing_ignores_the_default_device() -> None:
    """The generators are of the CPU; under another default device drawing must not follow that."""
    model = Megalodon(tiny_config(), seed=3)
    expected = model.embed.weight.clone()
    with torch.device("meta"):
        initialise(model, 3)
    assert torch.equal(model.embed.weight, expected)


def test_state_and_starts_that_do_not_fit() -> None:
    model = tiny_model()
    _, state = model(random_tokens(2, 5))
    with pytest.raises(ValueError, match="the state has 2 rows but tokens have 3"):
        model(random_tokens(3, 5), state)
    with pytest.raises(ValueError, match=r"starts are \(2, 4\) torch.bool; expected \(2, 5\)"):
        model(random_tokens(2, 5), None, torch.zeros(2, 4, dtype=torch.bool))


def test_a_state_whose_keys_are_not_those_of_its_position() -> None:
    """Asked once for all layers, so the first is not the only one that counts."""
    model = tiny_model()
    _, state = model(random_tokens(2, 4))
    further = state._replace(position=torch.tensor([4, 17]))
    with pytest.raises(ValueError, match="position says 7 tokens are in the open chunk but the state holds 4 keys"):
        model(random_tokens(2, 5), further)
    first, second = state.layers
    shorter = second._replace(k=second.k[:, :2], v=second.v[:, :2])
    with pytest.raises(ValueError, match="position says 4 tokens are in the open chunk but the state holds 2 keys"):
        model(random_tokens(2, 5), state._replace(layers=(first, shorter)))
