"""CEMA as a loop over time in complex128: the meaning of the op. Slow on purpose; tests compare with it."""

import torch
from torch import Tensor


def cema_reference(
    x: Tensor,
    p: Tensor,
    log_decay: Tensor,
    angle: Tensor,
    gamma: Tensor,
    omega: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `megalodon_kernels.cema`. Computes in float64 and rounds once, at the end."""
    q = torch.exp(torch.complex(log_decay.double(), angle.double()))
    weights = torch.view_as_complex(gamma.double())
    B, L = x.shape[:2]
    h = q.new_zeros(B, *p.shape) if h0 is None else torch.view_as_complex(h0.double())
    y = []
    for t in range(L):
        if starts is not None:
            h = torch.where(starts[:, t, None, None], torch.zeros_like(h), h)
        x_t = x[:, t].double()
        h = q * h + p.double() * x_t[..., None]
        y.append((weights * h).sum(-1).real + omega.double() * x_t)
    state_dtype = h0.dtype if h0 is not None else torch.promote_types(x.dtype, torch.float32)
    return torch.stack(y, dim=1).to(x.dtype), torch.view_as_real(h).to(state_dtype)
