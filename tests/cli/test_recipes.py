"""`megalodon recipes`: what it lists, shows, copies, compares and refuses."""

import json

import pytest
from typer.testing import CliRunner, Result

from megalodon_cli import recipe_files
from megalodon_cli.app import app


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["recipes", *arguments])


def document(*arguments: str):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert shown["schema"] == f"megalodon/recipes-{arguments[0]}/1" and shown["ok"] is True
    return shown["result"]


def test_ls_names_every_recipe_with_its_size():
    found = {entry["name"]: entry for entry in document("ls")}
    assert set(found) == set(recipe_files.names())
    assert (found["quickstart"]["parameters"], found["quickstart"]["seq_len"]) == (1_170_304, 1024)
    assert found["7b"]["horizon"] == "2T" and found["finetune-lora"]["horizon"] == "3 epochs"
    table = run("ls").stdout.splitlines()
    assert len(table) == len(found) + 1 and len({line[:17] for line in table}) == len(table)


def test_show_prints_a_recipe_that_can_be_used_again(tmp_path):
    result = run("show", "debug", "optim.lr=0.5", "--origin")
    path = tmp_path / "again.yaml"
    path.write_text(result.stdout)
    assert "lr: 0.5" in result.stdout and "# command line" in result.stdout and "# default" in result.stdout
    assert document("show", str(path))["recipe"] == document("show", "debug", "--optim.lr", "0.5")["recipe"]
    lines = recipe_files.find("debug").read_text().splitlines()
    number = 1 + next(number for number, line in enumerate(lines) if "max_steps" in line)
    assert document("show", "debug", "--origin")["origins"]["train.max_steps"].endswith(f"debug.yaml:{number}")


def test_cp_makes_a_recipe_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("cp", "quickstart-llama", "mine.yaml").exit_code == 0
    assert run("cp", "quickstart", "own.yaml").exit_code == 0
    mine, own = document("show", "mine.yaml")["recipe"], document("show", "own.yaml")["recipe"]
    assert (mine["name"], mine["model"]["arch"], mine["model"]["num_layers"]) == ("mine", "llama", 4)
    assert (own["name"], own["data"]["dir"]) == ("own", "data/own")
    again = run("cp", "debug", "mine.yaml")
    assert again.exit_code == 2 and "error: mine.yaml is there already; --force replaces it" in again.stderr
    assert run("cp", "debug", "mine.yaml", "--force").exit_code == 0
    assert run("cp", "debug", "mine").exit_code == 2
    assert run("cp", "debug", "nowhere/mine.yaml").exit_code == 2


def test_check_shows_every_error_of_every_file_with_source_and_carets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("base: debug\nname: a\noptim:\n  beta: [0.9, 0.95]\n")
    (tmp_path / "b.yaml").write_text("base: debug\nname: b\ntrain:\n  precision: fp16\n")
    result = run("check", "a.yaml", "debug", "b.yaml")
    assert result.exit_code == 2
    assert "debug: pretrain, 151,328 parameters" in result.stdout
    assert result.stderr.splitlines() == [
        "error: a.yaml:4:3: optim.beta: unknown key; did you mean `betas`?",
        "    4 |   beta: [0.9, 0.95]",
        "      |   ^^^^",
        "error: b.yaml:4:14: train.precision: `fp16` is not one of auto, bf16-mixed, bf16, fp32",
        "    4 |   precision: fp16",
        "      |              ^^^^",
        "hint: megalodon recipes schema optim",
        "2 errors in a.yaml, b.yaml; nothing was started",
    ]


def test_check_says_what_is_still_to_be_set():
    assert document("check", "books-small", "debug") == [
        {"recipe": "books-small", "kind": "pretrain", "parameters": 39_639_040, "unset": ["data.sources.books.path"]},
        {"recipe": "debug", "kind": "pretrain", "parameters": 151_328, "unset": []},
    ]


def test_diff_shows_what_differs_and_nothing_else():
    keys = [entry["key"] for entry in document("diff", "quickstart", "quickstart-llama")]
    assert sorted(keys) == ["model.arch", "model.ffn_hidden_dim", "model.num_heads", "name"]
    assert "have the same values" in run("diff", "debug", "debug").stdout


def test_schema_explains_a_section_a_key_and_knows_near_names():
    section, key = run("schema", "optim").stdout, run("schema", "train.batch-tokens").stdout
    assert "optim.betas: 2 numbers  [[0.9, 0.95]]" in section and "train." not in section
    assert key.splitlines()[0] == "train.batch_tokens: a count such as 8192, 10B or 8Ki  [524288]"
    assert "no key optm; did you mean optim?" in run("schema", "optm").stderr
    assert set(document("schema")["properties"]) >= {"schema", "name", "model", "data", "train", "optim"}


@pytest.mark.parametrize(
    "name, meant",
    [
        ("200M-lama", "did you mean 200m-llama?"),
        ("zzzz", "a file is written with its ending"),
        ("no/x.yaml", "no file"),
    ],
)
def test_a_recipe_that_is_not_there_gets_the_nearest_name(name, meant):
    result = run("show", name)
    assert result.exit_code == 2 and meant in result.stderr and "hint: megalodon recipes ls" in result.stderr


def test_completion_knows_the_names():
    assert recipe_files.complete("books-t") == ["books-tiny", "books-tiny-llama"]
