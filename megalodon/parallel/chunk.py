"""Chunk parallelism: one sequence over several ranks, of which each reads a piece (the mesh axis `cp`).

    prefix = ChunkPrefix(group, starts, batch_size, length, chunk_size)        # starts: of the whole sequence
    hidden, state = model.hidden(my_tokens, starts=prefix.starts, prefix=prefix)

Attention stays in its chunk. TimestepNorm and CEMA carry small states along time, which compose associatively: every
rank says what its own piece adds, all hear all of it, and each folds what came before its piece. No rank waits for the
layers of another. Two gathers a layer, forward, and two reductions of the same size, backward; their size does not
depend on the length. With documents isolated, chunks begin anew at each, so that one may be open at the end of a piece;
its keys and values go to the next rank, which is all that can see them.

A layer uses the answer on every rank, also on the first, where it is a constant: a rank that left it out would never
come to the collective of the backward pass, and the others would wait. Where documents start every rank of the group
knows of the whole sequence, so that resets and counts are not sent. Not here: who reads which rows (mesh.py).
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megalodon.model.attention import document_positions
from megalodon.parallel.collectives import all_gather, exchange, reduce_scatter
from megalodon_kernels import Statistics, merged_statistics, no_statistics
from megalodon_kernels.chunk_attention.open_chunk import still_open

Form = Literal["auto", "gather", "doubling"]
FEW = 16
"""Ranks up to which averages are gathered; beyond, log₂ of them rounds of one exchange each."""


class ChunkPrefix:
    """What came before this rank's piece of a sequence; see `megalodon.model.state.Prefix`.

    Gradients cross pieces, not the beginning of the sequence: a carried state is a constant.

    Args:
        group:      the ranks that share the sequence, in its order.
        starts:     (B, ranks · L) bool on the CPU: True at the first token of a document; None means nowhere.
        batch_size: B.
        length:     L, tokens of a piece.
        chunk_size: C, at most L.
        position:   (B,) int64 on the CPU: tokens of the current document before the sequence; None means 0.
        form:       of the exchange of averages: gather (one collective), doubling (log₂ of the ranks rounds; their
                    number is a power of two); auto: by the number of ranks.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        starts: Tensor | None,
        batch_size: int,
        length: int,
        chunk_size: int,
        position: Tensor | None = None,
        form: Form = "auto",
    ) -> None:
        self._group, self._rank, self._ranks = group, dist.get_rank(group), dist.get_world_size(group)
        power_of_two = not self._ranks & (self._ranks - 1)
        if length < chunk_size:  # the chunk that is open behind a piece would reach into the one before
            raise ValueError(f"a piece has {length} tokens; expected at least chunk_size {chunk_size}")
        if form == "doubling" and not power_of_two:
            raise ValueError(f"doubling among {self._ranks} ranks; expected a power of two")
        self._doubling = form == "doubling" or (form == "auto" and power_of_two and self._ranks > FEW)
        self._length, self._chunk_size = length, chunk_size
        whole = starts
        if whole is None:
            whole = torch.zeros(batch_size, self._ranks * length, dtype=torch.bool)
        pieces = whole.unflatten(1, (self._ranks, length))
        self._resets = pieces.any(2)
        self._counts = torch.where(self._resets, pieces.flip(2).long().argmax(2) + 1, length)
        origin = torch.zeros(batch_size, dtype=torch.int64) if position is None else position
        ends = document_positions(origin, whole, whole.shape[1])
        self._positions = torch.cat([origin[:, None], ends[:, length - 1 :: length] + 1], dim=1)
        """(B, ranks + 1): tokens of the current document before each piece, and behind the last."""
        self.position = self._positions[:, self._rank]
        self.starts = None if starts is None else pieces[:, self._rank]
        """(B, L): of this piece."""

    def statistics(self, own: Statistics, carried: Statistics | None) -> Statistics:
        """The statistics before the piece: one gather of (B, G, 2) float64."""
        device, (B, G) = own.mean.device, own.mean.shape
        begin = carried or no_statistics(G, device).over(B)
        counts, resets = self._counts.to(device), self._resets.to(device)
        count = begin.count
        for i in range(self._rank):
            count = torch.where(resets[:, i], 0, count) + counts[:, i]

        def fold(packets: Tensor) -> Tensor:
            past = begin
            for i in range(self._rank):
                seen = torch.where(resets[:, i], 0, past.count)
                mean, var = packets[i].unbind(-1)
                past = merged_statistics(past._replace(count=seen), Statistics(counts[:, i], mean, var))
            return torch.stack([past.mean, past.var], dim=-1)

        packet = torch.stack([own.mean, own.var], dim=-1)
        mean, var = _Fold.apply(packet, self._group, fold).unbind(-1)  # type: ignore[no-untyped-call]
        return Statistics(count, mean, var)

    def averages(self, own: Tensor, log_decay: Tensor, angle: Tensor, carried: Tensor | None) -> Tensor:
        """The averages before the piece: one gather of (B, D, N, 2), or log₂ of the ranks exchanges of as much."""
        keep = (~self._resets).to(own.device, own.dtype).T[..., None, None, None]  # (ranks, B, 1, 1, 1)

        def power(pieces: int) -> Tensor:
            # By its exponent, in float64: q itself, rounded, would not survive the power.
            steps = pieces * self._length
            size, turn = (steps * log_decay.double()).exp(), steps * angle.double()
            return torch.stack([size * turn.cos(), size * turn.sin()], dim=-1).to(own.dtype)

        begin = torch.zeros_like(own) if carried is None else carried.to(own.dtype)
        if self._doubling:
            left: Tensor = keep[: self._rank].prod(0) * _product(power(self._rank), begin)
            return self._doubled(own, keep, power) + left

        def fold(packets: Tensor, decay: Tensor) -> Tensor:
            h = begin
            for i in range(self._rank):
                h = keep[i] * _product(decay, h) + packets[i]
            return h

        folded: Tensor = _Fold.apply(own, self._group, fold, power(1))  # type: ignore[no-untyped-call]
        return folded

    def _doubled(self, own: Tensor, keep: Tensor, power: Callable[[int], Tensor]) -> Tensor:
        """The same by recursive doubling: blocks of 1, 2, 4 … ranks exchange what each adds as a whole."""
        rank, block, total, before = self._rank, 1, own, torch.zeros_like(own)
        while block < self._ranks:
            first = rank // block * block
            other: Tensor = _Swap.apply(total, self._group, rank ^ block)  # type: ignore[no-untyped-call]
            upper = bool(rank & block)
            kept = keep[first:rank].prod(0)
            # Selected, not left out: on every rank the exchange is part of the graph.
            gain = kept * _product(power(rank % block), other)
            before = before + torch.where(torch.tensor(upper, device=own.device), gain, 0)
            low, high = (other, total) if upper else (total, other)
            start = first if upper else first + block
            total = keep[start : start + block].prod(0) * _product(power(block), low) + high
            block *= 2
        return before

    def open_lengths(self) -> list[int]:
        """Tokens of the longest chunk that is open before each piece, and behind the last."""
        found: list[int] = (self._positions % self._chunk_size).amax(0).tolist()
        return found

    def open_chunk(
        self, k: Tensor, v: Tensor, carried: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys and values of the chunk that is open before the piece, from the rank before, if one is open anywhere."""
        longest = self.open_lengths()  # as every rank of the group has them
        first = (k[:, :0], v[:, :0]) if carried is None else carried
        if not any(longest[1:-1]):
            return k, v, *(first if self._rank == 0 else (k[:, :0], v[:, :0]))
        given = longest[self._rank + 1] if self._rank + 1 < self._ranks else 0
        wanted = longest[self._rank] if self._rank else 0
        filled = (self.position % self._chunk_size).to(k.device)
        starts = torch.zeros(k.shape[:2], dtype=torch.bool) if self.starts is None else self.starts
        # A piece is no shorter than a chunk, so that what is open behind it lies in it.
        none = k[:, :0], v[:, :0]
        tails = still_open(k, v, self._chunk_size, filled, *none, starts.to(k.device), given) if given else none
        k, before = _HandOver.apply(k, torch.cat(tails, dim=-1), wanted, self._group)  # type: ignore[no-untyped-call]
        open_k, open_v = before.split([k.shape[-1], v.shape[-1]], dim=-1)
        return k, v, *(first if self._rank == 0 else (open_k, open_v))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Of complex numbers as pairs."""
    return torch.view_as_real(torch.view_as_complex(a.contiguous()) * torch.view_as_complex(b.contiguous()))


class _Fold(torch.autograd.Function):
    """Gather a packet of every rank and fold those before this rank's: fold((ranks, …), *extras) -> what came before.

    Backward the fold is repeated with its graph; what it says of the packets is summed over ranks.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, packet: Tensor, group: dist.ProcessGroup, fold: Callable[..., Tensor], *extras: Tensor
    ) -> Tensor:
        gathered = all_gather(packet, group)
        ctx.save_for_backward(gathered, *extras)
        ctx.group, ctx.fold = group, fold  # type: ignore[attr-defined]
        return fold(gathered, *extras)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]  # type: ignore[attr-defined]
        with torch.enable_grad():
            before = ctx.fold(*leaves)  # type: ignore[attr-defined]
        of_packets, *of_extras = (
            torch.autograd.grad(before, leaves, grad, allow_unused=True, materialize_grads=True)
            if before.requires_grad
            else map(torch.zeros_like, leaves)
        )
        return reduce_scatter(of_packets, ctx.group), None, None, *of_extras  # type: ignore[attr-defined]


class _Swap(torch.autograd.Function):
    """Exchange a tensor with another rank; backward its gradients come back the same way."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: dist.ProcessGroup, other: int) -> Tensor:
        ctx.group, ctx.other = group, other  # type: ignore[attr-defined]
        return _swapped(x, group, other)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _swapped(grad, ctx.group, ctx.other), None, None  # type: ignore[attr-defined]


def _swapped(x: Tensor, group: dist.ProcessGroup, other: int) -> Tensor:
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    exchange([(x, other)], [(received, other)], group)
    return received


class _HandOver(torch.autograd.Function):
    """Give (B, P, …) to the next rank and take the (B, wanted, …) of the one before; their gradients go back.

    What else the layer uses passes through, so that the backward pass comes here on every rank, whatever it received.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, through: Tensor, given: Tensor, wanted: int, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        received = given.new_empty(len(given), wanted, *given.shape[2:])
        rank = dist.get_rank(group)
        exchange([(given, rank + 1)], [(received, rank - 1)], group)
        ctx.group, ctx.given = group, given.shape  # type: ignore[attr-defined]
        return through.view_as(through), received

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, through: Tensor, received: Tensor) -> tuple[Tensor, Tensor, None, None]:
        given = received.new_empty(ctx.given)  # type: ignore[attr-defined]
        rank = dist.get_rank(ctx.group)  # type: ignore[attr-defined]
        exchange([(received, rank - 1)], [(given, rank + 1)], ctx.group)  # type: ignore[attr-defined]
        return through, given, None, None
