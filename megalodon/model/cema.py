"""CEMA as a layer: parameters -> coefficients -> op. Not here: the recurrence itself (megalodon_kernels.cema)."""

import math

import torch
from torch import Tensor, nn

from megalodon.model.layers import Float32Module
from megalodon.model.state import Prefix
from megalodon_kernels import Backend, cema


class Cema(Float32Module):
    """Multi-dimensional complex EMA over each feature (arXiv 2404.08801, eqs. 2 and 3, as the released code has it).

        p = σ(alpha),  log|q| = log1p(-σ(alpha) σ(delta)),  arg q_n = n · σ(theta) · 2π/N,  weights gamma / √N

    Args:
        model_dim: D, features.
        num_states: N, complex averages a feature.
    """

    def __init__(self, model_dim: int, num_states: int, backend: Backend = "auto") -> None:
        super().__init__()
        self.backend = backend
        self.alpha = nn.Parameter(torch.empty(model_dim, num_states, 1))
        self.delta = nn.Parameter(torch.empty(model_dim, num_states, 1))
        self.theta = nn.Parameter(torch.empty(model_dim, 1, 1))
        self.gamma = nn.Parameter(torch.empty(model_dim, num_states, 2))
        self.omega = nn.Parameter(torch.empty(model_dim, 1))

    def forward(
        self,
        x: Tensor,
        h: Tensor | None = None,
        starts: Tensor | None = None,
        prefix: Prefix | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, L, D), state (B, D, N, 2) -> (B, L, D), the next state; see `megalodon_kernels.cema`.

        prefix: says what the state before x is, if x is a piece of a sequence and `h` is before all of it.
        """
        p, log_decay, angle, gamma = self.coefficients()
        coefficients = p, log_decay, angle, gamma, self.omega[:, 0]
        if prefix is None:
            y, h = cema(x, *coefficients, h, starts, backend=self.backend)
        else:
            # Linear in x and the state: no rank waits for another before its own tokens are averaged.
            y, own = cema(x, *coefficients, None, starts, backend=self.backend)
            before = prefix.averages(own, log_decay, angle, h)
            remembered, left = cema(torch.zeros_like(x), *coefficients, before, starts, backend=self.backend)
            y, h = y + remembered, own + left
        # A carried state is rounded once per call: on a CPU, where float64 is cheap, millions of calls must not add up.
        return y, h.double() if h.device.type == "cpu" else h

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """p (D, N), log|q| (D, N) float64, arg q (D, N) float64, gamma/√N (D, N, 2).

        The exponents are formed in float64 from the parameters: a rounded q would move q^t by 4e-4 at t = 32,768.
        """
        N = self.alpha.shape[1]
        alpha, delta, theta = (x[..., 0].double() for x in (self.alpha, self.delta, self.theta))
        p = alpha.sigmoid()
        # The clamp stands before log1p: after it, its gradient would be NaN where the product rounds to 1.
        log_decay = torch.log1p(-(p * delta.sigmoid()).clamp(max=1 - 2**-52))
        n = torch.arange(1, N + 1, device=theta.device)
        angle = n * (theta.sigmoid() * (2 * math.pi / N))
        return p.to(self.alpha.dtype), log_decay, angle, self.gamma * math.sqrt(1 / N)
