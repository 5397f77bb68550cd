"""Items 2 to 17 of the fault list: what may happen to checkpoints on disk, and what `pretrain` then does.

Not here: kills at random moments (test_campaigns.py), the functions beneath (tests/checkpoint).
"""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from breakable import CHECKPOINTS, RUN, copy_of, errors, pretrain, record, step, stopped_run, tree

from megalodon.checkpoint.lock import RunLock
from megalodon.checkpoint.store import FORMAT


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of this test with a copy of one stopped run, and no time spent on measuring the machine."""
    monkeypatch.setattr("megalodon.training.metrics.matmul_peak", lambda *_: 1e9)
    shared = tmp_path_factory.getbasetemp() / "faults"
    shared.mkdir(exist_ok=True)
    copy_of(stopped_run(shared), tmp_path)
    monkeypatch.chdir(tmp_path)


def files(number: int) -> list[Path]:
    """Every file of a checkpoint."""
    return sorted(path for path in step(number).rglob("*") if path.is_file())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def leftovers() -> list[str]:
    return [path.name for path in Path(RUN).rglob(".*") if path.name.startswith((".tmp-", ".del-"))]


def continues_at(number: int, *said: str) -> None:
    """The run goes on at this step, loudly, and reaches its end."""
    done = pretrain()
    assert done.exit_code == 0, done.output
    assert f"resuming at step {number} " in done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert bool(warnings) == (number < 6), done.stderr
    for text in said:
        assert any(text in line for line in warnings), warnings
    assert record()["status"] == "finished"


def test_2_a_half_written_step_is_ignored_and_removed() -> None:
    torn = CHECKPOINTS / ".tmp-step-00000007-dead"
    (torn / "tensors").mkdir(parents=True)
    (torn / "state.json").write_text("{")
    continues_at(6)
    assert leftovers() == []


def test_3_a_half_removed_step_is_no_candidate_and_is_removed() -> None:
    os.rename(step(6), CHECKPOINTS / ".del-step-00000006-dead")
    (CHECKPOINTS / ".del-step-00000006-dead/manifest.json").unlink()
    done = pretrain()
    assert done.exit_code == 0 and "resuming at step 4 " in done.stderr
    assert leftovers() == []


class Broken:
    """`os.fsync` that fails from its n-th call below a folder on."""

    def __init__(self, number: int, good: int) -> None:
        self.number, self.left, self.real = number, good, os.fsync

    def __call__(self, descriptor: int) -> None:
        if "/checkpoints" in os.readlink(f"/proc/self/fd/{descriptor}"):
            self.left -= 1
            if self.left < 0:
                raise OSError(self.number, os.strerror(self.number))
        self.real(descriptor)


@pytest.mark.parametrize("background", ["false", "true"])
@pytest.mark.parametrize("good", [0, 2])
@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, "No space left on device"), (errno.EIO, "Input/output")])
def test_5_6_a_disk_that_takes_no_more_ends_the_run_and_keeps_the_step_before(
    monkeypatch: pytest.MonkeyPatch, number: int, good: int, said: str, background: str
) -> None:
    before = tree(CHECKPOINTS)
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", Broken(number, good))
        done = pretrain(f"checkpoint.background={background}", "checkpoint.every=1")
    assert done.exit_code == 3, done.output
    (error,) = errors(done)
    assert "step 7 could not be saved" in error and said in error
    assert tree(CHECKPOINTS) == before
    assert record()["status"] == "failed"
    assert "resuming at step 6 " in pretrain().stderr


def test_5_too_little_space_is_refused_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs

    class Small:
        f_bavail, f_frsize, f_files, f_favail = 3, 4096, 0, 0

    before = tree(CHECKPOINTS)
    monkeypatch.setattr(os, "statvfs", lambda path: Small() if "checkpoints" in str(path) else real(path))
    done = pretrain()
    assert done.exit_code == 3
    (error,) = errors(done)
    assert "saving needs 0.017 GB and the disk has 0.000 GB free" in error
    assert tree(CHECKPOINTS) == before


def test_6_a_place_that_cannot_be_written_is_named_at_once() -> None:
    Path("file").touch()
    for place in ("file/run", "/proc/self/run"):
        done = pretrain("-o", place)
        assert done.exit_code in (2, 3)
        (error,) = errors(done)
        assert place.split("/run")[0] in error


def damaged(how: str, path: Path) -> None:
    """Damage one file."""
    if how == "flipped":
        flip(path)
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-2])  # the last byte of JSON is a line feed, which says nothing
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


CLASSES = ("manifest.json", "state.json", "tensors")


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty", "missing"])
@pytest.mark.parametrize("name", CLASSES)
def test_7_8_9_12_a_damaged_file_is_named_and_the_step_before_is_taken(how: str, name: str) -> None:
    chosen = [path for path in files(6) if name in str(path)]
    assert chosen
    for path in (chosen[0], *chosen[1:][-1:]):
        damaged(how, path)
    continues_at(4, str(step(6)), "trying the checkpoint before it")
    assert list(CHECKPOINTS.glob(".bad-step-00000006-*"))


def test_7_8_every_file_of_a_checkpoint_counts() -> None:
    for path in files(6):
        content = path.read_bytes()
        for how in ("flipped", "missing"):
            damaged(how, path)
            done = pretrain("--stop-at-step", "4")
            assert "resuming at step 4 " in done.stderr, (path, how, done.output)
            shutil.rmtree(step(6), ignore_errors=True)
            (bad,) = CHECKPOINTS.glob(".bad-step-00000006-*")
            os.rename(bad, step(6))
            path.write_bytes(content)


def test_9_a_manifest_of_the_future_names_both_versions() -> None:
    path = step(6) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": "megalodon/checkpoint/99"}))
    continues_at(4, f"has format megalodon/checkpoint/99; this version of megalodon reads {FORMAT}")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"format": 1}', "[" * 100_000, "\x00"])
def test_9_a_manifest_that_is_none_is_named(text: str) -> None:
    (step(6) / "manifest.json").write_text(text)
    continues_at(4, f"{step(6)}/manifest.json")


def test_10_a_stray_shard_is_refused_and_named() -> None:
    shard = next(path for path in files(6) if path.suffix == ".safetensors")
    shutil.copyfile(shard, shard.with_name("extra.safetensors"))
    continues_at(4, "tensors/extra.safetensors")


def test_10_files_of_another_step_are_refused() -> None:
    shard = next(path for path in files(6) if path.suffix == ".safetensors")
    shutil.copyfile(step(2) / shard.relative_to(step(6)), shard)
    continues_at(4, shard.name)


def test_10_a_step_under_another_name_is_refused() -> None:
    shutil.copytree(step(4), step(7))
    done = pretrain()
    assert "resuming at step 6 " in done.stderr
    assert "step-00000007/manifest.json is that of step 4; expected that of step-00000007" in done.stderr


def test_11_a_second_trainer_is_refused_and_told_the_owner() -> None:
    before = tree(CHECKPOINTS)
    with RunLock(RUN):
        done = pretrain()
    assert done.exit_code == 2
    (error,) = errors(done)
    assert f"{RUN} is held by process {os.getpid()} on " in error
    assert tree(CHECKPOINTS) == before


def test_11_a_stale_lock_is_taken_over_with_a_note() -> None:
    import socket

    owner = {"pid": 2**22 - 1, "host": socket.gethostname(), "started": "2026-01-01 00:00:00"}
    (RUN / "lock.json").write_text(json.dumps(owner))
    done = pretrain()
    assert done.exit_code == 0
    assert f"was left by process {2**22 - 1} on" in done.stderr and "taking over" in done.stderr


def test_11_a_lock_of_another_host_needs_force() -> None:
    (RUN / "lock.json").write_text(json.dumps({"pid": 1, "host": "elsewhere", "started": "then"}))
    done = pretrain()
    assert done.exit_code == 2 and "process 1 on elsewhere" in errors(done)[0]
    os.utime(RUN / "lock.json", (0, 0))
    assert pretrain().exit_code == 2
    assert pretrain("--force-unlock").exit_code == 0


def test_13_if_no_checkpoint_verifies_nothing_is_started_and_nothing_removed() -> None:
    for number in (2, 4, 6):
        flip(step(number) / "state.json")
    before = tree(CHECKPOINTS)
    done = pretrain()
    assert done.exit_code == 2
    (error,) = errors(done)
    assert all(f"step-0000000{number}/state.json" in error for number in (2, 4, 6))
    assert tree(CHECKPOINTS) == before
    assert record()["status"] == "stopped"


def other_data() -> list[str]:
    shutil.rmtree("data")
    return ["data.bos=false", "--allow-change", "data.bos"]


OTHER: dict[str, tuple[Callable[[], list[str]], tuple[str, ...]]] = {
    "config": (lambda: ["optim.lr=1e-2", "optim.eps=1e-6"], ("optim.lr is 0.003 there, 0.01 here", "optim.eps is")),
    "tokenizer": (lambda: ["tokenizer.reserve=8", "data.dir=d"], ("tokenizer.reserve is 16 there, 8 here",)),
    "data": (other_data, ("fingerprint",)),
    "model": (lambda: ["model.num_layers=3"], ("model.num_layers is 2 there, 3 here",)),
}


@pytest.mark.parametrize("what", OTHER)
def test_14_another_run_is_refused_with_every_difference(what: str) -> None:
    change, said = OTHER[what]
    words = change()
    before = tree(CHECKPOINTS)
    done = pretrain(*words)
    assert done.exit_code == 2, done.output
    (error,) = errors(done)
    assert all(text in error for text in said), error
    assert tree(CHECKPOINTS) == before


def test_15_another_cut_into_micro_batches_goes_on_with_the_same_data() -> None:
    whole = pretrain("-o", "whole", "train.micro_batch=4")
    assert whole.exit_code == 0
    assert pretrain("train.micro_batch=2").exit_code == 0
    rows: list[list[dict[str, Any]]] = []
    for run in (Path("whole"), RUN):
        lines = (run / "metrics.jsonl").read_text().splitlines()
        rows.append([row for line in lines if (row := json.loads(line))["kind"] == "train"])
    assert [row["tokens"] for row in rows[0]] == [row["tokens"] for row in rows[1]]
    assert all(abs(a["loss"] - b["loss"]) < 1e-4 for a, b in zip(*rows, strict=True))


def test_16_other_shapes_are_listed() -> None:
    before = tree(CHECKPOINTS)
    done = pretrain("model.ffn_hidden_dim=31", "--allow-change", "model.ffn_hidden_dim")
    assert done.exit_code == 2
    (error,) = errors(done)
    assert "does not fit this model" in error and "nffn" in error and "29" in error and "31" in error
    assert tree(CHECKPOINTS) == before


def test_17_a_writer_in_the_background_that_dies_is_noticed_within_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from megalodon.checkpoint import saver

    def dies(*_: object) -> None:
        raise MemoryError("no memory for the writer")

    monkeypatch.setattr(saver, "save_step", dies)
    best = (CHECKPOINTS / "best").read_bytes()
    done = pretrain("checkpoint.background=true", "checkpoint.every=1", "--max-steps", "50")
    assert done.exit_code not in (0, 75), done.output
    steps = [json.loads(line)["step"] for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) <= 8  # step 7 was to be saved; one more may be done before it is asked for
    assert not step(7).exists() and (CHECKPOINTS / "best").read_bytes() == best
