"""One step of decoding on a state of fixed size, in place: what the ops promise, and which implementation runs.

    step = norm_cema_step(count, mean, var, h, …)      # prepared once for a state and its coefficients
    normed, ema = step(x)                              # TimestepNorm, then CEMA, of one token a row; the state moves

The streaming forms of `timestep_norm`, `cema` and `chunk_attention` without what a call of any length costs: sizes are
checked and buffers made once, nothing is concatenated, and a GPU is never asked for a number, so that a step can be
recorded and replayed. What a step returns is a buffer that its next call overwrites. Not here: the coefficients
(megalodon/model/cema.py), the step of a whole model (megalodon/model/decoder.py).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megalodon_kernels.decode.portable import attention_step_portable, norm_cema_step_portable, norm_step_portable
from megalodon_kernels.decode.reference import attention_step_reference, norm_cema_step_reference, norm_step_reference
from megalodon_kernels.dispatch import Backend, check_shapes, choose

NormStep = Callable[[Tensor], Tensor]
"""x (B, D) -> (B, D)."""
NormCemaStep = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x (B, D) -> normed (B, D), the input of the values, and ema (B, D)."""
AttentionStep = Callable[[Tensor, Tensor, Tensor, int | None], Tensor]
"""q, k (B, H, Z), v (B, H, V), longest -> (B, H, V)."""

# What a program of the kernels holds at once. Compiled for sm_90, twice as much takes 1,575, 477, 2,309 and 680
# instructions that spill registers, in this order; these sizes take 0, 0, 26 and 54.
MOST_FEATURES = 16_384
"""Features of a group, D/G, in the norm alone."""
MOST_STATES = 8_192
"""Features of a group times states of a feature, D/G · N, each rounded up to a power of two."""
MOST_KEYS = 32_768
"""Scores of a chunk, C."""
MOST_KEY_FEATURES = 1024
"""Features of a key, Z."""


def norm_step(
    count: Tensor,
    mean: Tensor,
    var: Tensor,
    scale: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    *,
    eps: float = 1e-5,
    backend: Backend = "auto",
) -> NormStep:
    """Prepare to normalise one token a row by statistics that include it; each call moves the statistics.

        n += 1;  d = m - mean;  mean += d/n;  var += (s - var)/n + d²(n - 1)/n²
        y = (x - mean) / sqrt(var + eps) ⊙ scale + bias

    m and s are the mean and the variance of a group's features. Megalodon, arXiv 2404.08801, section 3.2.

    Args:
        count: (B,) int64: tokens so far; B ≥ 1.
        mean:  (B, G) float64, or float32 where a device has no better; contiguous, like var.
        var:   (B, G) likewise. Where count is 0 both must be finite, and carry no weight.
        scale: (D,) float32, or float64 as mean: one plus the stored weight.
        bias:  (D,) in the dtype of scale.
        dtype: of x and y: float32 or bfloat16 (or float64).
    Raises:
        ValueError: two sizes disagree; the message shows both.
        KernelError: `backend` cannot run this.
    """
    _check_norm("norm_step", count, mean, var, scale, bias)
    width = len(scale) // mean.shape[1]
    unfit = None if width <= MOST_FEATURES else f"D/G is {width}, expected at most {MOST_FEATURES}"
    run = NORM[choose("norm_step", backend, mean.device, dtype, unfit)]
    return run(count, mean, var, scale, bias, eps, dtype)


def norm_cema_step(
    count: Tensor,
    mean: Tensor,
    var: Tensor,
    h: Tensor,
    scale: Tensor,
    bias: Tensor,
    p: Tensor,
    q: Tensor,
    gamma: Tensor,
    omega: Tensor,
    dtype: torch.dtype,
    *,
    eps: float = 1e-5,
    backend: Backend = "auto",
) -> NormCemaStep:
    """Prepare TimestepNorm and CEMA of one token a row; each call moves both states.

        u = norm_step(x);   h ← q ⊙ h + p ⊙ u;   ema = Re Σ_n gamma_n h_n + omega ⊙ u

    Megalodon, arXiv 2404.08801, eqs. 2 and 3. Here q itself is given, not its logarithm: no powers of it are taken.

    Args:
        count, mean, var, scale, bias, dtype: as in `norm_step`.
        h:     (B, D, N, 2) float64, or float32 where a device has no better: the averages as (real, imaginary).
        p:     (D, N) in the dtype of h: weight of the input.
        q:     (D, N, 2) in the dtype of h: exp(log_decay + i angle).
        gamma: (D, N, 2) in the dtype of h: weights of the sum.
        omega: (D,) in the dtype of h: weight of the skip path.
    Raises:
        ValueError: two sizes disagree; the message shows both.
        KernelError: `backend` cannot run this.
    """
    _check_norm("norm_cema_step", count, mean, var, scale, bias)
    B, (D, N) = len(count), p.shape
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "h": (h, (B, D, N, 2)),
        "q": (q, (D, N, 2)),
        "gamma": (gamma, (D, N, 2)),
        "omega": (omega, (D,)),
        "scale": (scale, (D,)),
    }
    check_shapes("norm_cema_step", f"p is {tuple(p.shape)} with {B} rows", expected)
    _check_contiguous("norm_cema_step", h=h)
    width = D // mean.shape[1]
    states = _power_of_two(width) * _power_of_two(N)
    fits = states <= MOST_STATES
    unfit = None if fits else f"D/G is {width} and N {N}, {states} states a group, expected at most {MOST_STATES}"
    run = NORM_CEMA[choose("norm_cema_step", backend, h.device, dtype, unfit)]
    return run(count, mean, var, h, scale, bias, p, q, gamma, omega, eps, dtype)


