"""The laws of the loop: a cut into micro-batches changes nothing, a resumed run is an uninterrupted one."""

import contextlib
import json
import math
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import tiny_config
from pydantic import ValidationError
from stores import (
    BYTES_TABLE,
    NUM_CLASSES,
    SEQ_LEN,
    SHARD,
    assert_same_run,
    metrics,
    saved_tensors,
    score,
    tiny_plan,
    tiny_run,
    tiny_store,
)

import megalodon_kernels
from megalodon.checkpoint import saver
from megalodon.checkpoint.store import steps_in
from megalodon.config import InvalidRecipe
from megalodon.data.loader import IGNORED, Batch, Loader
from megalodon.data.prefetch import Prefetch
from megalodon.data.shards import Store
from megalodon.errors import CheckpointError, DataError, EnvironmentFault, NumericalError, OutOfMemory, RecipeError
from megalodon.model.megalodon import Megalodon
from megalodon.training.loop import Result, Row, Run, Task, Trainer
from megalodon.training.memory import fitted
from megalodon.training.optim import OptimConfig, build_optimizer, optimizer_tensors
from megalodon.training.plan import MICRO_TOKENS, ParallelConfig, TrainConfig
from megalodon.training.rollback import Rollback
from megalodon_kernels.cases import STATEFUL, TOKENWISE


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return tiny_store(tmp_path_factory.mktemp("data") / "store")


def test_the_loss_falls_and_padding_is_never_predicted(store: Store, tmp_path: Path) -> None:
    plan = tiny_plan(train={"max_steps": 30})
    result = tiny_run(store, tmp_path, plan)
    rows = [row for row in metrics(tmp_path) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert rows[0]["loss"] > 0.9 * math.log(NUM_CLASSES)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert (result.status, result.step, result.tokens) == ("finished", 30, 30 * 4 * 37)


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulation_changes_rounding_only(store: Store, tmp_path: Path, micro: int) -> None:
    """Rows have different numbers of targets, so a mean of means would differ by far more."""
    for name, rows in (("whole", 4), ("parts", micro)):
        tiny_run(
            store, tmp_path / name, tiny_plan(train={"micro_batch": rows, "max_steps": 3}, checkpoint={"every": 1})
        )
    whole, parts = (saved_tensors(tmp_path / name, 1) for name in ("whole", "parts"))
    for name in (name for name in whole if name.startswith("optim.exp_avg.")):  # a tenth of the first gradient
        assert torch.allclose(whole[name], parts[name], rtol=1e-4, atol=1e-6), name
    losses = [[row["loss"] for row in metrics(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert not all(torch.equal(whole[name], parts[name]) for name in whole)  # so the micro-batches were separate passes


def test_bits_per_byte_are_nats_over_bytes(store: Store, tmp_path: Path) -> None:
    tiny_run(store, tmp_path, tiny_plan(train={"max_steps": 1}))
    targets = Loader(store, SEQ_LEN, "doc", 1).batch(0, 4).targets
    targets = targets[targets != IGNORED]
    row = metrics(tmp_path)[0]
    assert row["bits_per_byte"] == pytest.approx(row["loss"] * len(targets) / math.log(2) / BYTES_TABLE[targets].sum())


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"train": {"micro_batch": 2}},
    "dropout": {
        "model": {"dropout": 0.1, "hidden_dropout": 0.2, "attention_dropout": 0.1},
        "train": {"micro_batch": 2},
    },
    "bf16": {"train": {"precision": "bf16-mixed"}},
    "matrices": {"optim": {"decay": "matrices", "schedule": "wsd"}, "model": {"share_emb": True}},
}


def both(store: Store, directory: Path, option: str, **how: Any) -> Result:
    chosen = OPTIONS[option]
    plan = tiny_plan(train=chosen.get("train"), optim=chosen.get("optim"))
    return tiny_run(store, directory, plan, model=chosen.get("model"), tasks=(score(),), **how)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_resumed_run_is_an_uninterrupted_one_bit_by_bit(store: Store, tmp_path: Path, option: str) -> None:
    both(store, tmp_path / "whole", option)
    for stop in (1, 4):
        result = both(store, tmp_path / "parts", option, stop_at_step=stop)
        assert (result.status, result.step) == ("milestone", stop)
        torch.manual_seed(stop)  # whatever the process drew meanwhile must not matter
    assert both(store, tmp_path / "parts", option).status == "finished"
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 7)


def test_a_run_killed_between_checkpoints_repeats_the_lost_steps_exactly(store: Store, tmp_path: Path) -> None:
    both(store, tmp_path / "whole", "plain")

    def die(row: Row) -> None:
        if row["kind"] == "train" and row["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        both(store, tmp_path / "parts", "plain", report=die)
    assert steps_in(tmp_path / "parts" / "checkpoints") == [3]
    both(store, tmp_path / "parts", "plain")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 7)


def test_a_stop_during_evaluation_saves_the_step_and_evaluates_it_later(store: Store, tmp_path: Path) -> None:
    both(store, tmp_path / "whole", "plain")
    task, told = score(), []

    def abandoned(model: Megalodon) -> list[Row] | None:
        if told or len(metrics(tmp_path / "parts")) < 4:
            return task.call(model)
        told.append("SIGTERM")
        return None

    plan = tiny_plan()
    tasks = (Task(abandoned, 2, at_start=True),)
    stop = lambda: told[0] if told else None  # noqa: E731
    result = tiny_run(store, tmp_path / "parts", plan, tasks=tasks, stop=stop)
    assert (result.status, result.step, result.reason) == ("stopped", 4, "SIGTERM")
    assert [row["kind"] for row in metrics(tmp_path / "parts") if row["step"] == 4] == ["train"]
    both(store, tmp_path / "parts", "plain")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 7)


