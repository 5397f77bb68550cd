"""Complex exponential moving average (CEMA): what the op promises, and which implementation runs.

Not here: the parameters and their squashing (megalodon/model/cema.py), the norm that follows.
"""

from typing import Any

import torch
from torch import Tensor

from megalodon_kernels.cema.portable import cema_portable
from megalodon_kernels.cema.reference import cema_reference
from megalodon_kernels.dispatch import Backend, check_shapes, choose

MOST_STATES = 32
"""A kernel holds the states of a channel and the powers they need in registers and shared memory."""


def cema(
    x: Tensor,
    p: Tensor,
    log_decay: Tensor,
    angle: Tensor,
    gamma: Tensor,
    omega: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Run N complex, decaying, rotating averages over each channel and read out their weighted real sum.

        h_t = q ⊙ h_{t-1} + p ⊙ x_t,   q = exp(log_decay + i·angle);    y_t = Re Σ_n gamma_n h_{t,n} + omega ⊙ x_t

    Megalodon, arXiv 2404.08801, eqs. 2 and 3, in the form of the released code: the input weight p is real.

    Args:
        x:         (B, L, D) float32 or bfloat16 (or float64, then throughout), B and L ≥ 1.
        p:         (D, N) float32 in (0, 1): weight of the input.
        log_decay: (D, N) float64 ≤ 0: nats a token. Not q itself, whose powers would compound a rounding.
        angle:     (D, N) float64: radians a token.
        gamma:     (D, N, 2) float32: weights of the sum, as (real, imaginary).
        omega:     (D,) float32: weight of the skip path.
        h0:        (B, D, N, 2) float32 or float64: the state before the first token; None means zero.
        starts:    (B, L) bool: True at the first token of a document, which sees no state; None means nowhere.
    Returns:
        y:         (B, L, D) in the dtype of x.
        h:         (B, D, N, 2) in the dtype of h0 (float32 without one): the state after the last token; pass it as
                   the next h0.
    Raises:
        ValueError: two sizes disagree; the message shows both.
        KernelError: `backend` cannot run this call.
    """
    _check(x, p, log_decay, angle, gamma, omega, h0, starts)
    N = p.shape[-1]
    unfit = None if N <= MOST_STATES else f"N is {N}, expected at most {MOST_STATES}"
    shared_memory = 112 << 10 if x.dtype == torch.bfloat16 else 208 << 10
    run = IMPLEMENTATIONS[choose("cema", backend, x.device, x.dtype, unfit, shared_memory)]
    with torch.autocast(x.device.type, enabled=False):
        y, h = run(x, p, log_decay, angle, gamma, omega, h0, starts)
    return y, h


def _check(
    x: Tensor,
    p: Tensor,
    log_decay: Tensor,
    angle: Tensor,
    gamma: Tensor,
    omega: Tensor,
    h0: Tensor | None,
    starts: Tensor | None,
) -> None:
    if x.dim() != 3 or not x.shape[0] or not x.shape[1]:
        raise ValueError(f"cema: x is {tuple(x.shape)}; expected (B, L, D) with B ≥ 1 and L ≥ 1")
    (B, L, D), N = x.shape, p.shape[-1]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "p": (p, (D, N)),
        "log_decay": (log_decay, (D, N)),
        "angle": (angle, (D, N)),
        "gamma": (gamma, (D, N, 2)),
        "omega": (omega, (D,)),
        "h0": (h0, (B, D, N, 2)),
        "starts": (starts, (B, L)),
    }
    check_shapes("cema", f"x is {tuple(x.shape)} with N = {N}", expected)


def _triton(*args: Any) -> tuple[Tensor, Tensor]:
    from megalodon_kernels.cema.kernel import cema_triton

    return cema_triton(*args)


IMPLEMENTATIONS = {"reference": cema_reference, "portable": cema_portable, "triton": _triton}
