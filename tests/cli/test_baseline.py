"""The baseline in the commands: trained, stopped and continued, exported, read by transformers; what it is refused for.

And every shipped pretraining recipe, shrunk, takes a step.
"""

import json
from pathlib import Path

import pytest
import torch
from small_runs import TINY, files, metrics, pretrain
from tolerances import LOGITS
from typer.testing import CliRunner, Result

from megalodon.checkpoint.tensors import load_language_model
from megalodon_cli.app import app

pytest.importorskip("transformers", reason="the extra hf is not installed")
RECIPES = Path(__file__).parents[2] / "recipes"
PRETRAINING = sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith("finetune"))
LLAMA = ("model.arch=llama", "-o", "runs/llama")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("baseline"))
    shared = tmp_path_factory.getbasetemp() / "pretrain-data"
    shared.mkdir(exist_ok=True)
    Path("data").symlink_to(shared)
    monkeypatch.setattr("megalodon.training.metrics.matmul_peak", lambda *_: 1e9)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_a_stopped_run_continues_as_if_nothing_had_happened() -> None:
    assert pretrain(*LLAMA).exit_code == 0
    stopped = pretrain("model.arch=llama", "-o", "runs/parts", "--stop-at-step", "3")
    assert stopped.exit_code == 0 and not Path("runs/parts/model").exists()
    assert pretrain("model.arch=llama", "-o", "runs/parts").exit_code == 0
    assert metrics("runs/llama") == metrics("runs/parts")
    assert list(files("runs/llama/model").values()) == list(files("runs/parts/model").values())


def test_its_loss_falls_and_activations_computed_again_change_nothing() -> None:
    done = pretrain(*LLAMA, "optim.lr=0.01", "--max-steps", "20")
    assert done.exit_code == 0, done.output
    assert "embeddings" in done.stderr and "attention" in done.stderr
    losses = [row["loss"] for row in metrics("runs/llama") if row["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.5
    for what in ("attention", "block"):
        again = pretrain("model.arch=llama", "-o", f"runs/{what}", "optim.lr=0.01", f"train.recompute={what}")
        assert again.exit_code == 0, again.output
        short = [row["loss"] for row in metrics(f"runs/{what}") if row["kind"] == "train"]
        assert short[0] == losses[0]


def test_the_checks_of_a_run_hold_for_it() -> None:
    check = pretrain(*LLAMA, "--check-resume", "4")
    assert check.exit_code == 0, check.output
    rehearsal = pretrain(*LLAMA, "--dry-run")
    assert rehearsal.exit_code == 0, rehearsal.output
    assert not Path("runs").exists()


def test_it_writes_and_transformers_loads_what_was_exported() -> None:
    from transformers import LlamaForCausalLM

    assert pretrain(*LLAMA).exit_code == 0
    written = run("generate", "runs/llama", "-p", "the ", "-n", "5", "--temperature", "0", "--seed", "1")
    assert written.exit_code == 0, written.output
    assert "B (grows)" in written.stderr
    rows = [{"prompt": "the "}, {"prompt": "a longer one"}]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    batch = run(
        "generate", "runs/llama", "--input", "in.jsonl", "--output", "out.jsonl", "-n", "5", "--temperature", "0"
    )
    assert batch.exit_code == 0, batch.output
    first = json.loads(Path("out.jsonl").read_text().splitlines()[0])
    assert first["text"] == written.stdout.removesuffix("\n")
    theirs, ours = LlamaForCausalLM.from_pretrained("runs/llama/model"), load_language_model("runs/llama/model").eval()
    assert theirs.config.max_position_embeddings == 37
    tokens = torch.arange(60)[None]  # longer than any window of training
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens)[0], atol=LOGITS[torch.float32], rtol=0.0)


def test_sizes_that_it_does_not_heed_may_be_anything() -> None:
    sizes = ["model.num_heads=3", "model.model_dim=24", "model.z_dim=7", "model.value_dim=11", "--max-steps", "1"]
    done = pretrain(*LLAMA, *sizes)
    assert done.exit_code == 0, done.output
    assert pretrain(*sizes, "-o", "runs/ours").exit_code == 2


def test_a_run_may_start_from_a_baseline() -> None:
    assert pretrain(*LLAMA, "--max-steps", "2").exit_code == 0
    again = pretrain("model.arch=llama", "-o", "runs/more", "--init-from", "runs/llama", "optim.lr=1e-9")
    assert again.exit_code == 0, again.output
    after = [row["valid_loss"] for row in metrics("runs/llama") if row["kind"] == "eval"][-1]
    assert next(row["valid_loss"] for row in metrics("runs/more") if row["kind"] == "eval") == pytest.approx(after)


def test_what_it_is_not_made_for_is_one_line() -> None:
    assert pretrain(*LLAMA).exit_code == 0
    Path("chats.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    refused = {
        ("generate", "runs/llama", "-p", "the ", "-n", "2", "--norm-stats", "window"): "norm_stats window",
        ("generate", "runs/llama", "-p", "the ", "-n", "2", "--save-state", "s.mega"): "a session file",
        ("finetune", "finetune-chat", "--init-from", "runs/llama", "--data", "chats.jsonl"): 'model_type "llama"',
        (
            "pretrain",
            "debug",
            *TINY,
            "model.arch=llama",
            "model.dropout=0.1",
        ): "not available with arch llama; expected 0 for every dropout",
        (
            "pretrain",
            "debug",
            *TINY,
            "model.arch=llama",
            "model.num_heads=1",
            "model.model_dim=25",
            "model.norm_num_groups=5",
        ): ("model_dim 25 is not a multiple of 2 x num_heads 1"),
    }
    for command, said in refused.items():
        done = run(*command)
        assert done.exit_code == 2, (command, done.output)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and said in errors[0], errors


@pytest.mark.parametrize("name", PRETRAINING)
def test_a_shipped_recipe_shrunk_takes_a_step(name: str) -> None:
    Path("text").mkdir()
    for number in range(40):
        Path(f"text/{number}.txt").write_text("".join(f"It was day {n} of {number}.\n" for n in range(30)))
    Path("mine.yaml").write_text(
        f"base: {name}\nname: mine\n"
        "model: {preset: null, num_layers: 2, model_dim: 24, z_dim: 12, num_heads: 2, value_dim: 34,\n"
        "  ffn_hidden_dim: 29, cema_ndim: 3, norm_num_groups: 4, chunk_size: 10}\n"
        "tokenizer: {kind: bytes, reserve: 2, path: null}\n"
        "data: {dir: store, seq_len: 40, sources: [{name: text, path: text, format: text}], valid: {fraction: 0.2}}\n"
        "train: {max_steps: 1, batch_tokens: 80, seq_len_warmup: null}\n"
        "eval: {tokens: 80, samples: {prompts: []}}\n"
        "parallel: {cp: 1}\n"
    )
    done = run("pretrain", "mine.yaml")
    assert done.exit_code == 0, done.output
    assert "done: 1/1 steps, 80 tokens" in done.stdout
