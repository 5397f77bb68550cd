"""Runs of `megalodon pretrain` that take a fraction of a second, and what they leave."""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from megalodon_cli.app import app

SIZES = {"model_dim": 24, "z_dim": 12, "num_heads": 2, "value_dim": 34, "ffn_hidden_dim": 29, "cema_ndim": 3}
TINY = [
    *(f"model.{key}={value}" for key, value in SIZES.items()),
    *("model.norm_num_groups=4", "model.chunk_size=10", "data.seq_len=37", "train.batch_tokens=148"),
    *("train.max_steps=6", "eval.tokens=300", "eval.every=2", "eval.samples.max_new_tokens=5"),
    *("checkpoint.every=2", "log.every=1"),
]
TIMES = {"tok_per_s", "seconds", "data_seconds", "peak_share", "memory"}


def pretrain(*arguments: str) -> Result:
    """Run the recipe `debug` with a tiny model."""
    return CliRunner().invoke(app, ["pretrain", "debug", *TINY, *arguments])


def metrics(run: str) -> list[dict[str, Any]]:
    """The rows of a run without what depends on the machine's speed."""
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def record(run: str) -> dict[str, Any]:
    """`run.json` of a run."""
    found: dict[str, Any] = json.loads(Path(run, "run.json").read_text())
    return found


def files(*places: str) -> dict[str, bytes]:
    """Every file below some places, with its content."""
    found = [path for place in places for path in Path(place).rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in found}
