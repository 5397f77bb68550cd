"""Faults while a checkpoint is written, and faults of what was written: found by name, and nothing else is lost.

Kills between any two moves, power loss, full and broken disks, flipped bits, files that are cut off, lost or foreign.
"""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalodon.checkpoint import store, tensor_files
from megalodon.checkpoint.store import (
    CheckpointConfig,
    clean_leftovers,
    load_tensors,
    newest_good_step,
    retain,
    save_step,
    step_path,
    steps_in,
    verify_step,
)
from megalodon.errors import CheckpointError, EnvironmentFault


@pytest.fixture(autouse=True)
def three_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", 300)


def tensors(step: int, rows: int = 5) -> dict[str, Tensor]:
    """Three tensors, each in a file of its own, that tell their step."""
    draw = torch.Generator().manual_seed(step)
    return {f"model.{name}": torch.randn(rows, 11, generator=draw) for name in "abc"}


def save(root: Path, step: int, **about: Any) -> Path:
    return save_step(root, step, tensors(step), {"step": step}, {"valid_loss": 1.5, **about})


def assert_newest(root: Path, step: int) -> None:
    """The newest checkpoint is this one, nothing newer is broken, and its tensors are those that were saved."""
    saved, faults = newest_good_step(root)
    assert saved is not None and (saved.step, faults) == (step, [])
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors(0).items()}
    load_tensors(saved, found)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(step).items())


# Kills. A child process forks at each point of the way, and the fork ends there at once.

KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_faults import POINTS, save
from megalodon.checkpoint import store, tensor_files
tensor_files.SHARD_BYTES = 300
for number, (module, name, nth, before) in enumerate(POINTS.values()):
    root = Path({root!r}) / str(number)
    save(root, 1)
    save(root, 2)
    if os.fork() == 0:
        module = {{"store": store, "os": os, "shutil": store.shutil}}[module]
        real, calls = getattr(module, name), []
        def dies(*arguments, **options):
            calls.append(1)
            if len(calls) == nth and before:
                os._exit(9)
            result = real(*arguments, **options)
            if len(calls) == nth:
                os._exit(9)
            return result
        setattr(module, name, dies)
        save(root, 3)
        store.retain(root, store.CheckpointConfig(keep_last=2, keep_best=0), 3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 9, (number, name)
"""
POINTS = {  # what is called, the how manieth time, killed before or after it
    "before the first byte": ("store", "write_tensors", 1, True),
    "a file written, not forced to the disk": ("os", "fsync", 2, True),
    "all tensors written": ("store", "write_tensors", 1, False),
    "the state written": ("store", "write_json", 1, False),
    "before the manifest": ("store", "write_json", 2, True),
    "after the manifest": ("store", "write_json", 2, False),
    "before the rename": ("os", "rename", 1, True),
    "after the rename": ("os", "rename", 1, False),
    "before `best` moves": ("os", "replace", 1, True),
    "a doomed step without its name": ("os", "rename", 2, False),
    "a doomed step half removed": ("os", "unlink", 2, False),
    "a doomed step removed": ("shutil", "rmtree", 2, False),
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    root = tmp_path_factory.mktemp("killed")
    script = KILLED.format(tests=str(Path(__file__).parent), root=str(root))
    places = os.pathsep.join([str(repository), str(repository / "kernels")])
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": places})
    return root


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_between_any_two_moves_leaves_whole_checkpoints_only(killed: Path, point: str) -> None:
    number = list(POINTS).index(point)
    root, committed = killed / str(number), number > list(POINTS).index("before the rename")
    assert_newest(root, 3 if committed else 2)
    for step in steps_in(root):
        verify_step(step_path(root, step))
    clean_leftovers(root)
    assert not [path.name for path in root.iterdir() if path.name.startswith(".")]
    assert_newest(root, 3 if committed else 2)
    save(root, 4)
    assert_newest(root, 4)


# Power loss: what was not forced to the disk is gone.


def test_everything_is_on_the_disk_before_the_rename_and_the_rename_before_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    forced: list[int] = []
    renamed: list[int] = []
    sync, rename = os.fsync, os.rename

    def record(descriptor: int) -> None:
        sync(descriptor)
        forced.append(os.fstat(descriptor).st_ino)

    def move(old: Path, new: Path) -> None:
        rename(old, new)
        renamed.append(len(forced))

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "rename", move)
    path = save(tmp_path, 2)
    (moment,) = renamed
    everything = [path, *path.rglob("*")]
    assert len(everything) == 1 + 1 + 3 + 2
    safe = set(forced[:moment])
    for place in everything:
        if place.is_file() and place.stat().st_ino not in safe:
            os.truncate(place, 0)
    assert {place.stat().st_ino for place in everything if place.is_dir()} <= safe
    assert tmp_path.stat().st_ino in forced[moment:]
    assert_newest(tmp_path, 2)


# Full and broken disks.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs the rights of root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_too_small_is_told_before_and_a_disk_that_fills_up_leaves_nothing(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EnvironmentFault, match=r"saving needs 0.0\d\d GB and the disk has 0.000 GB free"):
        save(small_disk, 1)
    monkeypatch.setattr(store, "check_space", lambda *_: None)
    save(small_disk, 1)
    used = shutil.disk_usage(small_disk).used
    with pytest.raises(EnvironmentFault, match=r"No space left on device: .*[.]safetensors"):
        save_step(small_disk, 2, tensors(2, rows=3000), {"step": 2}, {})
    assert [path.name for path in small_disk.iterdir()] == ["step-00000001"]
    assert shutil.disk_usage(small_disk).used == used
    assert_newest(small_disk, 1)


def test_a_file_that_may_not_grow_is_named(tmp_path: Path) -> None:
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(EnvironmentFault, match=r"File too large: .*shard-00001-model-00001"):
            save_step(tmp_path, 2, tensors(2, rows=3000), {"step": 2}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_newest(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def broken_open(number: int, file: str) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        real = Path.open

        def refuse(self: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
            if file in self.name and "w" in mode:
                raise OSError(number, os.strerror(number), str(self))
            return real(self, mode, *rest, **options)

        monkeypatch.setattr(Path, "open", refuse)

    return patch


def broken(module: object, name: str, number: int, *, says_where: bool) -> Callable[[pytest.MonkeyPatch], None]:
    def refuse(*arguments: Any, **_: Any) -> None:
        raise OSError(number, os.strerror(number), *([str(arguments[0])] if says_where else []))

    return lambda monkeypatch: monkeypatch.setattr(module, name, refuse)


BROKEN: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "no directory": (broken(Path, "mkdir", errno.EROFS, says_where=True), "Read-only file system: "),
    "no file of tensors": (broken_open(errno.EACCES, "model-00002"), "Permission denied: .*shard-00001-model-00002-of"),
    "no state": (broken_open(errno.EDQUOT, "state.json"), "Disk quota exceeded: .*state.json"),
    "no manifest": (broken_open(errno.EIO, "manifest.json"), "Input/output error: .*manifest.json"),
    "no fsync": (broken(os, "fsync", errno.EIO, says_where=False), "Input/output error: .*shard-00001-model-00001-of"),
    "no rename": (broken(os, "rename", errno.EACCES, says_where=True), "Permission denied: .*.tmp-step-00000002-"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_disk_that_refuses_is_one_line_with_file_and_cause_and_the_step_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    save(tmp_path, 1)
    patch, said = BROKEN[fault]
    with monkeypatch.context() as patched, pytest.raises(EnvironmentFault, match=said) as caught:
        patch(patched)
        save(tmp_path, 2)
    assert str(caught.value).startswith(f"step 2 could not be saved in {tmp_path}: ")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert_newest(tmp_path, 1)
    save(tmp_path, 2)
    assert_newest(tmp_path, 2)


def test_a_disk_that_cannot_be_read_any_more_makes_a_checkpoint_bad_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    bad = save(tmp_path, 2) / "tensors/shard-00001-model-00003-of-00003.safetensors"
    real = store.sha256_file

    def read(path: Path) -> str:
        if path == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path)

    monkeypatch.setattr(store, "sha256_file", read)
    saved, faults = newest_good_step(tmp_path)
    assert saved is not None and (saved.step, faults) == (1, [f"{bad} cannot be read: Input/output error"])


def test_a_writer_that_loses_a_tensor_is_found_out_before_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = store.write_tensors
    monkeypatch.setattr(
        store,
        "write_tensors",
        lambda path, given, *more, **how: real(path, dict(list(given.items())[:-1]), *more, **how),
    )
    with pytest.raises(EnvironmentFault, match=r"step 1 could not be saved .* model.c is missing"):
        save(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_retention_that_fails_is_told_and_the_new_step_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    broken(shutil, "rmtree", errno.EIO, says_where=True)(monkeypatch)
    with pytest.raises(EnvironmentFault, match=r"older checkpoints in .* could not be removed: .*Input/output"):
        retain(tmp_path, CheckpointConfig(keep_last=2, keep_best=0), 3)
    assert steps_in(tmp_path) == [3, 2]


# What was written, and is no more what it was.

FILES = ("manifest.json", "state.json", *(f"tensors/shard-00001-model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)))


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_in_any_file_is_found_and_the_step_before_is_used(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    content = path.read_bytes()
    for position in range(0, len(content), max(1, len(content) // 150)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        saved, faults = newest_good_step(tmp_path)
        assert saved is not None and saved.step == 1, position
        assert len(faults) == 1 and path.name in faults[0]
    path.write_bytes(content)
    assert_newest(tmp_path, 2)


HARM: dict[str, Callable[[Path], object]] = {
    "cut off": lambda path: os.truncate(path, path.stat().st_size // 2),
    "one byte short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "one byte long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: os.truncate(path, 0),
    "missing": lambda path: path.unlink(),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("verify", ["full", "fast"])
@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_off_or_lost_is_found_and_the_step_before_is_used(
    tmp_path: Path, name: str, harm: str, verify: Any
) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    HARM[harm](path)
    if (name, harm) == ("manifest.json", "one byte short"):  # the newline after the object says nothing
        verify_step(path.parent, verify)
        return
    saved, faults = newest_good_step(tmp_path, verify)
    assert saved is not None and saved.step == 1
    assert len(faults) == 1 and path.name in faults[0]


def rewritten(path: Path, **values: Any) -> None:
    """Change a manifest and its digest, as one who means harm would."""
    manifest = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({**manifest, "sha256": store._digest(manifest)}))


MANIFESTS: dict[str, tuple[dict[str, Any], str]] = {
    "of a later version": ({"format": "megalodon/checkpoint/3"}, "checkpoint/3; this version .* reads .*checkpoint/2"),
    "of an earlier version": ({"format": "megalodon/checkpoint/1"}, "checkpoint/1; this version .* reads .*/2"),
    "of something else": ({"format": None}, "has format null; this version of megalodon reads"),
    "of another step": ({"step": 9}, "is that of step 9; expected that of step-00000002"),
    "without a step": ({"step": None}, "is not a manifest of ours"),
    "without files": ({"files": None}, "its list of files is null"),
    "without tensors": ({"tensors": None}, "is not a manifest of ours"),
    "of other tensors": ({"tensors": {"model.z": {"shape": [2], "dtype": "float32"}}}, "model.a is unexpected"),
    "of strange tensors": ({"tensors": {"model.a": 3}}, "is not a manifest of ours"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_of_something_else_is_refused_by_name(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / "manifest.json"
    values, said = MANIFESTS[name]
    rewritten(path, **values)
    with pytest.raises(CheckpointError, match=said):
        verify_step(path.parent)
    assert newest_good_step(tmp_path)[0] == verify_step(step_path(tmp_path, 1))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format"', "\0", "[" * 10_000, "9" * 10_000])
def test_a_manifest_that_is_none_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = save(tmp_path, 2) / "manifest.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest.json (is not JSON|holds)"):
        verify_step(path.parent)


def test_foreign_files_and_files_of_another_step_are_refused_by_name(tmp_path: Path) -> None:
    first, second, third = (save(tmp_path, step) for step in (1, 2, 3))
    shutil.copy(first / FILES[2], second / "tensors/shard-00002-model-00001-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"not written by us: tensors/shard-00002-model-00001"):
        verify_step(second)
    shutil.copy(first / FILES[3], third / FILES[3])
    with pytest.raises(CheckpointError, match=r"shard-00001-model-00002-of-00003.safetensors has sha256"):
        verify_step(third)
    shutil.copytree(first, step_path(tmp_path, 4))
    with pytest.raises(CheckpointError, match="is that of step 1; expected that of step-00000004"):
        verify_step(step_path(tmp_path, 4))
    assert_no_newer(tmp_path, 1)


def assert_no_newer(root: Path, step: int) -> None:
    saved, _ = newest_good_step(root)
    assert saved is not None and saved.step == step


def test_when_all_are_bad_the_reasons_are_told_and_nothing_is_removed(tmp_path: Path) -> None:
    for step, name in ((1, FILES[0]), (2, FILES[1]), (3, FILES[2])):
        os.truncate(save(tmp_path, step) / name, 1)
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used: .*00000003.*00000002.*00000001"):
        newest_good_step(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_only_steps_before_one_count_when_that_is_asked(tmp_path: Path) -> None:
    for step in (1, 4, 6):
        save(tmp_path, step)
    found = [newest_good_step(tmp_path, before=before)[0] for before in (7, 6, 5, 4, 1)]
    assert [saved and saved.step for saved in found] == [6, 4, 4, 1, None]


def test_a_directory_that_cannot_take_its_name_gives_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    real, calls = os.rename, []

    def second_fails(old: Path, new: Path) -> None:
        calls.append(old)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(old))
        real(old, new)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="Input/output error"), store.staged(target, replace=True) as aside:
        (aside / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in target.iterdir()] == ["old"]
    with store.staged(target, replace=True) as aside:
        (aside / "new").touch()
    assert [path.name for path in target.iterdir()] == ["new"]
