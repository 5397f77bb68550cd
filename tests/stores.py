"""Token stores and training runs of a few hundred tokens, for tests of training, checkpoints and evaluation."""

from pathlib import Path
from typing import Any

import numpy as np
from factories import tiny_config

from megalodon.checkpoint.store import CheckpointConfig
from megalodon.data.loader import Loader
from megalodon.data.shards import Store, TokenDocument, write_store
from megalodon.training.loop import Result, Run, Task, train
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
