"""No rank of several holds a whole model: not while it is built, not while it is saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from factories import tiny_config
from ranks import on_ranks

from megalodon.checkpoint.saver import Saver
from megalodon.checkpoint.store import CheckpointConfig, load_tensors, newest_good_step
from megalodon.model.megalodon import Megalodon
from megalodon.parallel.fsdp import island_names
from megalodon.parallel.layout import Layout, ParallelConfig
from megalodon.parallel.mesh import Mesh
from megalodon.parallel.several import SeveralRanks
from megalodon.parallel.tensor import limits_of
from megalodon.profiling.shapes_only import LiveBytes
from megalodon.training.metrics import LogConfig
from megalodon.training.optim import OptimConfig
from megalodon.training.plan import Plan, TrainConfig, make_plan
from megalodon.training.weights import Weights

CONFIG = tiny_config(
    num_layers=12, model_dim=96, z_dim=48, value_dim=96, ffn_hidden_dim=192, norm_num_groups=8, share_emb=True
)
"""Its largest matrix is a small part of it."""
LAYOUTS = {"fsdp4": Layout(dp_shard=4), "hsdp": Layout(dp_replicate=2, dp_shard=2), "cp2 x tp2": Layout(cp=2, tp=2)}


def weights_of(layout: Layout) -> tuple[Plan, Weights]:
    plan = make_plan(
        TrainConfig(max_steps=2, batch_tokens=320, micro_batch=1, seed=7),
        OptimConfig(),
        CheckpointConfig(),
        LogConfig(),
        ParallelConfig(dp_replicate=layout.dp_replicate, dp_shard=layout.dp_shard, cp=layout.cp, tp=layout.tp),
        seq_len=40, windows=50, device="cpu", world_size=layout.world_size, **limits_of(CONFIG),
    )  # fmt: skip
    return plan, Weights(CONFIG, plan, SeveralRanks(Mesh(layout, "cpu")))


def built(layout: Layout, folder: str) -> Any:
    """The most bytes beside its own parts that lived while a rank built them, and saved them; how many it saved."""
    with LiveBytes() as building:
        _, weights = weights_of(layout)
        weights.begin(None)
    whole = Megalodon(CONFIG, 7)
    for name, part in weights.parameters.items():
        (offsets, shape), expected = weights.places()[f"model.{name}"], whole.get_parameter(name)
        spans = tuple(slice(begin, begin + n) for begin, n in zip(offsets, part.shape, strict=True))
        assert shape == expected.shape and torch.equal(part, expected[spans]), name
    for name, buffer in weights.model.named_buffers():
        assert torch.equal(buffer, whole.get_buffer(name)), name
    held = sum(x.nbytes for x in weights.live().values())
    with LiveBytes() as saving:
        tensors, share = weights.saved()
        saver = Saver(Path(folder), CheckpointConfig())
        saver.save(1, tensors, {}, {}, share=share)
        saver.poll(wait=True)
    return building.peak() - held, saving.peak(), sum(x.nbytes for x in tensors.values())


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_builds_and_saves_its_own_parts_with_the_values_of_the_whole(tmp_path: Path, name: str) -> None:
    whole = Megalodon(CONFIG, 7)
    largest = max(p.nbytes for p in whole.parameters())
    total = sum(p.nbytes for p in whole.parameters())
    found = on_ranks(4, built, LAYOUTS[name], str(tmp_path))
    for building, saving, _ in found:
        # Beside its parts lives one matrix that is being drawn, with its draws in float64, and what FSDP pads with.
        assert building < 4 * largest < total / 4, (building, largest, total)
        assert saving < total / 8, (saving, total)  # digests of all names, from all ranks
    saved = [size for *_, size in found]
    assert sum(saved) == pytest.approx(3 * total, rel=0.02)  # each part once, and the buffers, and AdamW's steps
    islands = sum(whole.get_parameter(name).nbytes for name in island_names(whole))
    shards = LAYOUTS[name].shards * LAYOUTS[name].tp
    assert max(saved) < 3 * (islands + total / shards) + 6 * largest
    checkpoint, _ = newest_good_step(tmp_path)
    assert checkpoint is not None
    read = {key: torch.empty(form["shape"]) for key, form in checkpoint.manifest["tensors"].items()}
    read |= {key: tensor.to(torch.int64) for key, tensor in read.items() if key.endswith("prior_count")}
    load_tensors(checkpoint, read)
    assert all(torch.equal(read[f"model.{key}"], parameter) for key, parameter in whole.named_parameters())


def test_a_model_on_several_ranks_is_whole_again_when_asked() -> None:
    found = on_ranks(4, gathered, LAYOUTS["fsdp4"])
    whole = Megalodon(CONFIG, 7).state_dict()
    assert found[0].keys() == whole.keys() and found[1:] == [None] * 3
    assert all(torch.equal(found[0][name], tensor) for name, tensor in whole.items())


def gathered(layout: Layout) -> Any:
    _, weights = weights_of(layout)
    weights.begin(None)
    model = weights.whole_model()
    return dict(model.state_dict()) if isinstance(model, Megalodon) and not weights._ranks.rank else None
