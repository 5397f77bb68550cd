"""The model that exports carry: our numbers, states, padding and initial values, through transformers' own loader."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import random_tokens, tiny_config, tiny_model
from golden_files import names, needs_golden, options, read
from safetensors.torch import load_file, save_file
from tolerances import BF16_LOGITS, GOLDEN_LOGITS, GRADIENTS, LOGITS, assert_close, assert_near
from torch import Tensor

from megalodon.interop.huggingface import write_export
from megalodon.model.loss import cross_entropy
from megalodon.model.megalodon import Megalodon, ModelConfig

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
from megalodon.interop.flat.configuration_megalodon import MegalodonConfig  # noqa: E402
from megalodon.interop.flat.modeling_megalodon import (  # noqa: E402
    MegalodonCache,
    MegalodonForCausalLM,
    MegalodonModel,
)

OPTIONS: list[dict[str, Any]] = [
    {},
    {"swiglu": True, "rescale_nffn": True, "scale_emb": True, "share_emb": True},
    {"norm_affine": False, "output_size": 31, "rope_base": 500.0, "num_heads": 1, "cema_ndim": 1},
]


def flat(model: Megalodon) -> MegalodonForCausalLM:
    """The same model for transformers."""
    config = model.config.model_dump()
    built = MegalodonForCausalLM(MegalodonConfig(**config)).to(model.output_weight.dtype)
    built.load_state_dict(model.state_dict())
    return built.eval()


@torch.no_grad()
def run(model: MegalodonForCausalLM, tokens: Tensor, **given: Any) -> Tensor:
    return model(tokens, **given).logits


@needs_golden
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_golden_logits_through_a_loaded_export(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    given = {k: v for k, v in options(name)["model"].items() if k not in ("efficient_attn", "layerwise_ckpt")}
    write_export(tmp_path, ModelConfig(**given), dtype=torch.float32, title=name, about={})
    save_file(dict(read(f"{name}/params")), tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = MegalodonForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    recordings = [n for n in names(f"{name}/forward", "f") if n.endswith("/logits")]
    assert len(recordings) >= 4
    for full in recordings:
        vectors, (precision, length, _) = read(f"{name}/forward"), full.split("/")
        exact = precision == "f64" and dtype == torch.float64
        tolerance = GOLDEN_LOGITS[torch.float64 if exact else torch.float32]
        assert_near(run(model, vectors[f"{length}/tokens"]), vectors[full], tolerance, full)


@pytest.mark.parametrize("changes", OPTIONS)
def test_loss_and_every_gradient_are_ours(changes: dict[str, Any]) -> None:
    ours = tiny_model(**changes)
    theirs, tokens = flat(ours).train(), random_tokens(3, 157, min(53, ours.config.num_outputs))
    labels = tokens.masked_fill(torch.rand(3, 157) < 0.3, -100)
    hidden, _ = ours.hidden(tokens)
    shifted = torch.cat([labels[:, 1:], labels.new_full((3, 1), -100)], dim=1)
    total, count = cross_entropy(hidden, ours.output_weight, shifted)
    (total / count).backward()
    loss = theirs(tokens, labels=labels).loss
    loss.backward()
    assert_near(loss, total / count, 1e-6)  # transformers takes the loss in float32
    expected = dict(ours.named_parameters())
    assert dict(theirs.named_parameters()).keys() == expected.keys()
    for name, parameter in theirs.named_parameters():
        assert_close(parameter.grad, expected[name].grad, 1e-6, name)


def test_gradients_of_the_hidden_values_are_exact() -> None:
    """Up to the loss, which transformers rounds to float32."""
    ours = tiny_model(swiglu=True, rescale_nffn=True)
    theirs, tokens = flat(ours), random_tokens(2, 157)
    weights = torch.randn(2, 157, 24, dtype=torch.float64)
    (ours.hidden(tokens)[0] * weights).sum().backward()
    (theirs.base_model(tokens).last_hidden_state * weights).sum().backward()
    for name, parameter in theirs.named_parameters():
        if not name.startswith("output.output"):
            assert_close(parameter.grad, ours.get_parameter(name).grad, GRADIENTS[torch.float64], name)


@pytest.mark.parametrize("changes", OPTIONS)
def test_the_names_and_shapes_of_the_weights_are_ours(changes: dict[str, Any]) -> None:
    ours = tiny_model(**changes)
    shapes = {name: (x.shape, x.dtype) for name, x in ours.state_dict().items()}
    assert {name: (x.shape, x.dtype) for name, x in flat(ours).state_dict().items()} == shapes


@pytest.mark.parametrize("pieces", [[1] * 157, [9, 1, 10, 11, 0, 126], [64, 64, 29], [3, 154]])
def test_any_split_of_a_text_gives_the_same(pieces: list[int]) -> None:
    model, tokens = flat(tiny_model()), random_tokens(2, 157)
    cache, parts = MegalodonCache(), []
    for piece in tokens.split(pieces, dim=1):
        parts.append(run(model, piece, cache=cache))
    assert cache.get_seq_length() == 157
    assert_near(torch.cat(parts, dim=1), run(model, tokens), LOGITS[torch.float64])
    assert_near(torch.cat(parts, dim=1), tiny_model()(tokens)[0], LOGITS[torch.float64], "ours")


def padded(texts: list[Tensor], width: int, before: list[int]) -> tuple[Tensor, Tensor]:
    """Texts as the rows of a batch, each behind so much padding: ids and mask."""
    ids, mask = torch.full((len(texts), width), 7), torch.zeros(len(texts), width, dtype=torch.int64)
    for row, (text, start) in enumerate(zip(texts, before, strict=True)):
        ids[row, start : start + len(text)], mask[row, start : start + len(text)] = text, 1
    return ids, mask


@pytest.mark.parametrize("pieces", [[140], [1] * 140, [50, 1, 89], [139, 1]])
def test_padding_on_either_side_changes_nothing(pieces: list[int]) -> None:
    model = flat(tiny_model())
    texts = [random_tokens(1, n, seed=n)[0] for n in (140, 133, 64, 9, 1)]
    starts = [0, 7, 31, 131, 139]
    ids, mask = padded(texts, 140, starts)
    cache, parts, end = MegalodonCache(), [], 0
    for piece in ids.split(pieces, dim=1):
        end += piece.shape[1]
        parts.append(run(model, piece, attention_mask=mask[:, :end], cache=cache))
    found = torch.cat(parts, dim=1)
    for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
        alone = run(model, text[None])[0]
        assert_near(found[row, start : start + len(text)], alone, LOGITS[torch.float64], f"row {row}")


def test_texts_of_different_lengths_go_on_from_their_own_ends() -> None:
    """Padding behind the first part of a text, or inside it, leaves no trace in what follows."""
    model, C = flat(tiny_model()), 10
    texts = [random_tokens(1, n + 25, seed=n)[0] for n in (C + 3, 2 * C, 1, 7)]
    ids, mask = padded([text[:-25] for text in texts], 2 * C, [0, 0, 0, 0])
    mask[3], ids[3, torch.tensor([0, 2, 5, 6, 11, 12, 19])] = 0, texts[3][:-25]
    mask[3, torch.tensor([0, 2, 5, 6, 11, 12, 19])] = 1
    cache = MegalodonCache()
    run(model, ids, attention_mask=mask, cache=cache)
    more = torch.stack([text[-25:] for text in texts])
    for row, found in enumerate(run(model, more, cache=cache)):
        assert_near(found, run(model, texts[row][None])[0, -25:], LOGITS[torch.float64], f"row {row}")


def test_right_padding_in_training_leaves_loss_and_gradients() -> None:
    model = flat(tiny_model()).train()
    texts = [random_tokens(1, n, seed=n)[0] for n in (37, 21)]
    ids, mask = padded(texts, 40, [0, 0])
    model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    losses = [model(text[None], labels=text[None]).loss * (len(text) - 1) for text in texts]
    (sum(losses) / (36 + 20)).backward()
    for name, parameter in model.named_parameters():
        assert_close(found[name], parameter.grad, 1e-6, name)


def test_a_cache_can_be_copied_reordered_and_repeated() -> None:
    model, tokens = flat(tiny_model()), random_tokens(3, 26)
    cache = MegalodonCache()
    run(model, tokens[:, :13], cache=cache)
    kept = copy.copy(cache)
    whole = run(model, tokens[:, 13:], cache=cache)
    exact = LOGITS[torch.float64]
    assert torch.equal(run(model, tokens[:, 13:], cache=copy.copy(kept)), whole)
    order = torch.tensor([2, 0, 0])
    swapped = copy.copy(kept)
    swapped.reorder_cache(order)
    assert_near(run(model, tokens[order, 13:], cache=swapped), whole[order], exact)
    twice = copy.copy(kept)
    twice.batch_repeat_interleave(2)
    assert_near(run(model, tokens[:, 13:].repeat_interleave(2, 0), cache=twice)[1::2], whole, exact)
    one = copy.copy(kept)
    one.batch_select_indices(torch.tensor([1]))
    assert_near(run(model, tokens[1:2, 13:], cache=one)[0], whole[1], exact)
    kept.reset()
    assert torch.equal(run(model, tokens, cache=kept), run(model, tokens))


def test_the_state_does_not_grow() -> None:
    model = flat(tiny_model(torch.float32))

    def size(length: int) -> int:
        cache, sizes = MegalodonCache(), []
        run(model, random_tokens(1, length), cache=cache)
        cache.state.map(lambda x: sizes.append(x.untyped_storage().nbytes()) or x)
        return sum(sizes)

    assert size(11) == size(321)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model, tokens = flat(tiny_model(dropout=0.0)).train(), random_tokens(2, 33)
    model(tokens, labels=tokens).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable()
    seen: list[int] = []
    model.layers[0].mega.wv.register_forward_hook(lambda *_: seen.append(1))
    model(tokens, labels=tokens).loss.backward()
    assert len(seen) == 2
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, found[name], 1e-12, name)


def test_decays_of_zero_have_finite_values_and_gradients() -> None:
    """|q| rounds to 0 there: log q and its gradient must not."""
    model, tokens = flat(tiny_model(torch.float32)), random_tokens(1, 130)
    with torch.no_grad():
        model.layers[0].mega.cema.alpha.fill_(50)
        model.layers[0].mega.cema.delta.fill_(50)
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


def test_dropout_acts_in_training_alone() -> None:
    model, tokens = flat(tiny_model(dropout=0.3, hidden_dropout=0.3, attention_dropout=0.3)), random_tokens(1, 20)
    assert torch.equal(run(model, tokens), run(model, tokens))
    assert not torch.equal(run(model.train(), tokens), run(model, tokens))


ISLANDS = ("timenorm", "final_norm", "cema", "rmsnorm", "nffn.norm", "nffn.alpha", "mega.gamma", "mega.beta", "rope")


def test_half_precision_leaves_norms_and_averages_in_float32(tmp_path: Path) -> None:
    ours = tiny_model(torch.float32, swiglu=True, rescale_nffn=True)
    write_export(tmp_path, ours.config, dtype=torch.float32, title="x", about={})
    save_file(ours.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    tokens = random_tokens(2, 37)
    expected = ours(tokens)[0]
    loaded = MegalodonForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    cast = MegalodonForCausalLM.from_pretrained(tmp_path).bfloat16()
    made = MegalodonForCausalLM._from_config(loaded.config, dtype=torch.bfloat16)
    for model in (loaded, cast, made):
        for name, value in model.state_dict().items():
            wide = any(island in name for island in ISLANDS)
            assert value.dtype == (torch.int64 if "count" in name else torch.float32 if wide else torch.bfloat16), name
    for model in (loaded, cast):
        for name, value in model.state_dict().items():
            if value.dtype == torch.float32:
                assert torch.equal(value, ours.state_dict()[name]), name
        assert_near(run(model, tokens), expected, BF16_LOGITS)


def test_autocast_stays_near_float32() -> None:
    model, tokens = flat(tiny_model(torch.float32)), random_tokens(2, 37)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(model, tokens)
    assert_near(found, run(model, tokens), BF16_LOGITS)


def test_a_new_model_starts_as_ours_does() -> None:
    """Constants exactly, random values by their moments: model.md section 4 has the same for both."""
    sizes = {"model_dim": 192, "norm_num_groups": 8, "ffn_hidden_dim": 256, "z_dim": 64, "value_dim": 128}
    config = tiny_config(**sizes, cema_ndim=8, vocab_size=500, swiglu=True, rescale_nffn=True)
    ours = Megalodon(config)
    theirs = MegalodonForCausalLM(MegalodonConfig(**config.model_dump()))
    for name, expected in ours.state_dict().items():
        found = theirs.state_dict()[name]
        assert torch.isfinite(found).all(), name
        if "theta" in name:
            assert_close(found.flatten().sort().values, expected.flatten().sort().values, 1e-6, name)
        elif expected.is_floating_point() and expected.numel() > 100 and expected.std() > 0:
            spread = expected.std().item()
            assert abs(found.mean() - expected.mean()) < 6 * spread * math.sqrt(2 / expected.numel()), name
            assert abs(found.std() / spread - 1) < 6 / math.sqrt(expected.numel()), name
            assert found.abs().max() < 1.5 * expected.abs().max() + 1e-9, name
        else:
            assert torch.equal(found, expected), name
    assert torch.isnan(
        MegalodonForCausalLM(MegalodonConfig(**tiny_config(init_mode="none").model_dump())).layers[0].mega.wv.weight
    ).all()


def test_what_a_file_lacks_is_filled_in(tmp_path: Path) -> None:
    """Buffers may be absent; a tied output matrix may stand in a file once, as transformers writes it."""
    ours = tiny_model(torch.float32, share_emb=True)
    tensors = {
        n: x
        for n, x in ours.state_dict().items()
        if "prior" not in n and n not in ("rope.freqs", "output.output.weight")
    }
    write_export(tmp_path, ours.config, dtype=torch.float32, title="x", about={})
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = MegalodonForCausalLM.from_pretrained(tmp_path)
    assert model.output.output.weight is model.embed.weight
    for name, value in ours.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("tied", [False, True])
def test_saving_and_loading_keeps_every_bit(tied: bool, tmp_path: Path) -> None:
    model = flat(tiny_model(torch.float32, share_emb=tied))
    model.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    assert (tmp_path / "a" / "model.safetensors.index.json").is_file()
    again = MegalodonForCausalLM.from_pretrained(tmp_path / "a")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key in ModelConfig.model_fields}
    assert ModelConfig(**kept) == tiny_config(share_emb=tied)


def test_a_body_without_head(tmp_path: Path) -> None:
    ours = tiny_model(torch.float32)
    write_export(tmp_path, ours.config, dtype=torch.float32, title="x", about={})
    save_file(ours.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    body, tokens = MegalodonModel.from_pretrained(tmp_path), random_tokens(2, 37)
    assert "output.output.weight" not in body.state_dict()
    with torch.no_grad():
        found = body(tokens, output_hidden_states=True)
    assert_close(found.last_hidden_state, ours.hidden(tokens)[0], 2e-5)
    assert len(found.hidden_states) == 3
    assert torch.equal(found.hidden_states[-1], found.last_hidden_state)
    assert_close(found.hidden_states[0], ours.embed(tokens), 1e-6)


def test_beams_and_pieces_of_a_prompt_give_what_no_cache_gives() -> None:
    model = flat(tiny_model(torch.float32))
    texts = [random_tokens(1, n, seed=n)[0] for n in (13, 4)]
    ids, mask = padded(texts, 13, [0, 9])
    given = {"attention_mask": mask, "max_new_tokens": 25, "do_sample": False, "pad_token_id": 0}
    for kind in ({}, {"num_beams": 3}):
        expected = model.generate(ids, **given, **kind, use_cache=False)
        assert torch.equal(model.generate(ids, **given, **kind), expected)
    pieces = model.generate(ids, **given, prefill_chunk_size=4)
    assert torch.equal(pieces, model.generate(ids, **given))
    one = model.generate(ids[1:, 9:], **(given | {"attention_mask": None}))
    assert torch.equal(one[0, 4:], pieces[1, 13:])


def test_a_conversation_goes_on_from_its_cache() -> None:
    model, tokens = flat(tiny_model(torch.float32)), random_tokens(1, 40)
    given = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    cache = MegalodonCache()
    first = model.generate(tokens[:, :17], cache=cache, **given)
    prompt = torch.cat([first, tokens[:, 17:]], dim=1)
    assert torch.equal(model.generate(prompt, cache=cache, **given), model.generate(prompt, **given))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_is_not_offered_is_refused_in_one_line() -> None:
    model, tokens = flat(tiny_model(torch.float32)), random_tokens(1, 12)
    packed = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])
    used = MegalodonCache()
    run(model, tokens, cache=used)
    refused = [
        ("packed texts", lambda: model(tokens, position_ids=packed)),
        ("packed texts", lambda: model(tokens, cu_seq_lens_q=torch.tensor([0, 5, 12]))),
        ("cache is a DynamicCache", lambda: model(tokens, cache=transformers.DynamicCache())),
        ("output_attentions", lambda: model(tokens, output_attentions=True)),
        ("attention_mask is (1, 5)", lambda: model(tokens, attention_mask=tokens[:, :5])),
        ("expected either input_ids or inputs_embeds", lambda: model()),
        ("the cache has 1 rows, the input 2", lambda: model(random_tokens(2, 3), cache=used)),
        ("cannot go back", lambda: used.crop(1)),
        ("cannot assist", lambda: used.activate_past_recording()),
        (
            "cache_implementation is static",
            lambda: model.generate(tokens, max_new_tokens=2, cache_implementation="static"),
        ),
        ("not supported with stateful", lambda: model.generate(tokens, max_new_tokens=2, prompt_lookup_num_tokens=2)),
        ("is not a multiple of", lambda: MegalodonConfig(model_dim=100, norm_num_groups=32)),
        ("init_mode is best", lambda: MegalodonConfig(init_mode="best")),
    ]
    for message, call in refused:
        with pytest.raises(ValueError) as raised:
            call()
        assert message in str(raised.value) and "\n" not in str(raised.value)
    run(model, tokens, position_ids=torch.arange(12)[None])  # a text's own positions say nothing new


def test_the_defaults_of_both_configurations_are_the_same() -> None:
    """transformers leaves nothing out when it saves, but a file by hand may."""
    ours = ModelConfig(vocab_size=1).model_dump()
    theirs = MegalodonConfig(vocab_size=1)
    assert {name: getattr(theirs, name) for name in ours} == ours
    assert theirs.hidden_size == ours["model_dim"] and theirs.tie_word_embeddings is False


def test_an_export_in_bfloat16_loads_as_it_is_stored(tmp_path: Path) -> None:
    ours = tiny_model(torch.float32).bfloat16()
    write_export(tmp_path, ours.config, dtype=torch.bfloat16, title="x", about={})
    save_file(ours.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = MegalodonForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    for name, value in load_file(tmp_path / "model.safetensors").items():
        assert model.state_dict()[name].dtype == value.dtype and torch.equal(model.state_dict()[name], value), name
