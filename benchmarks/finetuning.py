"""Tune a small base model on question-and-answer conversations, all of it and by adapters; print figures as JSON.

    python benchmarks/finetuning.py --train train.jsonl --valid test.jsonl --text DIR          # pretrains a base first
    python benchmarks/finetuning.py --train train.jsonl --valid test.jsonl --base runs/mine/model

The files hold lines with `question` and `answer` (gsm8k's). Asked of it: how far the loss on the assistant's tokens
of held-out conversations falls from the first evaluation, how much of that adapters reach with which part of the
parameters, and how many of 100 sampled answers end by themselves. Under 25 minutes on two cores; a run that was
stopped goes on where it was. Not here: training itself (megalodon), which runs in processes of its own.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BASE = """\
schema: 1
kind: pretrain
name: base
base: quickstart
data:
  dir: {store}
  sources:
    - {{name: text, path: {text}, format: text}}
eval:
  samples: {{prompts: []}}
"""
SHARED = ["data.fields={prompt: question, completion: answer}", "data.over_length=drop", "train.batch_tokens=8192"]
SHARED += ["eval.every=60", "eval.tokens=64Ki", "eval.samples.prompts=[]", "checkpoint.every=40"]
METHODS = {
    "full": ("finetune-chat", {"optim.lr_factor": "0.4"}),
    "lora": ("finetune-lora", {"optim.lr": "1.8e-2", "model.lora.r": "5", "model.lora.alpha": "10"}),
}
"""Recipe and changes of each, for a base of the size of quickstart."""
Row = dict[str, Any]


def main() -> None:
    """Train what is missing, sample, report."""
    parser = argparse.ArgumentParser(description="Figures of finetuning: full and by adapters.")
    parser.add_argument("--train", type=Path, required=True, help="JSON lines with question and answer")
    parser.add_argument("--valid", type=Path, required=True, help="the same, held out")
    parser.add_argument("--text", type=Path, help="folder of .txt files to pretrain a base on")
    parser.add_argument("--base", help="a model that is there already")
    parser.add_argument("--folder", type=Path, default=Path("runs/finetuning"), help="where the runs go")
    parser.add_argument("--base-steps", type=int, default=240, help="steps of pretraining, of 8,192 tokens")
    parser.add_argument("--steps", type=int, default=300, help="steps of tuning, of 8,192 tokens")
    parser.add_argument("--samples", type=int, default=100, help="answers that are sampled")
    parser.add_argument("--max-new-tokens", type=int, default=384, help="of an answer")
    parser.add_argument("--full", nargs="*", default=[], metavar="key=value", help="changes of full tuning")
    parser.add_argument("--lora", nargs="*", default=[], metavar="key=value", help="changes of the adapters' run")
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    given = parser.parse_args()
    if (given.text is None) == (given.base is None):
        parser.error("give one of --text and --base")
    given.folder.mkdir(parents=True, exist_ok=True)
    base = given.base or pretrained(given)
    figures: Row = {"base": base, "steps": given.steps, "methods": {}}
    for method, (recipe, changes) in METHODS.items():
        own = dict(change.split("=", 1) for change in (given.full if method == "full" else given.lora))
        run = given.folder / method
        files = [f"data.sources.0.path={given.train}", f"data.valid.path={given.valid}"]
        megalodon(
            "finetune",
            recipe,
            "--init-from",
            base,
            "-o",
            str(run),
            "--max-steps",
            str(given.steps),
            *SHARED,
            *files,
            *(f"{key}={value}" for key, value in {**changes, **own}.items()),
        )
        figures["methods"][method] = {**scores(run), **ended(run, given)}
    full, lora = (figures["methods"][name] for name in METHODS)
    figures["lora_part_of_full_drop"] = (lora["first"] - lora["last"]) / (full["first"] - full["last"])
    report(figures)
    if given.out:
        given.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def pretrained(given: argparse.Namespace) -> str:
    """Pretrain the base on the text, if that is not done; its directory."""
    recipe, run = given.folder / "base.yaml", given.folder / "base"
    store = given.folder / "data"
    recipe.write_text(BASE.format(store=json.dumps(str(store)), text=json.dumps(str(given.text))), encoding="utf-8")
    megalodon("pretrain", str(recipe), "-o", str(run), "--max-steps", str(given.base_steps))
    return str(run / "model")


def megalodon(*words: str) -> None:
    """Run the command; it ends this program if it fails."""
    done = subprocess.run([sys.executable, "-m", "megalodon_cli", *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def scores(run: Path) -> Row:
    """Losses on the assistant's tokens, and what it took."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    losses = [row for row in rows if row["kind"] == "eval"]
    first, last = losses[0]["valid_loss"], losses[-1]["valid_loss"]
    parameters, trained = record["parameters"], record["trainable"]
    whole = parameters if trained == parameters else parameters + trained
    return {
        "first": first,
        "last": last,
        "drop": 1 - last / first,
        "curve": {row["step"]: round(row["valid_loss"], 4) for row in losses},
        "valid_tokens": losses[-1]["valid_tokens"],
        "trained_parameters": trained,
        "trained_part": trained / whole,
        "seconds": record["seconds"],
        "tokens": record["tokens"],
    }


def ended(run: Path, given: argparse.Namespace) -> Row:
    """How many sampled answers to held-out questions end by themselves, and the first of them."""
    from itertools import islice

    from megalodon.data.conversations import example_files, read_examples
    from megalodon.inference.sampling import SamplingConfig
    from megalodon.inference.session import load_writer
    from megalodon_cli.training_job import answer

    writer = load_writer(next(run / name for name in ("model", "adapter") if (run / name).is_dir()))
    assert writer.chat is not None
    fields = {"prompt": "question", "completion": "answer"}
    asked = list(islice(read_examples(example_files(given.valid), "auto", fields), given.samples))
    found = []
    for number, example in enumerate(asked):
        turns = list(example.messages or ())[:1]
        found.append(answer(writer.model, writer.chat, turns, given.max_new_tokens, SamplingConfig(seed=number)))
    share = sum(end for _, end in found) / len(found)
    return {"sampled": len(found), "ended": share, "first_answer": found[0][0]}


def report(figures: Row) -> None:
    """Print the figures as a table and as JSON."""
    lines = [f"{'':6} {'first':>7} {'last':>7} {'drop':>7} {'trained':>9} {'part':>7} {'ended':>7} {'minutes':>8}"]
    for name, row in figures["methods"].items():
        lines.append(
            f"{name:6} {row['first']:7.3f} {row['last']:7.3f} {row['drop']:7.1%} {row['trained_parameters']:9,} "
            f"{row['trained_part']:7.2%} {row['ended']:7.1%} {row['seconds'] / 60:8.1f}"
        )
    lines += [
        f"{name} at step {step}: {loss:.3f}"
        for name, row in figures["methods"].items()
        for step, loss in row["curve"].items()
    ]
    lines.append(f"adapters reach {figures['lora_part_of_full_drop']:.1%} of the drop of full tuning")
    sys.stdout.write("\n".join([*lines, json.dumps(figures, ensure_ascii=False)]) + "\n")


if __name__ == "__main__":
    main()
