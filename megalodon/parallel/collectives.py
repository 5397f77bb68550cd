"""The few collectives of ours, over tensors of any layout, each counted. Not here: autograd, FSDP's own.

with counted() as sent: …                  # sent["all_gather"] == (calls, bytes this rank put in)
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13
_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_counts: list[dict[str, tuple[int, int]]] = []


@contextlib.contextmanager
def counted() -> Iterator[dict[str, tuple[int, int]]]:
    """Count calls and bytes, by kind, while the context lasts."""
    counts: dict[str, tuple[int, int]] = {}
    _counts.append(counts)
    try:
        yield counts
    finally:
        _counts.remove(counts)


def _count(kind: str, num_bytes: int) -> None:
    for counts in _counts:
        calls, total = counts.get(kind, (0, 0))
        counts[kind] = calls + 1, total + num_bytes


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(…) of every rank -> (ranks, …)."""
    _count("all_gather", x.nbytes)
    gathered = x.new_empty(dist.get_world_size(group), *x.shape)
    _gather(gathered.view(-1), x.contiguous().view(-1), group=group)
    return gathered


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(ranks, …) -> (…): the sum over ranks of the part that is this rank's."""
    _count("reduce_scatter", x[0].nbytes)
    mine = torch.empty_like(x[0], memory_format=torch.contiguous_format)
    _scatter(mine.view(-1), x.contiguous().view(-1), group=group)
    return mine


def exchange(
    sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], group: dist.ProcessGroup
) -> None:
    """Send tensors to ranks of the group and fill others from them; what is empty, on both sides, is left out.

    receives: contiguous, filled in place.
    """
    sends = [(x.contiguous(), to) for x, to in sends if x.numel()]
    work = [dist.P2POp(dist.isend, x, group=group, group_peer=to) for x, to in sends]
    work += [dist.P2POp(dist.irecv, x, group=group, group_peer=of) for x, of in receives if x.numel()]
    if sends:
        _count("exchange", sum(x.nbytes for x, _ in sends))
    for each in dist.batch_isend_irecv(work) if work else ():
        each.wait()
