"""A committed checkpoint is whole or is not used: kills, flipped bits, missing files, other models."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megalodon.checkpoint import store, tensor_files
from megalodon.checkpoint.store import (
    CheckpointConfig,
    check_files,
    clean_leftovers,
    load_tensors,
    newest_good_step,
    retain,
    save_step,
    set_aside,
    step_path,
    steps_in,
    verify_step,
)
from megalodon.errors import CheckpointError, EnvironmentFault

SHARD = "shard-00001-model-00001-of-00001.safetensors"


def tensors(step: int) -> dict[str, Tensor]:
    """A matrix, a complex-like table, a scalar, an empty and an integer tensor, all telling their step."""
    draw = torch.Generator().manual_seed(step)
    return {
        "model.a": torch.randn(5, 7, generator=draw),
        "model.b": torch.randn(3, 4, 2, generator=draw),
        "optim.step.a": torch.tensor(float(step)),
        "model.none": torch.zeros(0, 6),
        "model.count": torch.tensor([step]),
    }


def save(root: Path, step: int, **about: Any) -> Path:
    return save_step(root, step, tensors(step), {"step": step}, about)


def flip(path: Path, position: int = -50) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def shard(root: Path, step: int) -> Path:
    return step_path(root, step) / "tensors" / SHARD


class Disk(NamedTuple):
    """What `os.statvfs` tells."""

    f_bavail: int
    f_frsize: int
    f_files: int
    f_favail: int


@pytest.mark.parametrize("limit", [10**9, 100])
def test_what_is_saved_comes_back_bit_by_bit_from_one_file_or_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", limit)
    save(tmp_path, 12)
    saved, faults = newest_good_step(tmp_path)
    assert saved is not None and (saved.step, saved.state, faults) == (12, {"step": 12}, [])
    targets = {name: torch.full_like(tensor, 9) for name, tensor in tensors(0).items()}
    load_tensors(saved, targets)
    assert all(torch.equal(targets[name], tensor) for name, tensor in tensors(12).items())
    assert len(list((saved.path / "tensors").iterdir())) == (1 if limit > 100 else 3)


def test_no_file_of_a_checkpoint_is_a_pickle_and_the_manifest_lists_them_all(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    names = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert names == {"manifest.json", "state.json", f"tensors/{SHARD}"}
    assert set(json.loads((path / "manifest.json").read_text())["files"]) == names - {"manifest.json"}


@pytest.mark.parametrize("position", [3, 100, -1, -300])
def test_one_flipped_bit_is_detected_and_the_step_before_is_used(tmp_path: Path, position: int) -> None:
    save(tmp_path, 3)
    save(tmp_path, 9)
    flip(shard(tmp_path, 9), position)
    saved, faults = newest_good_step(tmp_path)
    assert saved is not None and saved.step == 3
    assert len(faults) == 1 and f"{SHARD} has sha256" in faults[0]


def test_fast_verification_sees_sizes_only(tmp_path: Path) -> None:
    save(tmp_path, 3)
    flip(shard(tmp_path, 3))
    assert verify_step(step_path(tmp_path, 3), "fast").step == 3
    with shard(tmp_path, 3).open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match=r"has [\d,]+ bytes; [\d,]+ were written"):
        verify_step(step_path(tmp_path, 3), "fast")


def test_missing_truncated_and_foreign_files_are_named(tmp_path: Path) -> None:
    def broken(step: int) -> Path:
        return save(tmp_path, step)

    (broken(1) / "state.json").unlink()
    (broken(2) / "tensors/extra.safetensors").write_bytes(b"")
    (broken(3) / "manifest.json").write_text(f'{{"format": "{store.FORMAT}", "step": 3}}')
    (broken(4) / "manifest.json").write_text('{"format"')
    broken(5)
    os.truncate(shard(tmp_path, 5), 40)
    with pytest.raises(CheckpointError) as caught:
        newest_good_step(tmp_path)
    text = str(caught.value)
    for said in (
        "step-00000001/state.json is missing",
        "not written by us: tensors/extra.safetensors",
        "step-00000003/manifest.json has sha256 ",
        "step-00000004/manifest.json is not JSON",
        f"step-00000005/tensors/{SHARD} has 40 bytes",
    ):
        assert said in text


def test_no_checkpoint_at_all_is_no_error(tmp_path: Path) -> None:
    assert newest_good_step(tmp_path / "nothing") == (None, [])


def test_an_error_while_saving_leaves_nothing_and_the_step_before_loadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 3)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_json", full)
    with pytest.raises(EnvironmentFault, match=r"step 4 could not be saved .* No space left"):
        save(tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


KILLED = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_store import tensors
from megalodon.checkpoint.store import save_step
for step in range(1, 10**6):
    save_step(Path({root!r}), step, tensors(step), {{"step": step}}, {{}})
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_loses_no_acknowledged_step(tmp_path: Path, repository: Path) -> None:
    script = KILLED.format(tests=str(Path(__file__).parent), root=str(tmp_path))
    places = os.pathsep.join([str(repository), str(repository / "kernels")])
    environment = {**os.environ, "PYTHONPATH": places}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()
        time.sleep(0.15)
        process.send_signal(signal.SIGKILL)
        acknowledged = 1 + len(process.stdout.read().splitlines())
    assert process.wait() == -signal.SIGKILL
    clean_leftovers(tmp_path)
    saved, faults = newest_good_step(tmp_path)
    assert saved is not None and saved.step >= acknowledged and faults == []
    targets = {name: torch.full_like(tensor, 9) for name, tensor in tensors(0).items()}
    load_tensors(saved, targets)
    assert all(torch.equal(targets[name], tensor) for name, tensor in tensors(saved.step).items())


def test_what_a_kill_leaves_behind_is_never_taken_for_a_checkpoint_and_is_removed(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    half = tmp_path / ".tmp-step-00000004-77"
    os.rename(path, half)
    (half / "manifest.json").unlink()
    save(tmp_path, 3)
    (tmp_path / ".tmp-best-77").touch()
    saved, _ = newest_good_step(tmp_path)
    assert saved is not None and saved.step == 3
    clean_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_valid_step_is_not_written_twice_and_a_broken_one_gives_way(tmp_path: Path) -> None:
    first = save(tmp_path, 3)
    before = (first / "manifest.json").stat().st_mtime_ns
    save(tmp_path, 3, valid_loss=1.0)
    assert (first / "manifest.json").stat().st_mtime_ns == before
    flip(shard(tmp_path, 3))
    save(tmp_path, 3)
    verify_step(first)
    assert len(list(tmp_path.glob(".bad-step-00000003-*"))) == 1


def test_too_little_space_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.statvfs", lambda _: Disk(f_bavail=10**4, f_frsize=10**3, f_files=99, f_favail=99))
    with pytest.raises(EnvironmentFault, match=r"needs 0.017 GB and the disk has 0.010 GB free"):
        save(tmp_path, 3)
    monkeypatch.setattr("os.statvfs", lambda _: Disk(f_bavail=10**6, f_frsize=10**3, f_files=99, f_favail=7))
    with pytest.raises(EnvironmentFault, match=r"needs 17 inodes and the disk has 7 free"):
        save(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []


def test_another_model_is_refused_with_the_full_list_and_left_unchanged(tmp_path: Path) -> None:
    save(tmp_path, 3)
    saved, _ = newest_good_step(tmp_path)
    assert saved is not None
    targets = tensors(5)
    del targets["model.b"]
    targets |= {"model.a": torch.zeros(7, 5), "model.count": torch.tensor([1.0]), "model.new": torch.zeros(2)}
    with pytest.raises(CheckpointError) as caught:
        load_tensors(saved, targets)
    text = str(caught.value)
    for said in (
        "model.new is missing",
        "model.b is unexpected",
        "model.a is float32 (5, 7), expected float32 (7, 5)",
        "model.count is int64 (1,), expected float32 (1,)",
    ):
        assert said in text
    assert torch.equal(targets["optim.step.a"], torch.tensor(5.0))


def test_the_best_is_kept_however_old(tmp_path: Path) -> None:
    for step, loss in enumerate([3.0, 1.0, 2.0, None, 2.5], start=1):
        save(tmp_path, step, valid_loss=loss)
    removed = retain(tmp_path, CheckpointConfig(background=False, keep_last=1, keep_best=2))
    assert (removed, steps_in(tmp_path)) == ([4, 1], [5, 3, 2])
    assert json.loads((tmp_path / "best").read_text()) == {"step": 2, "valid_loss": 1.0}


def test_best_points_at_a_step_that_is_kept_or_at_none(tmp_path: Path) -> None:
    for step, loss in enumerate([1.0, 2.0, 3.0], start=1):
        save(tmp_path, step, valid_loss=loss)
    retain(tmp_path, CheckpointConfig(keep_last=2, keep_best=0))
    assert json.loads((tmp_path / "best").read_text()) == {"step": 2, "valid_loss": 2.0}
    save(tmp_path, 4)
    retain(tmp_path, CheckpointConfig(background=False, keep_last=1, keep_best=0))
    assert steps_in(tmp_path) == [4] and not (tmp_path / "best").exists()


def test_damaged_steps_neither_count_as_the_last_nor_stop_retention(tmp_path: Path) -> None:
    for step in (4, 8, 12, 16):
        save(tmp_path, step, valid_loss=float(step))
    (step_path(tmp_path, 12) / "manifest.json").write_text('{"format"')
    os.truncate(shard(tmp_path, 16), 40)
    save(tmp_path, 5)
    assert retain(tmp_path, CheckpointConfig(background=False, keep_last=1, keep_best=0), 5) == [4]
    assert steps_in(tmp_path) == [16, 12, 8, 5]


def test_a_step_that_is_set_aside_counts_no_more_and_keeps_its_files(tmp_path: Path) -> None:
    set_aside(save(tmp_path, 3))
    assert newest_good_step(tmp_path) == (None, [])
    clean_leftovers(tmp_path)
    assert len(list(tmp_path.glob(".bad-step-00000003-*/tensors/*"))) == 1


NO_RECORD = {
    "no list": (None, "its list of files is null"),
    "a number": ({"a": 5}, "a is listed as 5; expected bytes and sha256"),
    "no hash": ({"a": {"bytes": 1}}, "a is listed as {bytes: 1}; expected bytes and sha256"),
    "a size in words": ({"a": {"bytes": "1", "sha256": "0"}}, "a is listed as"),
    "the folder above": ({"../b": {"bytes": 1, "sha256": "0"}}, "../b is listed, which lies outside"),
    "somewhere else": ({"/etc/hostname": {"bytes": 1, "sha256": "0"}}, "/etc/hostname is listed, which lies outside"),
}


@pytest.mark.parametrize("name", NO_RECORD)
def test_a_record_that_is_none_of_ours_is_refused_by_name(tmp_path: Path, name: str) -> None:
    files, said = NO_RECORD[name]
    (tmp_path / "b").write_text("b")
    with pytest.raises(CheckpointError, match=re.escape(said)):
        check_files(tmp_path / "run", files)
