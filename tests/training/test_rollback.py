"""A run that goes back and leaves samples out: every policy is obeyed, and a kill anywhere changes nothing."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stores import SEQ_LEN, SHARD, assert_same_run, metrics, score, tiny_plan, tiny_run, tiny_store

from megalodon.checkpoint.store import steps_in
from megalodon.data.loader import Batch, Loader
from megalodon.data.shards import Store
from megalodon.errors import CheckpointError, EnvironmentFault, NumericalError
from megalodon.training import guard
from megalodon.training.loop import Result, Row, Task, Trainer
from megalodon.training.rollback import Rollback, first_sample, merged, read_rollbacks, write_rollbacks


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return tiny_store(tmp_path_factory.mktemp("data") / "store", documents=120)


Poison = Callable[..., None]


def poisoning(patch: pytest.MonkeyPatch, store: Store) -> Poison:
    """Make every step that reads one of these samples end with this loss, by content: whenever it is read."""

    def apply(*samples: int, loss: float = math.nan) -> None:
        loader = Loader(store, SEQ_LEN, "doc", 1)
        bad = {loader.batch(sample, 1).tokens.tobytes() for sample in samples}
        gradient = Trainer._gradient

        def poisoned(self: Trainer, batch: Batch, *args: Any) -> Any:
            found = gradient(self, batch, *args)
            hit = any(row.tobytes() in bad for row in batch.tokens)
            return found._replace(loss=loss) if hit else found

        patch.setattr(Trainer, "_gradient", poisoned)

    return apply


@pytest.fixture
def poison(store: Store, monkeypatch: pytest.MonkeyPatch) -> Poison:
    return poisoning(monkeypatch, store)


def run(store: Store, directory: Path, steps: int = 12, *, model: dict[str, Any] | None = None, **how: Any) -> Result:
    chosen = how.pop("guard", {})
    plan = tiny_plan(train={"max_steps": steps, "guard": chosen}, optim=how.pop("optim", None))
    return tiny_run(store, directory, plan, **{"model": model, "tasks": (score(),), **how})


def state(directory: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / f"checkpoints/step-{step:08d}/state.json").read_text())
    return found


def test_three_bad_steps_go_back_and_their_samples_are_left_out(store: Store, tmp_path: Path, poison: Poison) -> None:
    poison(17, 21, 25)  # steps 5, 6, 7; checkpoints at 3, 6, 9
    assert run(store, tmp_path).status == "finished"
    events = [row for row in metrics(tmp_path) if row["kind"] == "event"]
    assert [(e["event"], e["step"], e["from"], e["to"], e["samples"]) for e in events] == [
        ("rollback", 3, 7, 3, [[16, 28]])
    ]
    assert "3 steps in a row were skipped" in events[0]["reason"]
    trained = [row for row in metrics(tmp_path) if row["kind"] == "train"]
    assert [row["step"] for row in trained] == list(range(1, 13))
    assert all(row["loss"] is not None for row in trained)
    data = state(tmp_path, 12)["data"]
    assert (data["samples_consumed"], data["skipped_ranges"]) == (12 * 4 + 12, [[16, 28]])
    assert (trained[3]["rollbacks"], trained[-1]["rollbacks"], trained[-1]["skips"]) == (1, 1, 0)
    assert steps_in(tmp_path / "checkpoints") == [12, 9, 6]
    assert len(list((tmp_path / "checkpoints").glob(".bad-step-00000006-*"))) == 1


def test_best_never_names_a_step_that_was_rolled_back(store: Store, tmp_path: Path, poison: Poison) -> None:
    poison(17, 21, 25)
    losses, named = iter(range(100, 0, -1)), []

    def look(row: Row) -> None:
        if row["kind"] == "event" and row["event"] == "rollback":
            named.append(json.loads((tmp_path / "checkpoints" / "best").read_text())["step"])

    better = Task(lambda model: [{"kind": "eval", "valid_loss": float(next(losses))}], every=3)
    run(store, tmp_path, tasks=(better,), report=look)
    assert named == [3], "step 6 was better, and is set aside"


def test_best_is_put_right_after_a_kill_between_setting_aside_and_naming(
    store: Store, tmp_path: Path, poison: Poison, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(17, 21, 25)
    losses, named = iter(range(100, 0, -1)), []
    better = Task(lambda model: [{"kind": "eval", "valid_loss": float(next(losses))}], every=3)

    def die(*_: object) -> None:
        if read_rollbacks(tmp_path):
            raise Killed

    def look(row: Row) -> None:
        if row.get("event") == "resumed":
            named.append(json.loads((tmp_path / "checkpoints" / "best").read_text())["step"])

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("megalodon.training.loop.point_at_best", die)
        run(store, tmp_path, tasks=(better,))
    assert steps_in(tmp_path / "checkpoints") == [3]
    run(store, tmp_path, tasks=(better,), report=look)
    assert named == [3]


@pytest.mark.parametrize("model", [{}, {"dropout": 0.1, "hidden_dropout": 0.2, "attention_dropout": 0.1}])
def test_what_was_trained_is_what_a_run_without_the_samples_would_have(
    store: Store, tmp_path: Path, poison: Poison, model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the rollback the tensors are those of a run in which the samples never existed."""
    batch = Loader.batch
    monkeypatch.setattr(Loader, "batch", lambda self, first, *n: batch(self, first + 12 * (first >= 16), *n))
    run(store, tmp_path / "without", model=model)
    monkeypatch.setattr(Loader, "batch", batch)
    poison(17, 21, 25)
    run(store, tmp_path / "back", model=model)
    losses = [
        [(row["step"], row["loss"]) for row in metrics(tmp_path / name) if row["kind"] == "train"]
        for name in ("without", "back")
    ]
    assert losses[0] == losses[1]


