"""The state of TimestepNorm as a value. Not here: how it moves."""

from typing import NamedTuple

import torch
from torch import Tensor


class Statistics(NamedTuple):
    """What TimestepNorm knows of the past, for each row and group.

    Shapes:
        count: (B,) int64: time steps seen (not elements); () in a prior. At 0, mean and var carry no weight at all.
        mean:  (B, G) float64; (G,) in a prior.
        var:   (B, G) float64, the population variance over all steps and all features of a group; (G,) in a prior.
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs of a state
    mean: Tensor
    var: Tensor

    def over(self, batch: int) -> "Statistics":
        """A prior, (), (G,), (G,), as the state of `batch` rows: (B,), (B, G), (B, G)."""
        return Statistics(self.count.expand(batch), self.mean.expand(batch, -1), self.var.expand(batch, -1))


def no_statistics(num_groups: int, device: torch.device | None = None) -> Statistics:
    """The prior that knows nothing: count 0, mean 0, variance 1."""
    zero = torch.zeros(num_groups, dtype=torch.float64, device=device)
    return Statistics(torch.zeros((), dtype=torch.int64, device=device), zero, zero + 1)
