"""Ranks that write a checkpoint together, here as threads: each its own files, one commit, one verdict."""

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalodon.checkpoint import store
from megalodon.checkpoint.saver import Saver
from megalodon.checkpoint.store import CheckpointConfig, Share, load_tensors, newest_good_step, save_step
from megalodon.checkpoint.tensor_files import form_of
from megalodon.errors import EnvironmentFault

WHOLE = {"model.a": torch.arange(35.0).reshape(7, 5), "optim.step.a": torch.tensor(2.0)}
FORMS = {name: form_of(tensor) for name, tensor in WHOLE.items()}
PLACES = ({"model.a": ((0, 0), (7, 5))}, {"model.a": ((4, 0), (7, 5))})
PARTS = ({"model.a": WHOLE["model.a"][:4], "optim.step.a": WHOLE["optim.step.a"]}, {"model.a": WHOLE["model.a"][4:]})


class Threads:
    """A team of two, of which each is a thread."""

    size = 2

    def __init__(self, rank: int, board: dict[Any, Any], barrier: threading.Barrier) -> None:
        self.rank, self._board, self._barrier = rank, board, barrier

    def gathered(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._barrier.wait(60)
        found = [self._board[rank] for rank in range(self.size)]
        self._barrier.wait(60)
        return found

    def from_main(self, value: Callable[[], Any]) -> Any:
        told: Any = None
        if self.rank == 0:
            try:
                told = value()
            except Exception as error:
                told = error
        told = self.gathered(told)[0]
        if isinstance(told, Exception):
            raise told
        return told


def together(call: Callable[[int, Share], Any]) -> list[Any]:
    """What each of two ranks has of a call, or its error."""
    board, barrier = dict[Any, Any](), threading.Barrier(2)

    def one(rank: int) -> Any:
        try:
            return call(rank, Share(FORMS, PLACES[rank], Threads(rank, board, barrier)))
        except Exception as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, range(2)))


def save(root: Path) -> list[Any]:
    return together(lambda rank, share: save_step(root, 3, PARTS[rank], {"rank": rank}, {}, share=share))


def assert_whole(root: Path) -> None:
    saved, faults = newest_good_step(root)
    assert saved is not None and (saved.step, saved.state, faults) == (3, {"rank": 0}, [])
    found = {name: torch.zeros_like(tensor) for name, tensor in WHOLE.items()}
    load_tensors(saved, found)
    assert all(torch.equal(found[name], tensor) for name, tensor in WHOLE.items())


def test_each_writes_its_own_files_and_all_know_of_the_commit(tmp_path: Path) -> None:
    assert save(tmp_path) == [tmp_path / "step-00000003"] * 2
    files = sorted(path.name for path in (tmp_path / "step-00000003/tensors").iterdir())
    assert files == [f"shard-0000{n}-model-00001-of-00001.safetensors" for n in (1, 2)]
    assert_whole(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert save(tmp_path) == [tmp_path / "step-00000003"] * 2  # it is there, and stays as it is
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_in_the_background_too_and_one_of_them_tidies_up(tmp_path: Path) -> None:
    for step in (1, 2):
        save_step(tmp_path, step, WHOLE, {}, {})

    def run(rank: int, share: Share) -> Any:
        saver, live = Saver(tmp_path, CheckpointConfig(keep_last=2)), {n: x.clone() for n, x in PARTS[rank].items()}
        saver.save(3, live, {"rank": rank}, {}, background=True, share=share)
        for tensor in live.values():
            tensor.zero_()
        commit = saver.poll(wait=True)
        return commit and (commit.step, commit.trouble)

    assert together(run) == [(3, None)] * 2
    assert store.steps_in(tmp_path) == [3, 2]
    assert_whole(tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_is_an_error_of_all_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    real = store.write_tensors

    def write(directory: Path, tensors: Any, *rest: Any, **how: Any) -> Any:
        if how["rank"] == rank:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory / "shard"))
        return real(directory, tensors, *rest, **how)

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_tensors", write)
        for error in save(tmp_path):
            assert isinstance(error, EnvironmentFault)
            said = f"step 3 could not be saved in {tmp_path}: rank {rank}: [Errno 28] No space left on device: "
            assert str(error).startswith(said) and "\n" not in str(error)
    assert list(tmp_path.iterdir()) == []
    save(tmp_path)
    assert_whole(tmp_path)


def test_a_bug_of_one_is_a_bug_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rank waits for one whose writer failed in a way that nobody thought of, and none takes it for a full disk."""
    real = store.write_tensors

    def write(directory: Path, tensors: Any, *rest: Any, **how: Any) -> Any:
        return real(directory, tensors, *rest, **how) if how["rank"] == 0 else [][1]

    monkeypatch.setattr(store, "write_tensors", write)
    assert [type(error) for error in save(tmp_path)] == [IndexError] * 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_copy_that_cannot_be_made_on_one_rank_is_told_to_all(tmp_path: Path, rank: int) -> None:
    class Full:
        nbytes = 4

        def detach(self) -> Any:
            raise MemoryError("no memory for a copy")

    def run(this: int, share: Share) -> Any:
        tensors: dict[str, Any] = {name: Full() for name in PARTS[this]} if this == rank else dict(PARTS[this])
        saver = Saver(tmp_path, CheckpointConfig())
        saver.save(3, tensors, {"rank": this}, {}, background=True, share=share)
        with pytest.raises(MemoryError, match="no memory for a copy"):
            saver.poll(wait=True)
        saver.save(3, PARTS[this], {"rank": this}, {}, background=True, share=share)
        return saver.poll(wait=True) is not None

    assert together(run) == [True] * 2
    assert_whole(tmp_path)


def test_a_disk_that_is_too_small_is_told_to_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted are the whole tensors, not the part of the rank that counts."""
    asked: list[tuple[int, int]] = []

    def refuse(directory: Path, num_bytes: int, num_files: int) -> None:
        asked.append((num_bytes, num_files))
        raise EnvironmentFault("too small")

    monkeypatch.setattr(store, "check_space", refuse)
    assert [str(error) for error in save(tmp_path)] == ["too small"] * 2
    assert asked == [(4 * 36, 2)]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({}, "model.a has 20 of 35 values"),
        ({"model.a": WHOLE["model.a"][4:], "optim.step.a": WHOLE["optim.step.a"]}, "optim.step.a has two pieces"),
    ],
    ids=["nobody writes it", "two write it"],
)
def test_what_ranks_agree_on_wrongly_is_found_before_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: dict[str, Tensor], said: str
) -> None:
    monkeypatch.setitem(globals(), "PARTS", (PARTS[0], second))
    for error in save(tmp_path):
        assert isinstance(error, EnvironmentFault) and said in str(error)
    assert list(tmp_path.iterdir()) == []
