"""A save in the background is the save in the foreground: same files, nothing earlier, no error unheard."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalodon.checkpoint import saver as module
from megalodon.checkpoint import store
from megalodon.checkpoint.saver import Saver
from megalodon.checkpoint.store import CheckpointConfig, load_tensors, newest_good_step, save_step, steps_in
from megalodon.errors import EnvironmentFault


class Gate:
    """Holds the writer before its commit until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, *arguments: Any) -> Path:
        self.reached.set()
        assert self.opened.wait(60)
        return save_step(*arguments)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    found = Gate()
    monkeypatch.setattr(module, "save_step", found)
    yield found
    found.opened.set()


def tensors(value: float) -> dict[str, Tensor]:
    return {"model.a": torch.full((5, 7), value), "optim.step.a": torch.tensor(value)}


def test_in_the_background_the_values_of_the_call_are_saved_and_nothing_points_at_them_before(
    tmp_path: Path, gate: Gate
) -> None:
    config = CheckpointConfig(keep_last=2, keep_best=0)
    for step in (1, 2):
        save_step(tmp_path, step, tensors(step), {}, {"valid_loss": 9.0 - step})
    saver = Saver(tmp_path, config)
    live, state = tensors(3.0), {"step": 3, "guard": [1.0]}
    saver.save(3, live, state, {"valid_loss": 1.0}, background=True)
    live["model.a"].fill_(99)
    state["guard"] = [2.0]
    assert gate.reached.wait(60)
    assert saver.poll() is None and saver.pending == 3
    assert steps_in(tmp_path) == [2, 1] and not (tmp_path / "best").exists()
    gate.opened.set()
    commit = saver.poll(wait=True)
    assert commit is not None and (commit.step, commit.trouble) == (3, None) and commit.waited <= commit.seconds
    assert steps_in(tmp_path) == [3, 2] and json.loads((tmp_path / "best").read_text())["step"] == 3
    saved, _ = newest_good_step(tmp_path)
    assert saved is not None and saved.state == {"step": 3, "guard": [1.0]}
    load_tensors(saved, live)
    assert all(torch.equal(live[name], tensor) for name, tensor in tensors(3.0).items())
    assert saver.poll(wait=True) is None and saver.pending is None


def test_both_ways_write_the_same(tmp_path: Path) -> None:
    manifests = []
    for name, background in (("front", False), ("back", True)):
        saver = Saver(tmp_path / name, CheckpointConfig())
        saver.save(1, tensors(1.0), {"step": 1}, {"valid_loss": None}, background=background)
        assert saver.poll(wait=True) is not None
        saved, _ = newest_good_step(tmp_path / name)
        assert saved is not None
        found = tensors(7.0)
        load_tensors(saved, found)
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors(1.0).items())
        manifests.append({**saved.manifest, "files": sorted(saved.manifest["files"]), "sha256": None})
    assert manifests[0] == manifests[1]


def fails(error: BaseException) -> Callable[..., Path]:
    def write(*_: object) -> Path:
        raise error

    return write


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("error", [EnvironmentFault("disk full"), RuntimeError("a bug")])
def test_an_error_of_the_writer_is_raised_by_the_next_look_and_the_next_save_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool, error: Exception
) -> None:
    saver = Saver(tmp_path, CheckpointConfig())
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_step", fails(error))
        saver.save(1, tensors(1.0), {}, {}, background=background)
        with pytest.raises(type(error), match=str(error)):
            saver.poll(wait=True)
    assert saver.poll() is None and steps_in(tmp_path) == []
    saver.save(2, tensors(2.0), {}, {}, background=background)
    assert saver.poll(wait=True) is not None and steps_in(tmp_path) == [2]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_writer_that_dies_without_a_word_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "save_step", fails(SystemExit()))
    saver = Saver(tmp_path, CheckpointConfig())
    saver.save(7, tensors(7.0), {}, {}, background=True)
    with pytest.raises(EnvironmentFault, match="step 7 was not saved: its writer ended without a result"):
        saver.poll(wait=True)


def test_trouble_with_older_checkpoints_does_not_hide_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "retain", fails(EnvironmentFault("older ones could not be removed")))
    saver = Saver(tmp_path, CheckpointConfig())
    saver.save(1, tensors(1.0), {}, {}, background=True)
    commit = saver.poll(wait=True)
    assert commit is not None and str(commit.trouble) == "older ones could not be removed"
    assert steps_in(tmp_path) == [1]


def test_at_most_one_save_is_in_flight(tmp_path: Path, gate: Gate) -> None:
    saver = Saver(tmp_path, CheckpointConfig())
    saver.save(1, tensors(1.0), {}, {}, background=True)
    with pytest.raises(AssertionError, match="comes first"):
        saver.save(2, tensors(2.0), {}, {}, background=True)
    gate.opened.set()
    assert saver.poll(wait=True) is not None


def test_a_save_that_is_abandoned_leaves_nothing_and_the_next_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, reached, real = Saver(tmp_path, CheckpointConfig()), threading.Event(), store.describe_file

    def describe(path: Path) -> dict[str, Any]:
        reached.set()
        assert saver._abandoned.wait(60)
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(store, "describe_file", describe)
        saver.save(1, tensors(1.0), {}, {}, background=True)
        assert reached.wait(60)
        saver.abandon(grace=0)
    assert list(tmp_path.iterdir()) == [] and saver.poll() is None
    saver.save(2, tensors(2.0), {}, {}, background=True)
    assert saver.poll(wait=True) is not None


def test_a_save_that_could_not_begin_and_is_abandoned_does_not_spoil_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(tmp_path, CheckpointConfig())
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fails(RuntimeError("can't start new thread")))
        saver.save(1, tensors(1.0), {}, {}, background=True)
    saver.abandon()
    assert steps_in(tmp_path) == []
    saver.save(2, tensors(2.0), {}, {}, background=True)
    assert saver.poll(wait=True) is not None and steps_in(tmp_path) == [2]


LEAVES = """
import os, sys, time
from pathlib import Path
import torch
from megalodon.checkpoint.saver import Saver
from megalodon.checkpoint.store import CheckpointConfig
torch.set_num_threads(1)
for number in range(5):
    if os.fork() == 0:
        saver = Saver(Path(sys.argv[1]) / str(number), CheckpointConfig())
        saver.save(1, {str(n): torch.ones(300, 300) for n in range(40)}, {}, {}, background=True)
        time.sleep(number / 40)
        if number % 2:
            saver.abandon(grace=0)
        sys.exit(130)
    code = os.waitstatus_to_exitcode(os.wait()[1])
    assert code == 130, (number, code)
"""


def test_a_process_that_leaves_while_a_save_is_in_flight_ends_with_its_own_code(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", LEAVES, str(tmp_path)], check=True)
    for root in tmp_path.iterdir():
        assert not [path for path in root.iterdir() if path.name.startswith(".")]
        assert not steps_in(root) or newest_good_step(root)[1] == []
