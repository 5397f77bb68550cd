"""TimestepNorm as a loop over time in float64: the meaning of the op. Slow on purpose; tests compare with it."""

import torch
from torch import Tensor

from megalodon_kernels.timestep_norm.statistics import Statistics, no_statistics


def timestep_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    state: Statistics | None = None,
    starts: Tensor | None = None,
    padding: Tensor | None = None,
    prior: Statistics | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Statistics]:
    """See `megalodon_kernels.timestep_norm`. Computes in float64 and rounds once, at the end."""
    B, L, D = x.shape
    fresh = (prior or no_statistics(num_groups, x.device)).over(B)
    count, mean, var = state or fresh
    mean, var = mean.double(), var.double()
    if padding is not None:
        x = x.masked_fill(padding[..., None], 0)
    y = []
    for t in range(L):
        if starts is not None:
            new = starts[:, t]
            count = torch.where(new, fresh.count, count)
            mean = torch.where(new[:, None], fresh.mean.double(), mean)
            var = torch.where(new[:, None], fresh.var.double(), var)
        groups = x[:, t].double().view(B, num_groups, -1)
        m, s = groups.mean(-1), groups.var(-1, unbiased=False)
        n = (count + 1).double()[:, None]
        d = m - mean
        # At count 0 the old mean and variance are ignored by selection: 0 · inf would be NaN.
        first = count[:, None] == 0
        next_var = torch.where(first, s, (n - 1) / n * var + s / n + (n - 1) / n**2 * d * d)
        next_mean = torch.where(first, m, mean + d / n)
        real = torch.ones_like(count, dtype=torch.bool) if padding is None else ~padding[:, t]
        count = torch.where(real, count + 1, count)
        mean = torch.where(real[:, None], next_mean, mean)
        var = torch.where(real[:, None], next_var, var)
        z = (groups - mean[..., None]) / torch.sqrt(var + eps)[..., None]
        z = z.reshape(B, D) * (1 + weight.double()) + bias.double()
        y.append(torch.where(real[:, None], z, 0.0))
    return torch.stack(y, dim=1).to(x.dtype), Statistics(count, mean, var)