class Killed(BaseException):
    """What a SIGKILL would do, at a chosen moment."""


MOMENTS = {
    "after the file": "write_rollbacks",
    "while checkpoints are set aside": "set_aside",
    "before the rows are cut": "open_at",
}


TWICE = (17, 21, 25, 41, 45, 49)
"""Three bad steps, and three after the first rollback, so that the second one jumps in a jumped stream."""
VARIED: dict[str, Any] = {"model": {"dropout": 0.1, "attention_dropout": 0.1}, "optim": {"ema": 0.8}}


@pytest.fixture(scope="module")
def whole(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two rollbacks that nothing interrupted."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        poisoning(patch, store)(*TWICE)
        run(store, directory, 14, **VARIED)
    assert [(r.at, r.to) for r in read_rollbacks(directory)] == [(7, 3), (10, 6)]
    return directory


@pytest.mark.parametrize("moment", [*MOMENTS, "on its row", "two steps later"])
def test_a_kill_around_a_rollback_changes_nothing(
    store: Store, whole: Path, tmp_path: Path, poison: Poison, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(*TWICE)
    armed = [True]

    def die(*_: object) -> None:
        if armed:
            armed.clear()
            raise Killed

    def report(row: Row) -> None:
        if (moment == "on its row" and row.get("event") == "rollback") or (
            moment == "two steps later" and row["kind"] == "train" and row["rollbacks"] and row["step"] == 5
        ):
            die()

    with monkeypatch.context() as patch:
        if moment == "after the file":
            patch.setattr(Trainer, "_restore", lambda self, saved: die())
        elif moment == "while checkpoints are set aside":
            patch.setattr("megalodon.training.loop.set_aside", die)
        elif moment == "before the rows are cut":
            cut = Trainer._cut_back

            def cut_back(self: Trainer) -> None:
                if self.rollbacks:
                    die()
                cut(self)

            patch.setattr(Trainer, "_cut_back", cut_back)
        with pytest.raises(Killed):
            run(store, tmp_path / "parts", 14, report=report, **VARIED)
    assert len(read_rollbacks(tmp_path / "parts")) == 1
    run(store, tmp_path / "parts", 14, **VARIED)
    assert_same_run(whole, tmp_path / "parts", 14)
    assert (whole / "rollbacks.json").read_bytes() == (tmp_path / "parts/rollbacks.json").read_bytes()


def test_three_rollbacks_and_then_the_run_stops_with_a_report(store: Store, tmp_path: Path, poison: Poison) -> None:
    poison(*range(16, 64))
    with pytest.raises(
        NumericalError, match=r"step 7: .*max_rollbacks 3 .*; step 7 went back to 3: loss nan"
    ) as caught:
        run(store, tmp_path)
    assert caught.value.exit_code == 5
    assert [(r.to, r.samples) for r in read_rollbacks(tmp_path)] == [
        (3, [[16, 28]]),
        (3, [[28, 40]]),
        (3, [[40, 52]]),
    ]
    with pytest.raises(NumericalError, match="max_rollbacks 3"):  # the count is not forgotten
        run(store, tmp_path)
    last = metrics(tmp_path)[-1]
    assert (last["kind"], last["event"], last["step"], last["samples"]) == ("event", "stop", 7, [60, 4])


def test_no_rollback_is_allowed_with_zero_and_none_possible_before_the_first_checkpoint(
    store: Store, tmp_path: Path, poison: Poison
) -> None:
    poison(17, 21, 25)
    with pytest.raises(NumericalError, match=r"step 7: .*max_rollbacks 0 does not allow another"):
        run(store, tmp_path / "none", guard={"max_rollbacks": 0})
    poison(5, 9, 13)
    with pytest.raises(NumericalError, match=r"step 4: .*no checkpoint from before step 2 to go back to"):
        run(store, tmp_path / "early")


@pytest.mark.parametrize("policy", ["log", "skip", "rollback"])
def test_a_spike_is_met_as_the_policy_says(
    store: Store, tmp_path: Path, poison: Poison, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "WINDOW", 4)
    poison(33, loss=1e4)  # step 9
    result = run(store, tmp_path, guard={"spike": policy})
    events = {row["event"] for row in metrics(tmp_path) if row["kind"] == "event" and "1e+04" in row["reason"]}
    assert events == {{"log": "spike", "skip": "skip", "rollback": "rollback"}[policy]}
    rollbacks = [r for r in read_rollbacks(tmp_path) if "1e+04" in r.reason]
    assert [(r.at, r.samples) for r in rollbacks] == ([(9, [[32, 36]])] if policy == "rollback" else [])
    assert result.status == "finished"


def test_a_damaged_checkpoint_is_not_the_one_to_go_back_to(store: Store, tmp_path: Path, poison: Poison) -> None:
    poison(29, 33, 37)  # steps 8, 9, 10

    def damage(row: Row) -> None:
        if row.get("event") == "saved" and row["step"] == 6:
            (tmp_path / "checkpoints/step-00000006/tensors" / SHARD).unlink()

    told: list[Row] = []
    run(store, tmp_path, report=lambda row: (damage(row), told.append(row))[1])
    assert [r.to for r in read_rollbacks(tmp_path)] == [3]
    assert "trying the checkpoint before it" in next(row["text"] for row in told if row["kind"] == "warning")


def test_positions_jump_over_ranges_in_any_order() -> None:
    ranges = [[20, 24], [8, 16], [16, 20]]
    firsts = [first_sample(step, 4, ranges)[0] for step in range(1, 6)]
    assert firsts == [0, 4, 24, 28, 32]
    assert first_sample(2, 4, ranges)[1] == []
    assert first_sample(3, 4, ranges)[1] == [[8, 16], [16, 20], [20, 24]]
    assert merged([12, 8, 24], 4) == [[8, 16], [24, 28]]


def test_the_record_of_rollbacks_is_read_as_it_was_written_and_nothing_else(tmp_path: Path) -> None:
    assert read_rollbacks(tmp_path) == []
    kept = [Rollback(7, 3, [[16, 28]], "loss nan", {"embed.weight": 5})]
    write_rollbacks(tmp_path, kept)
    assert read_rollbacks(tmp_path) == kept
    for wrong in ("{}", '{"rollbacks": [{}]}', '{"rollbacks": 3}', "[", '{"rollbacks": [[]]}'):
        (tmp_path / "rollbacks.json").write_text(wrong)
        with pytest.raises(CheckpointError, match=r"rollbacks\.json"):
            read_rollbacks(tmp_path)
    with pytest.raises(EnvironmentFault, match=r"nowhere/rollbacks\.json could not be written"):
        write_rollbacks(tmp_path / "nowhere", kept)
