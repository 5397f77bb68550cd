"""TimestepNorm as a layer: parameters and buffers -> op. Not here: the statistics (megalodon_kernels.timestep_norm)."""

import torch
from torch import Tensor, nn

from megalodon.model.layers import Float32Module
from megalodon.model.state import Prefix
from megalodon_kernels import Backend, Statistics, no_statistics, statistics_of, timestep_norm


class TimestepNorm(Float32Module):
    """Group norm with statistics over the document so far (arXiv 2404.08801, section 3.2); the scale is 1 + weight.

    The buffers `prior_*` exist because the released state dict has them; a language model has no prior, its count is 0.

    Args:
        model_dim: D, features.
        num_groups: G.
        eps: added to the variance inside the root.
    """

    prior_count: Tensor
    prior_mean: Tensor
    prior_logv: Tensor

    def __init__(self, model_dim: int, num_groups: int, eps: float, backend: Backend = "auto") -> None:
        super().__init__()
        self.num_groups, self.eps, self.backend = num_groups, eps, backend
        self.weight = nn.Parameter(torch.empty(model_dim))
        self.bias = nn.Parameter(torch.empty(model_dim))
        self.register_buffer("prior_count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("prior_mean", torch.zeros(num_groups))
        self.register_buffer("prior_logv", torch.zeros(num_groups))

    def forward(
        self,
        x: Tensor,
        state: Statistics | None = None,
        starts: Tensor | None = None,
        prefix: Prefix | None = None,
    ) -> tuple[Tensor, Statistics]:
        """(B, L, D), statistics -> (B, L, D), the next statistics; see `megalodon_kernels.timestep_norm`.

        prefix: says what the statistics before x are, if x is a piece of a sequence and `state` is before all of it.
        """
        if prefix is not None:
            state = prefix.statistics(statistics_of(x, self.num_groups, starts), state)
        return timestep_norm(
            x, self.weight, self.bias, self.num_groups, state, starts, eps=self.eps, backend=self.backend
        )

    def empty_statistics(self, batch_size: int) -> Statistics:
        """The statistics of rows that have read nothing: (B,), (B, G), (B, G)."""
        return no_statistics(self.num_groups, self.weight.device).over(batch_size)
