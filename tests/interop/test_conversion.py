"""A model survives every way from one form into another, bit by bit, or nothing is written."""

import json
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from conversions import info, logits, run, same, save, save_golden, save_released, stored
from factories import random_tokens
from golden_files import has, needs_golden, options, read
from safetensors.torch import save_file
from tolerances import GOLDEN_LOGITS, assert_near
from torch import Tensor

from megalodon.checkpoint import store
from megalodon.checkpoint.tensor_files import form_of
from megalodon.checkpoint.tensors import load_model
from megalodon.errors import CheckFailed, CheckpointError, EnvironmentFault, InputError
from megalodon.interop import conversion, official_files, parity
from megalodon.interop.official_files import split_axis
from megalodon.interop.pickled import PickledFiles

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"share_emb": True, "scale_emb": True, "swiglu": True},
    "rescaled": {"rescale_nffn": True, "norm_affine": False, "output_size": 301},
}


@pytest.mark.parametrize("to", ["native", "ref", "hf"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("no_transformers", "read_here")
def test_there_and_back_is_the_same_bit_by_bit(tmp_path: Path, shape: str, to: Any) -> None:
    model = save(tmp_path / "start", **SHAPES[shape])
    done = run(tmp_path / "start", tmp_path / "there", to=to, shard_bytes=20_000)
    back = run(tmp_path / "there", tmp_path / "back")
    for found in (done, back):
        assert found.parity is not None and found.parity.largest == 0 and found.parity.agreement == 1
        assert found.parity.first_layer is None and found.parity.tokens == 35
    expected = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    assert same(stored(tmp_path / "back"), expected)
    assert load_model(tmp_path / "back").config == model.config
    start, end = (info(tmp_path / place) for place in ("start", "back"))
    kept = {key for key in start if key not in ("files", "weights_sha256")}
    assert {key: end[key] for key in kept} == {key: start[key] for key in kept}
    assert end["weights_sha256"] == start["weights_sha256"], "one file of the same tensors is the same file"
    tokenizer = "byte_tokenizer.json"
    assert (tmp_path / "back" / tokenizer).read_bytes() == (tmp_path / "start" / tokenizer).read_bytes()


class ReadHere(PickledFiles):
    """Reads the files of these tests in this process: a process for each takes a second."""

    def __enter__(self) -> Self:
        self.parts = [torch.load(path, weights_only=True) for path in self._paths]
        self.forms = [{name: form_of(tensor) for name, tensor in part.items()} for part in self.parts]
        return self

    def read(self, file: int, name: str) -> Tensor:
        return self.parts[file][name].clone()

    def close(self) -> None:
        pass


@pytest.fixture
def read_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no process of its own read `.pth` files."""
    monkeypatch.setattr(official_files, "PickledFiles", ReadHere)


@pytest.fixture
def no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the check by transformers, which takes seconds."""
    monkeypatch.setattr(conversion, "_check_transformers", lambda *_: "left out")


@needs_golden
@pytest.mark.slow
@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_transformers_answers_as_the_golden_models_do(tmp_path: Path, name: str) -> None:
    save_golden(name, tmp_path / "native")
    for dtype in ("keep", "bf16"):  # AutoModelForCausalLM answers within 2e-5 and 0.1, or this raises
        done = run(tmp_path / "native", tmp_path / dtype, to="hf", dtype=dtype)
        assert done.remarks[-1].startswith("AutoModelForCausalLM: largest logit difference")


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["plain", "tied"])
def test_what_transformers_saves_again_is_read_again(tmp_path: Path, shape: str) -> None:
    save(tmp_path / "m", **SHAPES[shape])
    run(tmp_path / "m", tmp_path / "hf", to="hf")
    program = (
        "import sys; from transformers import AutoModelForCausalLM as M\n"
        "M.from_pretrained(sys.argv[1], trust_remote_code=True).save_pretrained(sys.argv[2], max_shard_size='40KB')"
    )
    environment = {"PATH": "", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", program, str(tmp_path / "hf"), str(tmp_path / "again")]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    run(tmp_path / "again", tmp_path / "back")
    assert same(stored(tmp_path / "back"), stored(tmp_path / "m"))


@needs_golden
@pytest.mark.parametrize("name", ["A", "B", "C"])
@pytest.mark.usefixtures("no_transformers")
def test_golden_logits_through_every_path(tmp_path: Path, name: str) -> None:
    expected = save_golden(name, tmp_path / "native")
    vectors = read(f"{name}/forward")
    save_released(tmp_path / "released", options(name)["model"], read(f"{name}/params"), 1)
    run(tmp_path / "released", tmp_path / "from released")
    run(tmp_path / "native", tmp_path / "ref", to="ref")
    run(tmp_path / "ref", tmp_path / "from ref", shard_bytes=100_000)
    run(tmp_path / "native", tmp_path / "hf", to="hf")
    run(tmp_path / "hf", tmp_path / "from hf")
    for place in ("from released", "from ref", "hf", "from hf"):
        assert same(stored(tmp_path / place), expected), place
        for length in ("short", "multi"):
            found = logits(tmp_path / place, vectors[f"{length}/tokens"])
            recorded = vectors.get(f"f64/{length}/logits", vectors[f"f32/{length}/logits"])
            assert_near(found, recorded, GOLDEN_LOGITS[torch.float32], f"{place} {length}")


@needs_golden
@pytest.mark.parametrize(("name", "ranks"), [("A", 2), ("C", 2), ("C", 4)])
def test_the_files_of_tensor_parallel_ranks_join_exactly(tmp_path: Path, name: str, ranks: int) -> None:
    whole = read(f"{name}/params")
    save_released(tmp_path / "ranks", options(name)["model"], whole, ranks)
    parts = torch.load(tmp_path / "ranks/consolidated.01.pth", weights_only=True)
    assert parts["layers.0.mega.gamma"].shape[1] * ranks == whole["layers.0.mega.gamma"].shape[1]
    run(tmp_path / "ranks", tmp_path / "joined")
    assert same(stored(tmp_path / "joined"), save_golden(name, tmp_path / "native"))


def test_the_table_of_shared_axes_names_every_tensor_of_a_model(tmp_path: Path) -> None:
    model = save(tmp_path / "m", swiglu=True, rescale_nffn=True)
    first, second, whole = set(), set(), set()
    for name in model.state_dict():
        {0: first, 1: second, None: whole}[split_axis(name)].add(name.removeprefix("layers.0."))
    assert {n for n in whole if not n.startswith("layers")} == {
        *("mega.timenorm.prior_count", "mega.rmsnorm.weight", "nffn.norm.weight", "nffn.norm.bias", "nffn.alpha"),
        *("output.final_norm.prior_count", "rope.freqs"),
    }
    assert {n for n in second if not n.startswith("layers")} == {
        *("embed.weight", "output.output.weight", "mega.wh2.weight", "nffn.fc2.weight", "mega.gamma", "mega.beta"),
    }
    assert {"mega.cema.gamma", "mega.wh1.bias", "mega.timenorm.prior_mean", "nffn.fc3.weight"} <= first


def released(tmp_path: Path, ranks: int = 2, **changes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    model = save(tmp_path / "m", **{"ffn_hidden_dim": 30, **changes})
    config = model.config.model_dump() | {"efficient_attn": "fused", "layerwise_ckpt": True}
    return config, {name: tensor.detach() for name, tensor in model.state_dict().items()}


RANKS: dict[str, tuple[Any, str]] = {
    "a rank is missing": (lambda d: (d / "consolidated.01.pth").unlink(), r"consolidated\.01\.pth is missing"),
    "one too many": (
        lambda d: shutil.copy(d / "consolidated.00.pth", d / "consolidated.02.pth"),
        r"holds consolidated\.02\.pth, but consolidate_config\.json says model_parallel_size 2",
    ),
    "copies differ": (
        lambda d: change(d, "nffn.norm.bias", lambda t: t + 1),
        r"layers\.0\.nffn\.norm\.bias is not the same in all ranks, but each has all of it",
    ),
    "one has less": (
        lambda d: change(d, "mega.wv.bias", lambda t: t[1:].clone()),
        r"wv\.bias is float32 \(17,\) in rank 0, float32 \(16,\) in consolidated\.01\.pth",
    ),
    "other dtype": (
        lambda d: change(d, "mega.wv.bias", lambda t: t.half()),
        r"float16 \(17,\) in consolidated\.01\.pth",
    ),
    "one lacks a tensor": (lambda d: change(d, "mega.wv.bias", None), r"wv\.bias is missing in consolidated\.01\.pth"),
    "no size": (
        lambda d: (d / "consolidate_config.json").write_text('{"dtype": "fp32"}'),
        r"model_parallel_size is None; expected a number from 1 on",
    ),
    "no about": (lambda d: (d / "consolidate_config.json").unlink(), r"consolidate_config\.json is missing"),
    "unknown option": (
        lambda d: (d / "config.json").write_text('{"model": {"model_dimm": 3, "vocab_size": 9}}'),
        r"config\.json: model: model_dimm: Extra inputs are not permitted",
    ),
    "no options": (lambda d: (d / "config.json").write_text("{}"), r"config\.json has no section model"),
}


def change(directory: Path, name: str, how: Any) -> None:
    """Change a tensor of the first layer in the file of the second rank."""
    path = directory / "consolidated.01.pth"
    tensors = torch.load(path, weights_only=True)
    found = tensors.pop(f"layers.0.{name}")
    if how is not None:
        tensors[f"layers.0.{name}"] = how(found)
    torch.save(tensors, path)


@pytest.mark.parametrize("damage", RANKS)
@pytest.mark.usefixtures("read_here")
def test_files_of_ranks_that_do_not_fit_together_are_refused(tmp_path: Path, damage: str) -> None:
    config, tensors = released(tmp_path)
    save_released(tmp_path / "r", config, tensors, 2)
    harm, said = RANKS[damage]
    harm(tmp_path / "r")
    refused(tmp_path / "r", tmp_path / "out", said)


def test_ranks_that_do_not_divide_the_heads_are_refused(tmp_path: Path) -> None:
    config, tensors = released(tmp_path, value_dim=36)
    save_released(tmp_path / "r", config, tensors, 2)
    about = json.loads((tmp_path / "r/config.json").read_text())
    about["model"]["num_heads"] = 3
    (tmp_path / "r/config.json").write_text(json.dumps(about))
    refused(tmp_path / "r", tmp_path / "out", r"2 ranks do not divide num_heads 3")


def refused(source: Path, target: Path, said: str, kind: type[Exception] = CheckpointError, **options: Any) -> None:
    """A conversion is refused in one line and leaves nothing."""
    before = sorted(path.name for path in target.parent.iterdir())
    with pytest.raises(kind, match=said) as caught:
        run(source, target, **options)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in target.parent.iterdir()) == before


def test_a_vocabulary_left_to_the_tokenizer_is_that_of_the_embedding(tmp_path: Path) -> None:
    config, tensors = released(tmp_path)
    save_released(tmp_path / "r", {**config, "vocab_size": -1, "init_mode": "none"}, tensors, 1)
    run(tmp_path / "r", tmp_path / "out")
    assert load_model(tmp_path / "out").config.vocab_size == config["vocab_size"]


def test_a_bf16_release_is_widened_where_it_matters_and_its_frequencies_are_formed_anew(tmp_path: Path) -> None:
    config, tensors = released(tmp_path)
    half = {n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors.items()}
    save_released(tmp_path / "r", config, half, 1)
    run(tmp_path / "r", tmp_path / "out")
    found = stored(tmp_path / "out")
    assert found["layers.0.mega.wv.weight"].dtype == found["embed.weight"].dtype == torch.bfloat16
    for name in ("layers.0.mega.cema.alpha", "layers.0.mega.gamma", "layers.1.nffn.norm.weight"):
        assert found[name].dtype == torch.float32 and torch.equal(found[name], half[name].float())
    assert torch.equal(found["rope.freqs"], tensors["rope.freqs"])


def test_a_cast_says_what_it_cost_and_keeps_norms_and_averages_exact(tmp_path: Path) -> None:
    model = save(tmp_path / "m")
    done = run(tmp_path / "m", tmp_path / "bf16", dtype="bf16")
    assert done.parity is not None and 0 < done.parity.largest < 0.1 * max(1, done.parity.scale / 10)
    assert done.parity.first_layer == "embed"
    assert info(tmp_path / "bf16")["converted"]["parity"] == done.parity.row()
    narrow = {n: t for n, t in model.bfloat16().state_dict().items()}
    assert same(stored(tmp_path / "bf16"), narrow), "the same tensors are narrow as in model.bfloat16()"
    again = load_model(tmp_path / "bf16")
    assert all(p.dtype == torch.float32 for p in again.parameters())
    wide = run(tmp_path / "bf16", tmp_path / "fp32", dtype="fp32")
    assert wide.parity is not None and wide.parity.largest == 0
    tokens = random_tokens(1, 37)
    assert torch.equal(logits(tmp_path / "fp32", tokens), logits(tmp_path / "bf16", tokens))
    kept = run(tmp_path / "bf16", tmp_path / "kept")
    assert kept.parity is not None and same(stored(tmp_path / "kept"), stored(tmp_path / "bf16"))


def test_without_proof_the_result_says_so(tmp_path: Path) -> None:
    save(tmp_path / "m")
    assert run(tmp_path / "m", tmp_path / "out", verify=False).parity is None
    assert info(tmp_path / "out")["converted"]["parity"] == "not checked"


def transformers_directory(tmp_path: Path, shards: int, **changes: Any) -> dict[str, Tensor]:
    """What save_pretrained leaves: a configuration with own keys, shards, a tied matrix once, no megalodon.json."""
    model = save(tmp_path / "m", **changes)
    place = tmp_path / "t"
    place.mkdir()
    own = {"architectures": ["MegalodonForCausalLM"], "auto_map": {"AutoConfig": "x.Y"}, "dtype": "float32"}
    own |= {"transformers_version": "5.24.0", "use_cache": True, "bos_token_id": 1, "model_type": "megalodon"}
    (place / "config.json").write_text(json.dumps({**model.config.model_dump(mode="json"), **own}))
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    held = {n: t for n, t in tensors.items() if not (changes.get("share_emb") and n == "output.output.weight")}
    names = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    places = {name: names[number % shards] for number, name in enumerate(held)}
    for file in names:
        save_file({n: t for n, t in held.items() if places[n] == file}, place / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


@pytest.mark.parametrize("changes", [{}, {"share_emb": True}], ids=str)
def test_a_directory_that_transformers_saved_is_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    expected = transformers_directory(tmp_path, 3, **changes)
    done = run(tmp_path / "t", tmp_path / "out")
    assert same(stored(tmp_path / "out"), expected)
    assert "holds no tokenizer of ours" in done.remarks[0]
    with pytest.raises(CheckpointError, match=r"megalodon\.json is missing") as caught:
        load_model(tmp_path / "t")
    assert caught.value.hint is not None and "megalodon convert" in caught.value.hint


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def remap(place: Path, how: Any) -> None:
    index = place / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    how(value["weight_map"])
    index.write_text(json.dumps(value))


def outside(place: Path) -> None:
    """A shard that is a link to a file elsewhere."""
    file = place / "model-00002-of-00003.safetensors"
    shutil.move(file, place.parent / "elsewhere.safetensors")
    file.symlink_to(place.parent / "elsewhere.safetensors")


def twice(place: Path) -> None:
    text = (place / "model.safetensors.index.json").read_text()
    line = '"embed.weight": "model-00001-of-00003.safetensors"'
    (place / "model.safetensors.index.json").write_text(text.replace(line, f"{line}, {line}"))


E = "embed.weight"
ONE, TWO = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
INDEX: dict[str, tuple[Any, str]] = {
    "parent": (lambda d: remap(d, lambda m: m.update({E: "../model.safetensors"})), r"names '\.\./model\.safetensors'"),
    "absolute": (
        lambda d: remap(d, lambda m: m.update({E: "/etc/x.safetensors"})),
        r"names '/etc/x\.safetensors'; expec",
    ),
    "hidden": (
        lambda d: remap(d, lambda m: m.update({E: ".x.safetensors"})),
        r"names '\.x\.safetensors'; expected the",
    ),
    "other kind": (lambda d: remap(d, lambda m: m.update({E: "model.bin"})), r"names 'model\.bin'; expected the plain"),
    "link outside": (outside, r"model-00002-of-00003\.safetensors leads out of"),
    "no such file": (lambda d: (d / TWO).unlink(), r"model-00002-of-00003\.safetensors is missing, but"),
    "a folder": (lambda d: ((d / TWO).unlink(), (d / TWO).mkdir()), r"is no file, but model\.safetensors\.index"),
    "moved": (lambda d: remap(d, lambda m: m.update({E: TWO})), rf"{E} is missing in {TWO}"),
    "not named": (lambda d: remap(d, lambda m: m.pop(E)), rf"{E} is in {ONE} but not in the index"),
    "invented": (lambda d: remap(d, lambda m: m.update({"x.weight": ONE})), rf"x\.weight is missing in {ONE}"),
    "named twice": (twice, r"embed\.weight stands in it twice"),
    "in two files": (
        lambda d: save_file({E: torch.zeros(3), "layers.0.mega.beta": torch.zeros(3)}, d / TWO),
        rf"{E} stands in {ONE} and {TWO}",
    ),
    "one file more": (lambda d: shutil.copy(d / ONE, d / "extra.safetensors"), r"holds extra\.safetensors, which"),
    "both forms": (lambda d: shutil.copy(d / ONE, d / "model.safetensors"), r"expected one of them"),
    "no map": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), r"has no weight_map"),
    "no JSON": (lambda d: (d / "model.safetensors.index.json").write_text("{"), r"index\.json is not JSON"),
}


@pytest.mark.parametrize("damage", INDEX)
def test_an_index_that_lies_is_refused(tmp_path: Path, damage: str) -> None:
    transformers_directory(tmp_path, 3)
    harm, said = INDEX[damage]
    harm(tmp_path / "t")
    refused(tmp_path / "t", tmp_path / "out", said)


def irregular(name: str) -> Any:
    """A file of this name that is a device: one that is read without end, or a pipe, would be no other."""

    def harm(place: Path) -> None:
        (place / name).unlink(missing_ok=True)
        (place / name).symlink_to("/dev/null")

    return harm


@pytest.mark.parametrize("name", ["megalodon.json", "model.safetensors.index.json"])
def test_a_device_is_not_read(tmp_path: Path, name: str) -> None:
    transformers_directory(tmp_path, 3)
    irregular(name)(tmp_path / "t")
    refused(tmp_path / "t", tmp_path / "out", rf"{name} is no regular file")


@pytest.mark.parametrize("name", ["model.safetensors", "consolidate_config.json"])
@pytest.mark.usefixtures("read_here")
def test_a_device_in_the_place_of_a_single_file_is_not_read(tmp_path: Path, name: str) -> None:
    if name == "model.safetensors":
        transformers_directory(tmp_path, 1)
        (tmp_path / "t/model.safetensors.index.json").unlink()
    else:
        save_released(tmp_path / "t", *released(tmp_path), 1)
    irregular(name)(tmp_path / "t")
    refused(tmp_path / "t", tmp_path / "out", rf"{name} is no regular file")


FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "many layers": ({"num_layers": 10**9}, r"num_layers: Input should be less than or equal to 1024"),
    "wide": (
        {"model_dim": 2**40, "norm_num_groups": 2**20},
        r"model_dim: Input should be less than or equal to 1048576",
    ),
    "many averages": ({"cema_ndim": 10**18}, r"cema_ndim: Input should be less than"),
    "many words": ({"vocab_size": 10**25}, r"vocab_size: Input should be less than"),
    "long chunks": ({"chunk_size": 10**30}, r"chunk_size: Input should be less than"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_sizes_beyond_all_bounds_are_refused_before_a_model_is_laid_out(tmp_path: Path, kind: str) -> None:
    changes, said = FOREIGN[kind]
    transformers_directory(tmp_path, 1)
    edit(tmp_path / "t/config.json", **changes)
    refused(tmp_path / "t", tmp_path / "out", said)


def test_a_chunk_longer_than_any_text_costs_no_more_tokens(tmp_path: Path) -> None:
    transformers_directory(tmp_path, 1)
    edit(tmp_path / "t/config.json", chunk_size=2**31)
    done = run(tmp_path / "t", tmp_path / "out")
    assert done.parity == parity.EQUAL, "tensors are compared, nothing is run"
    assert parity.parity_tokens(load_model(tmp_path / "out").config).shape == (1, parity.MOST)


@pytest.mark.parametrize("name", ["x\nerror: all is well", "x\x1b[31m", "x" * 600], ids=["line", "escape", "long"])
def test_a_name_that_would_forge_a_message_is_refused(tmp_path: Path, name: str) -> None:
    transformers_directory(tmp_path, 1)
    rewrite(tmp_path / "t", lambda tensors: tensors.update({name: torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"a tensor is named 'x.*'; expected at most 512 char") as caught:
        run(tmp_path / "t", tmp_path / "out")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32], ids=str)
@pytest.mark.parametrize("to", ["native", "ref"])
@pytest.mark.usefixtures("read_here")
def test_a_count_of_another_type_is_written_as_an_integer(tmp_path: Path, dtype: torch.dtype, to: Any) -> None:
    expected = transformers_directory(tmp_path, 1)
    rewrite(tmp_path / "t", lambda ts: ts.update({n: t.to(dtype) for n, t in ts.items() if n.endswith("prior_count")}))
    run(tmp_path / "t", tmp_path / "there", to=to)
    run(tmp_path / "there", tmp_path / "back")
    assert same(stored(tmp_path / "back"), expected)


def test_many_faults_are_counted_not_listed(tmp_path: Path) -> None:
    transformers_directory(tmp_path, 1)
    edit(tmp_path / "t/config.json", num_layers=300)
    with pytest.raises(CheckpointError, match=r"layers\.2\.mega\.[a-z.]*; and 6,\d\d\d more$") as caught:
        run(tmp_path / "t", tmp_path / "out")
    assert str(caught.value).count(";") == 8


@pytest.mark.parametrize("number", ["1e999", "NaN", "-Infinity"])
def test_a_record_without_finite_numbers_is_refused(tmp_path: Path, number: str) -> None:
    save(tmp_path / "m")
    path = tmp_path / "m/megalodon.json"
    path.write_text(path.read_text().replace('"step": 7', f'"step": {number}'))
    refused(tmp_path / "m", tmp_path / "out", rf"megalodon\.json is not JSON: {number} is no finite number")


def test_a_record_without_end_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "m")
    monkeypatch.setattr(store, "JSON_BYTES", 300)
    refused(tmp_path / "m", tmp_path / "out", r"config\.json has \d\d\d bytes; expected at most 300")


@pytest.mark.parametrize("to", ["native", "ref"])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, to: Any) -> None:
    save(tmp_path / "m")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        refused(tmp_path / "m", tmp_path / "out", r"out could not be written: ", EnvironmentFault, to=to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def rewrite(directory: Path, how: Any) -> None:
    """Change the tensors of a directory without records."""
    tensors = stored(directory)
    how(tensors)
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def spoil(name: str, value: float) -> Any:
    return lambda tensors: tensors[name].view(-1).__setitem__(3, value)


def three_faults(tensors: dict[str, Tensor]) -> None:
    del tensors["layers.1.mega.beta"]
    tensors["layers.7.mega.gamma"] = torch.zeros(2, 12)
    tensors["layers.0.mega.wz.weight"] = tensors["layers.0.mega.wz.weight"].T.contiguous()


WEIGHTS: dict[str, tuple[Any, str]] = {
    "all at once": (
        three_faults,
        r"3 tensors do not fit the model: missing layers\.1\.mega\.beta; unexpected layers\.7\.mega\.gamma; "
        r"layers\.0\.mega\.wz\.weight is \(24, 12\), expected \(12, 24\)",
    ),
    "NaN": (spoil("layers.1.nffn.fc1.weight", float("nan")), r"fc1\.weight has 1 values that are NaN or infinite"),
    "infinite": (
        spoil("layers.0.mega.cema.theta", float("-inf")),
        r"cema\.theta has 1 values that are NaN or infinite",
    ),
    "integers": (lambda t: t.update({E: t[E].long()}), r"embed\.weight is torch\.int64, expected a float type"),
    "a prior": (
        lambda t: t.update({"output.final_norm.prior_count": torch.tensor(3)}),
        r"output\.final_norm\.prior_count is 3; a language model has no prior",
    ),
    "no number of a prior": (
        lambda t: t.update({"output.final_norm.prior_count": torch.tensor(float("nan"))}),
        r"output\.final_norm\.prior_count is nan; a language model has no prior",
    ),
}


@pytest.mark.parametrize("damage", WEIGHTS)
@pytest.mark.parametrize("verify", [True, False])
def test_weights_that_are_no_model_are_refused_proof_or_not(tmp_path: Path, damage: str, verify: bool) -> None:
    transformers_directory(tmp_path, 1)
    harm, said = WEIGHTS[damage]
    rewrite(tmp_path / "t", harm)
    refused(tmp_path / "t", tmp_path / "out", said, verify=verify)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "m")
    transformers_directory(tmp_path / "small", 1, vocab_size=200)
    shutil.copy(tmp_path / "m/byte_tokenizer.json", tmp_path / "small/t")
    refused(tmp_path / "small/t", tmp_path / "out", r"the tokenizer has 264 ids, the model 200 rows")
    (tmp_path / "m/byte_tokenizer.json").write_text('{"kind": "bytes", "reserve": 3, "version": 1}\n')
    refused(tmp_path / "m", tmp_path / "out", r"byte_tokenizer\.json has sha256")


