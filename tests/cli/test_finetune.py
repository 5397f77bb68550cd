"""`megalodon finetune`: from conversations to a model that chats, in full and by adapters, and its refusals."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from small_runs import files, metrics, record
from small_tuning import base, chat, finetune, write_chats
from typer.testing import CliRunner

from megalodon.data.chat import BUILT_IN
from megalodon.inference.session import load_writer
from megalodon_cli.app import app


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and conversations, made once."""
    place = tmp_path_factory.mktemp("made")
    before = Path.cwd()
    os.chdir(place)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("megalodon.training.metrics.matmul_peak", lambda *_: 1e9)
            base()
    finally:
        os.chdir(before)
    return place


@pytest.fixture(autouse=True)
def _elsewhere(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "data"):
        shutil.copytree(made / name, name)
    write_chats()
    monkeypatch.setattr("megalodon.training.metrics.matmul_peak", lambda *_: 1e9)


def test_a_run_says_what_it_does_and_leaves_a_model_that_chats() -> None:
    done = finetune()
    assert done.exit_code == 0, done.output
    said = done.stderr
    assert "examples   read 40 = trained 31 + valid 9 + too long 0 (error) + nothing to train on 0" in said
    assert "takes    seq_len 120 (given), tokenizer bytes" in said and "template chatml (new to this model)" in said
    assert "examples messages 40; template chatml; the first one, trained where marked:" in said
    shown = r"  \| <bos><\|im_start\|>user\n  \| What is \d+\?<\|im_end\|>\n  \| <\|im_start\|>assistant\n  \| "
    assert re.search(shown + r"\[\[It is \d+!*<\|im_end\|>\]\]\n", said), said
    assert "labels     an epoch " in said and "sample at step 0: Who are you?|" in said
    assert "done: 6/6 steps, 2,880 tokens" in done.stdout
    writer = load_writer(Path("runs/finetune-chat/model"))
    assert writer.chat is not None and writer.chat.template.name == "chatml" and writer.bos
    rows = metrics("runs/finetune-chat")
    losses = [row["valid_loss"] for row in rows if row["kind"] == "eval"]
    assert losses[-1] < losses[0]
    samples = [row for row in rows if row["kind"] == "sample"]
    assert [row["step"] for row in samples] == [0, 3, 6] and samples[0]["messages"][0]["role"] == "user"
    assert record("runs/finetune-chat")["kind"] == "finetune"
    report = Path("runs/finetune-chat/report.md").read_text()
    assert "## Answers" in report and "| prompt | base, step 0 | tuned, step 6 |" in report
    assert "examples   read 40" in report
    info = json.loads(Path("runs/finetune-chat/model/megalodon.json").read_text())
    assert (info["lr"], info["seq_len"], info["bos"]) == (0.01, 120, True)


def test_what_the_base_has_is_inherited() -> None:
    lengths = ["data.seq_len=inherit", "train.batch_tokens=148", "data.over_length=truncate-start"]
    done = finetune(*lengths, "optim.lr_factor=0.5", "--stop-at-step", "1")
    assert done.exit_code == 0, done.output
    assert "seq_len 37 (inherited)" in done.stderr
    assert "peak lr 0.0015 = 0.5 x 0.003 of the base" in done.stderr
    fixed = finetune("optim.lr=2e-3", "-o", "fixed", "--stop-at-step", "1")
    assert "peak lr 0.002\n" in fixed.stderr, "what stands on the command line replaces the recipe's lr_factor"
    again = finetune("--init-from", "runs/first/model", "-o", "runs/second", "--stop-at-step", "1")
    assert again.exit_code == 2  # there is none yet
    assert finetune("-o", "runs/first").exit_code == 0
    second = finetune("-o", "runs/second", "--init-from", "runs/first/model", "--stop-at-step", "1")
    assert "template chatml (inherited)" in second.stderr, second.output


