"""Token stores and training runs of a few hundred tokens, for tests of training, checkpoints and evaluation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from factories import tiny_config
from safetensors import safe_open

from megalodon.checkpoint.store import CheckpointConfig
from megalodon.data.loader import Loader
from megalodon.data.shards import Store, TokenDocument, write_store
from megalodon.model.megalodon import Megalodon
from megalodon.training.loop import Result, Row, Run, Task, train
from megalodon.training.metrics import LogConfig
from megalodon.training.optim import OptimConfig
from megalodon.training.plan import ParallelConfig, Plan, TrainConfig, make_plan

NUM_CLASSES = 47
"""Ids of the pretended tokenizer; the tiny model has 53 rows, so 6 of them are padding."""
BYTES_TABLE = np.arange(NUM_CLASSES, dtype=np.int64) % 5
SEQ_LEN = 37
SHARD = "shard-00001-model-00001-of-00001.safetensors"
"""The only file of tensors in a checkpoint of the tiny model."""


def tiny_store(directory: Path, documents: int = 60, seed: int = 0) -> Store:
    """Documents of 3 to 80 tokens in which an id is mostly followed by its successor: there is something to learn."""
    draw = np.random.default_rng(seed)

    def document() -> TokenDocument:
        length = int(draw.integers(3, 81))
        ids = (int(draw.integers(NUM_CLASSES)) + np.arange(length)) % NUM_CLASSES
        noise = draw.random(length) < 0.1
        ids[noise] = draw.integers(0, NUM_CLASSES, int(noise.sum()))
        return TokenDocument("made-up", ids.astype(np.int64), int(BYTES_TABLE[ids].sum()))

    return write_store(directory, (document() for _ in range(documents)), NUM_CLASSES)


def tiny_plan(
    *,
    train: dict[str, Any] | None = None,
    optim: dict[str, Any] | None = None,
    checkpoint: dict[str, Any] | None = None,
    log: dict[str, Any] | None = None,
    parallel: dict[str, Any] | None = None,
    device: str = "cpu",
) -> Plan:
    """A run of 7 steps of 4 windows of 37 tokens; every section may be changed."""
    return make_plan(
        TrainConfig(**({"max_steps": 7, "batch_tokens": 4 * SEQ_LEN} | (train or {}))),
        OptimConfig(**({"lr": 1e-2, "warmup": "2 steps"} | (optim or {}))),
        CheckpointConfig(**({"every": 3} | (checkpoint or {}))),
        LogConfig(**(log or {})),
        ParallelConfig(**(parallel or {})),
        seq_len=SEQ_LEN,
        windows=50,
        device=device,
    )


def tiny_run(
    store: Store,
    directory: Path,
    plan: Plan,
    *,
    model: dict[str, Any] | None = None,
    tasks: tuple[Task, ...] = (),
    **how: Any,
) -> Result:
    """Train the tiny model on the store in a run directory, or continue what is there."""
    directory.mkdir(exist_ok=True)
    loader = Loader(store, SEQ_LEN, "doc", plan.config.seed)
    run = Run(directory, NUM_CLASSES, BYTES_TABLE, tasks=tasks, **how)
    return train(tiny_config(**(model or {})), loader, plan, run)


TIMES = {"tok_per_s", "seconds", "data_seconds", "peak_share", "memory"}
"""Keys of a row that differ between two equal runs."""


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what no two runs share."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def saved_tensors(directory: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint of a run, put together of the pieces in its files."""
    path = directory / "checkpoints" / f"step-{step:08d}"
    listed = json.loads((path / "manifest.json").read_text())["tensors"]
    found = {name: torch.empty(form["shape"], dtype=getattr(torch, form["dtype"])) for name, form in listed.items()}
    for file in sorted((path / "tensors").iterdir()):
        with safe_open(file, framework="pt") as opened:
            places = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
            for name in places:
                piece, begins = opened.get_tensor(name), places[name]["saved_offsets"]
                spans = tuple(slice(begin, begin + n) for begin, n in zip(begins, piece.shape, strict=True))
                found[name][spans] = piece
    return found


def score(every: int | None = 2) -> Task:
    """An evaluation that depends on every parameter."""

    def call(model: Megalodon) -> list[Row]:
        assert not model.training
        return [{"kind": "eval", "valid_loss": sum(float(p.detach().double().abs().sum()) for p in model.parameters())}]

    return Task(call, every, at_start=True)


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Tensors and state of a step, and all metrics, are equal bit by bit."""
    a, b = saved_tensors(one, step), saved_tensors(other, step)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert metrics(one) == metrics(other)
    state = [json.loads((d / f"checkpoints/step-{step:08d}/state.json").read_text()) for d in (one, other)]
    assert state[0] == state[1]
