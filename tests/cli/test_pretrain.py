"""`megalodon pretrain`: from text to a model directory, stopped and continued, and what it refuses."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import metrics, pretrain, record
from typer.testing import CliRunner

import megalodon
from megalodon.checkpoint.lock import RunLock
from megalodon_cli.app import app


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory for this test with the data all tests share, and no time spent on measuring this machine."""
    monkeypatch.chdir(tmp_path_factory.mktemp("with space"))
    shared = tmp_path_factory.getbasetemp() / "pretrain-data"
    shared.mkdir(exist_ok=True)
    Path("data").symlink_to(shared)
    monkeypatch.setattr("megalodon.training.metrics.matmul_peak", lambda *_: 1e9)


def test_a_run_leaves_a_model_a_curve_and_the_next_commands() -> None:
    done = pretrain()
    assert done.exit_code == 0, done.output
    assert "done: 6/6 steps, 888 tokens" in done.stdout
    assert "unigram model of the same tokens: " in done.stdout
    assert "  sample: the |" in done.stdout
    assert "megalodon generate debug -p TEXT" in done.stdout
    assert "step 3/6  50.0%  loss " in done.stderr
    assert "documents  read 512 = kept 512" in done.stderr
    run = Path("runs/debug")
    names = {path.name for path in run.iterdir()}
    expected = {"run.json", "recipe.yaml", "metrics.jsonl", "environment.json", "command.txt", "checkpoints", "model"}
    assert names == expected | {"lock.json", "report.md"}
    assert (record("runs/debug")["status"], record("runs/debug")["step"]) == ("finished", 6)
    rows = metrics("runs/debug")
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [0, 2, 4, 6]
    assert list(rows[0]["by_position"]) == ["1", "2", "4", "8", "16", "32", "37"]
    assert megalodon.load(run / "model").num_parameters() == record("runs/debug")["parameters"]
    assert record("runs/debug")["bits_per_byte"] == rows[-2]["bits_per_byte"]
    assert "max_steps: 6" in (run / "recipe.yaml").read_text() and "# command line" in (run / "recipe.yaml").read_text()


def test_a_finished_run_says_so_and_goes_on_with_a_longer_horizon() -> None:
    pretrain("--max-steps", "2")
    again = pretrain("--max-steps", "2")
    assert (again.exit_code, again.stdout.splitlines()[0]) == (0, "runs/debug is finished: 2 steps")
    longer = pretrain("--max-steps", "3")
    assert longer.exit_code == 0, longer.output
    assert "note: horizon 2 -> 3 steps; lr of step 3: " in longer.stderr
    assert "resuming at step 2 (296 tokens seen)" in longer.stderr
    assert "done: 3/3 steps" in longer.stdout


def test_a_store_may_be_read_without_mapping_it() -> None:
    assert pretrain("-o", "mapped", "--stop-at-step", "2").exit_code == 0
    assert pretrain("-o", "read", "--stop-at-step", "1").exit_code == 0
    assert pretrain("-o", "read", "data.reader=pread", "--stop-at-step", "2").exit_code == 0
    assert metrics("mapped") == metrics("read")