def test_an_adapter_is_small_and_generate_and_convert_take_it() -> None:
    done = finetune(method="lora")
    assert done.exit_code == 0, done.output
    assert "of adapters of rank 2, " in done.stderr
    run = Path("runs/finetune-lora")
    assert not (run / "model").exists()
    command = "megalodon convert runs/finetune-lora/adapter runs/finetune-lora/model --merge"
    assert command in done.stdout and command in record(str(run))["next"]
    (saved,) = (run / "checkpoints/step-00000006/tensors").iterdir()
    tensors = load_file(saved)
    assert tensors and all(".lora_" in name for name in tensors)
    assert record(str(run))["trainable"] == sum(t.numel() for n, t in tensors.items() if n.startswith("model."))
    losses = [row["valid_loss"] for row in metrics(str(run)) if row["kind"] == "eval"]
    assert losses[-1] < losses[0]

    def text(model: str) -> str:
        arguments = ["generate", model, "-p", "What", "-n", "9", "--seed", "1"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    by_adapter = text("finetune-lora")
    merged = CliRunner().invoke(app, command.split()[1:])
    assert merged.exit_code == 0 and "merged" in merged.stdout, merged.output
    assert (run / "model/chat_template.jinja").exists()
    assert text("finetune-lora") == text("runs/finetune-lora/model") == by_adapter
    shutil.move("base", "moved")
    elsewhere = CliRunner().invoke(app, ["convert", str(run / "adapter"), "whole", "--merge", "--base", "moved"])
    assert elsewhere.exit_code == 0, "a run stands for its model, as everywhere"
    shutil.move("moved", "base")
    refused = CliRunner().invoke(app, command.split()[1:])
    assert refused.exit_code == 2 and "already exists" in refused.stderr
    assert "using runs/finetune-lora/model" in CliRunner().invoke(app, ["generate", "finetune-lora", "-p", "a"]).stderr
    assert finetune("--max-steps", "8", method="lora").exit_code == 0
    longer = CliRunner().invoke(app, ["generate", "finetune-lora", "-p", "a"])
    assert "using runs/finetune-lora/adapter" in longer.stderr, "the merged model is that of step 6"
    tuned = finetune("--init-from", "runs/finetune-lora/adapter", "-o", "x")
    assert tuned.exit_code == 2 and "is an adapter; expected a model, merge it first" in tuned.stderr


@pytest.mark.parametrize("method", ["chat", "lora"])
def test_a_stopped_run_continues_as_if_nothing_had_happened(method: str) -> None:
    changes = ["model.lora.dropout=0.1"] if method == "lora" else []
    assert finetune(*changes, "-o", "whole", method=method).exit_code == 0
    stopped = finetune(*changes, "-o", "parts", "--stop-at-step", "3", method=method)
    assert stopped.exit_code == 0, stopped.output
    assert "next: megalodon finetune parts/recipe.yaml -o parts" in stopped.stdout
    resumed = CliRunner().invoke(app, ["finetune", "parts/recipe.yaml", "-o", "parts"])
    assert resumed.exit_code == 0 and "resuming at step 3" in resumed.stderr, resumed.output
    assert metrics("parts") == metrics("whole")
    name = "adapter/adapter_model" if method == "lora" else "model/model"
    assert Path(f"parts/{name}.safetensors").read_bytes() == Path(f"whole/{name}.safetensors").read_bytes()
    again = finetune(*changes, "-o", "parts", method=method)
    assert again.exit_code == 0 and "parts is finished: 6 steps" in again.stdout


@pytest.mark.parametrize("method", ["chat", "lora"])
def test_exact_resume_is_proven_and_a_dry_run_leaves_nothing(method: str) -> None:
    proven = finetune("--check-resume", "4", method=method)
    assert proven.exit_code == 0, proven.output
    assert "a run stopped after step 2 of 4 is the uninterrupted one" in proven.stdout
    dry = finetune("--dry-run", method=method)
    assert dry.exit_code == 0 and "it works, and nothing of it was kept" in dry.stdout, dry.output
    assert "export" in dry.stdout and not Path("runs").exists()


def test_ctrl_c_saves_and_the_same_command_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    from megalodon.training.loop import Trainer

    step = Trainer.train_step

    def interrupted(trainer: Trainer) -> list[dict[str, Any]]:
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    done = finetune(method="lora")
    assert done.exit_code == 75 and "stopping after step 3: saved; the same command continues" in done.stderr
    monkeypatch.setattr(Trainer, "train_step", step)
    assert "resuming at step 3" in finetune(method="lora").stderr


def test_the_method_may_be_chosen_on_the_command_line() -> None:
    lora = finetune("--method", "lora", "model.lora.r=3", "--stop-at-step", "1")
    assert lora.exit_code == 0 and "adapters of rank 3" in lora.stderr, lora.output
    full = finetune("--method", "full", "-o", "full", "--stop-at-step", "1", recipe="finetune-lora")
    assert full.exit_code == 0 and "adapters" not in full.stderr, full.output
    both = finetune("--method", "full", "model.lora.r=3", "-o", "both")
    assert both.exit_code == 2 and "--method full and model.lora.r=3 are both given" in both.stderr


def test_another_base_is_refused_with_both_hashes() -> None:
    assert finetune("--stop-at-step", "2", method="lora").exit_code == 0
    kept = files("runs")
    weights = Path("base/model")
    own = json.loads((weights / "megalodon.json").read_text())["weights_sha256"]
    base("other")
    shutil.rmtree(weights)
    shutil.copytree("other/model", weights)
    assert finetune("--init-from", "other", "-o", "again", "optim.lr=1e-3", "--stop-at-step", "1").exit_code == 0
    same = finetune("--stop-at-step", "3", method="lora")
    assert same.exit_code == 0, "the same weights again are the same base"
    kept = files("runs")
    tuned = finetune("-o", "tuned")
    assert tuned.exit_code == 0
    shutil.rmtree(weights)
    shutil.copytree("tuned/model", weights)
    refused = finetune(method="lora")
    other = json.loads((weights / "megalodon.json").read_text())["weights_sha256"]
    assert refused.exit_code == 2 and f"model.base is {own} there, {other} here" in refused.stderr, refused.output
    assert files("runs") == kept
    generated = CliRunner().invoke(app, ["generate", "finetune-lora", "-p", "a"])
    assert generated.exit_code == 2


def test_other_examples_are_another_run() -> None:
    assert finetune("--stop-at-step", "2").exit_code == 0
    kept = files("runs")
    write_chats(rows=[chat(n) for n in range(41)])
    refused = finetune()
    assert refused.exit_code == 2 and "the run cannot go on with other data: fingerprint was" in refused.stderr
    assert "packing was" in refused.stderr
    assert files("runs") == kept
    frozen = finetune("data.train_on=all")
    assert frozen.exit_code == 2 and "data.train_on is assistant there, all here" in frozen.stderr


def test_rows_are_added_where_no_ids_are_reserved(tmp_path: Path) -> None:
    from small_runs import pretrain

    sizes = ["tokenizer.reserve=0", "tokenizer.pad_to=1", "data.dir=data/bare", "--max-steps", "2", "-o", "bare"]
    assert pretrain(*sizes).exit_code == 0
    full = ["--init-from", "bare", "data.chat_template=chatml"]
    done = finetune(*full)
    assert done.exit_code == 0, done.output
    told = "no ids are reserved for <|im_start|>, <|im_end|>: 60 rows are added, which start as the mean of the others"
    assert told in done.stderr
    Path("more.jinja").write_text("{# <|im_end|> <|tool|> #}" + BUILT_IN["chatml"])
    writer = load_writer(Path("runs/finetune-chat/model"))
    assert writer.model.config.vocab_size == 320 and writer.chat is not None and writer.chat.stop_ids == {261}
    generated = CliRunner().invoke(app, ["generate", "finetune-chat", "-p", "What", "-n", "5", "--seed", "1"])
    assert generated.exit_code == 0, generated.output
    padded = finetune(
        "--init-from", "runs/finetune-chat/model", "data.chat_template=more.jinja", "-o", "y", method="lora"
    )
    assert padded.exit_code == 0, padded.output
    assert "for <|tool|>: padding rows are taken, and adapters leave them as they are" in padded.stderr
    refused = finetune(*full, "-o", "x", method="lora")
    assert refused.exit_code == 2 and "chatml needs 2 rows more than the model has" in refused.stderr
    assert "use data.chat_template=plain, or --method full" in refused.stderr
    plain = finetune("--init-from", "bare", "-o", "x", "--stop-at-step", "1", method="lora")
    assert plain.exit_code == 0 and "template plain (new to this model)" in plain.stderr, plain.output


QUESTION = {"messages": [{"role": "user", "content": "Hello?"}]}
LONG = {"messages": [{"role": "user", "content": "a" * 200}, {"role": "assistant", "content": "b"}]}
REFUSED: dict[str, tuple[list[dict[str, Any]] | None, list[str], str]] = {
    "no base": (None, ["model.init_from=null"], "model.init_from is required"),
    "a missing base": (None, ["--init-from", "nowhere"], "nowhere: no such directory, and no run runs/nowhere"),
    "no data": (None, ["data.sources.0.path=null"], "data.sources.chats.path is required"),
    "a missing file": (None, ["--data", "none.jsonl"], "none.jsonl: no such file"),
    "nothing to train on": ([QUESTION] * 9, [], "chats.jsonl:1: neither this example nor any of the 9"),
    "too long": ([chat(1), LONG], [], "chats.jsonl:2: 223 tokens, but a window holds data.seq_len 120"),
    "a batch that does not fit": (None, ["train.batch_tokens=500"], "is not a multiple of data.seq_len 120"),
    "an unknown template": (None, ["data.chat_template=llama"], "chat template llama: expected plain, chatml"),
    "an unknown target": (None, ["model.lora.targets=[output]"], "`output` is not one of wz"),
    "shorter windows": (None, ["train.seq_len_warmup={start: 60, over: 50%}"], "is not available in finetune"),
    "an unknown role": (
        [{"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}],
        [],
        'turn 2 has role "bot"; known: system, user, assistant; map it with data.fields.roles={bot: assistant}',
    ),
    "adapters on a step": (None, ["--init-from", "base@2", "model.lora.r=2"], "is a step of a run; adapters record"),
    "a prompt that is answered": (
        None,
        ["eval.samples.prompts=[{messages: [{role: user, content: a}, {role: assistant, content: b}]}]"],
        "eval.samples.prompts.0: ends with a turn of assistant; expected the user's",
    ),
    "no stored examples": (None, ["--no-prepare"], "--no-prepare forbids to make them"),
    "no step": (None, ["--resume", "base"], "--resume base: expected auto, never, or a step directory"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_one_line_and_nothing_is_left(case: str) -> None:
    rows, arguments, message = REFUSED[case]
    if rows is not None:
        write_chats(rows=rows)
    method = "lora" if "lora" in str(arguments) else "chat"
    done = finetune(*arguments, method=method)
    assert done.exit_code == 2, done.output
    assert message in done.stderr and "Traceback" not in done.output
    assert not Path("runs").exists()


def test_a_role_may_be_mapped() -> None:
    rows = [chat(n) for n in range(40)]
    for row in rows:
        row["messages"][1]["role"] = "bot"
    write_chats(rows=rows)
    done = finetune("data.fields.roles={bot: assistant}", "--stop-at-step", "1")
    assert done.exit_code == 0, done.output


def test_texts_are_tuned_on_too() -> None:
    write_chats(rows=[{"text": f"number {n} " * 30} for n in range(20)])
    done = finetune("data.over_length=split", "--stop-at-step", "1")
    assert done.exit_code == 0, done.output
    assert "examples text 20" in done.stderr and "+ split " in done.stderr


def test_a_step_of_pretraining_may_be_tuned_but_no_step_of_tuning() -> None:
    done = finetune("--init-from", "base@2", "--stop-at-step", "2")
    assert done.exit_code == 0 and "base     base/checkpoints/step-00000002, weights" in done.stderr, done.output
    again = finetune("--init-from", "finetune-chat@2", "-o", "x")
    assert again.exit_code == 2 and "a step of a finetuning run; expected its finished model" in again.stderr


def test_a_recipe_of_pretraining_is_refused() -> None:
    done = CliRunner().invoke(app, ["finetune", "debug"])
    assert done.exit_code == 2 and "kind is pretrain, expected finetune" in done.stderr


def test_the_directory_of_a_run_of_another_kind_is_refused_in_one_line() -> None:
    done = finetune("-o", "base")
    assert done.exit_code == 2
    assert "error: base holds a run of pretrain, this is a finetune; choose another -o\n" in done.stderr
    assert "--allow-change" not in done.stderr
    branch = finetune("--resume", "base/checkpoints/step-00000002", "-o", "x")
    assert branch.exit_code == 2 and "base holds a run of pretrain" in branch.stderr, branch.output


def test_averaged_weights_begin_as_those_of_the_base() -> None:
    done = finetune("optim.ema=0.9", "--stop-at-step", "1")
    assert done.exit_code == 0, done.output
    (first,) = (row for row in metrics("runs/finetune-chat") if row["kind"] == "eval" and row["step"] == 0)
    assert first["ema_valid_loss"] == first["valid_loss"]
    adapter = finetune("optim.ema=0.9", "--max-steps", "2", method="lora")
    assert "averaged weights, which adapter/ holds: " in adapter.stdout, adapter.output


def test_a_loss_that_is_no_number_is_shown_as_none() -> None:
    done = finetune("optim.lr=1e30", "--max-steps", "2", "eval.samples.prompts=[]", "checkpoint.export=false")
    assert done.exit_code == 0, done.output
    assert "loss by position: 32: -  64: -" in done.stdout


def test_a_model_that_diverged_is_not_exported() -> None:
    done = finetune("optim.lr=1e30", "--max-steps", "2", "eval.samples.prompts=[]")
    assert done.exit_code == 5, done.output
    assert "error: step 2: the validation loss is not finite, so the model is not exported" in done.stderr
    assert not Path("runs/finetune-chat/model").exists()
    assert record("runs/finetune-chat")["status"] == "failed"


def test_a_path_may_hold_any_character_and_an_example_none_that_steers_the_terminal() -> None:
    rows = [{"messages": [{"role": "user", "content": "a\x1b[31m\rb"}, {"role": "assistant", "content": "c\x9bd"}]}]
    path = write_chats('\U0001f988 \\u0041": c.jsonl', [*rows, *map(chat, range(40))])
    done = finetune("--data", path, "--stop-at-step", "1")
    assert done.exit_code == 0, done.output
    assert "user\n  | a\ufffd[31m\ufffdb<|im_end|>" in done.stderr and "[[c\ufffdd<|im_end|>]]" in done.stderr
    assert "\x1b" not in done.output
