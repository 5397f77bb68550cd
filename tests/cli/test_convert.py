"""`megalodon convert`: every kind of SRC, what it prints, and what it refuses in one line with its exit code."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import info, same, save, save_released, stored
from small_runs import pretrain
from typer.testing import CliRunner, Result

from megalodon.checkpoint.tensors import load_model
from megalodon.interop import conversion
from megalodon_cli.app import app


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(conversion, "_check_transformers", lambda *_: "left out")


def convert(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def refused(*arguments: object, code: int = 2) -> str:
    """The one line of an error; nothing is written."""
    before = sorted(path.name for path in Path().rglob("*"))
    result = convert(*arguments, code=code)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert sorted(path.name for path in Path().rglob("*")) == before
    return lines[0]


def test_a_run_its_steps_and_its_model_are_all_sources() -> None:
    assert pretrain("optim.ema=0.5").exit_code == 0
    tensors = {}
    for number, given in enumerate(["debug", "runs/debug", "debug@6", "debug@best", "runs/debug@4"]):
        done = convert(given, f"out{number}")
        assert "parity: equal bit by bit, 35 tokens" in done.stdout
        assert f"next: megalodon generate out{number} -p TEXT" in done.stdout
        which = "using runs/debug/model" if "@" not in given else f"using step {info(Path(f'out{number}'))['step']}"
        assert which in done.stderr
        tensors[given] = stored(Path(f"out{number}"))
    step = convert("runs/debug/checkpoints/step-00000006", "of step")
    assert "step of a run, 26,032 parameters" in step.stderr
    tensors["step"] = stored(Path("of step"))
    exported = stored(Path("runs/debug/model"))
    for given in ("debug", "runs/debug", "debug@6", "step"):  # averaged weights, as the export of the run
        assert same(tensors[given], exported), given
    assert not same(tensors["runs/debug@4"], exported)
    assert info(Path("of step"))["weights"] == "averaged, optim.ema 0.5"
    assert CliRunner().invoke(app, ["generate", "of step", "-p", "a", "-n", "3"]).exit_code == 0
    shutil.rmtree("runs/debug/model")
    newest = convert("debug", "newest")
    assert "using step 6" in newest.stderr and same(stored(Path("newest")), exported)


def test_a_step_says_how_documents_began_and_ended() -> None:
    assert pretrain("data.eos=false", "data.bos=false", "--stop-at-step", "2").exit_code == 0
    convert("debug@2", "out")
    assert (info(Path("out"))["bos"], info(Path("out"))["eos"]) == (False, False)
    Path("runs/debug/recipe.yaml").unlink()
    assert "recipe.yaml is missing, so its model is not known" in refused("debug@2", "again")


def test_options_reach_the_files() -> None:
    model = save(Path("m"))
    convert("m", "shards", "--shard-size", "20kB", "--dtype", "bf16")
    found = sorted(path.name for path in Path("shards").glob("model-*.safetensors"))
    assert len(found) > 2 and all((Path("shards") / name).stat().st_size < 25_000 for name in found)
    assert load_model("shards").config == model.config
    assert info(Path("shards"))["converted"]["dtype"] == "bf16"
    convert("m", "unproven", "--no-verify")
    assert info(Path("unproven"))["converted"]["parity"] == "not checked"
    quantised = convert("m", "q", "--quantize", "int8")
    assert "matrices as int8" in quantised.stdout and "largest logit difference" in quantised.stdout
    released = convert("m", "ref", "--to", "ref")
    assert "the released code: its tokenizer is SentencePiece alone" in released.stderr
    assert sorted(path.name for path in Path("ref").iterdir()) == [
        *("byte_tokenizer.json", "config.json", "consolidate_config.json", "consolidated.pth", "megalodon.json")
    ]
    assert 'next: megalodon.reloading.reload_model("."), with the released code, from inside ref' in released.stdout
    hf = convert("m", "hf", "--to", "hf").stdout
    assert "# hf\n" in Path("hf/README.md").read_text(), "its card has the name that it was given"
    assert 'AutoModelForCausalLM.from_pretrained("hf", trust_remote_code=True)' in hf
    assert 'AutoTokenizer.from_pretrained("hf")' in hf
    for place in ("shards", "q", "hf"):
        done = CliRunner().invoke(app, ["generate", place, "-p", "a", "-n", "3"])
        assert done.exit_code == 0, done.output


def test_the_document_has_what_was_found() -> None:
    save(Path("m"))
    found = json.loads(convert("m", "out", "--json", "--to", "ref").stdout)
    assert found["schema"] == "megalodon/convert/1" and found["ok"]
    result = found["result"]
    assert (result["kind"], result["to"]) == ("model directory", "ref")
    assert result["parity"] == {
        "tokens": 35,
        "largest_logit_difference": 0.0,
        "top1_agreement": 1.0,
        "first_layer_that_differs": None,
    }


def test_inspect_shows_every_tensor_and_writes_nothing() -> None:
    model = save(Path("m"))
    shown = convert("--inspect", "m").stdout
    assert "m: model directory" in shown and "chunk_size 10" in shown and "byte_tokenizer.json" in shown
    assert all(name in shown for name in model.state_dict())
    assert shown.splitlines()[-3:] == ["  missing    none", "  unexpected none", "  mismatched none"]
    found = json.loads(convert("--inspect", "m", "--json").stdout)["result"]
    assert found["parameters"] == model.num_parameters()
    assert found["values"] == {"float32": sum(t.numel() for t in model.state_dict().values()) - 3, "int64": 3}
    assert {"name": "embed.weight", "shape": [264, 24], "dtype": "float32"} in found["tensors"]
    convert("m", "q", "--quantize", "int4")
    held = json.loads(convert("--inspect", "q", "--json").stdout)["result"]
    assert held["quantisation"] == {"kind": "int4", "group_size": 64} and not held["missing"] + held["unexpected"]


def test_inspect_lists_what_does_not_fit() -> None:
    model = save(Path("m"))
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    del tensors["layers.1.mega.beta"]
    tensors["extra"] = torch.zeros(2)
    tensors["layers.0.mega.wz.weight"] = tensors["layers.0.mega.wz.weight"].T.contiguous()
    save_released(Path("r"), model.config.model_dump(), tensors, 1)
    result = convert("--inspect", "r", code=6)
    assert "checkpoint of the released implementation" in result.stdout
    assert "  missing    layers.1.mega.beta" in result.stdout and "  unexpected extra" in result.stdout
    assert "layers.0.mega.wz.weight is (24, 12), expected (12, 24)" in result.stdout
    assert "3 tensors do not fit its configuration" in result.stderr
    found = json.loads(convert("--inspect", "r", "--json", code=6).stdout)["result"]
    assert (found["missing"], found["unexpected"]) == (["layers.1.mega.beta"], ["extra"])


def llama(place: Path) -> None:
    place.mkdir()
    (place / "config.json").write_text('{"model_type": "llama"}')


def bare(place: Path) -> None:
    place.mkdir()
    (place / "weights.pth").write_bytes(b"x")


def other(place: Path) -> None:
    place.mkdir()
    (place / "config.json").write_text('{"model_type": "gpt2"}')


REFUSED: dict[str, tuple[list[str], str]] = {
    "gguf": (["m", "out", "--to", "gguf"], "--to gguf: GGUF has no Megalodon architecture; use --to hf"),
    "format": (["m", "out", "--to", "onnx"], "--to onnx: expected one of native, hf, ref"),
    "no DST": (["m"], "m: DST is missing; expected megalodon convert SRC DST, or --inspect SRC"),
    "DST of a look": (["--inspect", "m", "out"], "--inspect writes nothing, but DST is out"),
    "a form of a look": (["--inspect", "m", "--to", "hf"], "--to does nothing with --inspect, which writes nothing"),
    "a merge of a look": (["--inspect", "m", "--merge"], "--merge does nothing with --inspect"),
    "taken": (["m", "m"], "m already exists; choose another directory or remove it"),
    "inside SRC": (["m", "m/out"], "m/out lies inside m, which is only read; choose a place beside it"),
    "below a file": (["m", "m/config.json/out"], "config.json is no directory; choose another place"),
    "a link to nothing": (["m", "dangling"], "dangling already exists"),
    "a link to a folder": (["m", "linked"], "linked already exists"),
    "taken, told first": (["nowhere", "m"], "m already exists"),
    "size": (["m", "out", "--shard-size", "many"], "--shard-size: `many` is not a size such as 100MB or 2GiB"),
    "no size": (["m", "out", "--shard-size", "0"], "--shard-size 0: expected at least a byte"),
    "merge": (["m", "out", "--merge"], "--merge: m is a model directory; expected an adapter, such as RUN/adapter"),
    "base": (["m", "out", "--base", "m"], "--base: m is a model directory; expected an adapter"),
    "nothing": (["nowhere", "out"], "nowhere does not exist; expected a directory with a model, an adapter or a"),
    "llama": (["llama", "out"], "llama is a Llama, which transformers reads as it is; there is nothing to convert"),
    "other": (["other", "out"], "config.json has model_type 'gpt2'; expected 'megalodon'"),
    "a pickle alone": (["bare", "out"], "weights.pth alone is not enough: consolidate_config.json says how it was"),
    "no step": (["gone@4", "out"], "gone: no run gone and no run runs/gone"),
    "hf and int8": (["m", "out", "--to", "hf", "--quantize", "int8"], "--quantize writes native model directories"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_one_line(case: str) -> None:
    save(Path("m"))
    llama(Path("llama"))
    other(Path("other"))
    bare(Path("bare"))
    Path("dangling").symlink_to("gone")
    Path("empty").mkdir()
    Path("linked").symlink_to("empty")
    arguments, said = REFUSED[case]
    assert said in refused(*arguments)


def test_a_key_of_a_configuration_forges_no_line(tmp_path: Path) -> None:
    save(Path("m"))
    path = Path("m/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "x\nerror: all is well \x1b[2J": 1}))
    assert "unknown keys: x error: all is well \N{REPLACEMENT CHARACTER}[2J;" in refused("--inspect", "m")


def test_a_signal_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    save(Path("m"))
    monkeypatch.setattr(conversion, "write_weights", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # unheard, it ends this test alone
    try:
        convert("m", "out", code=143)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [path.name for path in Path().iterdir()] == ["m"]


def test_where_a_model_says_it_comes_from_is_only_passed_on() -> None:
    save(Path("m"))
    path = Path("m/megalodon.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "merged_from": 3}))
    assert json.loads(convert("m", "out", "--json").stdout)["result"]["model"] == "out"
    assert info(Path("out"))["merged_from"] == 3


def test_a_failed_proof_is_exit_6_and_no_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    save(Path("m"))
    monkeypatch.setattr(conversion, "_same", lambda written, back, name: name != "layers.1.mega.gamma")
    assert "came back with other values: layers.1.mega.gamma" in refused("m", "out", code=6)


def test_no_disk_space_is_exit_3(monkeypatch: pytest.MonkeyPatch) -> None:
    save(Path("m"))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "out/model.safetensors")

    monkeypatch.setattr(conversion, "write_weights", full)
    assert "out could not be written" in refused("m", "out", code=3)
