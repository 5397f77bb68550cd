"""Items 24, 25 and 45 of the fault list: signals, clocks, and machines that lack what one takes for granted.

Not here: what a signal does in the loop (tests/cli/test_pretrain.py, tests/training/test_loop.py).
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from breakable import RUN, TINY, command, errors, pretrain, record

COMMAND = [sys.executable, "-m", "megalodon_cli"]
TIMES = {"tok_per_s", "seconds", "data_seconds", "peak_share", "memory"}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, and no time spent on measuring the machine."""
    monkeypatch.setattr("megalodon.training.metrics.matmul_peak", lambda *_: 1e9)
    monkeypatch.chdir(tmp_path)


def rows() -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in found]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_24_a_signal_at_any_time_ends_as_promised(number: signal.Signals) -> None:
    """Six moments from start to end, one or two signals: 0, 75, or 128 + n; the same command always goes on."""
    draw = random.Random(int(number))
    words = ["pretrain", "debug", *TINY, "train.max_steps=400", "checkpoint.every=50", "eval.every=20"]
    seen = set()
    for attempt in range(6):
        with subprocess.Popen(
            [*COMMAND, *words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        ) as child:
            assert child.stderr is not None
            began = time.monotonic()
            wanted = draw.choice(["step ", "saved step", "eval at step"]) if attempt else "tokens: "
            said = []
            for line in child.stderr:
                said.append(line)
                if line.startswith(wanted):
                    break
            child.send_signal(number)
            if attempt % 2:
                child.send_signal(number)
            said += child.stderr.readlines()
            code = child.wait(timeout=60)
        assert time.monotonic() - began < 60
        text = "".join(said)
        assert code in {75, 128 + number, -number if not attempt else 75}, (wanted, code, text)
        assert "Traceback" not in text, text
        seen.add(code)
        if code == 75:
            assert "the same command continues" in text
            assert record()["status"] == "stopped"
    assert 75 in seen
    done = command(*words[:-3], "--max-steps", str(record()["step"] + 1), "checkpoint.every=50", "eval.every=20")
    assert done.exit_code == 0 and "resuming at step" in done.stderr, done.output


def test_25_a_clock_that_jumps_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pretrain().exit_code == 0
    whole = rows()
    RUN.rename("whole")
    jumps = iter(range(10**9))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + (-1) ** (n := next(jumps)) * 86_400.0 * (n + 1))
    done = pretrain("--max-time", "10m", "checkpoint.every_minutes=10")
    assert done.exit_code == 0, done.output
    assert rows() == whole
    every = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["seconds"] < 60 and row["tok_per_s"] > 0 for row in every if row["kind"] == "train")
    assert 0 <= record()["seconds"] < 600


def run(*words: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, with some of its environment changed or (None) taken away."""
    changed = {key: value for key, value in (os.environ | environment).items() if value is not None}
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, env=changed, errors="surrogateescape")


SURROUNDINGS: dict[str, dict[str, str | None]] = {
    "HOME that cannot be written": {"HOME": "/proc/self", "XDG_CACHE_HOME": None, "TORCHINDUCTOR_CACHE_DIR": None},
    "no HOME": {"HOME": None},
    "a locale without UTF-8": {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "a terminal that can nothing": {"TERM": "dumb", "COLUMNS": "20"},
    "proxies that are not there": {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"},
}


@pytest.mark.slow
@pytest.mark.parametrize("what", SURROUNDINGS)
def test_45_odd_surroundings_change_nothing(what: str) -> None:
    changed = SURROUNDINGS[what]
    Path("text.txt").write_text("héllo wörld\n" * 40)
    words = ("--input", "text.txt", "--document", "line", "--train", "--vocab-size", "300", "--valid", "0", "-o", "out")
    for line in (
        ("recipes", "show", "debug"),
        ("tokenize", *words, "-j", "2"),
        ("tokenize", "--inspect", "1", "out"),
        ("pretrain", "debug", *TINY, "--max-steps", "2"),
        ("generate", "debug", "-p", "é", "-n", "3", "--seed", "1"),
        ("runs", "show", "debug"),
    ):
        done = run(*line, **changed)
        assert done.returncode == 0, (line, done.stderr)
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_45_without_a_network_the_hub_is_an_error_of_the_environment() -> None:
    words = ("--input", "hf:nobody/nothing", "--tokenizer", "bytes", "-o", "out")
    for more, environment in (((), {"HTTPS_PROXY": "http://127.0.0.1:9"}), (("--offline",), {})):
        done = run("tokenize", *words, *more, **environment)
        assert done.returncode == 3, done.stderr
        assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
        assert "Traceback" not in done.stderr and not Path("out").exists()


def test_45_paths_may_hold_spaces_and_any_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "mit Ümlaut und 鯊 'zitiert'"
    Path(name).mkdir()
    monkeypatch.chdir(name)
    Path("ein text.txt").write_text("some words of text\n" * 30)
    words = ("--document", "line", "--tokenizer", "bytes", "--valid", "0", "-o", "ein store")
    assert command("tokenize", "--input", "ein text.txt", *words).exit_code == 0
    assert command("tokenize", "--verify", "ein store").exit_code == 0
    done = pretrain("-o", "läufe/mein lauf", "--max-steps", "2")
    assert done.exit_code == 0, done.output
    assert command("generate", "läufe/mein lauf", "-p", "x", "-n", "2").exit_code == 0


def test_45_a_port_or_a_pipe_is_no_text() -> None:
    os.mkfifo("pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.txt")
        for name in ("pipe.txt", "socket.txt"):
            done = command("tokenize", "--input", name, "--tokenizer", "bytes", "-o", "out")
            assert done.exit_code == 2, done.output
            assert name in errors(done)[0]
