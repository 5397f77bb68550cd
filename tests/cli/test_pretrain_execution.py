"""`pretrain --profile` and `--deterministic`, and the passes that a run keeps once it has found them."""

import json
from pathlib import Path

import pytest
from small_runs import pretrain, record

from megalodon_cli.run_start import micro_rows


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    shared = tmp_path_factory.getbasetemp() / "pretrain-data"
    shared.mkdir(exist_ok=True)
    Path("data").symlink_to(shared)
    monkeypatch.setattr("megalodon.training.metrics.matmul_peak", lambda *_: 1e9)


def test_steps_are_traced_into_the_run() -> None:
    done = pretrain("--profile", "2..3", "--max-steps", "4", "--deterministic")
    assert done.exit_code == 0, done.output
    trace = json.loads(Path("runs/debug/profile/steps-2-3.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"step 2", "step 3"} <= names and "step 4" not in names
    assert "deterministic: true" in Path("runs/debug/recipe.yaml").read_text()


@pytest.mark.parametrize("given", ["3..2", "0..2", "2", "a..b", "2..", "9..9"])
def test_steps_that_cannot_be_traced_are_refused(given: str) -> None:
    done = pretrain("--profile", given, "--max-steps", "4")
    assert done.exit_code == 2
    assert (
        f"error: --profile{': expected steps A..B' if given != '9..9' else ' 9..9: the run has 4 steps'}" in done.stderr
    )
    assert not Path("runs").exists()


def test_a_run_that_goes_on_keeps_the_windows_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pretrain("--stop-at-step", "2").exit_code == 0
    first = record("runs/debug")["micro_rows"]
    assert first == 4
    monkeypatch.setattr("megalodon.training.plan.MICRO_TOKENS", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr("megalodon.training.memory.MICRO_TOKENS", {"cpu": 1, "cuda": 1})
    done = pretrain()
    assert done.exit_code == 0, done.output
    assert "; 4 in a pass" in done.stderr
    assert pretrain("-o", "runs/other", "--stop-at-step", "1").exit_code == 0
    assert record("runs/other")["micro_rows"] == 1, "a new run finds its own"


@pytest.mark.parametrize("changed", ["device", "train.batch_tokens", "data.seq_len"])
def test_the_windows_of_a_pass_are_found_again_where_they_mean_something_else(changed: str) -> None:
    assert pretrain("--stop-at-step", "1").exit_code == 0
    path = Path("runs/debug/run.json")
    there = json.loads(path.read_text()) | {"micro_rows": 2}
    frozen = there["frozen"]
    path.write_text(json.dumps(there | {"device": "cuda"} if changed == "device" else there))
    assert micro_rows(path.parent, frozen | {"optim.lr": 1.0}, "cpu") == (None if changed == "device" else 2)
    assert micro_rows(path.parent, frozen | {changed: 74}, "cuda" if changed == "device" else "cpu") == (
        2 if changed == "device" else None
    )
