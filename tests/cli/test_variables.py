"""Options from the environment: every one has a variable, the command line stands above it, mistakes name it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from megalodon_cli.app import app


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: str, **variables: str) -> Result:
    env = {f"MEGALODON_{name}": value for name, value in variables.items()}
    return CliRunner(env=env).invoke(app, list(arguments))


def test_every_option_of_every_command_names_its_variable() -> None:
    for command in ("tokenize", "pretrain", "generate", "profile", "doctor", "recipes check", "runs show"):
        text = run(*command.split(), "-h").stdout
        assert "MEGALODON_QUIET" in text, command
    text = run("pretrain", "-h").stdout
    assert "MEGALODON_MAX_TIME" in text and "MEGALODON_OUT_DIR" in text and "MEGALODON_MAX_STEPS" not in text
    assert "MEGALODON_OFFLINE" in run().stdout


BAD = {
    "a choice": (["runs", "ls"], {"COLOR": "pink"}, "invalid value for `MEGALODON_COLOR`: `pink` is not one of"),
    "a flag": (["pretrain", "debug"], {"NO_PREPARE": "perhaps"}, "invalid value for `MEGALODON_NO_PREPARE`"),
    "a number": (["generate", "x", "-p", "y"], {"TOP_P": "much"}, "invalid value for `MEGALODON_TOP_P`"),
    "a range": (["generate", "x", "-p", "y"], {"TOP_P": "3"}, "MEGALODON_TOP_P"),
    "a time": (["pretrain", "debug"], {"MAX_TIME": "soon"}, "MEGALODON_MAX_TIME: `soon` is not a time such as 90s"),
    "a device": (["pretrain", "debug"], {"DEVICE": "tpu"}, "MEGALODON_DEVICE tpu: expected auto, cpu, cuda"),
    "a store": (["tokenize", "debug"], {"VALID": "few"}, "MEGALODON_VALID is `few`; expected a share"),
    "a file": (["runs", "ls"], {"LOG_FILE": "no/log"}, "MEGALODON_LOG_FILE no/log: cannot be written"),
    "a document": (["pretrain", "debug"], {"JSON": "1"}, "MEGALODON_JSON: pretrain prints"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_names_the_variable_it_came_from(name: str) -> None:
    line, variables, said = BAD[name]
    done = run(*line, **variables)
    assert done.exit_code == 2, done.output
    assert said in (json.loads(done.stdout)["error"]["message"] if "JSON" in variables else done.stderr)


def test_the_command_line_stands_above_the_environment_before_and_after_the_name() -> None:
    for line in (["--color", "never", "recipes", "ls"], ["recipes", "ls", "--color", "never"]):
        assert "\x1b[" not in run(*line, COLOR="always").stdout
    assert "\x1b[" in run("recipes", "ls", COLOR="always").stdout
    assert "--device x: expected" in run("pretrain", "debug", "--device", "x", DEVICE="cpu").stderr
    assert "--max-time: `0s`" in run("pretrain", "debug", "--max-time", "0s", MAX_TIME="soon").stderr
    assert run("runs", "ls", QUIET="0").stderr.startswith("note: no runs here")
    assert run("runs", "ls", QUIET="true").stderr == run("runs", "ls", QUIET="1").stderr == ""
    assert json.loads(run("runs", "ls", JSON="1").stdout)["ok"]


def test_a_repeatable_option_takes_one_value_with_all_its_spaces() -> None:
    Path("two words.txt").write_text("some text, long enough to count\n")
    done = run("tokenize", "--tokenizer", "bytes", INPUT="two words.txt", OUT_DIR="store", VALID="0.0")
    assert done.exit_code == 0, done.output
    assert Path("store/manifest.json").exists()


def test_generate_takes_its_options_from_the_environment() -> None:
    done = run("generate", "nope", MAX_NEW_TOKENS="3", PROMPT="x")
    assert done.exit_code == 2 and "nope: no such directory" in done.stderr


def test_a_variable_that_is_no_option_is_a_warning_with_the_nearest_one() -> None:
    done = run("runs", "ls", DEVCE="cpu", ZZZZZ="1", MAX_STEPS="3")
    assert done.exit_code == 0
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert warnings == [
        "warning: MEGALODON_DEVCE: no option has this variable; did you mean MEGALODON_DEVICE?",
        "warning: MEGALODON_MAX_STEPS is ignored: recipe keys never come from the environment; give --max-steps",
        "warning: MEGALODON_ZZZZZ: no option has this variable; `megalodon COMMAND --help` shows the variables",
    ]


def test_short_names_of_keys_stand_in_the_order_of_the_line() -> None:
    from megalodon_cli.app import spelled

    line = ["pretrain", "a", "--max-steps", "3", "train.max_steps=4", "--max_tokens=2M", "--init-from", "my run"]
    keys = ["train.max_steps=3", "train.max_steps=4", "train.max_tokens=2M", 'model.init_from="my run"']
    assert spelled(line) == ["pretrain", "a", *keys]
    assert spelled(["generate", "x", "--max-tokens", "3"]) == ["generate", "x", "--max-tokens", "3"]
