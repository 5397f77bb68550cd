"""Wherever a run is interrupted, the same call ends with the parameters, moments, data order and metrics of one that
was not: before a step, inside an accumulated gradient, inside an evaluation, at every file operation of a save."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import TIMES
from stores import tiny_plan, tiny_run, tiny_store

from megalodon.data.loader import Loader
from megalodon.data.shards import Store
from megalodon.model.megalodon import Megalodon
from megalodon.training.loop import Row, Task

POINTS = {
    "batch": (Loader, "batch"),
    "micro-batch": (Megalodon, "hidden"),
    "flush": (os, "fsync"),
    "rename": (os, "rename"),
    "replace": (os, "replace"),
}
"""What a run goes through, one after the other; a step has one batch and two micro-batches."""


class Killed(BaseException):
    """Nothing in a run catches it, and no step is finished after it."""


@contextmanager
def watched(reached: Callable[[str], None]) -> Iterator[None]:
    """Call `reached` with the name of every point before it is gone through."""
    with pytest.MonkeyPatch.context() as patch:
        for name, (owner, attribute) in POINTS.items():
            before = getattr(owner, attribute)

            def hooked(*args: Any, _name: str = name, _before: Callable[..., Any] = before, **named: Any) -> Any:
                reached(_name)
                return _before(*args, **named)

            patch.setattr(owner, attribute, hooked)
        yield


def once(store: Store, directory: Path, stop: Callable[[], str | None] = lambda: None) -> Any:
    """Train 5 steps with dropout, accumulation, a save every 2 steps, and an evaluation that runs the model."""

    def evaluate(model: Megalodon) -> list[Row] | None:
        losses = []
        for first in range(0, 6, 2):
            if stop():
                return None
            tokens = torch.from_numpy(Loader(store, 37, "doc", 9).batch(first, 2).tokens)
            with torch.no_grad():
                losses.append(float(model.hidden(tokens)[0].double().square().mean()))
        return [{"kind": "eval", "valid_loss": sum(losses)}]

    plan = tiny_plan(
        train={"max_steps": 5, "micro_batch": 2},
        checkpoint={"every": 2, "keep_last": 2, "keep_best": 1, "background": False},
    )
    tasks = (Task(evaluate, 2, at_start=True),)
    return tiny_run(store, directory, plan, model={"dropout": 0.1}, tasks=tasks, stop=stop)


def outcome(directory: Path) -> tuple[dict[str, bytes], Any, list[dict[str, Any]]]:
    """The bytes of every tensor of the last step, the state beside them, and the metrics without the clock's part.

    `observed` is left out: a run stopped between its last step and the evaluation of it has saved that step already.
    """
    step = directory / "checkpoints/step-00000005"
    tensors = {name: t for file in step.rglob("*.safetensors") for name, t in load_file(file).items()}
    data = {name: t.reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    bare = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    state = json.loads((step / "state.json").read_text())
    return data, {key: value for key, value in state.items() if key != "observed"}, bare


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return tiny_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="module")
def whole(store: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[str]]:
    """What the uninterrupted run leaves, and the points it went through."""
    went: list[str] = []
    directory = tmp_path_factory.mktemp("whole") / "run"
    with watched(went.append):
        assert once(store, directory).status == "finished"
    return outcome(directory), went


def places(went: list[str], every: int) -> list[int]:
    """Some of the points: the first of every kind, then every so many."""
    return sorted({went.index(name) for name in dict.fromkeys(went)} | set(range(3, len(went), every)))


def killed_at_each(store: Store, directory: Path, whole: tuple[Any, list[str]], every: int) -> None:
    for place in places(whole[1], every):
        went: list[str] = []

        def die(name: str, went: list[str] = went, place: int = place) -> None:
            went.append(name)
            if len(went) == place + 1:
                raise Killed(name)

        run = directory / f"run-{place}"
        with watched(die):
            try:
                once(store, run)
            except Killed:
                pass
            else:  # a batch that a thread read ahead for a step that never came, or did not come to read
                assert went[place : place + 1] in (["batch"], [])
        torch.manual_seed(place)  # whatever the process draws meanwhile must not matter
        assert once(store, run).status == "finished"
        assert outcome(run) == whole[0], f"killed at point {place}, a {whole[1][place]}"


def stopped_at_each(store: Store, directory: Path, whole: tuple[Any, list[str]], every: int) -> None:
    for place in places(whole[1], every):
        went: list[str] = []
        run = directory / f"run-{place}"
        with watched(went.append):
            result = once(store, run, partial(_asked, went, place))
        assert result.status in ("stopped", "finished")
        assert result.saved is not None or result.step == 0, "a step that was finished is saved"
        assert once(store, run).status == "finished"
        assert outcome(run) == whole[0], f"stopped at point {place}, a {whole[1][place]}"


def _asked(went: list[str], place: int) -> str | None:
    return "SIGTERM" if len(went) > place else None


def test_a_run_killed_anywhere_ends_as_if_it_had_not_been(
    store: Store, tmp_path: Path, whole: tuple[Any, list[str]]
) -> None:
    killed_at_each(store, tmp_path, whole, 45)


def test_a_run_stopped_anywhere_ends_as_if_it_had_not_been(
    store: Store, tmp_path: Path, whole: tuple[Any, list[str]]
) -> None:
    stopped_at_each(store, tmp_path, whole, 45)


@pytest.mark.slow
def test_a_run_killed_at_every_point_there_is(store: Store, tmp_path: Path, whole: tuple[Any, list[str]]) -> None:
    killed_at_each(store, tmp_path, whole, 1)


@pytest.mark.slow
def test_a_run_stopped_at_every_point_there_is(store: Store, tmp_path: Path, whole: tuple[Any, list[str]]) -> None:
    stopped_at_each(store, tmp_path, whole, 1)
