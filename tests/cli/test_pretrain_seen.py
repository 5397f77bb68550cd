"""What `pretrain` leaves for whoever wants to see the run: sinks of `log.to`, data and tokenizer by hash, a report."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from megalodon_cli.app import app


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megalodon.training.metrics.matmul_peak", lambda *_: 1e9)


def pretrain(*changes: str) -> Result:
    return CliRunner().invoke(app, ["pretrain", "debug", "train.max_steps=4", "eval.tokens=400", *changes])


def test_a_run_that_continues_is_one_curve_in_tensorboard_and_tells_what_it_is() -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert pretrain("log.to=[tensorboard]", "--stop-at-step", "2").exit_code == 0
    done = pretrain("log.to=[tensorboard]")
    assert done.exit_code == 0, done.output
    run = Path("runs/debug")
    board = EventAccumulator(str(run / "logs/tensorboard"), {"scalars": 0}).Reload()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for kind, key in (("train", "loss"), ("eval", "valid_loss")):
        expected = [(row["step"], pytest.approx(row[key])) for row in rows if row["kind"] == kind]
        assert [(event.step, event.value) for event in board.Scalars(f"{kind}/{key}")] == expected
    record = json.loads((run / "run.json").read_text())
    assert set(record["data"]) == {"train", "valid", "tokenizer"}
    assert all(re.fullmatch("[0-9a-f]{16,64}", value) for value in record["data"].values())
    report = (run / "report.md").read_text()
    titles = ["Scores", "By position", "Checkpoints", "Baseline", "Samples", "Ledger", "Made by", "Overrides", "Next"]
    assert re.findall("^## (.*)$", report, re.M) == titles
    assert "megalodon generate debug -p TEXT" in report and f"tokenizer {record['data']['tokenizer'][:12]}" in report


def test_a_missing_extra_is_named_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused = pretrain("log.to=[trackio]")
    assert refused.exit_code == 3
    assert "log.to: trackio needs the extra [trackio]: pip install 'megalodon-lm[trackio]'" in refused.stderr
    assert not Path("runs").exists() and not Path("data").exists()