def test_a_stopped_run_continues_as_if_nothing_had_happened() -> None:
    assert pretrain("-o", "whole").exit_code == 0
    stopped = pretrain("-o", "parts", "--stop-at-step", "3")
    assert stopped.exit_code == 0 and record("parts")["status"] == "stopped"
    assert "step 3 was asked for: 3/6 steps" in stopped.stdout and "validation" not in stopped.stdout
    assert not Path("parts/model").exists()
    assert pretrain("-o", "parts").exit_code == 0
    assert metrics("parts") == metrics("whole")
    weights = [Path(run, "model/model.safetensors").read_bytes() for run in ("whole", "parts")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_finishes_the_step_saves_and_ends_with_75(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    from megalodon.training.loop import Trainer

    step = Trainer.train_step

    def interrupted(trainer: Trainer) -> dict[str, Any]:
        if trainer.step == 2:
            os.kill(os.getpid(), number)
        return step(trainer)

    before = signal.getsignal(number)
    monkeypatch.setattr(Trainer, "train_step", interrupted)
    done = pretrain()
    assert done.exit_code == 75, done.output
    assert f"{number.name}: stopping after step 3: saved; the same command continues" in done.stderr
    assert (record("runs/debug")["status"], record("runs/debug")["step"]) == ("stopped", 3)
    assert signal.getsignal(number) == before
    monkeypatch.setattr(Trainer, "train_step", step)
    assert "resuming at step 3" in pretrain().stderr


def test_the_second_signal_ends_at_once_and_the_run_can_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from megalodon.training.loop import Trainer

    step = Trainer.train_step

    def interrupted(trainer: Trainer) -> dict[str, Any]:
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    assert pretrain().exit_code == 143
    monkeypatch.setattr(Trainer, "train_step", step)
    assert "resuming at step 2" in pretrain().stderr


def test_a_signal_before_the_first_step_ends_without_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("megalodon.data.prepare.prepare_store", interrupted)
    assert pretrain().exit_code == 130
    assert not Path("runs").exists()


def test_the_clock_stops_a_run_with_75() -> None:
    done = pretrain("--max-time", "0.001s")
    assert done.exit_code == 75
    assert "--max-time 0.001 s: stopping after step 0: nothing to save yet" in done.stderr


def test_changes_are_said_and_kept() -> None:
    done = pretrain("optim.lr=1e-2", "--stop-at-step", "1")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("overrides: ")]
    assert "optim.lr 0.003 -> 0.01" in line and ", train.max_steps " in line
    assert "lr: 0.01" in Path("runs/debug/recipe.yaml").read_text()
    refused = pretrain("--stop-at-step", "2")
    assert refused.exit_code == 2
    assert "runs/debug holds another run: optim.lr is 0.01 there, 0.003 here" in refused.stderr
    allowed = pretrain("--stop-at-step", "2", "--allow-change", "optim.lr", "--allow-change", "optim.eps")
    assert allowed.exit_code == 0
    assert record("runs/debug")["allowed"] == [{"optim.lr": [0.01, 0.003]}]


@pytest.mark.parametrize("held_out", [(), ("data.valid.path=own", "data.dir=own-valid")], ids=["a part", "own files"])
def test_the_saved_recipe_continues_the_run(held_out: tuple[str, ...]) -> None:
    Path("own").mkdir()
    Path("own/text.txt").write_text("The text that is held out. " * 20)
    pretrain("--stop-at-step", "1", *held_out)
    done = CliRunner().invoke(app, ["pretrain", "runs/debug/recipe.yaml", "-o", "runs/debug"])
    assert done.exit_code == 0, done.output
    assert "resuming at step 1" in done.stderr


def test_a_refused_resume_leaves_the_run_as_it_was() -> None:
    pretrain("--stop-at-step", "2")
    kept = {path: path.read_bytes() for path in Path("runs/debug").rglob("*") if path.is_file()}
    refused = pretrain("train.seed=2", "--allow-change", "train.seed")
    assert refused.exit_code == 2 and "cannot go on with other data: seed was 1" in refused.stderr
    assert {path: path.read_bytes() for path in Path("runs/debug").rglob("*") if path.is_file()} == kept
    assert "resuming at step 2" in pretrain("--stop-at-step", "3").stderr


def test_a_sample_that_fails_at_the_end_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from megalodon.errors import InputError

    def fail(*_: object, **__: object) -> str:
        raise InputError("the prompt has zero tokens")

    with monkeypatch.context() as patch:
        patch.setattr("megalodon.inference.session.generate_text", fail)
        failed = pretrain("checkpoint.every=null")
    assert failed.exit_code == 2 and record("runs/debug")["status"] == "failed"
    assert "resuming at step 6" in pretrain().stderr


def test_a_model_too_large_for_the_memory_ends_with_4_and_leaves_no_run() -> None:
    done = pretrain("model.model_dim=262144", "model.ffn_hidden_dim=1048576")
    assert done.exit_code == 4, done.output
    assert "error: out of memory on cpu: " in done.stderr and "hint: a smaller model" in done.stderr
    assert not Path("runs/debug").exists()


def test_printed_commands_can_be_pasted() -> None:
    stopped = pretrain("-o", "my run", "--stop-at-step", "1")
    assert "next: megalodon pretrain 'my run/recipe.yaml' -o 'my run'" in stopped.stdout
    assert record("my run")["next"] == ["megalodon pretrain 'my run/recipe.yaml' -o 'my run'"]
    done = pretrain("-o", "my run", "--max-steps", "2")
    assert "next: megalodon generate 'my run' -p TEXT · megalodon runs show 'my run'" in done.stdout
    assert record("my run")["next"] == ["megalodon generate 'my run' -p TEXT", "megalodon runs show 'my run'"]


REFUSED = {
    "two horizons": (["--max-steps", "3", "--max-tokens", "300"], "not both"),
    "a mistyped key": (["optim.beta=1"], "did you mean `betas`?"),
    "an unknown option": (["--max-step", "3"], "no such option"),
    "a time without unit": (["--max-time", "soon"], "--max-time: `soon` is not a time such as 90s"),
    "a device": (["--device", "tpu"], "--device tpu: expected auto, cpu"),
    "a batch": (["train.batch_tokens=150"], "150 is not a multiple of data.seq_len 37"),
    "a micro-batch": (["train.micro_batch=3"], "train.micro_batch 3 does not divide the 4 windows"),
    "no time": (["--max-time", "0s"], "--max-time: `0s` leaves no time for a step"),
    "no steps": (["--max-steps", ""], "--max-steps: expected a value, such as --max-steps 2000, got nothing"),
    "no tokens": (["--max-tokens", ""], "--max-tokens: expected a value, such as --max-tokens 2M, got nothing"),
    "no name of a directory": (["-o", ""], "-o/--out-dir: expected a directory such as runs/mine"),
    "a directory below a file": (["-o", "file.txt/run"], "file.txt is a file; expected a run directory"),
    "a key that is not frozen": (["--allow-change", "optim.lrr"], "--allow-change optim.lrr: did you mean optim.lr?"),
    "an empty prompt": (["eval.samples.prompts=['']"], "eval.samples.prompts"),
    "no device": (["parallel.dp_shard=0"], "parallel.dp_shard=0"),
    "averages that grow": (["optim.betas=[1.5,0.9]"], "expected two numbers from 0 to below 1"),
    "what is not there yet": (
        ["train.precision=bf16"],
        "train.precision=bf16: bf16 is not available here; expected auto",
    ),
    "an adapter": (["model.lora={r: 4}"], "an adapter is not available in pretrain; expected null"),
    "no data": (["--no-prepare", "data.dir=none"], "none holds no token store"),
    "no validation text": (["data.valid.fraction=0.0", "data.dir=no-valid"], "too few to validate on"),
    "windows that are too long": (
        ["data.seq_len=1000000", "train.batch_tokens=1M"],
        "one window of data.seq_len 1,000,000",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_message_exit_2_and_no_run(name: str) -> None:
    arguments, said = REFUSED[name]
    Path("file.txt").touch()
    done = pretrain(*arguments)
    assert done.exit_code == 2, done.output
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said in error
    assert done.stdout == ""
    assert not Path("runs").exists()


def test_all_that_is_not_there_yet_is_named_at_once_each_with_its_place() -> None:
    Path("mine.yaml").write_text("base: debug\nname: mine\ntrain: {backend: triton}\n")
    done = CliRunner().invoke(app, ["pretrain", "mine.yaml", "train.precision=bf16", "model.lora={r: 4}"])
    assert done.exit_code == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: command line: model.lora={r: 4}: an adapter is not available in pretrain; expected null",
        "error: command line: train.precision=bf16: bf16 is not available here; expected auto or bf16-mixed or fp32",
        "error: mine.yaml:3:18: train.backend: triton is not available here; expected auto or portable or reference",
    ]


def test_recipes_that_are_none_are_refused() -> None:
    for arguments, said in (
        (["optim.lr=1"], "no recipe; expected a shipped name"),
        (["deubg"], "did you mean debug?"),
        (["books-tiny"], "data.sources.books.path is required"),
        (["finetune-lora"], "kind is finetune, expected pretrain"),
    ):
        done = CliRunner().invoke(app, ["pretrain", *arguments])
        assert done.exit_code == 2 and said in done.stderr, done.output
    assert not Path("runs").exists()


def test_directories_that_are_no_run_or_somebody_elses_are_left_alone() -> None:
    Path("thesis").mkdir()
    Path("thesis/chapter.tex").touch()
    foreign = pretrain("-o", "thesis")
    assert foreign.exit_code == 2 and "holds chapter.tex; choose another -o" in foreign.stderr
    assert [path.name for path in Path("thesis").iterdir()] == ["chapter.tex"]
    pretrain("--stop-at-step", "1")
    never = pretrain("--resume", "never")
    assert never.exit_code == 2 and "runs/debug holds a run" in never.stderr
    with RunLock(Path("runs/debug")):
        held = pretrain()
    assert held.exit_code == 2 and f"is held by process {os.getpid()} on " in held.stderr


def test_a_run_whose_loss_is_not_finite_ends_with_5_and_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    from megalodon.training.loop import Trainer

    gradient = Trainer._gradient
    monkeypatch.setattr(Trainer, "_gradient", lambda *args: gradient(*args)._replace(loss=float("nan")))
    done = pretrain()
    assert done.exit_code == 5
    assert "error: step 3: loss nan" in done.stderr
    assert record("runs/debug")["status"] == "failed"
    assert "step 3: loss nan" in record("runs/debug")["error"]


def test_averages_memory_and_a_rollback_are_shown_and_the_averages_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    from megalodon.training.loop import Trainer

    gradient, seen = Trainer._gradient, []

    def poisoned(trainer: Trainer, *args: Any) -> Any:
        bad = trainer.step in (2, 3, 4) and not trainer.rollbacks
        seen.append(trainer.step + 1)
        return gradient(trainer, *args)._replace(loss=float("nan")) if bad else gradient(trainer, *args)

    monkeypatch.setattr(Trainer, "_gradient", poisoned)
    done = pretrain("optim.ema=0.5", "log.health_every=2")
    assert done.exit_code == 0, done.output
    assert seen == [1, 2, 3, 4, 5, 3, 4, 5, 6]
    assert "step 5: rolled back to step 2; samples 8 to 19 are left out from now on: loss nan" in done.stderr
    assert "health at step 2: memory of layers (tokens) " in done.stderr
    assert "; averaged weights " in done.stderr
    assert "averaged weights, which model/ holds: " in done.stdout
    assert "  loss by position: 1: " in done.stderr
    info = json.loads(Path("runs/debug/model/megalodon.json").read_text())
    assert info["weights"] == "averaged, optim.ema 0.5"
    assert info["scores"]["ema_valid_loss"] == metrics("runs/debug")[-2]["ema_valid_loss"]
    (shard,) = Path("runs/debug/checkpoints/step-00000006/tensors").iterdir()
    saved, model = load_file(shard), megalodon.load(Path("runs/debug/model"))
    assert all(torch.equal(parameter, saved[f"ema.{name}"]) for name, parameter in model.named_parameters())
