"""Whether several ranks hear one another: each collective that training uses, with known values, and its speed.

Not here: the other checks of `megalodon doctor` (health.py).
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megalodon.parallel.collectives import all_gather, exchange, reduce_scatter
from megalodon.profiling.health import Check

SIZE = 4 << 20
"""float32 numbers of the messages whose speed is measured."""


def collectives(group: dist.ProcessGroup, device: torch.device) -> Check:
    """Try them on all ranks of a group, which call this together; the same answer on each."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    mine = torch.full((ranks, 3), float(rank), device=device)
    total, everybody = ranks * (ranks - 1) / 2, torch.arange(ranks, dtype=torch.float32, device=device)

    def sent_on() -> Tensor:
        received = torch.empty_like(mine)
        exchange([(mine, (rank + 1) % ranks)], [(received, (rank - 1) % ranks)], group)
        return received[0, 0]

    def summed() -> Tensor:
        x = mine.clone()
        dist.all_reduce(x, group=group)
        return x[0, 0]

    tried: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        "all-reduce": (summed, torch.tensor(total, device=device)),
        "all-gather": (lambda: all_gather(mine, group)[:, 0, 0], everybody),
        "reduce-scatter": (lambda: reduce_scatter(mine, group)[0], torch.tensor(total, device=device)),
        "send and receive": (sent_on, torch.tensor(float((rank - 1) % ranks), device=device)),
    }
    right = torch.tensor([bool(torch.equal(work(), expected)) for work, expected in tried.values()], device=device)
    agreed = right.to(torch.float32)
    dist.all_reduce(agreed, dist.ReduceOp.MIN, group=group)
    wrong = [name for name, ok in zip(tried, agreed.tolist(), strict=True) if not ok]
    large, small = (_seconds(n, group, device) for n in (SIZE, 1))
    said = f"{ranks} ranks over {dist.get_backend(group)}"
    if wrong:
        return Check("collectives", False, f"{said}: {', '.join(wrong)} of known values is wrong", "check the network")
    speed = f"16 MiB summed at {SIZE * 4 / large / 1e9:,.2f} GB/s, one number in {small * 1e6:,.0f} µs"
    return Check("collectives", True, f"{said}: {', '.join(tried)} exact; {speed}")


def _seconds(count: int, group: dist.ProcessGroup, device: torch.device) -> float:
    """Median seconds of an all-reduce of so many numbers."""
    x, took = torch.zeros(count, device=device), []
    for _ in range(6):
        begin = time.perf_counter()
        dist.all_reduce(x, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - begin)
    return statistics.median(took[1:])
