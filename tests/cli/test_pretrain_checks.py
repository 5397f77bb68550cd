"""`--check-resume` and `--dry-run`: what they prove, what they cost, and that nothing of them stays."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from small_runs import files, pretrain

from megalodon.training.loop import Trainer


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("check"))
    shared = tmp_path_factory.getbasetemp() / "pretrain-data"
    shared.mkdir(exist_ok=True)
    Path("data").symlink_to(shared)
    monkeypatch.setattr("megalodon.training.metrics.matmul_peak", lambda *_: 1e9)


def left() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if path.parts[0] != "data")


def test_a_resumed_run_is_proven_to_be_the_uninterrupted_one_and_nothing_stays() -> None:
    done = pretrain("--check-resume", "4", "model.dropout=0.1")
    assert done.exit_code == 0, done.output
    assert "a run stopped after step 2 of 4 is the uninterrupted one" in done.stdout
    counts = {line.split("  ")[0]: line.split()[-4] for line in done.stdout.splitlines() if "bit by bit" in line}
    assert list(counts) == ["losses", "weights", "moments", "data position", "other state"] and counts["losses"] == "4"
    assert left() == []


def test_a_difference_ends_with_6_and_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    resume = Trainer.resume

    def slightly_off(trainer: Trainer) -> None:
        resume(trainer)
        if trainer.step:
            trainer.model.get_parameter("layers.0.mega.wv.bias").data[3] += 1e-3

    monkeypatch.setattr(Trainer, "resume", slightly_off)
    done = pretrain("--check-resume", "4", "optim.lr=1e-12")
    assert done.exit_code == 6, done.output
    assert "error: --check-resume 4: step 3: " in done.stderr
    assert " without a stop, " in done.stderr and done.stderr.rstrip().endswith(" resumed")
    assert left() == []


def test_the_checks_print_a_document() -> None:
    for line, kind in ((["--check-resume", "2"], "check-resume"), (["--dry-run"], "dry-run")):
        shown = json.loads(pretrain(*line, "--json").stdout)
        assert (shown["schema"], shown["ok"]) == (f"megalodon/{kind}/1", True)


def test_a_dry_run_goes_through_everything_beside_a_run_and_leaves_nothing() -> None:
    pretrain("--stop-at-step", "1")
    kept = files(".")
    Path("runs/.tmp-999999999-debug").mkdir()  # of a check that was killed
    Path("runs/.tmp-999999999-debug/model").touch()
    done = pretrain("--dry-run", "optim.lr=1")  # another recipe than that of the run: it does not matter
    assert done.exit_code == 0, done.output
    rows = [line.split()[0] for line in done.stdout.splitlines() if "GiB" in line]
    assert rows == ["build", "step", "evaluation", "samples", "save", "load", "export"]
    assert files(".") == kept


def test_a_dry_run_ends_with_the_codes_of_the_real_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pretrain("--dry-run", "model.model_dim=262144", "model.ffn_hidden_dim=1048576").exit_code == 4
    assert pretrain("--dry-run", "train.batch_tokens=150").exit_code == 2
    assert pretrain("--dry-run", "--device", "cuda:99").exit_code in (2, 3)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "runs")

    monkeypatch.setattr("megalodon.checkpoint.store.write_json", full)
    assert pretrain("--dry-run").exit_code == 3
    assert left() == []


@pytest.mark.parametrize("way", [["--check-resume", "4"], ["--dry-run"]])
def test_a_signal_ends_a_check_at_once_without_a_trace(way: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.train_step

    def interrupted(trainer: Trainer) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    assert pretrain(*way).exit_code == 143
    assert left() == []


@pytest.mark.parametrize(
    "line, said",
    [
        (["--check-resume", "7"], "a check of 7 steps; expected 2 to 6, the steps of this run"),
        (["--check-resume", "1"], "--check-resume"),
        (["--check-resume", "4", "--dry-run"], "--dry-run and --check-resume are both given"),
        (["--dry-run", "--max-time", "5s"], "--dry-run and --max-time are both given"),
        (["--check-resume", "4", "--stop-at-step", "2"], "--check-resume and --stop-at-step are both given"),
    ],
)
def test_what_makes_no_sense_is_refused(line: list[str], said: str) -> None:
    done = pretrain(*line)
    assert done.exit_code == 2 and said in done.stderr, done.output
    assert left() == []