def test_a_stop_before_the_first_step_saves_nothing(store: Store, tmp_path: Path) -> None:
    result = tiny_run(store, tmp_path, tiny_plan(), stop=lambda: "SIGINT")
    assert (result.status, result.step, result.saved) == ("stopped", 0, None)
    assert not (tmp_path / "checkpoints").exists()


def test_files_ask_to_save_and_to_stop_and_the_clock_stops(store: Store, tmp_path: Path) -> None:
    def ask(row: Row) -> None:
        if row["kind"] == "train" and row["step"] in (2, 5):
            (tmp_path / ("save" if row["step"] == 2 else "stop")).touch()

    plan = tiny_plan(checkpoint={"every": None})
    result = tiny_run(store, tmp_path, plan, report=ask)
    assert (result.step, result.reason) == (5, "the file `stop`")
    assert steps_in(tmp_path / "checkpoints") == [5, 2]
    assert not list(tmp_path.glob("s*"))
    assert tiny_run(store, tmp_path, plan, max_seconds=0.0).reason.startswith("--max-time")


def test_a_broken_newest_checkpoint_is_told_and_the_one_before_it_is_used(store: Store, tmp_path: Path) -> None:
    both(store, tmp_path / "whole", "plain")
    both(store, tmp_path / "parts", "plain", stop_at_step=6)
    shard = tmp_path / f"parts/checkpoints/step-00000006/tensors/{SHARD}"
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    told: list[Row] = []
    both(store, tmp_path / "parts", "plain", report=told.append)
    texts = [row["text"] for row in told if "text" in row]
    assert f"{SHARD} has sha256" in texts[0] and "the checkpoint before it" in texts[0]
    assert texts[1].startswith("resuming at step 3 (444 tokens")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 7)


