"""Sinks of `log.to`: what arrives there, once, also after a stop or a kill; and what happens when one fails."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from megalodon.errors import EnvironmentFault
from megalodon.training.metrics import MetricsLog
from megalodon.training.sinks import Sinks, require, scalars

Scalars = dict[str, list[tuple[int, float]]]


def train(step: int, loss: float | None = None) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": loss if loss is not None else 10.0 - step, "tokens": 8 * step}


def evaluation(step: int) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "valid_loss": 9.5 - step, "by_position": {"1": 4.0, "256": 3.0}}


class Process:
    """A training process: writes metrics.jsonl and reports to the sinks, as the loop does."""

    left: ClassVar[list["Process"]] = []
    """Those that were killed in the middle of their work, as far as a test sees."""

    def __init__(self, directory: Path, *names: str, at: int | None = None, observed: bool = True) -> None:
        self.left.append(self)
        self.seen: list[dict[str, Any]] = []
        self.log = MetricsLog(directory / "metrics.jsonl")
        self.sinks = Sinks(names, directory, self.seen.append)
        self.sinks.open({"optim.lr": 1e-3}, offline=True)
        self.log.open_at(at or 0, observed)
        if at is not None:
            self.sinks({"kind": "note", "event": "resumed", "step": at, "text": "resuming"})

    def log_rows(self, *rows: dict[str, Any]) -> None:
        for row in rows:
            self.log.write(row)
            self.sinks(row)

    def close(self) -> None:
        self.left.remove(self)
        self.log.close()
        self.sinks.close()


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    yield
    for process in list(Process.left):
        process.close()


def events(directory: Path) -> Scalars:
    """What TensorBoard shows of a run: every scalar with its steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory / "logs" / "tensorboard"), {"scalars": 0})
    found.Reload()
    return {name: [(e.step, round(e.value, 4)) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_scalars_have_stable_names_and_leave_out_what_is_no_finite_number():
    row = {**train(7), "memory": 5, "grad_norm": None, "peak_share": float("nan")}
    assert scalars(row) == {"train/loss": 3.0, "train/tokens": 56.0, "train/memory": 5.0}
    assert scalars(evaluation(2)) == {
        "eval/valid_loss": 7.5,
        "eval/loss_at_position/1": 4.0,
        "eval/loss_at_position/256": 3.0,
    }
    health = {"kind": "health", "step": 3, "memory": {"tokens": [1, 2.5]}, "name": "x", "on": True}
    assert scalars(health) == {"health/memory/tokens/0": 1.0, "health/memory/tokens/1": 2.5}
    assert scalars({"kind": "event", "step": 3, "event": "skip", "samples": [0, 4]}) == {"event/skip": 1.0}
    assert scalars({"kind": "sample", "step": 3, "text": "x", "tokens": 5}) == {}


def test_tensorboard_has_every_scalar_against_its_step(tmp_path):
    run = Process(tmp_path, "tensorboard")
    run.log_rows(evaluation(0), train(1), {"kind": "event", "step": 2, "event": "skip"}, train(2), evaluation(2))
    run.close()
    found = events(tmp_path)
    assert found["train/loss"] == [(1, 9.0), (2, 8.0)]
    assert found["eval/loss_at_position/256"] == [(0, 3.0), (2, 3.0)]
    assert found["event/skip"] == [(2, 1.0)]
    assert [row["kind"] for row in run.seen] == ["eval", "train", "event", "train", "eval"]


@pytest.mark.parametrize("observed", [True, False])
@pytest.mark.parametrize("at", [None, 2])
def test_tensorboard_shows_no_step_twice_after_a_kill(tmp_path, at, observed):
    killed = Process(tmp_path, "tensorboard")
    killed.log_rows(evaluation(0), train(1), train(2), evaluation(2), train(3), train(4))  # and no close
    again = Process(tmp_path, "tensorboard", at=at, observed=observed)
    if at is None:
        again.log_rows(evaluation(0), train(1), train(2), evaluation(2))
    elif not observed:
        again.log_rows(evaluation(2))
    again.log_rows(train(3), train(4), evaluation(4), train(5))
    again.close()
    found = events(tmp_path)
    assert found["train/loss"] == [(step, 10.0 - step) for step in range(1, 6)]
    assert found["eval/valid_loss"] == [(step, 9.5 - step) for step in (0, 2, 4)]


def test_tensorboard_follows_a_run_that_rolls_back(tmp_path):
    run = Process(tmp_path, "tensorboard")
    run.log_rows(train(1), train(2), train(3, 99.0), {"kind": "event", "step": 3, "event": "rollback"})
    run.log_rows(train(2, 7.0), train(3, 6.0), train(4, 5.0))
    run.close()
    assert events(tmp_path)["train/loss"] == [(1, 9.0), (2, 7.0), (3, 6.0), (4, 5.0)]


class Foreign:
    """A module with the calls of wandb and of trackio that we make; a run keeps what it is given by its id or name."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.runs: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.finished = 0
        self.fails = False

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def init(self, **options: Any) -> Any:
        sys.stdout.write("* initialized\n")  # as trackio does
        self.asked.append(options)
        rows = self.runs.setdefault(options.get("id") or options["name"], [])
        return SimpleNamespace(log=lambda values, step: self._log(rows, values, step), finish=self._finish)

    def _log(self, rows: list[tuple[int, dict[str, float]]], values: dict[str, float], step: int) -> None:
        if self.fails:
            raise ConnectionError("no route\nto host")
        rows.append((step, values))

    def _finish(self) -> None:
        sys.stdout.write("* finished\n")
        self.finished += 1


@pytest.fixture(params=["wandb", "trackio"])
def foreign(request, monkeypatch):
    module = Foreign()
    monkeypatch.setitem(sys.modules, request.param, module)
    return SimpleNamespace(name=request.param, module=module)


def losses(rows: list[tuple[int, dict[str, float]]]) -> list[tuple[int, float]]:
    return [(step, values["train/loss"]) for step, values in rows if "train/loss" in values]


def test_a_run_that_continues_is_one_run_there_and_no_step_is_sent_twice(foreign, tmp_path, capsys):
    killed = Process(tmp_path, foreign.name)
    killed.log_rows(evaluation(0), train(1), train(2), evaluation(2), train(3))
    again = Process(tmp_path, foreign.name, at=2, observed=False)
    again.log_rows(evaluation(2), train(3), train(4), evaluation(4))
    again.close()
    [rows] = foreign.module.runs.values()
    assert losses(rows) == [(step, 10.0 - step) for step in range(1, 5)]
    assert [step for step, values in rows if "eval/valid_loss" in values] == [0, 2, 4]
    first, second = foreign.module.asked
    assert first == second and first["config"] == {"optim.lr": 1e-3} and first["project"] == "megalodon"
    assert foreign.module.finished == 1
    if foreign.name == "trackio":
        assert first["resume"] == "allow" and first["name"].startswith(f"{tmp_path.name}-")
        assert capsys.readouterr().out == ""
    else:
        assert (first["mode"], first["resume"], first["name"]) == ("offline", None, tmp_path.name)
        assert first["settings"]["console"] == "off" and first["dir"] == str(tmp_path / "logs")


def test_wandb_goes_online_only_without_offline(tmp_path, monkeypatch):
    module = Foreign()
    monkeypatch.setitem(sys.modules, "wandb", module)
    Sinks(["wandb"], tmp_path, lambda row: None).open({})
    assert (module.asked[0]["mode"], module.asked[0]["resume"]) == ("online", "allow")


def test_a_step_that_a_rollback_repeats_is_not_sent_again(foreign, tmp_path):
    run = Process(tmp_path, foreign.name)
    run.log_rows(train(1), train(2), train(3), {"kind": "event", "step": 3, "event": "rollback"}, train(2), train(3))
    run.log_rows(train(4))
    [rows] = foreign.module.runs.values()
    assert [step for step, _ in losses(rows)] == [1, 2, 3, 4]


def test_a_sink_that_is_named_later_begins_where_the_run_is(foreign, tmp_path):
    Process(tmp_path).log_rows(train(1), train(2), train(3))
    Process(tmp_path, foreign.name, at=1).log_rows(train(2), train(3))
    [rows] = foreign.module.runs.values()
    assert [step for step, _ in losses(rows)] == [2, 3]


def test_a_sink_that_fails_is_one_warning_and_the_others_go_on(tmp_path, monkeypatch):
    module = Foreign()
    monkeypatch.setitem(sys.modules, "trackio", module)
    run = Process(tmp_path, "trackio", "tensorboard")
    module.fails = True
    run.log_rows(train(1), train(2))
    run.close()
    warnings = [row["text"] for row in run.seen if row["kind"] == "warning"]
    assert warnings == [
        "log.to: trackio failed and is given up: no route to host; metrics.jsonl has everything",
    ]
    assert events(tmp_path)["train/loss"] == [(1, 9.0), (2, 8.0)]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_sink_that_cannot_be_opened_or_is_not_installed_is_an_error_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    with pytest.raises(EnvironmentFault, match=r"log\.to: wandb cannot be opened: .*init"):
        Sinks(["wandb"], tmp_path, lambda row: None).open({})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault) as caught:
        require(["trackio"])
    assert str(caught.value) == "log.to: trackio needs the extra [trackio]: pip install 'megalodon-lm[trackio]'"
    assert caught.value.exit_code == 3
    require([])


def test_nothing_is_imported_or_written_that_is_not_named(tmp_path):
    before = set(sys.modules)
    Process(tmp_path).log_rows(train(1))
    assert not {"wandb", "trackio", "tensorboard"} & (set(sys.modules) - before)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_wandb_itself_keeps_an_offline_run(tmp_path):
    wandb = pytest.importorskip("wandb", reason="the extra [wandb] is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    run = Process(tmp_path, "wandb")
    run.log_rows(train(1), evaluation(1), train(2))
    run.close()
    wandb.teardown()  # its own process writes the file; at the end of ours it is waited for in the same way
    assert not [row for row in run.seen if row["kind"] == "warning"]
    identity = json.loads((tmp_path / "logs" / "wandb.json").read_text())["id"]
    [file] = (tmp_path / "logs" / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb")
    data, at, logged = file.read_bytes(), 7, {}
    while at < len(data):  # blocks as in LevelDB: checksum, length, type; this file is smaller than a block
        size = int.from_bytes(data[at + 4 : at + 6], "little")
        record = Record.FromString(data[at + 7 : at + 7 + size])
        at += 7 + size
        if record.HasField("history"):
            items = {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            logged[int(items["_step"])] = {key: float(v) for key, v in items.items() if not key.startswith("_")}
    assert logged.keys() == {1, 2}
    assert logged[1]["train/loss"] == 9.0 and logged[1]["eval/loss_at_position/256"] == 3.0
    assert logged[2] == {"train/loss": 8.0, "train/tokens": 16.0}
