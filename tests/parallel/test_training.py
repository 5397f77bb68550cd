"""Runs on several ranks: the same losses, weights and moments as on one, also after a stop and in another layout."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import random_tokens, tiny_model
from rank_runs import LAYOUTS, SEQ_LEN, STEPS, parts
from ranks import on_ranks
from stores import BYTES_TABLE, NUM_CLASSES, metrics, saved_tensors, tiny_store
from tolerances import distance

from megalodon.data.loader import validation_batches
from megalodon.errors import CheckFailed
from megalodon.evaluation.perplexity import evaluate
from megalodon.model.adapters import LoraConfig, inject
from megalodon.parallel.layout import Layout
from megalodon.parallel.mesh import Mesh
from megalodon.parallel.several import SeveralRanks
from megalodon.training.guard import StepGuard
from megalodon.training.loop import Run, Task, Trainer, train
from megalodon.training.optim import gradient_norms, parameter_of
from megalodon.training.rollback import Rollback, write_rollbacks


def run(folder: str, layout: Layout | None, isolate: str = "doc", stop_at: int | None = None, **how: Any) -> Any:
    """Train, or go on, as one rank of a layout: how it ended, at which step, and on the main rank the weights."""
    build = with_adapters if how.pop("adapters", False) else None
    config, loader, plan, ranks = parts(folder, layout, isolate, how)

    def score(model: Any) -> Any:
        batches = validation_batches(loader.store, SEQ_LEN, "doc", 3, 500)
        found = evaluate(model, batches, BYTES_TABLE, NUM_CLASSES, bf16=plan.bf16, ranks=ranks)
        return found and [found.row()]

    def count(model: Any) -> Any:
        return [{"kind": "sample", "prompt": "", "text": f"{model.num_parameters()}"}]

    tasks = (Task(score, 2, at_start=True, averaged=True, by_all=True), Task(count, 2))
    about = Run(Path(folder), NUM_CLASSES, BYTES_TABLE, tasks=tasks, ranks=ranks, stop_at_step=stop_at, build=build)
    result = train(config, loader, plan, about)
    weights = {name: p.detach() for name, p in result.model.named_parameters()} if ranks.main else {}
    return result.status, result.step, weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_store(tmp_path / "store")
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    return tmp_path


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for row in metrics(folder) if row["kind"] != "health"]


def health(folder: Path) -> list[dict[str, Any]]:
    return [row for row in metrics(folder) if row["kind"] == "health"]


def assert_alike(one: Any, other: Any, what: str = "") -> None:
    """Numbers within float32 sums in another order; everything else equal."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), what
        for key in one:
            assert_alike(one[key], other[key], f"{what}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), what
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_alike(*pair, f"{what}.{number}")
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=2e-5, abs=1e-7), what
    else:
        assert one == other, what


