"""`megalodon evaluate`: tables and documents that agree, files beside the run, every bad input as one line."""

import json
import math
from pathlib import Path

import pytest
import torch
from byte_texts import TOKENIZER, byte_model, text, write
from small_runs import pretrain
from typer.main import get_command
from typer.testing import CliRunner

from megalodon.checkpoint.tensors import save_model
from megalodon_cli.app import app

META = {"tokenizer_sha256": TOKENIZER.sha256, "bos": True}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with two models of random weights, a run and its data, and texts."""
    place = tmp_path_factory.mktemp("evaluate")
    for seed, name in enumerate("ab"):
        save_model(byte_model(torch.float32, seed), place / name, TOKENIZER.save, META)
    write(place / "texts", text(400), text(300, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert pretrain("--max-steps", "2").exit_code == 0
    return place


@pytest.fixture
def place(workplace, monkeypatch) -> Path:
    monkeypatch.chdir(workplace)
    return workplace


def run(*arguments: object):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def document(*arguments: object) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["result"]


def refused(result, *words: str, code: int = 2) -> None:
    """One line that names the problem, nothing on stdout."""
    assert result.exit_code == code, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    for word in words:
        assert word in errors[0]
    assert result.stdout == ""


def test_quick_prints_a_table_and_saves_json_and_markdown(place, tmp_path):
    result = run("a", "--data", "texts", "--output-path", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "norm_stats cumulative · fp32 on cpu · texts" in result.stdout
    assert "0 tokens truncated" in result.stdout
    saved, report = sorted((tmp_path / "out").iterdir())
    whole = json.loads(saved.read_text())
    assert whole["schema"] == "megalodon/evaluate/1"
    found = whole["result"]["models"][0]["quick"]
    size = sum(len(given.encode()) for given in (text(400), text(300, 1)))
    assert (found["tokens"], found["bytes"], found["documents"]) == (size + 2, size, 2)
    assert found["tokens_read"] == found["tokens"] + found["documents"]
    assert f"{found['loss']['value']:.4f} ± {found['loss']['error']:.4f}" in result.stdout
    assert f"| {found['loss']['value']:.4f} ± " in report.read_text()
    assert report.read_text().startswith("# evaluate quick · norm_stats cumulative")
    assert found["bits_per_byte"]["value"] == pytest.approx(
        found["loss"]["value"] * found["tokens"] / math.log(2) / size, rel=1e-9
    )


def test_a_run_is_scored_on_its_validation_part_and_keeps_the_results(place):
    found = document("debug")
    assert found["data"]["name"] == "data/debug/valid"
    assert found["models"][0]["seq_len"] == 37
    manifest = json.loads(Path("data/debug/valid/manifest.json").read_text())
    assert found["models"][0]["quick"]["tokens_read"] == manifest["tokens"]
    assert found["models"][0]["quick"]["bytes"] == manifest["text_bytes"]
    again = document("debug")
    assert again["models"] == found["models"]
    saved = [json.loads(path.read_text())["result"] for path in Path("runs/debug/evals").glob("*.json")]
    assert found in saved and again in saved
    assert not list(Path("runs/debug/evals").glob(".tmp*"))


def test_the_policy_changes_the_numbers_and_stands_in_the_header(place):
    cumulative, window = (document("a", "--data", "texts", "--norm-stats", p) for p in ("cumulative", "window"))
    assert window["norm_stats"] == "window"
    losses = [found["models"][0]["quick"]["loss"]["value"] for found in (cumulative, window)]
    assert losses[0] != losses[1]
    assert "norm_stats window" in run("a", "--data", "texts", "--norm-stats", "window").stdout


def test_context_prints_losses_gains_and_words_and_draws_them(place, tmp_path):
    asked = ["--suite", "context", "--data", "texts", "--lengths", "8,64,300", "--target", "32", "--windows", "5"]
    result = run("a", *asked, "--plot", tmp_path / "c.svg", "--output-path", tmp_path)
    assert result.exit_code == 0, result.stderr
    whole = json.loads(next(tmp_path.glob("context-*.json")).read_text())["result"]
    found = whole["models"][0]["context"]
    assert [row["context"] for row in found["lengths"]] == [0, 8, 64, 300]
    assert (found["windows"], found["scored_tokens"]) == (5, 160)
    for row in found["lengths"]:
        assert f"{row['loss']['value']:.4f}" in result.stdout
        assert row["bits_per_byte"] == pytest.approx(row["loss"]["value"] / math.log(2), rel=1e-9)  # a byte a token
    assert "tokens back" in result.stdout or "helps beyond chance" in result.stdout
    assert (tmp_path / "c.svg").read_text().startswith("<?xml")
    batched = document("a", *asked, "--batch-size", "1")["models"][0]["context"]
    for one, other in zip(batched["lengths"], found["lengths"], strict=True):
        assert one["loss"]["value"] == pytest.approx(other["loss"]["value"], rel=1e-5)


def test_models_are_compared_on_the_same_text(place, tmp_path):
    asked = ["a", "b", "--data", "texts", "--plot", tmp_path / "p.png", "--output-path", tmp_path]
    result = run(*asked)
    assert result.exit_code == 0, result.stderr
    found = json.loads(next(tmp_path.glob("*.json")).read_text())["result"]
    bits = [model["quick"]["bits_per_byte"]["value"] for model in found["models"]]
    [own] = found["comparisons"]
    assert (own["model"], own["against"]) == ("b", "a")
    change = own["bits_per_byte"]
    assert change["value"] == pytest.approx(bits[1] - bits[0], rel=1e-9)
    assert change["low"] <= change["value"] <= change["high"]
    assert "bits/byte less that of a, paired" in result.stdout
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert document("a", "--compare", "b", "--data", "texts")["comparisons"] == found["comparisons"]
    windows = document("a", "b", "--data", "texts", "--suite", "context", "--lengths", "64", "--target", "32")
    losses = [[row["loss"]["value"] for row in model["context"]["lengths"]] for model in windows["models"]]
    paired = [row["loss"]["value"] for row in windows["comparisons"][0]["lengths"]]
    assert paired == pytest.approx([b - a for a, b in zip(*losses, strict=True)])


def test_the_text_of_one_run_may_stand_in_the_training_data_of_another_model(place):
    result = run("debug", "a")
    assert result.exit_code == 0, result.stderr
    assert "the text is the validation part of debug; a was trained on other data" in result.stderr


def test_fewer_windows_than_asked_for_are_a_note(place):
    result = run("a", "--suite", "context", "--data", "texts", "--lengths", "64", "--target", "1Ki")
    assert result.exit_code == 0
    assert "the text holds 2 such windows, fewer than --windows 32" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a"], ["a is in no run, so it has no validation part; expected --data FILE|DIR"]),
        (["a", "--data", "none.txt"], ["--data: none.txt does not exist"]),
        (["a", "a", "--data", "texts"], ["a is given twice"]),
        (
            ["a", "--suite", "context", "--data", "texts", "--lengths", "64Ki"],
            ["--lengths 64Ki: the longest document has"],
        ),
        (["a", "--data", "texts", "--batch-size", "0"], ["--batch-size: 0 is too small"]),
        (["a", "--data", "texts", "--plot", "x.pdf"], ["x.pdf: expected a name ending in .png or .svg"]),
        (["a", "--data", "texts", "--output-path", "texts/00.txt"], ["texts/00.txt is a file; expected a folder"]),
        (["a", "--data", "texts", "--suite", "fast"], ["fast"]),
        (["a", "--data", "texts", "--device", "tpu"], ["--device tpu"]),
    ],
)
def test_a_bad_request_is_one_line(place, arguments, words):
    refused(run(*arguments), *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"x", "one.txt holds 1 token of text; expected at least 2"),
        (b"", "one.txt holds 0 tokens of text"),
        (b"\x00\x01\xff\xfe", "one.txt:1: not UTF-8 (byte 0xff at offset 2)"),
    ],
)
def test_text_that_cannot_be_scored_is_one_line_and_nothing_is_written(place, tmp_path, content, words):
    (tmp_path / "one.txt").write_bytes(content)
    refused(run("a", "--data", tmp_path / "one.txt", "--output-path", tmp_path / "out"), words)
    assert not (tmp_path / "out").exists()


def test_ctrl_c_ends_with_130_and_leaves_nothing(place, tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megalodon_cli.evaluation_request.Meter.at", interrupted)
    result = run("a", "--data", "texts", "--output-path", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (130, "")
    assert not (tmp_path / "out").exists()


def test_ckpt_completes_to_finished_runs(place):
    [argument] = [param for param in get_command(app).commands["evaluate"].params if param.name == "models"]
    assert [item.value for item in argument.shell_complete(None, "de")] == ["debug"]


def test_the_examples_of_the_help_run_as_printed(place):
    Path("README.md").write_text(text(200))
    shown = [line.strip(" │") for line in CliRunner().invoke(app, ["evaluate", "--help"]).stdout.splitlines()]
    examples = [line.split()[2:] for line in shown if line.startswith("megalodon evaluate ")]
    assert len(examples) >= 3
    for arguments in examples:
        result = run(*arguments)
        assert result.exit_code == 0, (arguments, result.stderr)
