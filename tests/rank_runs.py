"""What tests of runs on several ranks train, and how it is laid out. Not here: starting ranks (ranks.py)."""

from pathlib import Path
from typing import Any

from factories import tiny_config

from megalodon.checkpoint.store import CheckpointConfig
from megalodon.data.loader import Loader
from megalodon.data.shards import open_store
from megalodon.model.llama import LlamaConfig
from megalodon.parallel.layout import Layout, ParallelConfig
from megalodon.parallel.mesh import Mesh
from megalodon.parallel.ranks import ALONE
from megalodon.parallel.several import SeveralRanks
from megalodon.parallel.tensor import limits_of
from megalodon.training.metrics import LogConfig
from megalodon.training.optim import OptimConfig
from megalodon.training.plan import TrainConfig, make_plan

SEQ_LEN, STEPS = 40, 4
LAYOUTS = {
    "fsdp2": Layout(dp_shard=2), "hsdp": Layout(dp_replicate=2, dp_shard=2), "tp2": Layout(tp=2), "cp2": Layout(cp=2),
    "fsdp2 x tp2": Layout(dp_shard=2, tp=2), "cp2 x tp2": Layout(cp=2, tp=2), "fsdp4": Layout(dp_shard=4),
}  # fmt: skip


def parts(folder: str, layout: Layout | None, isolate: str, how: dict[str, Any]) -> Any:
    """What a rank of a layout trains: configuration, samples, plan, ranks."""
    precision, arch = how.pop("precision", "fp32"), how.pop("arch", "megalodon")
    config: Any = tiny_config(ffn_hidden_dim=30, swiglu=True, **how)
    if arch == "llama":
        config = LlamaConfig(
            num_layers=2, model_dim=24, num_heads=2, ffn_hidden_dim=30, vocab_size=53, max_positions=99
        )
    ranks = SeveralRanks(Mesh(layout, "cpu")) if layout else ALONE
    shape = ranks.layout
    plan = make_plan(
        TrainConfig(max_steps=STEPS, batch_tokens=8 * SEQ_LEN, micro_batch=1, precision=precision),
        OptimConfig(lr=1e-2, warmup="2 steps", ema=0.9),
        CheckpointConfig(every=2),
        LogConfig(health_every=2),
        ParallelConfig(dp_replicate=shape.dp_replicate, dp_shard=shape.dp_shard, cp=shape.cp, tp=shape.tp),
        seq_len=SEQ_LEN, windows=50, device="cpu", world_size=shape.world_size, **limits_of(config),
    )  # fmt: skip
    return config, Loader(open_store(Path(folder).parent / "store"), SEQ_LEN, isolate, 1), plan, ranks
