"""`megalodon generate`: text on stdout, all else on stderr, and every bad input as one line with its exit code."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from factories import tiny_model
from typer.main import get_command
from typer.testing import CliRunner

from megalodon.checkpoint.tensors import save_model
from megalodon.data.tokenizer import ByteTokenizer
from megalodon_cli.app import app
from megalodon_cli.checkpoints import complete

TOKENIZER = ByteTokenizer(reserve=2)
SIZES = {"vocab_size": TOKENIZER.vocab_size + 5, "chunk_size": 16}
FOOTER = re.compile(
    r"(\d+) tokens, [\d.]+ tok/s, first token [\d.]+ s, context ([\d,]+), state \d+ kB \(constant\), seed (\d+)"
)


@pytest.fixture(scope="module")
def shared_model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("shared") / "my model"
    meta = {"tokenizer_sha256": TOKENIZER.sha256, "bos": True}
    save_model(tiny_model(torch.float32, **SIZES), directory, TOKENIZER.save, meta)
    return directory


@pytest.fixture
def model(shared_model, tmp_path, monkeypatch) -> Path:
    """A copy that a test may damage, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(shared_model, tmp_path / "my model"))


def run(*arguments: object, stdin: bytes | str | None = None):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)], input=stdin)


def refused(result, *words: str) -> None:
    """One line that names the problem, exit code 2, nothing on stdout."""
    assert result.exit_code == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    for word in words:
        assert word in errors[0]
    assert result.stdout == ""


def make_run(name: str, model: Path, age: float = 0) -> Path:
    directory = Path("runs") / name
    directory.mkdir(parents=True)
    (directory / "run.json").write_text("{}")
    shutil.copytree(model, directory / "model")
    moment = time.time_ns() - int(age * 1e9)
    os.utime(directory / "model", ns=(moment, moment))
    return directory


def test_text_goes_to_stdout_and_the_footer_to_stderr(model):
    result = run(model, "-p", "abc", "-n", 12, "--seed", 7)
    assert result.exit_code == 0, result.stderr
    found = FOOTER.search(result.stderr)
    assert found
    assert found.groups() == ("12", "16", "7")  # BOS, 3 bytes and all new tokens were read
    assert result.stdout.endswith("\n")
    assert "tok/s" not in result.stdout


def test_a_seed_decides_the_text_and_a_drawn_one_is_printed(model):
    def text(*more: object) -> tuple[str, str]:
        result = run(model, "-p", "abc", "-n", 16, *more)
        return result.stdout, FOOTER.search(result.stderr)[3]

    assert text("--seed", 3) == text("--seed", 3)
    assert text("--seed", 3)[0] != text("--seed", 4)[0]
    drawn, seed = text()
    assert text("--seed", seed) == (drawn, seed)


def test_greedy_does_not_depend_on_the_seed(model):
    greedy = [run(model, "-p", "abc", "-n", 16, "--temp", 0, "--seed", seed).stdout for seed in (1, 2)]
    assert greedy[0] == greedy[1]


def test_the_json_document_has_text_and_numbers(model):
    result = run(model, "-p", "abc", "--max-tokens", 9, "--seed", 5, "--top-k", 3, "--json")
    document = json.loads(result.stdout)
    assert document["schema"] == "megalodon/generate/1"
    body = document["result"]
    assert body["text"] == run(model, "-p", "abc", "-n", 9, "--seed", 5, "--top-k", 3).stdout.removesuffix("\n")
    assert body["prompt_tokens"] == 4
    assert body["new_tokens"] == 9
    assert body["finish_reason"] == "length"
    assert body["context"] == 13
    longer = json.loads(run(model, "-p", "x" * 50, "-n", 3, "--json").stdout)["result"]
    assert body["state_bytes"] == longer["state_bytes"] > 0
    assert body["sampling"]["seed"] == 5
    assert body["sampling"]["top_k"] == 3


@pytest.mark.parametrize("how", ["-p -", "pipe", "-f"])
def test_a_prompt_comes_from_stdin_a_pipe_or_a_file(model, how):
    expected = run(model, "-p", "d'été\n", "-n", 8, "--seed", 1).stdout
    Path("prompt.txt").write_bytes("d'été\n".encode())
    arguments = {"-p -": ["-p", "-"], "pipe": [], "-f": ["-f", "prompt.txt"]}[how]
    assert run(model, *arguments, "-n", 8, "--seed", 1, stdin="d'été\n".encode()).stdout == expected


def test_a_stop_text_ends_the_answer(model):
    whole = json.loads(run(model, "-p", "abc", "-n", 40, "--seed", 2, "--json").stdout)["result"]["text"]
    stop = whole[10:12]
    body = json.loads(run(model, "-p", "abc", "-n", 40, "--seed", 2, "--json", "--stop", stop).stdout)["result"]
    assert body["text"] == whole[: whole.index(stop)]
    assert body["finish_reason"] == "stop"


def test_eos_ends_the_answer(model, monkeypatch):
    ids = iter([*TOKENIZER.encode("yes"), TOKENIZER.eos_id])
    monkeypatch.setattr("megalodon.inference.sampling.sample", lambda *_: next(ids))
    result = run(model, "-p", "abc", "--json")
    body = json.loads(result.stdout)["result"]
    assert (body["text"], body["finish_reason"], body["new_tokens"]) == ("yes", "stop", 3)


