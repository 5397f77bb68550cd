"""`megalodon runs` beside a living run: status, save and stop, following; and comparing, drawing, cleaning up."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pexpect
import pytest
import torch
from typer.testing import CliRunner, Result

from megalodon.checkpoint.lock import RunLock
from megalodon.checkpoint.store import retain, save_step
from megalodon.recipe import CheckpointConfig
from megalodon.training.rollback import Rollback, write_rollbacks
from megalodon_cli import run_clean, run_files
from megalodon_cli.app import app
from megalodon_cli.checkpoints import weights
from megalodon_cli.run_tail import _Followed, follow


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["runs", *arguments])


def train(step: int, loss: float = 3.0) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "loss": loss,
        "lr": 1e-3,
        "grad_norm": 1.5,
        "tokens": 8 * step,
        "tok_per_s": 50,
    }


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """As the loop does: aside, then in one move."""
    aside = path.with_name(".tmp-metrics.jsonl")
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(aside, path)


def make(name: str, loss: float = 3.0, **recipe: Any) -> Path:
    path = Path("runs") / name
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"status": "running", "step": 2, "steps": 9, "next": []}))
    lines = [f"name: {name}", "optim:", *(f"  {key}: {value}    # command line" for key, value in recipe.items())]
    (path / "recipe.yaml").write_text("\n".join([*lines, "train:", "  seed: 1    # default"]) + "\n")
    health = {"kind": "health", "step": 2, "layers": [{"memory": {"median": 5.0, "p99.9": 60.0, "max": 70.0}}]}
    position = {"1": loss + 1, "2": loss}
    evaluation = {"kind": "eval", "step": 2, "valid_loss": loss, "bits_per_byte": 2.0, "by_position": position}
    skip = {"kind": "event", "step": 2, "event": "skip", "reason": "loss nan"}
    write(path / "metrics.jsonl", [train(1, loss + 1), train(2, loss), evaluation, health, skip])
    return path


@pytest.fixture
def first(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make("first", lr=0.001)


def status() -> str:
    [entry] = json.loads(run("ls", "--json").stdout)["result"]
    return str(entry["status"])


def test_a_run_is_running_while_a_process_holds_it_and_interrupted_when_that_died(first):
    assert status() == "interrupted"
    code = "import sys, time; from pathlib import Path; from megalodon.checkpoint.lock import RunLock\n"
    code += "with RunLock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(first)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        assert status() == "running"
        holder = run_files.holder(first)
        assert holder is not None and holder["pid"] == process.pid
        process.kill()
    assert json.loads((first / "lock.json").read_text())["pid"] == process.pid  # its name is still there
    assert status() == "interrupted"


def test_a_memory_that_is_no_number_hides_nothing(first):
    """metrics.jsonl holds null for what is not finite."""
    health = {"kind": "health", "step": 3, "layers": [{"memory": {"median": None, "p99.9": 6.0, "max": None}}]}
    with (first / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(health) + "\n")
    assert "memory of layers (tokens) -\n" in run("tail", "first").stdout
    shown = run("show", "first")
    assert shown.exit_code == 0 and shown.stdout.count("layer  memory") == 1
    (row,) = [
        line.split() for line in shown.stdout.splitlines() if line.split()[:1] == ["0"] and len(line.split()) == 4
    ]
    assert row == ["0", "-", "6", "-"]


def test_another_host_is_believed_while_its_heart_beats(first):
    (first / "lock.json").write_text(json.dumps({"pid": 1, "host": f"not-{socket.gethostname()}"}))
    assert status() == "running"
    os.utime(first / "lock.json", (time.time() - 3600,) * 2)
    assert status() == "interrupted"


@pytest.mark.parametrize("what", ["save", "stop"])
def test_save_and_stop_leave_a_file_for_a_run_that_is_held_and_refuse_any_other(first, what):
    refused = run(what, "first")
    assert refused.exit_code == 2 and not (first / what).exists()
    assert refused.stderr == f"error: runs/first is interrupted: no process holds it, so there is nothing to {what}\n"
    with RunLock(first):
        done = run(what, "first", "--json")
        assert json.loads(done.stdout)["result"]["owner"]["pid"] == os.getpid()
    assert (first / what).exists()


def test_tail_prints_the_last_rows_as_lines_or_as_they_stand(first):
    assert run("tail", "first", "-n", "1").stdout == "step 2: skip: loss nan\n"
    text = run("tail", "first").stdout.splitlines()
    assert text[0].startswith("step 1/9  11.1%  loss 4.000") and "memory of layers (tokens) 5" in text[3]
    rows = [json.loads(line) for line in run("tail", "first", "--json").stdout.splitlines()]
    assert rows == run_files.metrics(first)
    ended = run("tail", "first", "-f", "-n", "1")  # no process holds it: there is nothing to wait for
    assert (ended.exit_code, ended.stdout) == (0, "step 2: skip: loss nan\n")
    assert ended.stderr == "note: runs/first: interrupted\n"


def test_a_followed_run_shows_each_row_once_although_its_file_is_replaced(first):
    path = first / "metrics.jsonl"
    rows = [train(step) for step in range(1, 6)]
    write(path, rows)
    followed = _Followed(path)
    assert list(followed.new_rows()) == rows
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
        file.flush()
        assert list(followed.new_rows()) == []
        file.write('ep": 6}\n')
    assert [row["step"] for row in followed.new_rows()] == [6]
    write(path, rows[:3])  # continued from the checkpoint of step 3
    assert list(followed.new_rows()) == []
    write(path, [*rows, {"kind": "train", "step": 6}, {"kind": "eval", "step": 6}, train(7)])
    assert [(row["kind"], row["step"]) for row in followed.new_rows()] == [("eval", 6), ("train", 7)]
    back = {"kind": "event", "step": 3, "event": "rollback", "from": 8, "to": 3, "samples": [[0, 1]], "reason": "x"}
    write(path, [*rows[:3], back, train(4, 1.0)])
    assert [row["step"] for row in followed.new_rows()] == [3, 4]
    write(path, [*rows[:3], back, train(4, 1.0), train(5, 1.0)])
    assert [row["step"] for row in followed.new_rows()] == [5]
    followed.close()


def test_following_ends_when_nobody_holds_the_run_and_misses_nothing(first, monkeypatch):
    held = iter([True, True, False])

    def holder(run: Path) -> dict[str, Any] | None:
        state = next(held)
        with (run / "metrics.jsonl").open("a") as file:  # between the question and the look at the file
            file.write(json.dumps(train(3 if state else 4)) + "\n")
        return {"pid": 1} if state else None

    monkeypatch.setattr("megalodon_cli.run_tail.holder", holder)
    assert [row["step"] for row in follow(first, 0, stay=True, poll=0.0)] == [3, 4]


def test_ctrl_c_ends_tail_with_0(first):
    with RunLock(first):
        tail = pexpect.spawn(
            sys.executable,
            ["-m", "megalodon_cli", "runs", "tail", "first", "-f"],
            timeout=60,
            # whoever runs the tests in the background may have made them, and so this child, deaf to Ctrl-C
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        tail.expect("skip: loss nan")
        tail.sendintr()
        tail.expect(pexpect.EOF)
        tail.close()
    assert tail.exitstatus == 0


def test_compare_shows_what_differs_and_both_curves(first):
    make("second", loss=2.0, lr=0.002)
    text = run("compare", "first", "second").stdout
    assert "recipe    first  second\noptim.lr  0.001  0.002\n" in text and "train.seed" not in text
    assert "A first  B second" in text
    result = json.loads(run("compare", "first", "second", "--json").stdout)["result"]
    assert result["differences"] == {"optim.lr": [0.001, 0.002]}
    assert result["curves"]["second"] == [[8, 3.0], [16, 2.0]]
    for names in (["first"], ["first", "runs/first"]):
        refused = run("compare", *names)
        assert refused.exit_code == 2 and "expected two or more different runs" in refused.stderr


@pytest.mark.parametrize(("suffix", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_plot_draws_a_picture(first, suffix, begins):
    pytest.importorskip("matplotlib", reason="the extra [plot] is not installed")
    make("second", loss=2.0)
    assert run("plot", "first", "-o", f"one.{suffix}").exit_code == 0
    assert run("compare", "first", "second", "--plot", f"two.{suffix}").exit_code == 0
    assert all(Path(f"{name}.{suffix}").read_bytes().startswith(begins) for name in ("one", "two"))


def test_plot_in_the_terminal_and_what_it_refuses(first, monkeypatch):
    text = run("plot", "first").stdout
    assert [t in text for t in ("training loss", "validation loss", "learning rate", "gradient norm")] == [True] * 4
    assert run("plot", "first", "-o", "x.gif").stderr == "error: x.gif: expected a name ending in .png or .svg\n"
    assert "there is no folder nowhere" in run("plot", "first", "-o", "nowhere/x.png").stderr
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    missing = run("plot", "first", "-o", "x.png")
    assert missing.exit_code == 3 and "pip install 'megalodon-lm[plot]'" in missing.stderr
    (first / "metrics.jsonl").unlink()
    assert run("plot", "first").stderr.startswith("error: runs/first has no training step to draw yet")


def test_show_has_events_memory_overrides_and_the_loss_by_position(first):
    text = run("show", "first").stdout
    assert "skip 1\n  step 2: skip: loss nan" in text
    assert "layer  memory, tokens: median  p99.9  max" in text
    assert "overrides\n  lr = 0.001" in text.replace("optim.", "") and "seed" not in text
    assert "loss up to position  step 2" in text
    result = json.loads(run("show", "first", "--json").stdout)["result"]
    assert result["status"] == "interrupted" and result["overrides"]["optim.lr"]["origin"] == "command line"


@pytest.fixture
def saved(first) -> Path:
    """A run with four checkpoints, the second of lowest loss, and what killed processes left."""
    root = first / "checkpoints"
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5)):
        save_step(root, step, {"model.w": torch.ones(3)}, {"step": step}, {"valid_loss": loss})
    retain(root, CheckpointConfig(keep_last=4))
    for name in (".tmp-run.json-7", "checkpoints/.bad-step-00000009-1", "model", "profile"):
        (first / name).mkdir()
        (first / name / "file").write_text("x" * 10)
    return first


def names(path: Path) -> set[str]:
    return {p.name for p in (path / "checkpoints").iterdir()}


def test_clean_asks_and_refuses_where_nobody_can_be_asked(saved):
    before = names(saved)
    refused = run("clean", "first")
    assert refused.exit_code == 2 and "nothing was removed" in refused.stderr
    assert refused.stderr.endswith("hint: megalodon runs clean first --yes\n") and names(saved) == before
    assert "checkpoints/step-00000001" in refused.stdout and "older than step 4" in refused.stdout
    with RunLock(saved):
        held = run("clean", "first", "--yes")
    assert held.exit_code == 2 and "is held by process" in held.stderr and names(saved) == before


def test_clean_keeps_the_newest_that_verifies_the_best_and_the_model(saved):
    (saved / "checkpoints/step-00000004/state.json").write_text("{}")  # the newest no longer verifies
    removed = json.loads(run("clean", "first", "--yes", "--json").stdout)["result"]["removed"]
    assert {Path(item["path"]).name: item["why"] for item in removed} == {
        "step-00000001": "older than step 3",
        "step-00000004": "does not verify, or was rolled back",
        ".bad-step-00000009-1": "did not verify when it was needed, or was rolled back",
        ".tmp-run.json-7": "left by a process that was killed",
        "profile": "traces of `--profile`",
    }
    assert names(saved) == {"step-00000002", "step-00000003", "best"}
    assert (saved / "model/file").exists() and not (saved / "profile").exists()
    assert run("clean", "first").stdout == "runs/first: nothing to remove\n"


def test_clean_keeps_the_checkpoint_that_a_killed_rollback_goes_back_to(saved):
    """rollbacks.json commits a rollback; the process died before it set the abandoned steps aside."""
    write_rollbacks(saved, [Rollback(5, 3, [[16, 20]], "loss nan", {})])
    for made in (*(saved / "checkpoints").glob("step-*"), saved / "model"):
        shutil.rmtree(made)
    for step in (1, 2, 3, 4):
        state = {"step": step, "rollbacks": []}
        save_step(saved / "checkpoints", step, {"model.w": torch.full((3,), float(step))}, state, {"valid_loss": None})
    assert weights("first").source.endswith("step-00000003")
    assert run("clean", "first", "--yes").exit_code == 0
    assert "step-00000003" in names(saved) and not {"step-00000001", "step-00000004"} & names(saved)


def test_clean_removes_no_checkpoint_if_none_verifies(saved):
    for step in (saved / "checkpoints").glob("step-*"):
        (step / "state.json").write_text("{}")
    assert not [item for item in run_clean.removable(saved) if item.path.name.startswith("step-")]


def test_the_end_of_a_long_file_is_read_alone(first, monkeypatch):
    rows = [train(step) for step in range(1, 4000)]
    write(first / "metrics.jsonl", [{"kind": "eval", "step": 0, "valid_loss": 9.0}, *rows])
    assert run_files.last_rows(first, 2) == rows[-2:]
    monkeypatch.setattr(run_files, "BLOCK", 100)
    lines = list(run_files.backwards(first / "metrics.jsonl"))
    assert [json.loads(line)["step"] for line in lines] == list(range(3999, -1, -1))
    assert run_files.summary(first, {})["valid_loss"] == 9.0


def test_completion_offers_the_runs_that_begin_so(first):
    make("second")
    assert sorted(run_files.complete("")) == ["first", "second"]
    assert run_files.complete("runs/f") == ["runs/first"]


def test_a_recipe_that_cannot_be_read_hides_nothing_else(first):
    (first / "recipe.yaml").write_bytes(b"name: caf\xe9\n")
    result = run("show", "first")
    assert result.exit_code == 0 and "skip 1" in result.stdout
    assert result.stderr == "warning: runs/first/recipe.yaml: not UTF-8: byte 9 is 0xe9\nwarning: " + (
        "runs/first/recipe.yaml: not UTF-8: byte 9 is 0xe9 (2 times)\n"
    )
