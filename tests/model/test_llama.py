"""The baseline behind the model's contract: laws of its state, files that transformers reads, decoding, refusals."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from factories import random_starts, random_tokens
from tolerances import LOGITS

from megalodon.checkpoint.tensors import load_language_model, load_model, save_model
from megalodon.errors import CheckpointError, EnvironmentFault, InputError
from megalodon.inference.sampling import SamplingConfig
from megalodon.inference.session import Session, generate
from megalodon.model.architectures import build_model
from megalodon.model.llama import Llama, LlamaConfig

pytest.importorskip("transformers", reason="the extra hf is not installed")

SIZES = {"num_layers": 2, "model_dim": 24, "num_heads": 2, "ffn_hidden_dim": 37, "vocab_size": 53}
CLOSE = {"atol": LOGITS[torch.float32], "rtol": 0.0}
"""What is asked of our own model: two ways to read one text, logits in float32."""


@pytest.fixture(scope="module")
def model() -> Llama:
    built = build_model(LlamaConfig(**SIZES), seed=3)
    assert isinstance(built, Llama)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter *= 5  # weights of std 0.1, so that attention is not flat
    return built.eval()


def test_parameters_are_counted_and_drawn_from_seed_and_name(model: Llama):
    config = LlamaConfig(**SIZES)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, other = Llama(config, seed=1), Llama(config, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert one.num_parameters() == config.num_parameters()
    assert Llama(config.model_copy(update={"share_emb": True})).num_parameters() == config.num_parameters() - 53 * 24
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, dict(other.named_parameters())[name])
        assert parameter.dim() == 1 or abs(float(parameter.detach().std()) / 0.02 - 1) < 0.2, name
    assert not torch.equal(one.output_weight, Llama(config, seed=2).output_weight)


def test_any_split_of_a_text_gives_the_same(model: Llama):
    tokens = random_tokens(2, 37)
    whole, end = model(tokens)
    first, state = model(tokens[:, :11])
    second, state = model(tokens[:, 11:12], state)
    third, state = model(tokens[:, 12:], state)
    torch.testing.assert_close(torch.cat([first, second, third], 1), whole, **CLOSE)
    assert torch.equal(state.position, end.position) and end.num_bytes() == 2 * 8 + 2 * 2 * 2 * 37 * 24 * 4
    torch.testing.assert_close(state.layers[1], end.layers[1], **CLOSE)


def test_packed_documents_are_those_alone_and_stay_so_in_the_state(model: Llama):
    tokens, starts = random_tokens(2, 60), random_starts(2, 60)
    packed, state = model(tokens, None, starts)
    more = random_tokens(2, 7, seed=5)
    continued, _ = model(more, state)
    for row in range(2):
        begins = [*starts[row].nonzero()[:, 0].tolist(), 60]
        for start, stop in pairwise(begins):
            alone, its = model(tokens[row : row + 1, start:stop])
            torch.testing.assert_close(packed[row, start:stop], alone[0], **CLOSE)
        assert int(state.position[row]) == int(its.position)
        torch.testing.assert_close(continued[row], model(more[row : row + 1], its)[0][0], **CLOSE)


def test_a_token_of_one_document_moves_no_other(model: Llama):
    tokens, starts = random_tokens(1, 40), torch.zeros(1, 40, dtype=torch.bool)
    starts[0, 17] = True
    other = tokens.clone()
    other[0, 3] = (other[0, 3] + 1) % 53
    one, two = model(tokens, None, starts)[0], model(other, None, starts)[0]
    assert torch.equal(one[:, 17:], two[:, 17:]) and not torch.equal(one[:, :17], two[:, :17])


def test_decoding_is_reading_and_greedy_text_is_that_of_transformers(model: Llama, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    save_model(model, tmp_path / "model", None, {})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    prompt = random_tokens(1, 9)
    torch.testing.assert_close(theirs(prompt).logits, model(prompt)[0], **CLOSE)
    text = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False)
    session = Session(load_language_model(tmp_path / "model").eval())
    ours = list(generate(session, prompt[0].tolist(), 30, SamplingConfig(temperature=0)))
    assert ours == text[0, 9:].tolist()
    assert not session.constant and session.memory > 2 * 2 * 38 * 24 * 4
    place = session.snapshot()
    session.step(5)
    session.rewind(place)
    again = session.step(5)
    torch.testing.assert_close(again, model(torch.tensor([[*prompt[0].tolist(), *ours[:-1], 5]]))[0][0, -1], **CLOSE)


def test_a_saved_model_comes_back_bit_by_bit(model: Llama, tmp_path: Path):
    save_model(model, tmp_path / "model", None, {})
    again = load_language_model(tmp_path / "model")
    assert isinstance(again, Llama) and again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    with pytest.raises(CheckpointError, match='model_type "llama"; expected "megalodon"'):
        load_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_key_value_heads": 1}, "num_key_value_heads"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"hidden_size": None}, "model_dim"),
        ({"hidden_size": 26}, "not a multiple"),
    ],
)
def test_a_llama_of_another_kind_is_refused(model: Llama, tmp_path: Path, change: dict, said: str):
    save_model(model, tmp_path / "model", None, {})
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=said):
        load_language_model(tmp_path / "model")


def test_what_the_baseline_cannot_do_is_said(model: Llama, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match="norm_stats window is not available with arch llama"):
        Session(model, norm_stats="window")
    with pytest.raises(ValueError, match="token id 53 is outside the vocabulary 0 … 52"):
        model(torch.tensor([[53]]))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match=r"model.arch llama needs the extra \[hf\]"):
        Llama(LlamaConfig(**SIZES))