def attention_step(k_cache: Tensor, v_cache: Tensor, slot: Tensor, *, backend: Backend = "auto") -> AttentionStep:
    """Prepare to put one key and value a row into its open chunk and to attend to that chunk, the new token included.

        cache[slot] = k, v;   y = Σ_j softmax_j(q · k_j) v_j   over j ≤ slot

    At slot 0 a chunk begins: what the cache holds of the one before lies behind the slot, and is never used.
    No further scale on the scores. Megalodon, arXiv 2404.08801, section 3.3.

    Args:
        k_cache: (B, H, C, Z) float32, bfloat16 or float64, contiguous: rotated keys of the open chunks; moved.
        v_cache: (B, H, C, V) in the same dtype, contiguous; moved. All finite: a weight of 0 does not stop NaN. A CPU
                 is faster with float32 caches also for bfloat16 inputs, whose values they hold exactly.
        slot:    (B,) int64: position in the document mod C of the token to come; the caller moves it on.
    Called with:
        q, k:    (B, H, Z) in any float dtype: rotated query and key of each row; v: (B, H, V): its value.
        longest: the largest slot plus one, so that no more keys are read than there are; None means that the host
                 does not know it, and all places are read.
    Raises:
        ValueError: two sizes disagree; the message shows both.
        KernelError: `backend` cannot run this.
    """
    if k_cache.dim() != 4 or not len(k_cache):
        raise ValueError(f"attention_step: k_cache is {tuple(k_cache.shape)}; expected (B, H, C, Z) with B ≥ 1")
    B, H, C, Z = k_cache.shape
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "v_cache": (v_cache, (B, H, C, v_cache.shape[-1])),
        "slot": (slot, (B,)),
    }
    check_shapes("attention_step", f"k_cache is {tuple(k_cache.shape)}", expected)
    _check_contiguous("attention_step", k_cache=k_cache, v_cache=v_cache, slot=slot)
    unfit = f"C is {C}, expected at most {MOST_KEYS}" if C > MOST_KEYS else None
    if Z > MOST_KEY_FEATURES:
        unfit = f"Z is {Z}, expected at most {MOST_KEY_FEATURES}"
    run = ATTENTION[choose("attention_step", backend, slot.device, k_cache.dtype, unfit)]
    return run(k_cache, v_cache, slot)


def _norm_triton(*args: Any) -> NormStep:
    from megalodon_kernels.decode.kernel import norm_step_triton

    return norm_step_triton(*args)


def _norm_cema_triton(*args: Any) -> NormCemaStep:
    from megalodon_kernels.decode.kernel import norm_cema_step_triton

    return norm_cema_step_triton(*args)


def _attention_triton(*args: Any) -> AttentionStep:
    from megalodon_kernels.decode.kernel import attention_step_triton

    return attention_step_triton(*args)


NORM = {"reference": norm_step_reference, "portable": norm_step_portable, "triton": _norm_triton}
NORM_CEMA = {"reference": norm_cema_step_reference, "portable": norm_cema_step_portable, "triton": _norm_cema_triton}
ATTENTION = {"reference": attention_step_reference, "portable": attention_step_portable, "triton": _attention_triton}


def _check_norm(op: str, count: Tensor, mean: Tensor, var: Tensor, scale: Tensor, bias: Tensor) -> None:
    if mean.dim() != 2 or not len(mean):
        raise ValueError(f"{op}: mean is {tuple(mean.shape)}; expected (B, G) with B ≥ 1")
    (B, G), D = mean.shape, len(scale)
    if D % G:
        raise ValueError(f"{op}: mean has {G} groups; expected a divisor of D = {D}")
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "count": (count, (B,)),
        "var": (var, (B, G)),
        "bias": (bias, (D,)),
    }
    check_shapes(op, f"mean is {tuple(mean.shape)} and scale {tuple(scale.shape)}", expected)
    _check_contiguous(op, count=count, mean=mean, var=var)


def _power_of_two(size: int) -> int:
    """The least one that is not below `size`, at least 1."""
    return 1 << (size - 1).bit_length()


def _check_contiguous(op: str, **states: Tensor) -> None:
    """A state is written in place, through views that a copy would lead astray."""
    for name, state in states.items():
        if not state.is_contiguous():
            raise ValueError(f"{op}: {name} has strides {state.stride()}; expected it contiguous; make it so first")