@pytest.mark.parametrize("isolate", ["doc", pytest.param("none", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["fsdp2", "cp2", "tp2"])
def test_a_run_on_several_ranks_is_that_of_one(folder: Path, name: str, isolate: str) -> None:
    status, step, weights = run(str(folder / "one"), None, isolate)
    found = on_ranks(LAYOUTS[name].world_size, run, str(folder / "many"), LAYOUTS[name], isolate)
    assert [(s, n) for s, n, _ in found] == [(status, step)] * len(found)
    for one, many in zip(rows(folder / "one"), rows(folder / "many"), strict=True):
        assert_alike(one, many)
    if name == "tp2":  # in others rank 0 reads a part of the windows, whose states these rows are of
        for one, many in zip(health(folder / "one"), health(folder / "many"), strict=True):
            assert_alike(one, many)
    whole, parts = (saved_tensors(folder / x, STEPS) for x in ("one", "many"))
    assert whole.keys() == parts.keys()
    for key in whole:
        assert distance(parts[key], whole[key]) < 2e-3, key  # Adam divides small gradients by their own size
    assert found[0][2].keys() == weights.keys()
    for key in weights:
        assert distance(found[0][2][key], weights[key]) < 2e-3, key


def test_all_ranks_leave_out_what_a_rollback_did(folder: Path) -> None:
    """Killed behind a rollback and before the next save: only rollbacks.json, which rank 0 reads, knows of it."""
    for name in ("one", "many"):
        run(str(folder / name), None, stop_at=2)
        write_rollbacks(folder / name, [Rollback(4, 2, [[16, 24]], "a spike", {})])
    run(str(folder / "one"), None)
    on("fsdp2", run, str(folder / "many"))
    for one, many in zip(rows(folder / "one"), rows(folder / "many"), strict=True):
        assert_alike(one, many)
    state = json.loads((folder / "many/checkpoints/step-00000004/state.json").read_text())
    assert state["data"]["skipped_ranges"] == [[16, 24]]


def failing(folder: str, layout: Layout | None, where: str) -> str:
    """What a rank says of a run whose task after step 1 fails: on rank 0 alone, on rank 1 in the midst of all."""
    config, loader, plan, ranks = parts(folder, layout, "none", {})

    def fail(model: Any) -> Any:
        if where == "by rank 0":
            raise OSError("nothing works")
        assert not ranks.alone
        if ranks.rank == 0:
            ranks.any(False)  # as in an evaluation that goes on
        raise OSError("only here")

    about = Run(Path(folder), NUM_CLASSES, BYTES_TABLE, tasks=(Task(fail, 1, by_all=where != "by rank 0"),))
    saves: list[int] = []
    trainer = Trainer(config, loader, plan, dataclasses.replace(about, ranks=ranks))
    trainer.resume()
    trainer._save = lambda **how: saves.append(trainer.step)  # type: ignore[method-assign]
    try:
        trainer.run_to_the_end()
    except OSError as error:
        if where != "by rank 0" and ranks.rank == 1:
            ranks.any(False)  # nothing else came between
        return f"{error}, saved {saves}"
    return "nothing"


@pytest.mark.parametrize(
    ("where", "said"), [("by rank 0", "nothing works, saved [1]"), ("by rank 1", "only here, saved []")]
)
def test_only_an_error_of_all_ranks_is_followed_by_a_save(folder: Path, where: str, said: str) -> None:
    """A rank that saved by itself would wait for the others, who wait for it in the task."""
    assert on_ranks(2, failing, str(folder / "many"), LAYOUTS["fsdp2"], where) == [said] * 2


def steering(layout: Layout) -> list[Any]:
    """Words and errors that ranks have from one another."""
    ranks, found = SeveralRanks(Mesh(layout, "cpu")), list[Any]()
    found.append(ranks.first("here" if ranks.rank else None))
    found.append(ranks.first(None))

    class Odd(Exception):
        def __init__(self, one: int, other: int) -> None:
            super().__init__(f"{one} and {other}")

    def fail() -> None:
        raise Odd(1, 2)

    try:
        ranks.from_main(fail)
    except Exception as error:
        found += [str(error), ranks.all_have(error), ranks.all_have(OSError())]
    return found


def test_words_and_errors_reach_every_rank() -> None:
    first, second = on_ranks(2, steering, LAYOUTS["fsdp2"])
    assert first == ["here", None, "1 and 2", True, False]
    assert second == ["here", None, "Odd: 1 and 2", True, False]


def reloaded(folder: str, layout: Layout | None) -> dict[str, torch.Tensor]:
    """What a rank has after resuming, put together again."""
    config, loader, plan, ranks = parts(folder, layout, "doc", {})
    trainer = Trainer(config, loader, plan, Run(Path(folder), NUM_CLASSES, BYTES_TABLE, ranks=ranks))
    trainer.resume()
    trainer.metrics.close()
    live = trainer.weights.live()
    return {name: ranks.whole(parameter_of(name), tensor).clone() for name, tensor in live.items()}


def with_adapters(model: Any) -> None:
    inject(model, LoraConfig(r=2), 1)


def as_rank(folder: str, layout: Layout | None, how: dict[str, Any]) -> Any:
    return run(folder, layout, **how)


@pytest.mark.parametrize("layout", ["fsdp2", pytest.param("hsdp", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "how", [{"arch": "llama"}, {"adapters": True}, {"share_emb": True}], ids=["the baseline", "adapters", "tied"]
)
def test_what_else_is_trained_is_sharded_too(folder: Path, layout: str, how: dict[str, Any]) -> None:
    run(str(folder / "one"), None, **how)
    found = on_ranks(LAYOUTS[layout].world_size, as_rank, str(folder / "many"), LAYOUTS[layout], how)
    assert [status for status, *_ in found] == ["finished"] * len(found)
    for one, many in zip(rows(folder / "one"), rows(folder / "many"), strict=True):
        assert_alike(one, many)
    whole, parts = (saved_tensors(folder / x, STEPS) for x in ("one", "many"))
    assert whole.keys() == parts.keys()
    for key in whole:
        assert distance(parts[key], whole[key]) < 2e-3, key


def in_bfloat16(folder: str, layout: Layout | None) -> Any:
    return run(folder, layout, precision="bf16-mixed")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2", "cp2", "tp2"])
def test_losses_in_bfloat16_follow_those_of_one(folder: Path, name: str) -> None:
    """Products are rounded to 2⁻⁹, the same on all; what is summed over ranks is float32, in another order."""
    in_bfloat16(str(folder / "one"), None)
    on_ranks(LAYOUTS[name].world_size, in_bfloat16, str(folder / "many"), LAYOUTS[name])
    one, many = ([row["loss"] for row in rows(folder / x) if row["kind"] == "train"] for x in ("one", "many"))
    assert many == pytest.approx(one, rel=2**-9)


RESHARDED = [(before, after) for before in ("one", "fsdp4", "cp2 x tp2") for after in ("one", "tp2", "hsdp")]
QUICK = {("one", "tp2"), ("fsdp4", "one"), ("cp2 x tp2", "hsdp")}


@pytest.mark.parametrize(
    ("before", "after"), [pytest.param(*p, marks=() if p in QUICK else pytest.mark.slow) for p in RESHARDED]
)
def test_a_checkpoint_is_read_in_any_layout(folder: Path, before: str, after: str) -> None:
    """Tensor by tensor exact; and the run goes on with the same data and the losses of one that never stopped."""
    where = str(folder / "many")
    on(before, run, where, 2)
    saved = saved_tensors(folder / "many", 2)
    found = on(after, reloaded, where)[0]
    assert found.keys() == saved.keys()
    assert [name for name in saved if not torch.equal(found[name], saved[name])] == []
    (status, step, _), *_ = on(after, run, where)
    assert (status, step) == ("finished", STEPS)
    run(str(folder / "one"), None)
    for one, many in zip(rows(folder / "one"), rows(folder / "many"), strict=True):
        assert_alike(one, many)
    state = [json.loads((folder / x / "checkpoints/step-00000004/state.json").read_text()) for x in ("one", "many")]
    assert state[0]["data"] == state[1]["data"]


def on(name: str, function: Any, where: str, stop_at: int | None = None) -> list[Any]:
    """Call it as each rank of a layout, or in this process as the only one."""
    more = () if stop_at is None else ("doc", stop_at)
    if name == "one":
        return [function(where, None, *more)]
    return on_ranks(LAYOUTS[name].world_size, function, where, LAYOUTS[name], *more)


def strayed(layout: Layout, name: str, rank: int) -> str:
    """What is said after one value of a parameter changed on one rank."""
    ranks = SeveralRanks(Mesh(layout, "cpu"))
    model = tiny_model(torch.float32, value_dim=44, ffn_hidden_dim=30)
    ranks.wrap(model, bf16=False)
    parameters = ranks.parameters(model)
    ranks.check_alike(parameters)
    if ranks.rank == rank:
        parameters[name].data.flatten()[0] += 1e-6
    with pytest.raises(CheckFailed) as fault:
        ranks.check_alike(parameters)
    return str(fault.value)


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("fsdp2", "layers.1.mega.cema.omega"),
        ("hsdp", "layers.0.mega.wv.weight"),
        ("fsdp2 x tp2", "layers.1.mega.timenorm.bias"),
        ("fsdp2 x tp2", "layers.0.nffn.norm.weight"),
    ],
)
def test_a_rank_that_strayed_is_found(layout: str, name: str) -> None:
    last = LAYOUTS[layout].world_size - 1
    for said in on_ranks(last + 1, strayed, LAYOUTS[layout], name, last):
        assert said == f"{name} of rank {last} is no longer what the other ranks hold"


def poisoned(layout: Layout) -> tuple[float, str | None, bool]:
    """A step whose gradient is not finite on one rank only: the norm of it, and the verdict."""
    ranks = SeveralRanks(Mesh(layout, "cpu"))
    model = tiny_model(torch.float32, value_dim=44, ffn_hidden_dim=30)
    ranks.wrap(model, bf16=False)
    parameters = ranks.parameters(model)
    hidden, _ = model.hidden(**ranks.piece(model, random_tokens(2, 40), None))
    (hidden.sum() * (float("nan") if ranks.rank == 1 else 1.0)).backward()
    gradients = ranks.gradients(model, parameters)
    norm, _ = gradient_norms(gradients, ranks.copies, ranks.sums)
    guard = StepGuard("skip", "log")
    verdict = guard.judge(1, ranks.sums([1.0])[0], float(norm))
    return float(norm), verdict.event, verdict.accept


@pytest.mark.parametrize("layout", ["fsdp2", "hsdp", "tp2", "cp2"])
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(layout: str) -> None:
    for norm, event, accept in on_ranks(LAYOUTS[layout].world_size, poisoned, LAYOUTS[layout]):
        assert norm != norm and event == "skip" and not accept
