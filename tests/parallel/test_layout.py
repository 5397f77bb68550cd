"""Ranks are laid out as the recipe says, or refused with all numbers."""

import pytest

from megalodon.checkpoint.store import CheckpointConfig
from megalodon.errors import RecipeError
from megalodon.parallel.layout import Layout, ParallelConfig, check_layout, resolve_layout
from megalodon.training.metrics import LogConfig
from megalodon.training.optim import OptimConfig
from megalodon.training.plan import TrainConfig, make_plan

SIZES = {"seq_len": 32, "chunk_size": 8, "batch_tokens": 256}


def test_the_shards_take_what_the_others_leave() -> None:
    layout = resolve_layout(ParallelConfig(dp_replicate=2, cp=4, tp=2), 64)
    assert layout == Layout(2, 4, 4, 2)
    assert (layout.world_size, layout.data_ranks, layout.shards) == (64, 8, 16)
    assert resolve_layout(ParallelConfig(), 1) == Layout()
    assert resolve_layout(ParallelConfig(dp_shard=3, cp=2), 6) == Layout(1, 3, 2, 1)


def test_ranks_that_do_not_divide_are_refused_with_all_numbers() -> None:
    said = r"6 ranks are not a multiple of parallel.dp_replicate 1 x cp 4 x tp 1 = 4; nearest: 4 and 8"
    with pytest.raises(RecipeError, match=said):
        resolve_layout(ParallelConfig(cp=4), 6)
    with pytest.raises(RecipeError, match=r"3 ranks are not a multiple of .* = 2; nearest: 2 and 4$"):
        resolve_layout(ParallelConfig(cp=2), 3)
    said = r"8 ranks, but parallel.dp_replicate 1 x cp 2 x tp 1 x dp_shard 3 = 6; expected that many"
    with pytest.raises(RecipeError, match=said):
        resolve_layout(ParallelConfig(dp_shard=3, cp=2), 8)


def test_what_fits_passes() -> None:
    check_layout(Layout(2, 2, 4, 2), **SIZES, micro_batch=2, split={"num_heads": 4, "model_dim": 24})
    check_layout(Layout(), **SIZES, micro_batch=8)


@pytest.mark.parametrize(
    ("layout", "more", "said"),
    [
        (Layout(cp=3), {}, r"data.seq_len 32 is not a multiple of parallel.cp 3 x model.chunk_size 8 = 24"),
        (Layout(cp=2), {"chunk_size": None}, r"parallel.cp is 2, but full attention sees the whole sequence"),
        (Layout(tp=2), {"split": {"num_heads": 1, "z_dim": 4}}, r"model.num_heads 1: not a multiple of parallel.tp 2"),
        (Layout(tp=2), {"split": None}, r"parallel.tp is 2, but this architecture is not divided"),
        (Layout(dp_shard=3), {}, r"256 is not a multiple .* 32 x 3 data-parallel ranks .* = 96; nearest: 192 and 288"),
        (Layout(dp_shard=2), {"micro_batch": 3}, r"micro_batch 3 does not divide the 4 windows .*; fits: 1, 2, 4"),
    ],
)
def test_what_does_not_divide_names_its_numbers(layout: Layout, more: dict, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        check_layout(layout, **(SIZES | more))


def test_dropout_and_compilation_that_tp_cannot_have_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"parallel.tp is 2, but the model has dropout; expected 1, or 0"):
        check_layout(Layout(tp=2), seq_len=40, chunk_size=10, batch_tokens=80, split={"num_heads": 2}, dropout=True)
    check_layout(Layout(cp=2), seq_len=40, chunk_size=10, batch_tokens=80, split={"num_heads": 2}, dropout=True)


@pytest.mark.parametrize(("axis", "wanted"), [("tp", True), ("tp", "block"), ("cp", "block")])
def test_compilation_across_an_exchange_is_refused(axis: str, wanted: object) -> None:
    with pytest.raises(RecipeError, match=f"train.compile (true|block) with parallel.{axis} 2"):
        make_plan(
            TrainConfig(max_steps=1, batch_tokens=80, compile=wanted), OptimConfig(), CheckpointConfig(), LogConfig(),
            ParallelConfig(**{axis: 2}), seq_len=40, windows=9, device="cpu", world_size=2, chunk_size=10,
            split={"num_heads": 2},
        )  # fmt: skip
