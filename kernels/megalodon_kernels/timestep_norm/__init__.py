"""Timestep normalisation, group norm whose statistics run over time: what the op promises, and what runs.

Not here: the parameters (megalodon/model/timestep_norm.py).
"""

from typing import Any

import torch
from torch import Tensor

from megalodon_kernels.dispatch import Backend, check_shapes, choose
from megalodon_kernels.timestep_norm.portable import timestep_norm_portable
from megalodon_kernels.timestep_norm.reference import timestep_norm_reference
from megalodon_kernels.timestep_norm.statistics import Statistics

MOST_WIDTH = 1024
"""A kernel holds all features of a group, and a few steps of it, in registers."""


def timestep_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    state: Statistics | None = None,
    starts: Tensor | None = None,
    padding: Tensor | None = None,
    prior: Statistics | None = None,
    *,
    eps: float = 1e-5,
    backend: Backend = "auto",
) -> tuple[Tensor, Statistics]:
    """Normalise every group of features by the mean and variance of all its values up to and including this step.

        y_t = (x_t - mean_t) / sqrt(var_t + eps) ⊙ (1 + weight) + bias

    Megalodon, arXiv 2404.08801, section 3.2; eps inside the root and weight stored minus one as in the released code.

    Args:
        x:          (B, L, D) float32 or bfloat16 (or float64), B and L ≥ 1.
        weight:     (D,) float32: the scale minus one.
        bias:       (D,) float32.
        num_groups: G; D is a multiple of it.
        state:      the statistics before the first step; None means the prior.
        starts:     (B, L) bool: True at the first token of a document, whose statistics begin at the prior.
        padding:    (B, L) bool: True where there is no token: y is 0 and the statistics do not move.
        prior:      statistics of a document's past before its first token; None means none (count 0).
    Returns:
        y:          (B, L, D) in the dtype of x.
        state:      the statistics after the last step, float64.
    Raises:
        ValueError: two sizes disagree; the message shows both.
        KernelError: `backend` cannot run this call.
    """
    _check(x, weight, bias, num_groups, state, starts, padding, prior)
    width = x.shape[2] // num_groups
    fits = width <= MOST_WIDTH and not width & (width - 1)
    unfit = None if fits else f"D/G is {width}, expected a power of two up to {MOST_WIDTH}"
    run = IMPLEMENTATIONS[choose("timestep_norm", backend, x.device, x.dtype, unfit)]
    with torch.autocast(x.device.type, enabled=False):
        result: tuple[Tensor, Statistics] = run(x, weight, bias, num_groups, state, starts, padding, prior, eps)
    return result


def _triton(*args: Any) -> tuple[Tensor, Statistics]:
    from megalodon_kernels.timestep_norm.kernel import timestep_norm_triton

    return timestep_norm_triton(*args)


IMPLEMENTATIONS = {"reference": timestep_norm_reference, "portable": timestep_norm_portable, "triton": _triton}


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    state: Statistics | None,
    starts: Tensor | None,
    padding: Tensor | None,
    prior: Statistics | None,
) -> None:
    if x.dim() != 3 or not x.shape[0] or not x.shape[1]:
        raise ValueError(f"timestep_norm: x is {tuple(x.shape)}; expected (B, L, D) with B ≥ 1 and L ≥ 1")
    B, L, D = x.shape
    if num_groups < 1 or D % num_groups:
        raise ValueError(f"timestep_norm: num_groups is {num_groups}; expected a divisor of D = {D}")
    G = num_groups
    no = Statistics(None, None, None)  # type: ignore[arg-type]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "weight": (weight, (D,)),
        "bias": (bias, (D,)),
        "state.count": ((state or no).count, (B,)),
        "state.mean": ((state or no).mean, (B, G)),
        "state.var": ((state or no).var, (B, G)),
        "starts": (starts, (B, L)),
        "padding": (padding, (B, L)),
        "prior.count": ((prior or no).count, ()),
        "prior.mean": ((prior or no).mean, (G,)),
        "prior.var": ((prior or no).var, (G,)),
    }
    check_shapes("timestep_norm", f"x is {tuple(x.shape)} with {G} groups", expected)
