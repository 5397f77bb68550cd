"""`megalodon pretrain RECIPE --plan`: what it prints, for any device, and what it refuses; nothing is written."""

import json
from pathlib import Path

import pytest
from small_runs import TINY
from typer.testing import CliRunner, Result

from megalodon_cli.app import app


def plan(*arguments: str, recipe: str = "debug") -> Result:
    tiny = TINY if recipe == "debug" else []
    return CliRunner().invoke(app, ["pretrain", recipe, *tiny, "--plan", *arguments])


def test_a_plan_says_what_each_number_is_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = plan("--device", "cpu")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("plan debug: ") and " on 1 x this machine" in lines[0] and lines[0].endswith("fp32")
    sources = {line.split()[2] for line in lines if line.startswith(("parameters", "activations", "process"))}
    assert sources == {"derived", "assumed"} and "(measured: free memory" in lines[1]
    assert any("tokens/s, 6 steps in" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_json_tags_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = plan("--device", "h100", "--gpus", "2", "train.micro_batch=1", "--json")
    shown = json.loads(result.stdout)
    assert shown["schema"] == "megalodon/plan/1" and shown["ok"]
    found = shown["result"]
    assert found["ranks"] == 2 and found["layout"] == {"dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 1}
    assert (found["passes"] == 2 and found["fits"] is True and found["limit"] == "compute") or found["exchange"]
    assert found["peak"]["value"] == sum(part["value"] for part in found["memory"].values())
    tagged = [*found["memory"].values(), *found["activations"].values(), found["checkpoint"], found["step_seconds"]]
    assert {number["source"] for number in tagged} == {"derived", "assumed"}
    assert found["memory"]["process"]["source"] == found["device"]["speed"]["source"] == "assumed"


def test_a_recipe_whose_text_is_missing_still_plans() -> None:
    result = plan("--device", "cpu", "train.batch_tokens=4096", recipe="books-tiny")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("plan books-tiny: 7,868,800 parameters")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "h10"], "error: --device h10: no such device; did you mean h100?"),
        (["--gpus", "0"], "error: --gpus 0: expected a number of processes from 1, or all"),
        (["--gpus", "two"], "error: --gpus two: expected a number of processes from 1, or all"),
        (["--gpus", "3", "--device", "h100"], "is not a multiple of data.seq_len 37 x 3 data-parallel ranks"),
        (["--gpus", "3", "parallel.tp=2", "--device", "h100"], "error: 3 ranks are not a multiple of"),
        (["--gpus", "3", "parallel.tp=3", "--device", "h100"], "model.num_heads 2, model.norm_num_groups 4"),
        (["--dry-run"], "error: --plan and --dry-run are both given"),
        (["--stop-at-step", "3"], "error: --plan and --stop-at-step are both given"),
    ],
)
def test_what_cannot_be_planned_is_one_clear_line(arguments: list[str], said: str) -> None:
    result = plan(*arguments)
    assert result.exit_code == 2 and said in result.stderr
    assert sum(line.startswith("error: ") for line in result.stderr.splitlines()) == 1
