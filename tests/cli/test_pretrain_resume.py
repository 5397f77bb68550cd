"""What the run directory holds and what `pretrain` does then, row by row; weights from elsewhere; branches."""

import os
import pkgutil
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from small_runs import files, metrics, pretrain, record

from megalodon.checkpoint.store import steps_in
from megalodon.training.loop import Trainer

STEP = "runs/debug/checkpoints/step-0000000"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("run"))
    shared = tmp_path_factory.getbasetemp() / "pretrain-data"
    shared.mkdir(exist_ok=True)
    Path("data").symlink_to(shared)
    monkeypatch.setattr("megalodon.training.metrics.matmul_peak", lambda *_: 1e9)


def test_nothing_and_a_run_killed_before_its_first_save_start_and_say_so() -> None:
    assert "runs/debug: a new run, starting at step 0" in pretrain("--stop-at-step", "1").stderr
    whole = metrics("runs/debug")
    shutil.rmtree("runs/debug/checkpoints")  # what a kill before the first save leaves
    again = pretrain("--stop-at-step", "1")
    assert again.exit_code == 0
    assert "runs/debug: the run ended before its first save; starting at step 0" in again.stderr
    assert metrics("runs/debug") == whole


def test_an_unfinished_run_continues_from_its_newest_step() -> None:
    pretrain("--stop-at-step", "3")
    assert "resuming at step 3 (444 tokens seen)" in pretrain("--stop-at-step", "4").stderr


def test_a_finished_run_says_so_and_touches_nothing() -> None:
    pretrain("--max-steps", "2")
    kept = files("runs")
    done = pretrain("--max-steps", "2")
    assert (done.exit_code, done.stdout.splitlines()[0]) == (0, "runs/debug is finished: 2 steps")
    assert files("runs") == kept


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("model.ffn_hidden_dim", "31", "29 there, 31 here"),
        ("data.isolate", "none", "doc there, none here"),
        ("train.seed", "2", "1 there, 2 here"),
        ("train.batch_tokens", "74", "148 there, 74 here"),
        ("optim.grad_clip", "0.5", "1.0 there, 0.5 here"),
    ],
)
def test_other_frozen_values_are_refused_with_both(key: str, value: str, said: str) -> None:
    pretrain("--stop-at-step", "1")
    kept = files("runs")
    refused = pretrain(f"{key}={value}")
    assert refused.exit_code == 2
    assert f"{key} is {said}; choose another -o, or --allow-change {key}" in refused.stderr
    assert files("runs") == kept


