"""The feed-forward half of a block, plain and SwiGLU. Not here: the attention half."""

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from megalodon.model.layers import Float32Module, LayerNorm, Linear
from megalodon_kernels import Backend, swiglu


class FeedForward(Float32Module):
    """x + alpha · fc2(silu(fc1 f) ⊙ fc3 f), f = LayerNorm(y): the residual is the block's input x, not y (two hops).

    arXiv 2404.08801, section 3.5. Without SwiGLU there is no fc3; without `rescale`, alpha is 1.

    Args:
        model_dim, hidden_dim: D and F.
        rescale: learn the scale alpha (D,) of the output.
    """

    def __init__(
        self,
        model_dim: int,
        hidden_dim: int,
        *,
        swiglu: bool,
        rescale: bool,
        eps: float,
        affine: bool,
        dropout: float,
        hidden_dropout: float,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.dropout, self.hidden_dropout, self.backend = dropout, hidden_dropout, backend
        self.norm = LayerNorm(model_dim, eps, affine, backend)
        self.fc1 = Linear(model_dim, hidden_dim, bias=False)
        self.fc3 = Linear(model_dim, hidden_dim, bias=False) if swiglu else None
        self.fc2 = Linear(hidden_dim, model_dim, bias=False)
        self.alpha = nn.Parameter(torch.empty(model_dim)) if rescale else None

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Output of the attention half (B, L, D), input of the block (B, L, D) -> (B, L, D)."""
        f = self.norm(y)
        gate = None if self.fc3 is None else self.fc3(f)
        hidden = swiglu(self.fc1(f), gate, backend=self.backend)
        hidden = dropout(hidden, self.hidden_dropout, self.training)
        out = dropout(self.fc2(hidden), self.dropout, self.training)
        if self.alpha is not None:
            out = self.alpha * out
        return out.to(x.dtype) + x
