"""Quantised models are small, near the original, and read and write; they are refused everywhere else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import info, logits, run, save, stored
from factories import random_tokens, tiny_model
from torch.nn.functional import linear

from megalodon.checkpoint.tensors import load_model, read_quantisation, save_model
from megalodon.errors import CheckpointError, InputError
from megalodon.inference.sampling import SamplingConfig
from megalodon.inference.session import Session, generate, load_writer
from megalodon.interop import quantise as quantising
from megalodon.model.adapters import LoraConfig
from megalodon.model.decoder import Decoder
from megalodon.model.layers import QuantisedLinear, dequantised, unpacked
from megalodon.model.quantised import Quantisation, packed, quantised_matrices

KINDS = {"int8": Quantisation(kind="int8"), "int4": Quantisation(kind="int4", group_size=8)}


def test_two_int4_share_a_byte_without_loss() -> None:
    whole = torch.arange(-8, 8, dtype=torch.int8).repeat(5)[:77].view(7, 11)
    held = packed(whole)
    assert held.shape == (7, 6) and held.dtype == torch.uint8
    assert torch.equal(unpacked(held)[:, :11], whole)


@pytest.mark.parametrize(("kind", "bound"), [("int8", 1 / 250), ("int4", 1 / 13)])
def test_a_weight_moves_by_half_a_step_at_most(kind: Any, bound: float) -> None:
    """A step of a symmetric scale is the largest value of its group over 127 or 7.5; HQQ may clip what is largest."""
    matrix = torch.randn(37, 48, generator=torch.Generator().manual_seed(0))
    integers, scale = quantising.quantise(matrix, kind, KINDS[kind])
    back = dequantised(integers, scale, 48)
    groups = scale.shape[1]
    assert groups == (1 if kind == "int8" else 6)
    error = (back - matrix).unflatten(1, (groups, -1))
    largest = matrix.unflatten(1, (groups, -1)).abs().amax(-1, keepdim=True)
    if kind == "int8":
        assert ((error.abs() / largest) <= bound).all()
    else:
        assert (error.square().mean().sqrt() / matrix.std()) < bound


@pytest.mark.parametrize("changes", [{}, {"share_emb": True, "swiglu": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_directory_reads_and_writes(tmp_path: Path, kind: Any, changes: dict[str, Any]) -> None:
    model = save(tmp_path / "m", **changes)
    done = run(tmp_path / "m", tmp_path / "q", quantisation=KINDS[kind])
    assert done.parity is not None and done.parity.largest > 0, "the cost is printed, it is no failure"
    assert info(tmp_path / "q")["converted"]["parity"] == done.parity.row()
    found = load_model(tmp_path / "q").eval()
    assert read_quantisation(tmp_path / "q") == KINDS[kind]
    assert found.num_parameters() == model.num_parameters() == found.config.num_parameters()
    maps = [m for m in found.layers.modules() if isinstance(m, QuantisedLinear)]
    assert len(maps) == 2 * (8 if changes else 7)
    assert {m.integers.dtype for m in maps} == {torch.int8 if kind == "int8" else torch.uint8}
    assert all(p.dtype == torch.float32 for p in found.parameters())
    kept = {n: t for n, t in model.state_dict().items() if n not in quantised_matrices(model.config)}
    for name, tensor in found.state_dict().items():
        if name in kept and not name.endswith("output.weight"):
            assert torch.equal(tensor, kept[name]), f"{name} is not quantised"
    tokens = random_tokens(1, 37, vocab_size=264)
    whole = logits(tmp_path / "q", tokens)
    original = model(tokens)[0]
    assert (whole - original).abs().max() < {"int8": 0.1, "int4": 1.0}[kind] * original.abs().max()
    state, steps = found.empty_state(1), []
    decoder = Decoder(found, state)
    for token in tokens[0]:
        steps.append(decoder.step(token[None]))
    torch.testing.assert_close(torch.cat(steps), whole[0], rtol=1e-4, atol=1e-4)
    session = Session(found)
    session.feed(tokens[0].tolist())
    assert len(list(generate(session, [], 5, SamplingConfig(temperature=0)))) == 5
    assert load_writer(tmp_path / "q").tokenizer.vocab_size == 264


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_map_is_the_product_with_its_matrix(kind: Any) -> None:
    matrix, bias = torch.randn(13, 24), torch.randn(13)
    module = QuantisedLinear(*quantising.quantise(matrix, kind, KINDS[kind]), bias, 24)
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(module(x), linear(x, module.weight, bias))
    narrow = module.bfloat16()
    assert narrow.scale.dtype == torch.float32, "scales never leave float32"
    assert narrow(x.bfloat16()).dtype == torch.bfloat16


def test_the_file_of_int8_is_half_that_of_bf16_and_int4_less(tmp_path: Path) -> None:
    """Of a model whose matrices outweigh the rest, as in any but the smallest."""
    save(tmp_path / "m", model_dim=256, value_dim=512, z_dim=64, ffn_hidden_dim=512, num_layers=1)
    sizes = {}
    for name, changes in {
        "bf16": {"dtype": "bf16"},
        **{k: {"quantisation": Quantisation(kind=k)} for k in ("int8", "int4")},
    }.items():
        sizes[name] = run(tmp_path / "m", tmp_path / name, verify=False, **changes).num_bytes
    assert sizes["int8"] < 0.54 * sizes["bf16"]
    assert sizes["int4"] < 0.42 * sizes["bf16"]


def test_a_quantised_model_is_not_trained_merged_or_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megalodon.checkpoint import adapter_files
    from megalodon.model.adapters import inject
    from megalodon_cli import checkpoints, profile_request

    save(tmp_path / "m")
    run(tmp_path / "m", tmp_path / "q", quantisation=KINDS["int8"], verify=False)
    said = r"is quantised and cannot be {}; expected the model it was made from"
    with pytest.raises(InputError, match=said.format("exported again")):
        run(tmp_path / "q", tmp_path / "out")
    with pytest.raises(InputError, match=said.format("exported again")):
        save_model(load_model(tmp_path / "q"), tmp_path / "out", None, {})
    with pytest.raises(InputError, match=said.format("profiled")):
        profile_request._target(str(tmp_path / "q"), "cpu", "auto")
    with pytest.raises(InputError, match=said.format("trained")):
        checkpoints.weights(str(tmp_path / "q"))
    adapted = load_model(tmp_path / "m")
    inject(adapted, LoraConfig(r=2), seed=0)
    adapter_files.save_adapter(adapted, tmp_path / "a", tmp_path / "m", None, {})
    monkeypatch.setattr(adapter_files, "base_of", lambda *_: tmp_path / "q")
    with pytest.raises(InputError, match=said.format("given an adapter")):
        adapter_files.load_adapter(tmp_path / "a")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"to": "hf"}, "--quantize writes native model directories; --to hf cannot hold one"),
        ({"to": "ref"}, "--quantize writes native model directories; --to ref cannot hold one"),
        ({"dtype": "bf16"}, "--quantize and --dtype bf16 exclude each other"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    save(tmp_path / "m")
    with pytest.raises(InputError, match=said):
        run(tmp_path / "m", tmp_path / "q", quantisation=KINDS["int8"], **changes)


def rewrite(directory: Path, how: Any) -> None:
    from safetensors.torch import save_file

    tensors = stored(directory)
    how(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


W = "layers.0.mega.wv.weight"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda t: t.pop(f"{W}.int8"), rf"missing {W}\.int8"),
        (lambda t: t.pop(f"{W}.scale"), rf"missing {W}\.scale"),
        (lambda t: t.update({f"{W}.scale": torch.ones(34, 2)}), rf"{W}\.scale is torch\.float32 \(34, 2\), expected"),
        (
            lambda t: t.update({f"{W}.int8": t[f"{W}.int8"].float()}),
            rf"{W}\.int8 is torch\.float32 \(34, 24\), expected",
        ),
        (lambda t: t.update({f"{W}.int4": t[f"{W}.int8"].clone()}), rf"unexpected {W}\.int4"),
        (lambda t: t.pop("layers.0.mega.wv.bias"), r"missing layers\.0\.mega\.wv\.bias"),
        (lambda t: t.update({"layers.0.nffn.fc1.bias": torch.ones(29)}), r"unexpected layers\.0\.nffn\.fc1\.bias"),
    ],
)
def test_integers_that_do_not_fit_are_named(tmp_path: Path, how: Any, said: str) -> None:
    save(tmp_path / "m")
    run(tmp_path / "m", tmp_path / "q", quantisation=KINDS["int8"], verify=False)
    rewrite(tmp_path / "q", how)
    with pytest.raises(CheckpointError, match=said):
        load_model(tmp_path / "q")


def test_without_the_extra_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from megalodon.errors import EnvironmentFault

    save(tmp_path / "m")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        EnvironmentFault, match=r"--quantize needs the extra \[quant\]: pip install 'megalodon-lm\[quant"
    ):
        run(tmp_path / "m", tmp_path / "q", quantisation=KINDS["int8"])


def test_a_model_that_was_never_quantised_says_nothing_of_it() -> None:
    from megalodon.model.quantised import num_quantised

    assert num_quantised(tiny_model()) == 0