def test_free_keys_may_change_in_the_middle_of_a_run() -> None:
    pretrain("--stop-at-step", "2")
    free = ["log.every=3", "eval.every=3", "eval.tokens=200", "checkpoint.every=5", "checkpoint.keep_last=4"]
    free += ["train.micro_batch=2", "train.compile=false", "train.recompute=none", "parallel.dp_shard=1"]
    done = pretrain(*free)
    assert done.exit_code == 0, done.output
    assert "resuming at step 2" in done.stderr and record("runs/debug")["allowed"] == []
    assert [row["step"] for row in metrics("runs/debug") if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_exactly_this_step_is_the_newest_one_of_its_run() -> None:
    pretrain("--stop-at-step", "5")
    kept = files("runs")
    for step in (2, 4):
        refused = pretrain("--resume", f"{STEP}{step}")
        assert refused.exit_code == 2
        assert "runs/debug has newer steps" in refused.stderr and "choose another -o to branch off" in refused.stderr
    assert files("runs") == kept
    done = pretrain("--resume", f"{STEP}5")
    assert done.exit_code == 0 and "resuming at step 5" in done.stderr


def test_a_named_step_that_is_damaged_is_an_error_and_no_other_is_taken() -> None:
    pretrain("--stop-at-step", "4")
    shard = next(Path(f"{STEP}4").rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    kept = files("runs/debug/checkpoints", "runs/debug/metrics.jsonl")
    refused = pretrain("--resume", f"{STEP}4")
    assert refused.exit_code == 2 and shard.name in refused.stderr
    assert files("runs/debug/checkpoints", "runs/debug/metrics.jsonl") == kept


def test_a_branch_begins_with_the_step_and_ends_as_the_run_does() -> None:
    pretrain()
    kept = files("runs/debug")
    begun = pretrain("--resume", f"{STEP}4", "-o", "branch", "--stop-at-step", "5")
    assert begun.exit_code == 0, begun.output
    assert "branch: a new run, a branch of runs/debug from step 4 on" in begun.stderr
    assert record("branch")["branched_from"] == {"run": "runs/debug", "step": 4}
    assert pretrain("--resume", f"{STEP}4", "-o", "branch").exit_code == 0  # the same command goes on
    assert metrics("branch") == metrics("runs/debug")
    models = [Path(run, "model/model.safetensors").read_bytes() for run in ("branch", "runs/debug")]
    assert models[0] == models[1] and files("runs/debug") == kept
    other = pretrain("--resume", f"{STEP}6", "-o", "branch")
    assert other.exit_code == 2 and "branch holds a run that did not branch off" in other.stderr


@pytest.mark.parametrize("place", ["megalodon.training.run.RunRecord.update", "shutil.copyfile", "os.replace"])
def test_a_branch_that_was_killed_while_it_began_goes_on(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain()
    branch = ["--resume", f"{STEP}4", "-o", "branch"]
    owner, _, name = place.rpartition(".")
    real = getattr(pkgutil.resolve_name(owner), name)

    def die(*given: Any, **named: Any) -> Any:
        if name != "replace" or str(given[1]) == "branch/metrics.jsonl":
            raise KeyboardInterrupt
        return real(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr("megalodon.training.run.drop_unbegun", lambda *_: None)  # nobody tidies up after a kill
        patch.setattr(place, die)
        assert pretrain(*branch).exit_code == 130
    assert pretrain(*branch).exit_code == 0
    assert metrics("branch") == metrics("runs/debug")


def test_a_branch_with_other_values_has_them_on_record() -> None:
    pretrain("--stop-at-step", "2")
    line = ["--resume", f"{STEP}2", "-o", "branch", "optim.lr=1e-2", "--stop-at-step", "3"]
    refused = pretrain(*line)
    assert refused.exit_code == 2 and "optim.lr is 0.003 there, 0.01 here" in refused.stderr
    assert not Path("branch").exists()
    assert pretrain(*line, "--allow-change", "optim.lr").exit_code == 0
    assert record("branch")["allowed"] == [{"optim.lr": [0.003, 0.01]}]


@pytest.mark.parametrize("given", ["sometimes", "runs/debug", "runs/debug/checkpoints/step-00000009", ""])
def test_what_is_no_step_directory_is_refused(given: str) -> None:
    pretrain("--stop-at-step", "1")
    refused = pretrain("--resume", given, "-o", "new")
    assert refused.exit_code == 2 and "expected auto, never, or a step directory such as" in refused.stderr
    assert not Path("new").exists()
    refused = pretrain("--resume", given)
    assert refused.exit_code == 2 and "expected auto, never, or a step directory such as" in refused.stderr


def test_weights_from_elsewhere_begin_a_new_run_and_only_that() -> None:
    pretrain("--max-steps", "2")
    for given in ("runs/debug", "debug", "debug@2", "debug@best", "runs/debug/model"):
        done = pretrain("--init-from", given, "-o", "new", "eval.at_start=true", "--stop-at-step", "1")
        assert done.exit_code == 0, done.output
        assert "new: weights from " in done.stderr
        begin, end = metrics("new")[0], [row for row in metrics("runs/debug") if row["kind"] == "eval"][-1]
        assert (begin["step"], begin["valid_loss"]) == (0, end["valid_loss"]), given
        shutil.rmtree("new")
    pretrain("--init-from", "debug@2", "-o", "new", "--stop-at-step", "1")
    shutil.rmtree("runs/debug")  # the run has weights of its own by now
    assert "resuming at step 1" in pretrain("--init-from", "debug@2", "-o", "new", "--stop-at-step", "2").stderr


def test_weights_that_do_not_fit_are_named_one_by_one() -> None:
    pretrain("--max-steps", "1")
    refused = pretrain("--init-from", "debug", "-o", "new", "model.ffn_hidden_dim=31", "model.num_layers=1")
    assert refused.exit_code == 2 and not Path("new").exists()
    assert "unexpected layers.1." in refused.stderr and "expected (31, 24)" in refused.stderr
    for given, said in (
        ("nope", "nope: no such directory"),
        ("debug@9", "step-00000009/manifest.json is missing"),
        ("debug@last", "expected a step or `best` behind the @"),
        ("nope@1", "nope: no run nope"),
    ):
        refused = pretrain("--init-from", given, "-o", "deep/runs/new")
        assert refused.exit_code == 2 and said in refused.stderr, refused.output
        assert not Path("deep").exists()
    Path("deep").mkdir()
    assert pretrain("--init-from", "nope", "-o", "deep/runs/new").exit_code == 2
    assert list(Path("deep").iterdir()) == []  # what was there before stays
    both = pretrain("--init-from", "debug", "--resume", f"{STEP}1")
    assert both.exit_code == 2 and "a step has its own weights" in both.stderr


def test_the_last_change_on_the_line_wins() -> None:
    assert "done: 2/2 steps" in pretrain("--max-steps", "3", "train.max_steps=2", "-o", "a").stdout
    assert "done: 3/3 steps" in pretrain("train.max_steps=2", "--max-steps", "3", "-o", "b").stdout


def test_a_clock_that_is_set_during_a_run_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock leaps a day forward and back; what is timed is timed by another clock."""
    leaps = iter([86_400.0, -86_400.0] * 10_000)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(leaps))
    done = pretrain("--max-time", "10m", "checkpoint.every=null", "checkpoint.every_minutes=5")
    assert done.exit_code == 0, done.output
    assert steps_in(Path("runs/debug/checkpoints")) == [6]
    assert 0 < record("runs/debug")["seconds"] < 600


def _kill_in(monkeypatch: pytest.MonkeyPatch, place: str, times: int, when: int) -> None:
    """Send SIGTERM `times` times at the `when`-th call of a function."""
    module, _, name = place.rpartition(".")
    owner: Any = pytest.importorskip(module)
    before, calls = getattr(owner, name), []

    def interrupted(*args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == when:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGTERM)
        return before(*args, **named)

    monkeypatch.setattr(owner, name, interrupted)


PLACES = {
    "a micro-batch": ("megalodon.training.loop.loss_sums", 6),
    "an evaluation": ("megalodon.evaluation.perplexity.evaluate", 2),
    "a sample": ("megalodon.inference.session.generate", 1),
    "a save": ("megalodon.checkpoint.saver.save_step", 1),
    "a commit": ("os.rename", 1),
}
QUICK = {("a micro-batch", 1), ("a sample", 1), ("a commit", 2)}
POINTS = [(name, times) for name in PLACES for times in (1, 2)]
ACCUMULATED = ["train.micro_batch=2", "eval.samples.every=2", "checkpoint.background=false"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The run that nothing interrupts."""
    place = str(tmp_path_factory.mktemp("whole") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        pretrain(*ACCUMULATED, "-o", place)
    return place


@pytest.mark.parametrize(
    "name, times", [pytest.param(*p, marks=() if p in QUICK else pytest.mark.slow) for p in POINTS]
)
def test_a_signal_anywhere_saves_and_a_second_one_leaves_and_both_go_on(
    name: str, times: int, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _kill_in(patch, PLACES[name][0], times, PLACES[name][1])
        done = pretrain(*ACCUMULATED, "-o", "parts")
    assert done.exit_code == (75 if times == 1 else 143), done.output
    if times == 1:
        assert "SIGTERM: stopping after step " in done.stderr and ": saved; the same command continues" in done.stderr
    assert record("parts")["status"] == "stopped"
    assert pretrain(*ACCUMULATED, "-o", "parts").exit_code == 0
    assert metrics("parts") == metrics(whole)
    models = [Path(run, "model/model.safetensors").read_bytes() for run in ("parts", whole)]
    assert models[0] == models[1]
    assert not [path for path in Path("parts").rglob(".*")]


def test_a_signal_while_the_model_is_exported_lets_the_run_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    _kill_in(monkeypatch, "megalodon.checkpoint.tensors.save_model", 1, 1)
    assert pretrain("--max-steps", "1").exit_code == 0
    assert record("runs/debug")["status"] == "finished"


def test_an_unexpected_error_leaves_a_report_in_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(trainer: Trainer) -> None:
        secret = "tokens of a document"  # noqa: F841
        raise KeyError("wz")

    monkeypatch.setattr(Trainer, "train_step", fail)
    monkeypatch.setenv("MY_TOKEN", "hf_secret")
    done = pretrain()
    assert done.exit_code == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: internal: KeyError: 'wz' in cli/test_pretrain_resume.py:")
    assert error.endswith("; this is a bug. Details: runs/debug/crash.txt") and "Traceback" not in done.stderr
    text = Path("runs/debug/crash.txt").read_text()
    assert "Traceback" in text and "\ntorch 2." in text and "max_steps: 6" in text
    assert "hf_secret" not in text and text.count("tokens of a document") == 0
    assert "Traceback" in pretrain("--debug").stderr
    monkeypatch.undo()


def test_a_report_that_can_be_written_nowhere_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("wz")

    monkeypatch.setattr("megalodon.data.prepare.prepare_store", fail)
    monkeypatch.setattr("tempfile.tempdir", "/nowhere/at/all")
    done = pretrain()
    assert done.exit_code == 1
    assert "this is a bug. Details: below; no place for a report can be written" in done.stderr
    assert "Traceback" in done.stderr and "KeyError: 'wz'" in done.stderr
