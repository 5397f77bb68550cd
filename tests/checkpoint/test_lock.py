"""Two trainers never share a run directory; the lock of a dead one is taken over, here at once, elsewhere by force."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalodon.checkpoint import lock
from megalodon.checkpoint.lock import STALE_SECONDS, RunLock
from megalodon.errors import CheckpointError, EnvironmentFault

ELSEWHERE = '{"pid": 1, "host": "elsewhere", "started": "then"}'


def age(path: Path, seconds: float) -> None:
    """Let the last heartbeat of a lock be so long ago."""
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_two_trainers_never_share_a_run(tmp_path: Path) -> None:
    with RunLock(tmp_path) as first:
        assert first.taken_over is None
        with pytest.raises(CheckpointError, match=rf"is held by process {os.getpid()} on .* since"), RunLock(tmp_path):
            pass
        owner = json.loads(first.path.read_text())
        assert owner.keys() == {"pid", "host", "boot", "started"}
    with RunLock(tmp_path) as second:
        assert second.taken_over is None


@pytest.mark.parametrize("left", ['{"pid": 1}', '{"pid": 1, "host"', "[1]"])
def test_a_lock_left_by_a_dead_process_of_this_host_is_taken_over(tmp_path: Path, left: str) -> None:
    (tmp_path / "lock.json").write_text(left)
    with RunLock(tmp_path) as taken:
        assert taken.taken_over == ("process 1 on ? since ?" if left.endswith("1}") else None)
        assert json.loads(taken.path.read_text())["pid"] == os.getpid()


HOLDS = """
import os, sys
from pathlib import Path
from megalodon.checkpoint.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.__enter__()
print(os.getpid(), flush=True)
sys.stdin.read()
os._exit(1)
"""


def test_a_killed_trainer_refuses_the_second_one_while_it_lives_and_no_longer(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        number = process.stdout.readline().strip()
        with pytest.raises(CheckpointError, match=f"is held by process {number} on"), RunLock(tmp_path, force=True):
            pass
        process.stdin.close()
        process.wait()
    with RunLock(tmp_path) as taken:
        assert taken.taken_over is not None and taken.taken_over.startswith(f"process {number} on")


def test_another_host_gives_way_to_force_only_and_only_once_its_heart_has_stopped(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    for seconds, force in ((0.0, False), (0.0, True), (STALE_SECONDS - 60, True), (STALE_SECONDS + 60, False)):
        path.write_text(ELSEWHERE)
        age(path, seconds)
        with (
            pytest.raises(CheckpointError, match=r"left locked by process 1 on elsewhere since then, .* s old") as told,
            RunLock(tmp_path, force=force),
        ):
            pass
        assert told.value.hint is not None and "--force-unlock" in told.value.hint
        assert path.read_text() == ELSEWHERE
    with RunLock(tmp_path, force=True) as taken:
        assert taken.taken_over == "process 1 on elsewhere since then"
    assert [entry.name for entry in tmp_path.iterdir()] == ["lock.json"]


def test_a_heartbeat_renews_the_lock_by_a_clock_that_cannot_jump(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(lock.time, "monotonic", lambda: now)
    with RunLock(tmp_path) as mine:
        age(mine.path, 500)
        before = mine.path.stat().st_mtime
        mine.beat()
        assert mine.path.stat().st_mtime == before
        now = lock.BEAT_SECONDS
        mine.beat()
        assert mine.path.stat().st_mtime > before + 400
    mine.beat()


def test_a_lock_that_cannot_be_written_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "lock.json").mkdir()
    with pytest.raises(EnvironmentFault, match=r"lock.json cannot be locked: Is a directory"), RunLock(tmp_path):
        pass
