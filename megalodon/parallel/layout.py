"""How ranks are laid out: copies of the model, shards of a copy, pieces of a sequence, parts of a layer.

    layout = resolve_layout(ParallelConfig(cp=2), 256)        # Layout(dp_replicate=1, dp_shard=128, cp=2, tp=1)
    check_layout(layout, seq_len=…, chunk_size=…, batch_tokens=…, split={"num_heads": 4, …})

Not here: process groups and meshes, anything that runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from megalodon.config import Config
from megalodon.errors import RecipeError


class ParallelConfig(Config):
    """How a run is laid out over devices (the `parallel:` section of a recipe)."""

    dp_replicate: int = Field(default=1, ge=1)
    """Whole copies of the model."""
    dp_shard: Literal["all"] | Annotated[int, Field(ge=1)] = "all"
    """Devices that share one copy; all = those the other three leave."""
    cp: int = Field(default=1, ge=1)
    """Devices that share one sequence (chunk parallelism)."""
    tp: int = Field(default=1, ge=1)
    """Devices that share one layer."""
    timeout_minutes: float = Field(default=30, gt=0)
    """What a rank waits for the others before the run ends; also for rank 0 while it writes samples, and for all to
    write their parts of a checkpoint."""


@dataclass(frozen=True)
class Layout:
    """Ranks in each direction; a rank's number counts tp fastest, then cp, dp_shard, dp_replicate."""

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def data_ranks(self) -> int:
        """Ranks, or groups of them, that read different windows."""
        return self.dp_replicate * self.dp_shard

    @property
    def shards(self) -> int:
        """Ranks over which FSDP divides a block: dp_shard x cp."""
        return self.dp_shard * self.cp


ONE = Layout()
"""One process alone."""


def resolve_layout(config: ParallelConfig, world_size: int) -> Layout:
    """Return the layout of so many ranks. Raises: RecipeError with all numbers if they do not go together."""
    given = config.dp_replicate * config.cp * config.tp
    named = f"parallel.dp_replicate {config.dp_replicate} x cp {config.cp} x tp {config.tp}"
    if config.dp_shard != "all":
        given, named = given * config.dp_shard, f"{named} x dp_shard {config.dp_shard}"
    if world_size == 1 and given > 1:
        hint = f"--gpus {given}, or torchrun, or srun"
        raise RecipeError(f"{named} = {given:,} ranks, and this is one process", hint)
    if config.dp_shard != "all":
        if given != world_size:
            raise RecipeError(
                f"{world_size:,} ranks, but {named} = {given:,}; expected that many, or parallel.dp_shard=all"
            )
        return Layout(config.dp_replicate, config.dp_shard, config.cp, config.tp)
    shards, rest = divmod(world_size, given)
    if rest or not shards:
        nearest = " and ".join(f"{n * given:,}" for n in (shards, shards + 1) if n)
        raise RecipeError(f"{world_size:,} ranks are not a multiple of {named} = {given:,}; nearest: {nearest}")
    return Layout(config.dp_replicate, shards, config.cp, config.tp)


def check_layout(
    layout: Layout,
    *,
    seq_len: int,
    batch_tokens: int,
    chunk_size: int | None = None,
    micro_batch: int | None = None,
    split: Mapping[str, int] | None = None,
    dropout: bool = False,
) -> None:
    """Check that windows, batch and widths divide over the ranks. Raises: RecipeError with all numbers.

    Args:
        seq_len:     tokens of a window.
        chunk_size:  of attention; None for a model that cannot share a sequence between ranks.
        micro_batch: windows of a pass; None leaves the choice open.
        split:       names and sizes of what tp divides; None for a model that tp cannot divide.
        dropout:     whether the model has any.
    """
    faults: list[str] = []
    if layout.cp > 1 and chunk_size is None:
        faults.append(f"parallel.cp is {layout.cp}, but full attention sees the whole sequence; expected 1")
    elif layout.cp > 1 and seq_len % (layout.cp * (chunk_size or 1)):
        whole = f"parallel.cp {layout.cp} x model.chunk_size {chunk_size:,}"
        faults.append(f"data.seq_len {seq_len:,} is not a multiple of {whole} = {layout.cp * (chunk_size or 1):,}")
    if layout.tp > 1 and split is None:
        faults.append(f"parallel.tp is {layout.tp}, but this architecture is not divided; expected 1")
    odd = [f"model.{name} {size:,}" for name, size in (split or {}).items() if size % layout.tp]
    if odd:
        faults.append(f"{', '.join(odd)}: not a multiple of parallel.tp {layout.tp}")
    if layout.tp > 1 and dropout:  # what all ranks of a layer hold would be dropped differently on each
        faults.append(f"parallel.tp is {layout.tp}, but the model has dropout; expected 1, or 0 for every dropout")
    whole_batch, shared = seq_len * layout.data_ranks, ""
    if layout.data_ranks > 1:
        shared = f" x {layout.data_ranks:,} data-parallel ranks (GPUs / (cp x tp)) = {whole_batch:,}"
    if batch_tokens % whole_batch:
        below = batch_tokens // whole_batch
        nearest = " and ".join(f"{n * whole_batch:,}" for n in (below, below + 1) if n)
        faults.append(
            f"train.batch_tokens {batch_tokens:,} is not a multiple of data.seq_len {seq_len:,}{shared}; "
            f"nearest: {nearest}"
        )
    elif micro_batch and (rows := batch_tokens // whole_batch) % micro_batch:
        fits = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
        faults.append(f"train.micro_batch {micro_batch} does not divide the {rows:,} windows of a rank; fits: {fits}")
    if faults:
        raise RecipeError("; ".join(faults))
