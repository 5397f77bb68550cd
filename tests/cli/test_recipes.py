"""`megalodon recipes`: what it lists, shows, copies, compares and refuses."""

import json
from pathlib import Path

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
    assert found["debug"]["fits_here"] is True and 0 < found["debug"]["memory"] < found["7b"]["memory"]
    assert found["finetune-lora"]["memory"] is None
    table = run("ls").stdout.splitlines()
    assert "memory  fits here" in table[0]
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


@pytest.mark.parametrize(
    "file, example",
    [
        ("", "mine.yaml"),
        ("mine", "mine.yaml"),
        (r"a\1.yaml", "a-1.yaml"),
        ("my book.yaml", "my-book.yaml"),
        ("x/bücher.yaml", "x/b-cher.yaml"),
    ],
)
def test_cp_writes_no_recipe_that_its_name_would_spoil(file, example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("cp", "debug", file)
    assert (result.exit_code, list(tmp_path.iterdir())) == (2, [])
    assert result.stderr.startswith(f"error: `{Path(file)}` cannot name a recipe") and example in result.stderr


@pytest.mark.parametrize("name", ["123", "20240101123456789012345", "null"])
def test_cp_keeps_what_looks_like_a_value_a_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert run("cp", "debug", f"{name}.yaml").exit_code == 0
    assert document("show", f"./{name}.yaml")["recipe"]["name"] == name


def test_cp_says_that_a_baseline_keeps_the_data_of_its_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("cp", "quickstart-llama", "mine.yaml").exit_code == 0
    assert document("show", "mine.yaml")["recipe"]["data"]["dir"] == "data/quickstart"
    assert "shares the data of its base keeps doing so" in " ".join(run("cp", "--help").stdout.split())


@pytest.mark.parametrize("line", [["show", "optim.lr=1"], ["check", "optim.lr=1"], ["check", "~train.seed"]])
def test_changes_without_a_recipe_are_refused(line):
    result = run(*line)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: no recipe; expected a shipped name or a file ending in .yaml\n")


def test_a_path_with_an_equals_sign_is_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1.yaml").write_text("base: debug\nname: x\n")
    assert [found["recipe"] for found in document("check", "lr=1.yaml", "optim.lr=1")] == ["lr=1.yaml"]
    missing = run("check", "no/lr=1.yaml")
    assert missing.exit_code == 2 and "error: no file `no/lr=1.yaml`" in missing.stderr
    long = f"name={'x' * 300}"  # longer than a file's name may be
    assert recipe_files.split(["debug", "data.dir=a/b", long]) == (["debug"], ["data.dir=a/b", long])


def test_an_empty_name_is_refused():
    result = run("check", "debug", "")
    assert result.exit_code == 2 and result.stderr.startswith("error: no recipe ``; a file is written with its ending")


def test_c_and_config_name_a_recipe():
    found = document("check", "-c", "debug", "--config", "quickstart", "--config=200m")
    assert [entry["recipe"] for entry in found] == ["debug", "quickstart", "200m"]


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
    assert recipe_files.complete("optim.l") == []


def test_completion_knows_the_keys_after_a_recipe():
    for words, number in (("megalodon pretrain debug optim.l", 3), ("megalodon recipes show debug optim.l", 4)):
        asked = {"_MEGALODON_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(number)}
        found = CliRunner().invoke(app, [], prog_name="megalodon", env=asked).stdout.split()
        assert "optim.lr=" in found and all(key.startswith("optim.l") for key in found)
