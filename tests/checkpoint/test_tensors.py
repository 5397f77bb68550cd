"""A model directory gives back the model it was made from, or says in one line what is wrong with it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import random_tokens, tiny_config, tiny_model
from safetensors.torch import load_file, save_file

from megalodon.checkpoint.store import describe_file
from megalodon.checkpoint.tensors import finish_directory, load_model, read_model_info, save_model
from megalodon.checkpoint.weight_files import tensors_in_memory, write_weights
from megalodon.errors import CheckpointError, EnvironmentFault
from megalodon.model.megalodon import ModelConfig


def save_tokenizer(directory: Path) -> None:
    (directory / "tokens.txt").write_text("a b c")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    save_model(tiny_model(torch.float32), directory, save_tokenizer, {"tokenizer_sha256": "123", "step": 7})
    return directory


@pytest.mark.parametrize("changes", [{}, {"share_emb": True, "scale_emb": True}, {"swiglu": True, "output_size": 61}])
def test_a_saved_model_computes_the_same_bits(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = tiny_model(torch.float32, **changes)
    save_model(model, tmp_path / "model", None, {})
    again = load_model(str(tmp_path / "model"))
    assert again.config == model.config
    assert model.state_dict().keys() == again.state_dict().keys()
    tokens = random_tokens(2, 37)
    assert torch.equal(model(tokens)[0], again(tokens)[0])
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_the_directory_holds_what_the_layout_says(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == [
        "config.json",
        "megalodon.json",
        "model.safetensors",
        "tokens.txt",
    ]
    config = json.loads((saved / "config.json").read_text())
    assert config.pop("model_type") == "megalodon"
    assert ModelConfig(**config) == tiny_config()
    info = read_model_info(saved)
    assert (info["format"], info["tokenizer_sha256"], info["step"]) == ("megalodon/model/1", "123", 7)
    assert info["weights_sha256"] == describe_file(saved / "model.safetensors")["sha256"]


def test_a_tied_output_matrix_stands_in_the_file_twice(tmp_path: Path) -> None:
    save_model(tiny_model(torch.float32, share_emb=True), tmp_path / "model", None, {})
    tensors = load_file(tmp_path / "model/model.safetensors")
    assert torch.equal(tensors["output.output.weight"], tensors["embed.weight"])
    model = load_model(tmp_path / "model")
    assert model.output_weight is model.get_parameter("embed.weight")


def test_an_existing_directory_is_replaced_only_by_a_whole_one(saved: Path) -> None:
    def fail(directory: Path) -> None:
        (directory / "half").touch()
        raise OSError("no")

    before = read_model_info(saved)
    with pytest.raises(EnvironmentFault, match="could not be written: no"):
        save_model(tiny_model(torch.float32, seed=3), saved, fail, {})
    assert read_model_info(saved) == before
    save_model(tiny_model(torch.float32, seed=3), saved, None, {})
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "megalodon.json", "model.safetensors"]
    assert [path.name for path in saved.parent.iterdir()] == ["model"]
    load_model(saved)


def rewrite(saved: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(saved / "model.safetensors")
    change(tensors)
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})


def edit(saved: Path, file: str, **values: Any) -> None:
    found = json.loads((saved / file).read_text())
    (saved / file).write_text(json.dumps({**found, **values}))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


W = "layers.0.mega.wv.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), r"config\.json is missing"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), r"model\.safetensors is missing"),
    "no info": (lambda d: (d / "megalodon.json").unlink(), r"megalodon\.json is missing"),
    "no tokenizer": (lambda d: (d / "tokens.txt").unlink(), r"tokens\.txt is missing"),
    "truncated": (
        lambda d: os.truncate(d / "model.safetensors", 5000),
        r"model\.safetensors has 5,000 bytes; [\d,]+ were written",
    ),
    "empty": (lambda d: os.truncate(d / "model.safetensors", 0), r"model\.safetensors has 0 bytes"),
    "flipped": (lambda d: flip(d / "model.safetensors"), r"model\.safetensors has sha256 \w+…; \w+… was written"),
    "other tokenizer": (lambda d: (d / "tokens.txt").write_text("x y z"), r"tokens\.txt has sha256"),
    "missing tensor": (lambda d: rewrite(d, lambda t: t.pop(W)), rf"missing {W}"),
    "unknown tensor": (lambda d: rewrite(d, lambda t: t.update(extra=t[W].clone())), r"unexpected extra"),
    "misshapen tensor": (
        lambda d: rewrite(d, lambda t: t.update({W: t[W].T.contiguous()})),
        rf"{W} is \(24, 34\), expected \(34, 24\)",
    ),
    "half precision": (
        lambda d: rewrite(d, lambda t: t.update({W: t[W].half()})),
        r"model\.safetensors has [\d,]+ bytes; [\d,]+ were written",
    ),
    "unknown key": (lambda d: edit(d, "config.json", modle_dim=3), r"unknown keys: modle_dim; known are num_layers"),
    "other type": (lambda d: edit(d, "config.json", model_type="llama"), r'model_type "llama"; expected "megalodon"'),
    "impossible": (lambda d: edit(d, "config.json", num_heads=5), r"z_dim 12 is not a multiple of num_heads 5"),
    "silent change": (lambda d: edit(d, "config.json", chunk_size=11), r"config\.json has (sha256|[\d,]+ bytes)"),
    "other format": (
        lambda d: edit(d, "megalodon.json", format="megalodon/model/2"),
        r"'megalodon/model/2'; expected 'megalodon/model/1'",
    ),
    "no JSON": (lambda d: (d / "config.json").write_text("{"), r"config\.json is not JSON"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_directory_is_refused_in_one_line(saved: Path, damage: str) -> None:
    harm, said = DAMAGE[damage]
    harm(saved)
    with pytest.raises(CheckpointError, match=said) as caught:
        load_model(saved)
    assert "\n" not in str(caught.value)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    directory = tmp_path / "shards"
    state = {name: tensor.detach() for name, tensor in tiny_model(torch.float32).state_dict().items()}
    directory.mkdir()
    config = {"model_type": "megalodon", **tiny_config().model_dump(mode="json")}
    (directory / "config.json").write_text(json.dumps(config))
    finish_directory(directory, write_weights(directory, tensors_in_memory(state), 10_000), {"step": 7})
    return directory


SECOND = "model-00002-of-00007.safetensors"
SHARD_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda d: (d / SECOND).unlink(), rf"{SECOND} is missing"),
    "cut off": (lambda d: os.truncate(d / SECOND, 900), rf"{SECOND} has 900 bytes; [\d,]+ were written"),
    "flipped": (lambda d: flip(d / SECOND), rf"{SECOND} has sha256 \w+…; \w+… was written"),
    "index changed": (
        lambda d: edit(d, "model.safetensors.index.json", metadata={"total_size": 1}),
        r"index\.json has [\d,]+ bytes",
    ),
    "no index": (lambda d: (d / "model.safetensors.index.json").unlink(), r"index\.json is missing"),
    "not listed": (lambda d: edit(d, "megalodon.json", files={}), r"megalodon\.json does not list model-00001-of"),
    "traversal": (
        lambda d: edit(d, "model.safetensors.index.json", weight_map={"embed.weight": "../saved.safetensors"}),
        r"index\.json has [\d,]+ bytes; [\d,]+ were written",
    ),
}


def test_a_sharded_directory_gives_the_same_model(sharded: Path) -> None:
    tokens = random_tokens(1, 23)
    assert torch.equal(load_model(sharded)(tokens)[0], tiny_model(torch.float32)(tokens)[0])
    shards = sorted(path.name for path in sharded.glob("model-*"))
    assert len(shards) == 7 and shards[1] == SECOND
    assert all(path.stat().st_size <= 10_000 + 2_000 for path in sharded.glob("model-*"))
    files = read_model_info(sharded)["files"]
    assert {*shards, "model.safetensors.index.json"} <= files.keys()
    assert files[SECOND] == describe_file(sharded / SECOND), "hashed while it was written"


@pytest.mark.parametrize("damage", SHARD_DAMAGE)
def test_a_damaged_shard_is_refused_in_one_line(sharded: Path, damage: str) -> None:
    harm, said = SHARD_DAMAGE[damage]
    harm(sharded)
    with pytest.raises(CheckpointError, match=said) as caught:
        load_model(sharded)
    assert "\n" not in str(caught.value)


def test_half_precision_is_widened(sharded: Path, tmp_path: Path) -> None:
    narrow = {name: tensor.detach() for name, tensor in tiny_model(torch.float32).bfloat16().state_dict().items()}
    place = tmp_path / "narrow"
    place.mkdir()
    (place / "config.json").write_bytes((sharded / "config.json").read_bytes())
    finish_directory(place, write_weights(place, tensors_in_memory(narrow)), {})
    found = load_model(place)
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    assert all(torch.equal(t, narrow[n].to(t.dtype)) for n, t in found.state_dict().items())


def test_what_is_no_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere does not exist; expected a model directory"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file is a file; expected a model directory"):
        load_model(tmp_path / "file")


def test_a_tied_matrix_that_differs_is_refused(tmp_path: Path) -> None:
    saved = tmp_path / "model"
    save_model(tiny_model(torch.float32, share_emb=True), saved, None, {})
    rewrite(saved, lambda tensors: tensors["output.output.weight"].add_(1))
    files = {path.name: describe_file(path) for path in saved.iterdir() if path.name != "megalodon.json"}
    edit(saved, "megalodon.json", files=files)
    with pytest.raises(
        CheckpointError, match=r"output\.output\.weight differs from embed\.weight, but share_emb ties them"
    ):
        load_model(saved)