def test_after_a_fallback_the_next_save_keeps_itself_and_the_good_one(store: Store, tmp_path: Path) -> None:
    plan = tiny_plan(checkpoint={"every": 2, "keep_last": 2})
    tiny_run(store, tmp_path, tiny_plan(checkpoint={"every": 2}), stop_at_step=6)
    for step in (4, 6):
        shard = tmp_path / f"checkpoints/step-{step:08d}/tensors/{SHARD}"
        content = bytearray(shard.read_bytes())
        content[-100] ^= 1
        shard.write_bytes(content)
    assert tiny_run(store, tmp_path, plan, stop_at_step=3).step == 3
    assert steps_in(tmp_path / "checkpoints") == [3, 2]
    assert len(list((tmp_path / "checkpoints").glob(".bad-step-*"))) == 2


@pytest.mark.parametrize("last", [False, True])
def test_a_task_that_fails_costs_no_step(store: Store, tmp_path: Path, last: bool) -> None:
    def fail(model: Megalodon) -> list[Row]:
        raise RecipeError("the prompt has zero tokens")

    plan = tiny_plan(train={"max_steps": 5}, checkpoint={"every": None})
    with pytest.raises(RecipeError, match="zero tokens"):
        tiny_run(store, tmp_path, plan, tasks=(Task(fail, None if last else 4),))
    assert steps_in(tmp_path / "checkpoints") == [5 if last else 4]
    assert tiny_run(store, tmp_path, plan, tasks=(score(),)).status == "finished"
    assert [row["step"] for row in metrics(tmp_path) if row["kind"] == "train"] == [1, 2, 3, 4, 5]


def test_a_run_that_cannot_go_on_has_not_begun(store: Store, tmp_path: Path) -> None:
    begun: list[str] = []
    tiny_run(store, tmp_path, tiny_plan(), stop_at_step=2, begin=lambda: begun.append("first"))
    before = metrics(tmp_path)
    with pytest.raises(Exception, match="cannot go on with other data: seed was"):
        tiny_run(store, tmp_path, tiny_plan(train={"seed": 2}), begin=lambda: begun.append("refused"))
    assert (begun, metrics(tmp_path)) == (["first"], before)


def test_memory_that_is_not_there_is_said_so(store: Store, tmp_path: Path) -> None:
    with pytest.raises(OutOfMemory, match=r"out of memory on cpu: .*tried to allocate [0-9]+ bytes") as caught:
        tiny_run(store, tmp_path, tiny_plan(), model={"model_dim": 2**18, "ffn_hidden_dim": 2**20})
    assert caught.value.hint == "a smaller model"