def test_a_template_that_is_a_link_is_not_copied(tmp_path: Path) -> None:
    transformers_directory(tmp_path, 1)
    (tmp_path / "secret").write_text("of someone else")
    (tmp_path / "t/chat_template.jinja").symlink_to(tmp_path / "secret")
    refused(tmp_path / "t", tmp_path / "out", r"chat_template\.jinja leads out of .*; expected the file itself")


def test_a_tied_matrix_that_differs_is_refused(tmp_path: Path) -> None:
    transformers_directory(tmp_path, 1, share_emb=True)
    rewrite(tmp_path / "t", lambda tensors: tensors.update({"output.output.weight": tensors[E] + 1}))
    refused(tmp_path / "t", tmp_path / "out", r"output\.output\.weight differs from embed\.weight")


def test_float64_is_not_rounded_unasked(tmp_path: Path) -> None:
    transformers_directory(tmp_path, 1)
    rewrite(tmp_path / "t", lambda tensors: tensors.update({E: tensors[E].double()}))
    refused(
        tmp_path / "t", tmp_path / "out", r"is float64, which no format here holds; choose --dtype fp32", InputError
    )
    assert run(tmp_path / "t", tmp_path / "out", dtype="fp32").parity is not None


@pytest.mark.parametrize("to", ["native", "ref"])
def test_a_file_that_comes_back_otherwise_is_a_failure_and_leaves_nothing(
    tmp_path: Path, to: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "m")
    if to == "native":
        whole = conversion.write_weights

        def damaged(directory: Path, *arguments: Any) -> Any:
            files = whole(directory, *arguments)
            flip(directory / "model.safetensors", -7)
            return files

        monkeypatch.setattr(conversion, "write_weights", damaged)
    else:
        released = conversion.write_released

        def torn(directory: Path, *arguments: Any) -> Any:
            said = released(directory, *arguments)
            with zipfile.ZipFile(directory / "consolidated.pth") as file, file.open("consolidated/data/3") as record:
                flip(directory / "consolidated.pth", record._orig_compress_start)
            return said

        monkeypatch.setattr(conversion, "write_released", torn)
    refused(tmp_path / "m", tmp_path / "out", r"parity: 1 tensors came back with other values: ", CheckFailed, to=to)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_other_logits_are_a_failure_that_names_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "m")
    monkeypatch.setattr(conversion, "_same", lambda *_: True)
    original = conversion.open_weights

    def moved(*arguments: Any) -> Any:
        found = original(*arguments)
        name = "layers.1.mega.wv.weight"
        return found._replace(read=lambda n: found.read(n) + (1e-3 if n == name else 0))

    monkeypatch.setattr(conversion, "open_weights", moved)
    refused(tmp_path / "m", tmp_path / "out", r"parity: logits differ by 0\.\d+, from layers\.1 on", CheckFailed)


