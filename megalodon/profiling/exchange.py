"""What ranks send each other in a step: bytes that one of them receives, and how long that takes.

    exchanges(sizes, layout, …)        # scale by scale: weights, gradients, pieces of a sequence, parts of a layer

Derived from what each collective moves: an all-gather or reduce-scatter over R ranks brings (R - 1)/R of the whole, an
all-reduce twice that. Not here: collectives themselves (megalodon/parallel).
"""

from typing import NamedTuple

from megalodon.model.megalodon import ModelConfig
from megalodon.parallel.layout import Layout
from megalodon.profiling.devices import DeviceSpec

LATENCY = 20e-6
"""Seconds of one collective beside its bytes; assumed."""


class Exchange(NamedTuple):
    """One kind of traffic of a step."""

    name: str
    bytes: float
    """That a rank receives."""
    seconds: float
    overlaps: bool
    """It goes on beside the computation; otherwise the computation waits for it."""
    how: str


class Sizes(NamedTuple):
    """Parameters of a model by how they are laid out."""

    blocks: int
    """Of blocks, islands not among them."""
    root: int
    """Embedding and output matrix; a tied one once."""
    islands: int
    """Of norms, CEMA, queries and keys, scales: whole on every rank of a copy, in float32."""
    blocks_split: int
    """Those of `blocks` that tp divides."""
    islands_split: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.blocks + self.root + self.islands

    def local_blocks(self, tp: int) -> int:
        """Parameters of blocks that a rank of `tp` has."""
        return self.blocks - self.blocks_split + self.blocks_split // tp

    def local_islands(self, tp: int) -> int:
        """Parameters of islands that a rank of `tp` has."""
        return self.islands - self.islands_split + self.islands_split // tp


def exchanges(
    config: ModelConfig | None,
    sizes: Sizes,
    layout: Layout,
    device: DeviceSpec,
    *,
    passes: int,
    rows: int,
    tokens: int,
    bf16: bool,
    recomputed: bool,
    isolated: bool,
) -> list[Exchange]:
    """Return the traffic of an optimizer step, of one rank.

    Args:
        config:     of a Megalodon; None for a model that has neither cp nor tp.
        passes:     micro-batches of a step.
        rows:       windows of a pass.
        tokens:     of a window that this rank reads.
        recomputed: whether the pass back runs the attention half of a block again.
        isolated:   whether documents are.
    """
    tp, width = layout.tp, 2 if bf16 else 4
    found: list[Exchange] = []

    def add(name: str, size: float, group: int, calls: int, overlaps: bool, how: str) -> None:
        speed = device.link if group <= device.node else device.network
        found.append(Exchange(name, size, size / speed + (0 if overlaps else calls * LATENCY), overlaps, how))

    inner, copy = layout.shards, layout.shards * tp
    blocks, islands = sizes.local_blocks(tp), sizes.local_islands(tp)
    if copy > 1:
        gathered = passes * (2 * width * blocks * _share(inner) + 4 * sizes.root * _share(copy))
        how = f"{passes} x (blocks twice in {'bf16' if bf16 else 'fp32'}, embedding and output once in fp32)"
        add("weights, gathered", gathered, copy, 0, True, how)
        summed = 4 * (blocks * _share(inner) + sizes.root * _share(copy))
        add("gradients, scattered", summed, copy, 0, True, "once a step, fp32")
    if layout.dp_replicate > 1:
        part = 4 * (blocks / inner + sizes.root / copy)
        add("gradients between copies", 2 * part * _share(layout.dp_replicate), layout.world_size, 0, True, "fp32")
    if layout.world_size > tp:
        size = 2 * 4 * islands * _share(layout.world_size // tp)
        add("islands, summed", size, layout.world_size, 1, False, "CEMA and norms, one bucket, fp32")
    if config is None:
        return found
    times, layers = passes * (3 if recomputed else 2), config.num_layers
    if layout.cp > 1:
        others = layout.cp - 1
        averages = 4 * rows * 2 * config.model_dim * config.cema_ndim / tp
        statistics = 8 * rows * 2 * config.norm_num_groups / tp
        size = times * others * (layers * averages + (layers + 1) * statistics)
        calls = times * (2 * layers + 1)
        add("pieces of a sequence", size, layout.cp * tp, calls, False, "CEMA states, norm statistics")
        if isolated:
            keys = width * rows * config.chunk_size * (config.z_dim + config.value_dim) / tp
            how = "keys and values of the chunk that is open, at most"
            add("open chunks", times * layers * keys, layout.cp * tp, times * layers, False, how)
    if tp > 1:
        stream = 4 * rows * tokens * config.model_dim * _share(tp)
        calls = times * 5 * layers
        add(
            "parts of a layer",
            calls * stream,
            tp,
            calls,
            False,
            "5 times the stream a layer and pass, fp32",
        )
        add("final hidden states", passes * 2 * stream, tp, 2 * passes, False, "gathered, fp32")
    return found


def _share(ranks: int) -> float:
    return (ranks - 1) / ranks