def test_a_step_that_is_not_finite_changes_no_parameter_and_three_stop_the_run(store: Store, tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def poison(model: Megalodon) -> list[Row]:
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        with torch.no_grad():
            model.layers[0].get_parameter("mega.wv.bias")[0] = math.nan
        return []

    with pytest.raises(NumericalError, match=r"step 5: loss nan.*3 steps in a row"):
        tiny_run(store, tmp_path, tiny_plan(), tasks=(Task(poison, 2),))
    rows = metrics(tmp_path)
    skipped = [row for row in rows if row["kind"] == "event"]
    assert [(row["step"], row["event"], row["samples"]) for row in skipped] == [
        (3, "skip", [8, 4]),
        (4, "skip", [12, 4]),
        (5, "stop", [16, 4]),
    ]
    assert "layers.0.mega.wv.bias" in skipped[0]["nonfinite"]
    assert [row["loss"] for row in rows if row["kind"] == "train"][2:] == [None, None]
    name = "layers.1.mega.wv.bias"
    assert torch.equal(seen[0][name], seen[1][name])


def test_a_failed_save_stops_the_run_or_is_told(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise EnvironmentFault("disk full")

    monkeypatch.setattr(saver, "save_step", fail)
    with pytest.raises(EnvironmentFault, match="disk full"):
        tiny_run(store, tmp_path / "stops", tiny_plan())
    told: list[Row] = []
    plan = tiny_plan(checkpoint={"every": 3, "on_error": "continue"})
    assert tiny_run(store, tmp_path / "goes-on", plan, report=told.append).status == "finished"
    assert next(row["text"] for row in told if row["kind"] == "warning").startswith("disk full; the run goes on")


def test_a_save_in_the_background_that_fails_is_noticed_within_a_step(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fails = saver.save_step, threading.Event()

    def second_fails(root: Path, step: int, *rest: Any) -> Path:
        if step == 4:
            assert fails.wait(60)
            raise EnvironmentFault("disk full")
        return real(root, step, *rest)

    told: list[Row] = []

    def during_step_6(row: Row) -> None:
        told.append(row)
        if row["kind"] == "train" and row["step"] == 6:
            fails.set()
            for thread in threading.enumerate():
                if thread.name == "save-4":
                    thread.join()

    monkeypatch.setattr(saver, "save_step", second_fails)
    with pytest.raises(EnvironmentFault, match="disk full"):
        tiny_run(store, tmp_path, tiny_plan(checkpoint={"every": 4}), report=during_step_6)
    assert [row["step"] for row in told if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert not [row for row in told if row.get("event") == "saved"]
    assert steps_in(tmp_path / "checkpoints") == []


def test_both_ways_of_saving_are_the_same_run(store: Store, tmp_path: Path) -> None:
    for name, background in (("front", False), ("back", True)):
        tiny_run(store, tmp_path / name, tiny_plan(checkpoint={"every": 2, "background": background}))
    assert_same_run(tmp_path / "front", tmp_path / "back", 7)
    assert [steps_in(tmp_path / name / "checkpoints") for name in ("front", "back")] == [[7, 6, 4]] * 2


def test_a_second_signal_gives_up_the_save_in_flight(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hangs(root: Path, step: int, tensors: Any, state: Any, about: Any, go_on: Callable[[], None]) -> Path:
        while True:
            go_on()

    def leave(row: Row) -> None:
        if row["kind"] == "train" and row["step"] == 5:
            raise SystemExit(130)

    monkeypatch.setattr(saver, "save_step", hangs)
    with pytest.raises(SystemExit):
        tiny_run(store, tmp_path, tiny_plan(checkpoint={"every": 4}), report=leave)
    assert not [thread for thread in threading.enumerate() if thread.name == "save-4"]


@pytest.mark.parametrize("ends", [True, False])
def test_a_save_in_flight_is_waited_for_before_an_error_leaves(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    real, poll, waits = saver.save_step, saver.Saver.poll, threading.Event()

    def slow(*arguments: Any) -> Path:
        assert waits.wait(60)
        if not ends:
            raise EnvironmentFault("disk full")
        return real(*arguments)

    def tells(self: saver.Saver, *, wait: bool = False) -> saver.Commit | None:
        if wait and self.pending:
            waits.set()
        return poll(self, wait=wait)

    monkeypatch.setattr(saver, "save_step", slow)
    monkeypatch.setattr(saver.Saver, "poll", tells)
    told: list[Row] = []

    def fail(row: Row) -> None:
        told.append(row)
        if row["kind"] == "train" and row["step"] == 5:
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        tiny_run(store, tmp_path, tiny_plan(checkpoint={"every": 4}), report=fail)
    assert steps_in(tmp_path / "checkpoints") == ([4] if ends else [])
    said = [row["text"] for row in told if row["kind"] in ("note", "warning") and row.get("event") != "compile"]
    assert len(said) == 1 and said[0].startswith("saved step 4" if ends else "disk full")


def test_a_run_that_was_to_stop_with_a_checkpoint_and_could_not_says_so(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise EnvironmentFault("disk full")

    plan = tiny_plan(checkpoint={"every": None, "on_error": "continue"})
    tiny_run(store, tmp_path, plan, stop_at_step=2)
    monkeypatch.setattr(saver, "save_step", fail)
    lost = r"stopping \(step 4 was asked for\): step 4 could not be saved, the newest checkpoint is of step 2"
    with pytest.raises(EnvironmentFault, match=lost):
        tiny_run(store, tmp_path, plan, stop_at_step=4)


@pytest.mark.parametrize(("minutes", "steps"), [(1e-9, [7, 6, 5, 4, 3, 2, 1]), (60.0, [7])])
def test_a_save_is_due_by_the_clock_too(store: Store, tmp_path: Path, minutes: float, steps: list[int]) -> None:
    tiny_run(store, tmp_path, tiny_plan(checkpoint={"every": None, "every_minutes": minutes, "keep_last": 9}))
    assert steps_in(tmp_path / "checkpoints") == steps


def test_who_asks_for_a_save_hears_of_it_even_if_there_is_nothing_to_save(store: Store, tmp_path: Path) -> None:
    told: list[Row] = []
    for stop_at_step in (2, 3):
        (tmp_path / "save").touch()
        plan = tiny_plan(checkpoint={"every": None})
        tiny_run(store, tmp_path, plan, stop_at_step=stop_at_step, report=told.append)
        assert not (tmp_path / "save").exists()
    texts = [row["text"] for row in told if row.get("event") == "asked"]
    assert texts == [
        "nothing to save before the first step",
        f"step 2 is saved already: {tmp_path / 'checkpoints/step-00000002'}",
    ]


def test_the_owner_shows_between_steps_that_it_lives(store: Store, tmp_path: Path) -> None:
    beats: list[None] = []
    tiny_run(store, tmp_path, tiny_plan(), beat=lambda: beats.append(None))
    assert len(beats) == 7


def test_retention_keeps_the_last_the_best_and_every_nth(store: Store, tmp_path: Path) -> None:
    losses = iter([5.0, 1.0, 4.0, 3.0, 3.0, 3.0, 2.0])
    task = Task(lambda model: [{"kind": "eval", "valid_loss": next(losses)}], 1)
    plan = tiny_plan(checkpoint={"every": 1, "keep_last": 2, "keep_best": 1, "keep_every": 4})
    tiny_run(store, tmp_path, plan, tasks=(task,))
    assert steps_in(tmp_path / "checkpoints") == [7, 6, 4, 2]
    assert json.loads((tmp_path / "checkpoints/best").read_text()) == {"step": 2, "valid_loss": 1.0}


def test_other_data_are_refused_at_resume(store: Store, tmp_path: Path) -> None:
    tiny_run(store, tmp_path / "run", tiny_plan(), stop_at_step=2)
    other = tiny_store(tmp_path / "other", seed=1)
    with pytest.raises(Exception, match="cannot go on with other data: fingerprint was"):
        tiny_run(other, tmp_path / "run", tiny_plan())


def test_a_jump_over_samples_survives_a_restart(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    get = Prefetch.get
    monkeypatch.setattr(Prefetch, "get", lambda self, first: (read.append(first), get(self, first))[1])

    @contextlib.contextmanager
    def trainer() -> Iterator[Trainer]:
        loader, run = Loader(store, SEQ_LEN, "doc", 1), Run(tmp_path, NUM_CLASSES, BYTES_TABLE)
        made = Trainer(tiny_config(), loader, tiny_plan(), run)
        with contextlib.closing(made.metrics), contextlib.closing(made.batches):
            made.resume()
            yield made

    with trainer() as first:
        first.train_step()
        first.rollbacks.append(Rollback(4, 1, [[4, 12]], "a reason", {}))
        first.train_step()
        first._save()
    with trainer() as again:
        assert (again.step, again.consumed, again.skipped_ranges) == (2, 16, [[4, 12]])
        again.train_step()
        assert read == [0, 12, 16]
        again.consumed += 1
        again._save()
    wrong = "21 samples were consumed, but 3 steps of 4 sequences are 12 and 8 were skipped"
    with pytest.raises(CheckpointError, match=wrong), trainer():
        pass


def test_an_error_of_the_data_ends_the_run_with_its_own_words(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Loader.batch

    def fails(self: Loader, first: int, count: int, *share: int) -> Batch:
        if first == 16:
            raise DataError("00000.bin was cut")
        return batch(self, first, count, *share)

    monkeypatch.setattr(Loader, "batch", fails)
    with pytest.raises(DataError, match="bin was cut"):
        tiny_run(store, tmp_path, tiny_plan())
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3, 4]
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_the_state_of_the_optimizer_has_a_name_for_every_tensor() -> None:
    model = Megalodon(tiny_config())
    names = optimizer_tensors(build_optimizer(dict(model.named_parameters()), OptimConfig(decay="matrices"))).keys()
    parameters = [name for name, _ in model.named_parameters()]
    assert names == {f"optim.{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq", "step") for name in parameters}


REFUSED: dict[str, dict[str, Any]] = {
    "train.precision bf16 ": {"train": {"precision": "bf16"}},
    "train.backend triton ": {"train": {"backend": "triton"}},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(said: str) -> None:
    with pytest.raises(InvalidRecipe) as caught:
        tiny_plan(**REFUSED[said])
    (problem,) = caught.value.problems
    assert f"{problem.key} {problem.text}".startswith(said)


@pytest.mark.parametrize("axis", ["dp_replicate", "dp_shard", "cp", "tp"])
def test_one_process_is_not_laid_out_as_several(axis: str) -> None:
    with pytest.raises(RecipeError, match="= 4 ranks, and this is one process") as caught:
        tiny_plan(parallel={axis: 4})
    assert f"{axis} 4" in str(caught.value) and caught.value.hint == "--gpus 4, or torchrun, or srun"


@pytest.mark.parametrize("number", [0, -1])
def test_a_part_of_a_batch_or_a_number_of_devices_is_at_least_one(number: int) -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        TrainConfig(micro_batch=number)
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        ParallelConfig(dp_shard=number)


def test_the_help_of_micro_batch_tells_what_auto_takes() -> None:
    assert f"{MICRO_TOKENS['cpu']:,}" in str(TrainConfig.model_fields["micro_batch"].description)


def test_numbers_that_do_not_go_together_name_all_parties() -> None:
    with pytest.raises(RecipeError, match=r"tokens 100 is not a multiple of data.seq_len 37; nearest: 74 and 111"):
        tiny_plan(train={"batch_tokens": 100})
    with pytest.raises(RecipeError, match="micro_batch 3 does not divide the 4 windows of a rank; fits: 1, 2, 4"):
        tiny_plan(train={"micro_batch": 3})


def test_the_device_is_checked() -> None:
    with pytest.raises(Exception, match="--device tpu: expected auto, cpu, cuda"):
        tiny_plan(device="tpu")
    with pytest.raises(EnvironmentFault, match="CUDA devices"):
        tiny_plan(device="cuda:99")


def test_the_reference_backend_trains_to_the_same_weights(store: Store, tmp_path: Path) -> None:
    runs = [
        tiny_run(store, tmp_path / name, tiny_plan(train={"backend": name, "max_steps": 2}))
        for name in ("portable", "reference")
    ]
    for (name, a), b in zip(runs[0].model.named_parameters(), runs[1].model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4), name


def test_a_step_runs_on_the_backend_it_names_alone(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss included, also when the memory of a pass is measured."""

    def other(*_: object) -> None:
        pytest.fail("an op ran on another backend")

    for op in STATEFUL | TOKENWISE:
        module = sys.modules[getattr(megalodon_kernels, op).__module__]
        for name in ("portable", "triton"):
            monkeypatch.setitem(module.IMPLEMENTATIONS, name, other)
    plan = tiny_plan(train={"backend": "reference", "max_steps": 1})
    tiny_run(store, tmp_path, fitted(tiny_config(), plan, None))
    assert len([row for row in metrics(tmp_path) if row["kind"] == "train"]) == 1


def test_deterministic_mode_trains_and_is_left_as_it_was(store: Store, tmp_path: Path) -> None:
    tiny_run(store, tmp_path, tiny_plan(train={"deterministic": True, "max_steps": 2}))
    assert torch.is_deterministic_algorithms_warn_only_enabled()
