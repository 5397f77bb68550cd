"""The streaming state of the model as values: everything it remembers of what it has read.

Its size depends on the model and the chunk size alone, never on how much was read. Nothing here is modified in place,
so a state can be kept, copied and branched. Where several ranks read one sequence, each a piece, what came before a
piece is not there when the call begins: every layer asks its `Prefix`. Not here: how a state moves (the layers), how
ranks answer (megalodon/parallel/chunk.py), its file format.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from megalodon_kernels import Statistics


class LayerState(NamedTuple):
    """What one block remembers; P is the number of tokens in the open chunk of the longest row.

    Shapes:
        k:    (B, P, H, Z/H): rotated keys of the open chunk, each row's own first, zeros behind them.
        v:    (B, P, H, V/H): its values.
        norm: Statistics of the block's TimestepNorm: (B,), (B, G), (B, G).
        cema: (B, D, N, 2): the complex averages as (real, imaginary); float64 on a CPU, else float32.
    """

    k: Tensor
    v: Tensor
    norm: Statistics
    cema: Tensor


class State(NamedTuple):
    """What the model remembers.

    Shapes:
        position: (B,) int64: tokens of the current document read so far, in each row.
        layers:   one LayerState a block.
        norm:     Statistics of the final TimestepNorm.
    """

    position: Tensor
    layers: tuple[LayerState, ...]
    norm: Statistics

    def detach(self) -> "State":
        """The same values outside the graph."""
        return self.map(Tensor.detach)

    def map(self, function: Callable[[Tensor], Tensor]) -> "State":
        """Apply `function` to every tensor."""

        def norm(x: Statistics) -> Statistics:
            return Statistics(function(x.count), function(x.mean), function(x.var))

        layers = (LayerState(function(x.k), function(x.v), norm(x.norm), function(x.cema)) for x in self.layers)
        return State(function(self.position), tuple(layers), norm(self.norm))

    def rows(self, numbers: Sequence[int]) -> "State":
        """The state of these rows alone, in this order."""
        index = torch.tensor(numbers, device=self.position.device)
        return self.map(lambda x: x.index_select(0, index))

    def num_bytes(self) -> int:
        """Memory of all tensors, in bytes."""
        sizes: list[int] = []

        def count(x: Tensor) -> Tensor:
            sizes.append(x.numel() * x.element_size())
            return x

        self.map(count)
        return sum(sizes)


class Prefix(Protocol):
    """What came before a piece of a sequence, asked layer by layer with what the piece says by itself.

    Every rank that reads a piece of the same sequence asks the same questions in the same order. `carried` is the state
    before the whole sequence, the same on all of them; None means nothing was read yet.
    """

    position: Tensor
    """(B,) int64: tokens of the current document before the piece."""

    def statistics(self, own: Statistics, carried: Statistics | None) -> Statistics:
        """The statistics before the piece; `own`: what its tokens since the last document start say by themselves."""

    def averages(self, own: Tensor, log_decay: Tensor, angle: Tensor, carried: Tensor | None) -> Tensor:
        """The complex averages (B, D, N, 2) before the piece; `own`: those behind it that began at zero before it.

        log_decay, angle: (D, N) float64, as `megalodon_kernels.cema` takes them.
        """

    def open_chunk(
        self, k: Tensor, v: Tensor, carried: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys and values of the chunk that is open before the piece, (B, P, H, ·), behind those given.

        k, v: (B, L, H, ·) of the piece. They are returned too and take the place of those that were given.
        """


def stack_states(states: Sequence[State]) -> State:
    """States of one model as the rows of one: their positions may differ; open chunks are padded to the longest."""
    longest = max(state.layers[0].k.shape[1] for state in states)

    def open_chunks(caches: Sequence[Tensor]) -> Tensor:
        return torch.cat([pad(x, (0, 0, 0, 0, 0, longest - x.shape[1])) for x in caches])

    def norms(those: Sequence[Statistics]) -> Statistics:
        return Statistics(*(torch.cat(parts) for parts in zip(*those, strict=True)))

    layers = []
    for i in range(len(states[0].layers)):
        own = [state.layers[i] for state in states]
        k, v = open_chunks([x.k for x in own]), open_chunks([x.v for x in own])
        layers.append(LayerState(k, v, norms([x.norm for x in own]), torch.cat([x.cema for x in own])))
    return State(torch.cat([state.position for state in states]), tuple(layers), norms([s.norm for s in states]))
