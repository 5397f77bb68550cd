"""The state of TimestepNorm as a value: nothing seen yet, what a piece of text says by itself, two pieces as one.

Not here: how it moves over a sequence (portable.py, kernel.py).
"""

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


def statistics_of(x: Tensor, num_groups: int, starts: Tensor | None = None) -> Statistics:
    """What the tokens of each row since its last document start say by themselves; differentiable.

    Args:
        x:      (B, L, D) with L ≥ 1.
        starts: (B, L) bool: True at the first token of a document; None means nowhere.
    """
    B, L, _ = x.shape
    seen = torch.ones(B, L, dtype=torch.bool, device=x.device)
    if starts is not None:
        seen = starts.flip(1).cumsum(1).flip(1) - starts.long() == 0  # no start behind this token
    groups = x.unflatten(-1, (num_groups, -1)).to(torch.promote_types(x.dtype, torch.float32))
    s, m = torch.var_mean(groups, dim=-1, correction=0)
    m, s, weight = m.double(), s.double(), seen[..., None].double()
    count = seen.sum(1)
    n = count[:, None].double()
    mean = (weight * m).sum(1) / n
    var = (weight * (s + (m - mean[:, None]).square())).sum(1) / n
    return Statistics(count, mean, var)


def merged_statistics(a: Statistics, b: Statistics) -> Statistics:
    """What two pieces of text say together; not both may be empty (Chan et al. 1983, pairwise form)."""
    count = a.count + b.count
    n, n_a, n_b = (each[:, None].double() for each in (count, a.count, b.count))
    step = b.mean - a.mean
    var = (n_a * a.var + n_b * b.var) / n + n_a / n * (n_b / n) * step.square()
    return Statistics(count, a.mean + n_b / n * step, var)