def test_our_loader_is_part_of_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "m")
    original = conversion.load_model

    def other(path: Path) -> Any:
        model = original(path)
        model.embed.weight.data += 1e-4
        return model

    monkeypatch.setattr(conversion, "load_model", other)
    refused(tmp_path / "m", tmp_path / "out", r"parity: our loader: largest logit difference", CheckFailed)


def test_a_large_model_is_proven_by_its_tensors_and_a_cast_layer_by_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "m")
    small = run(tmp_path / "m", tmp_path / "small", dtype="bf16").parity
    monkeypatch.setattr(parity, "SMALL", 0)
    monkeypatch.setattr(parity, "PIECE", 7)
    monkeypatch.setattr(parity, "_LOGIT_BYTES", 5000)
    done = run(tmp_path / "m", tmp_path / "out")
    assert done.parity is not None and done.parity.tokens == 0 and done.parity.largest == 0
    cast = run(tmp_path / "m", tmp_path / "bf16", dtype="bf16").parity
    assert small is not None and cast is not None
    assert cast.largest == pytest.approx(small.largest, rel=1e-3) and cast.first_layer == "embed"
    assert cast.agreement == small.agreement and cast.tokens == 35


@pytest.mark.skipif(not has("A"), reason="no golden vectors")
def test_a_strict_loader_takes_what_is_written_for_the_released_code(tmp_path: Path) -> None:
    """As its reloading.py does: ModelConf(**cfg["model"]), TokenizerConf(**cfg["tokenizer"]), then load_state_dict."""
    save_golden("B", tmp_path / "native")
    run(tmp_path / "native", tmp_path / "ref", to="ref")
    config = json.loads((tmp_path / "ref/config.json").read_text())
    assert config["model"].keys() == options("B")["model"].keys()
    assert config["tokenizer"].keys() == {"path", "additional_vocab_size", "data_tokenized"}
    about = json.loads((tmp_path / "ref/consolidate_config.json").read_text())
    assert about == {"model_parallel_size": 1, "dtype": "fp32"}
    found = torch.load(tmp_path / "ref/consolidated.pth", weights_only=True)
    recorded = read("B/params")
    assert list(found) and found.keys() == recorded.keys()
    for name, tensor in recorded.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype, name
    assert found["embed.weight"].data_ptr() == found["output.output.weight"].data_ptr(), "tied, as torch.save keeps it"
