"""z-loss, averaged weights, shorter windows, the health panel: each in a run, and none moves data or resume."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import tiny_config
from stores import (
    BYTES_TABLE,
    NUM_CLASSES,
    SEQ_LEN,
    assert_same_run,
    metrics,
    saved_tensors,
    score,
    tiny_plan,
    tiny_run,
    tiny_store,
)

from megalodon.checkpoint.store import CheckpointConfig
from megalodon.data.loader import IGNORED, Batch, Loader
from megalodon.data.shards import Store
from megalodon.errors import RecipeError
from megalodon.model.megalodon import Megalodon
from megalodon.training.loop import Result, Row, Run, Task, Trainer, train
from megalodon.training.metrics import LogConfig
from megalodon.training.optim import OptimConfig
from megalodon.training.plan import ParallelConfig, TrainConfig, make_plan


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return tiny_store(tmp_path_factory.mktemp("data") / "store")


def rows(directory: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in metrics(directory) if row["kind"] == kind]


def test_the_logged_loss_is_without_the_penalty_and_z_is_logged_anyway(store: Store, tmp_path: Path) -> None:
    for name, weight in (("without", 0.0), ("with", 0.5)):
        tiny_run(store, tmp_path / name, tiny_plan(optim={"z_loss": weight}, train={"max_steps": 20}))
    without, penalised = (rows(tmp_path / name, "train") for name in ("without", "with"))
    assert (without[0]["loss"], without[0]["z"]) == (penalised[0]["loss"], penalised[0]["z"])
    assert without[0]["grad_norm"] != penalised[0]["grad_norm"]
    assert penalised[-1]["z"] < 0.5 * without[-1]["z"]


def test_norms_are_logged_before_clipping_with_the_factor_of_it(store: Store, tmp_path: Path) -> None:
    tiny_run(store, tmp_path, tiny_plan(optim={"grad_clip": 0.25}, train={"max_steps": 2}))
    for row in rows(tmp_path, "train"):
        assert set(row["norms"]) == {"embed", "cema", "norm", "attn", "ffn", "head"}
        assert row["grad_norm"] == pytest.approx(sum(norm**2 for norm in row["norms"].values()) ** 0.5, rel=1e-6)
        assert row["grad_norm"] > 0.25
        assert row["clip"] == pytest.approx(0.25 / row["grad_norm"], rel=1e-4)


OPTIONS: dict[str, dict[str, Any]] = {
    "ema": {"optim": {"ema": 0.7, "z_loss": 1e-3}},
    "health": {"log": {"health_every": 2}},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_resumed_run_is_an_uninterrupted_one_bit_by_bit(store: Store, tmp_path: Path, option: str) -> None:
    task = score()._replace(averaged=True)
    for name, stops in (("whole", (None,)), ("parts", (1, 4, None))):
        for stop in stops:
            tiny_run(store, tmp_path / name, tiny_plan(**OPTIONS[option]), tasks=(task,), stop_at_step=stop)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 7)
    if option == "health":
        assert [row["step"] for row in rows(tmp_path / "parts", "health")] == [2, 4, 6]


def test_averages_are_saved_evaluated_and_what_a_finished_run_hands_over(store: Store, tmp_path: Path) -> None:
    plan = tiny_plan(optim={"ema": 0.7})
    result = tiny_run(store, tmp_path, plan, tasks=(score()._replace(averaged=True),))
    tensors = saved_tensors(tmp_path, 7)
    for name, parameter in result.model.named_parameters():
        assert torch.equal(parameter, tensors[f"ema.{name}"])
        assert not torch.equal(parameter, tensors[f"model.{name}"]), name
    last = rows(tmp_path, "eval")[-1]
    for key, prefix in (("valid_loss", "model."), ("ema_valid_loss", "ema.")):
        kept = [t for name, t in tensors.items() if name.startswith(prefix) and not name.endswith(BUFFERS)]
        assert last[key] == pytest.approx(sum(float(t.double().abs().sum()) for t in kept), rel=1e-9)


BUFFERS = ("rope.freqs", "prior_count", "prior_mean", "prior_logv")


def test_averages_pass_over_steps_that_were_not_accepted(store: Store, tmp_path: Path) -> None:
    def poison(model: Megalodon) -> list[Row]:
        with torch.no_grad():
            model.layers[0].get_parameter("mega.wv.bias")[0] = float("nan")
        return []

    plan = tiny_plan(optim={"ema": 0.7}, checkpoint={"every": 1, "keep_last": 9}, train={"max_steps": 4})
    tiny_run(store, tmp_path, plan, tasks=(Task(poison, 2),))
    before, after = saved_tensors(tmp_path, 2), saved_tensors(tmp_path, 4)
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("ema."))


def test_an_infinite_norm_with_a_finite_loss_changes_no_parameter(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradient = Trainer._gradient

    def huge(self: Trainer, *args: Any) -> Any:
        found = gradient(self, *args)
        if self.step == 1:
            grad = self.model.embed.weight.grad
            assert grad is not None
            grad[3, 5] = float("inf")
        return found

    monkeypatch.setattr(Trainer, "_gradient", huge)
    tiny_run(store, tmp_path, tiny_plan(checkpoint={"every": 1}, train={"max_steps": 2}))
    (event,) = rows(tmp_path, "event")
    assert (event["event"], event["nonfinite"]) == ("skip", {"embed.weight": 1})
    train = rows(tmp_path, "train")
    assert train[1]["loss"] > 0 and train[1]["grad_norm"] is None and train[1]["skips"] == 1
    one, two = saved_tensors(tmp_path, 1), saved_tensors(tmp_path, 2)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_step_without_a_target_is_counted_and_changes_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Loader.batch

    def padded(self: Loader, first: int, count: int, *share: int) -> Batch:
        found = batch(self, first, count, *share)
        return found._replace(targets=np.full_like(found.targets, IGNORED)) if first == 4 else found

    monkeypatch.setattr(Loader, "batch", padded)
    plan = tiny_plan(checkpoint={"every": 1}, train={"max_steps": 2}, log={"health_every": 2}, optim={"ema": 0.5})
    tiny_run(store, tmp_path, plan)
    (event,) = rows(tmp_path, "event")
    assert (event["step"], event["event"], event["samples"]) == (2, "empty", [4, 4])
    assert (rows(tmp_path, "train")[1]["loss"], rows(tmp_path, "train")[1]["norms"]) == (None, {})
    assert "variance" not in rows(tmp_path, "health")[0]["layers"][0]
    one, two = saved_tensors(tmp_path, 1), saved_tensors(tmp_path, 2)
    assert all(torch.equal(one[name], two[name]) for name in one)


def warmed(store: Store, directory: Path, warmup: dict[str, Any] | None, **train_changes: Any) -> Result:
    """A run with windows of 32 tokens, which are cut."""
    config = {"max_steps": 6, "batch_tokens": 4 * 32, "seq_len_warmup": warmup} | train_changes
    plan = make_plan(
        TrainConfig(**config),
        OptimConfig(lr=1e-2),
        CheckpointConfig(every=3),
        LogConfig(),
        ParallelConfig(),
        seq_len=32,
        windows=50,
        device="cpu",
    )
    directory.mkdir(exist_ok=True)
    return train(tiny_config(), Loader(store, 32, "doc", 1), plan, Run(directory, NUM_CLASSES, BYTES_TABLE))


def test_shorter_windows_move_no_token_and_no_target(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[str, list[Any]] = {"cut": [], "whole": []}
    hidden = Megalodon.hidden
    name = ""

    def spy(self: Megalodon, tokens: torch.Tensor, *args: Any, **options: Any) -> Any:
        read[name].append((tuple(tokens.shape), tokens.flatten().tolist()))
        return hidden(self, tokens, *args, **options)

    monkeypatch.setattr(Megalodon, "hidden", spy)
    for name, warmup in (("cut", {"start": 8, "over": "4 steps"}), ("whole", None)):
        warmed(store, tmp_path / name, warmup, micro_batch=2)
    assert [shape for shape, _ in read["cut"]] == [(8, 8)] * 4 + [(4, 16)] * 4 + [(2, 32)] * 4
    assert [tokens for _, tokens in read["cut"]] == [tokens for _, tokens in read["whole"]]
    cut, whole = (rows(tmp_path / name, "train") for name in ("cut", "whole"))
    assert [row["tokens"] for row in cut] == [row["tokens"] for row in whole]
    assert [row["seq_len"] for row in cut] == [8, 8, 16, 16, 32, 32]
    assert cut[0]["loss"] != whole[0]["loss"]


def test_a_start_of_windows_that_does_not_fit_is_refused_with_the_plan() -> None:
    with pytest.raises(RecipeError, match=f"start 8 does not lead to data.seq_len {SEQ_LEN} by doubling"):
        tiny_plan(train={"seq_len_warmup": {"start": 8, "over": "5%"}})


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_schedules_know_nothing_of_a_stop(store: Store, tmp_path: Path, schedule: str) -> None:
    for name, how in (("whole", [{}]), ("parts", [{"stop_at_step": 2}, {"max_seconds": 0.0}, {}])):
        for options in how:
            tiny_run(store, tmp_path / name, tiny_plan(optim={"schedule": schedule}, train={"max_steps": 5}), **options)
    rates = [[row["lr"] for row in rows(tmp_path / name, "train")] for name in ("whole", "parts")]
    assert rates[0] == rates[1]
    assert len(rates[0]) == 5
