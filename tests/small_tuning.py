"""Runs of `megalodon finetune` that take a second, from a base that takes another."""

import json
from pathlib import Path
from typing import Any

from small_runs import pretrain
from typer.testing import CliRunner, Result

from megalodon_cli.app import app

SMALL = ["data.seq_len=120", "train.batch_tokens=480", "train.max_steps=6", "eval.every=2", "eval.samples.every=3"]
SMALL += [
    "eval.samples.max_new_tokens=5",
    "checkpoint.every=2",
    "log.every=1",
    "data.valid.fraction=0.2",
]


def base(directory: str = "base") -> None:
    """A model of a few thousand parameters with a byte tokenizer, trained for two steps."""
    done = pretrain("--max-steps", "2", "-o", directory)
    assert done.exit_code == 0, done.output


def chat(number: int) -> dict[str, Any]:
    """A short conversation."""
    asked, said = f"What is {number}?", f"It is {number}{'!' * (number % 5)}"
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


def write_chats(path: str = "chats.jsonl", rows: list[dict[str, Any]] | None = None) -> str:
    """A file of conversations."""
    lines = [json.dumps(row) for row in (map(chat, range(40)) if rows is None else rows)]
    Path(path).write_text("".join(f"{line}\n" for line in lines))
    return path


def finetune(*arguments: str, method: str = "chat", recipe: str | None = None) -> Result:
    """Tune the base on the conversations."""
    given = ["--init-from", "base", "--data", "chats.jsonl"]
    own = ["model.lora.r=2"] if method == "lora" else []
    own += [] if any(text.startswith("optim.lr") for text in arguments) else ["optim.lr=1e-2"]
    return CliRunner().invoke(app, ["finetune", recipe or f"finetune-{method}", *given, *SMALL, *own, *arguments])