def test_an_answer_of_no_tokens_is_an_empty_line(model, monkeypatch):
    monkeypatch.setattr("megalodon.inference.sampling.sample", lambda *_: TOKENIZER.eos_id)
    result = run(model, "-p", "abc")
    assert (result.exit_code, result.stdout) == (0, "\n")
    assert FOOTER.search(result.stderr)[1] == "0"


def test_ckpt_is_a_model_directory_a_run_or_its_name(model):
    directory = make_run("small", model)
    texts = {run(c, "-p", "abc", "-n", 6, "--seed", 1).stdout for c in (model, directory, "small", directory / "model")}
    assert len(texts) == 1
    assert "runs/small/model" in run("small", "-p", "abc", "-n", 1).stderr


def test_without_ckpt_the_newest_finished_run_is_used_and_named(model):
    make_run("older", model, age=100)
    make_run("newer", model, age=50)
    unfinished = make_run("unfinished", model)
    shutil.rmtree(unfinished / "model")
    result = run("-p", "abc", "-n", 2)
    assert result.exit_code == 0
    assert "runs/newer/model" in result.stderr
    (unfinished / "command.txt").write_text("megalodon pretrain debug\n")
    why = "runs/unfinished has no finished model"
    refused(run(unfinished, "-p", "abc"), why, "the command that started it continues it: megalodon pretrain debug")


def test_an_empty_folder_does_not_hide_the_run_of_its_name(model):
    make_run("small", model)
    Path("small").mkdir()
    assert "runs/small/model" in run("small", "-p", "abc", "-n", 1).stderr
    Path("other").mkdir()
    refused(run("other", "-p", "abc"), "other")


def test_an_empty_name_is_no_model(model):
    refused(run("", "-p", "abc"), "CKPT is empty")


def test_finished_runs_complete_a_name(model):
    for name in ("small", "smart", "tall"):
        make_run(name, model)
    shutil.rmtree("runs/smart/model")
    assert complete("s") == ["small"]
    assert complete("runs/") == ["runs/small", "runs/tall"]
    arguments = get_command(app).commands["generate"].params
    assert [item.value for item in arguments[0].shell_complete(None, "ta")] == ["tall"]


def test_without_any_run_the_message_says_what_to_give(model):
    refused(run("-p", "abc"), "no CKPT given", "megalodon generate CKPT -p TEXT")


def test_a_missing_directory_is_named_with_what_is_there(model):
    make_run("quickstart", model)
    refused(run("runs/quikstart", "-p", "abc"), "runs/quikstart: no such directory", "quickstart")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "megalodon.json", "byte_tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_missing_or_truncated_file_is_named(model, name, damage):
    path = model / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-30])
    refused(run(model, "-p", "abc"), name)


def test_a_tokenizer_of_another_model_is_refused(model):
    ByteTokenizer(reserve=1).save(model)
    refused(run(model, "-p", "abc"), "byte_tokenizer.json")
    path = model / "megalodon.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_sha256": "f" * 64}))
    TOKENIZER.save(model)
    refused(run(model, "-p", "abc"), "the tokenizer is", "trained with ffffffff")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", -1], ["temperature is -1.0; expected 0"]),
        (["--top-p", 1.2], ["top_p is 1.2; expected above 0 and at most 1"]),
        (["--top-k", -1], ["top_k is -1; expected 0"]),
        (["--min-p", 2], ["min_p is 2.0"]),
        (["--repetition-penalty", 0], ["repetition_penalty is 0.0"]),
        (["--seed", -5], ["seed is -5; expected from 0"]),
        (["-n", -3], ["max_new_tokens is -3; expected at least 1"]),
        (["-n", 0], ["max_new_tokens is 0; expected at least 1"]),
        (["-n", "many"], ["--max-new-tokens", "integer"]),
        (["--stop", ""], ["stop string is empty"]),
        (["-f", "prompt.txt"], ["both -p and -f"]),
        (["--temprature", 1], ["--temprature: no such option; did you mean --temperature?"]),
    ],
)
def test_bad_options_are_one_line_with_what_was_expected(model, arguments, words):
    refused(run(model, "-p", "abc", *arguments), *words)


def test_a_prompt_of_zero_tokens_is_refused(model):
    refused(run(model, "-p", ""), "zero tokens")
    refused(run(model, stdin=""), "zero tokens")
    Path("empty.txt").touch()
    refused(run(model, "-f", "empty.txt"), "zero tokens")


def test_a_prompt_that_cannot_be_read_is_refused(model):
    refused(run(model, "-f", "nowhere.txt"), "nowhere.txt: no such file")
    refused(run(model, "-f", "."), ".: is a directory")
    Path("latin.txt").write_bytes(b"caf\xe9")
    refused(run(model, "-f", "latin.txt"), "latin.txt: byte 3 is 0xe9, which is not UTF-8")
    refused(run(model, stdin=b"\xff"), "stdin: byte 0 is 0xff")


def test_help_names_every_option(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    text = run("--help").stdout
    for option in ("--prompt", "--max-new-tokens", "--temperature", "--top-k", "--top-p", "--seed", "--stop", "--file"):
        assert option in text
