"""The step of decoding in Triton. Every value of a state is read and written by one program, so nothing races.

TimestepNorm and CEMA: a program for each row and group of features. Attention: one kernel for the scores, a program for
each block of keys, and one for the values, a program for each slice of their features, which forms the softmax of all
scores by itself (C numbers; the values are V times as many). Where a program meets the place of the new token, it takes
the key or value that came and puts it there.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalodon_kernels.dispatch import INTERPRETED
from megalodon_kernels.kernel_math import accumulator, exp
from megalodon_kernels.registration import operator

KEYS = 8 if INTERPRETED else 64
"""Keys of a program for scores, and of one turn of the loop over values."""
SLICE = 8 if INTERPRETED else 64
"""Features of the values of a program: at 4 heads of 2048 these are 128 programs."""


def norm_step_triton(
    count: Tensor, mean: Tensor, var: Tensor, scale: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """See `megalodon_kernels.decode.norm_step`."""
    u = torch.empty(len(count), len(scale), dtype=dtype, device=mean.device)

    def run(x: Tensor) -> Tensor:
        move_norm(x.contiguous(), count, mean, var, scale, bias, u, None, None, None, None, None, None, eps)
        return u

    return run


def norm_cema_step_triton(
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
    eps: float,
    dtype: torch.dtype,
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """See `megalodon_kernels.decode.norm_cema_step`."""
    u, ema = (torch.empty(len(count), len(scale), dtype=dtype, device=mean.device) for _ in range(2))
    p, q, gamma, omega = (x.contiguous() for x in (p, q, gamma, omega))

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        move_norm(x.contiguous(), count, mean, var, scale, bias, u, h, p, q, gamma, omega, ema, eps)
        return u, ema

    return run


def attention_step_triton(
    k_cache: Tensor, v_cache: Tensor, slot: Tensor
) -> Callable[[Tensor, Tensor, Tensor, int | None], Tensor]:
    """See `megalodon_kernels.decode.attention_step`. The kernels read `slot` themselves and never need `longest`."""
    B, H, C, _ = k_cache.shape
    wide = torch.promote_types(k_cache.dtype, torch.float32)
    scores, y = k_cache.new_empty(B, H, C, dtype=wide), v_cache.new_empty(B, H, v_cache.shape[-1])

    def run(q: Tensor, k: Tensor, v: Tensor, longest: int | None) -> Tensor:
        attend(q.contiguous(), k.contiguous(), v.contiguous(), slot, k_cache, v_cache, scores, y)
        return y.to(v.dtype)

    return run


@operator("decode_norm_cema", mutates=("count", "mean", "var", "u", "h", "ema"))
def move_norm(
    x: Tensor,
    count: Tensor,
    mean: Tensor,
    var: Tensor,
    scale: Tensor,
    bias: Tensor,
    u: Tensor,
    h: Tensor | None,
    p: Tensor | None,
    q: Tensor | None,
    gamma: Tensor | None,
    omega: Tensor | None,
    ema: Tensor | None,
    eps: float,
) -> None:
    """x (B, D) -> u, ema (B, D), which are given; every state moves. Without h, the norm alone."""
    (B, D), G = x.shape, mean.shape[1]
    N = 1 if p is None else p.shape[1]
    width, states = triton.next_power_of_2(D // G), triton.next_power_of_2(N)
    count.add_(1)  # here, because the programs of a row all read it
    _norm_cema[(B, G)](
        x, count, mean, var, scale, bias, u, h, p, q, gamma, omega, ema, eps,
        D, D // G, N, width, states, accumulator(x.dtype),
        num_warps=max(1, min(8, width * states // 256)),
    )  # fmt: skip


move_norm.register_fake(lambda *args: None)


@operator("decode_attention", mutates=("k_cache", "v_cache", "scores", "y"))
def attend(
    q: Tensor, k: Tensor, v: Tensor, slot: Tensor, k_cache: Tensor, v_cache: Tensor, scores: Tensor, y: Tensor
) -> None:
    """q, k (B, H, Z), v (B, H, V) -> y (B, H, V) and the caches, all given; scores (B, H, C) is room to work in."""
    (B, H, C, Z), V, wide = k_cache.shape, v_cache.shape[-1], accumulator(k_cache.dtype)
    _scores[(B * H, triton.cdiv(C, KEYS))](
        q, k, slot, k_cache, scores, H, C, Z, triton.next_power_of_2(Z), KEYS, wide, num_warps=4
    )
    _values[(B * H, triton.cdiv(V, SLICE))](
        v, slot, scores, v_cache, y, H, C, V, triton.next_power_of_2(C), KEYS, SLICE, wide, num_warps=4
    )


attend.register_fake(lambda *args: None)


@triton.jit
def _norm_cema(
    x_ptr, count_ptr, mean_ptr, var_ptr, scale_ptr, bias_ptr, u_ptr,
    h_ptr, p_ptr, q_ptr, gamma_ptr, omega_ptr, ema_ptr, eps,
    D: tl.constexpr, SIZE: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, STATES: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    # States keep the dtype they are stored in, float64 or float32; between them all is float32 (WIDE). The interpreter
    # knows no way from float64 to bfloat16 but this one.
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, WIDTH)
    inside, feature = lane < SIZE, group * SIZE + lane
    x = tl.load(x_ptr + row * D + feature, mask=inside, other=0).to(WIDE)
    m = tl.sum(x, axis=0) / SIZE
    away = tl.where(inside, x - m, 0)
    s = tl.sum(away * away, axis=0) / SIZE

    at = row * tl.num_programs(1) + group
    mean, var = tl.load(mean_ptr + at), tl.load(var_ptr + at)
    n, m, s = tl.load(count_ptr + row).to(mean.dtype), m.to(mean.dtype), s.to(mean.dtype)
    d = m - mean
    first = n == 1  # what came before carries no weight: by selection
    var = tl.where(first, s, var + (s - var) / n + d * d * (n - 1) / (n * n))
    mean = tl.where(first, m, mean + d / n)
    tl.store(mean_ptr + at, mean)
    tl.store(var_ptr + at, var)

    scale = tl.load(scale_ptr + feature, mask=inside, other=0).to(WIDE)
    bias = tl.load(bias_ptr + feature, mask=inside, other=0).to(WIDE)
    u = ((x - mean.to(WIDE)) * (1 / tl.sqrt(var + eps)).to(WIDE) * scale + bias).to(u_ptr.dtype.element_ty)
    tl.store(u_ptr + row * D + feature, u, mask=inside)
    if h_ptr is not None:
        u = u.to(WIDE).to(h_ptr.dtype.element_ty)
        n_th = tl.arange(0, STATES)
        both = inside[:, None] & (n_th < N)[None, :]
        own = feature[:, None] * N + n_th[None, :]
        h_at = row * D * N + own
        re, im = tl.load(h_ptr + 2 * h_at, mask=both, other=0), tl.load(h_ptr + 2 * h_at + 1, mask=both, other=0)
        q_re = tl.load(q_ptr + 2 * own, mask=both, other=0)
        q_im = tl.load(q_ptr + 2 * own + 1, mask=both, other=0)
        p = tl.load(p_ptr + own, mask=both, other=0)
        next_re = q_re * re - q_im * im + p * u[:, None]
        next_im = q_re * im + q_im * re
        tl.store(h_ptr + 2 * h_at, next_re, mask=both)
        tl.store(h_ptr + 2 * h_at + 1, next_im, mask=both)
        g_re = tl.load(gamma_ptr + 2 * own, mask=both, other=0)
        g_im = tl.load(gamma_ptr + 2 * own + 1, mask=both, other=0)
        omega = tl.load(omega_ptr + feature, mask=inside, other=0)
        ema = tl.sum(g_re * next_re - g_im * next_im, axis=1) + omega * u
        tl.store(ema_ptr + row * D + feature, ema.to(WIDE).to(ema_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scores(
    q_ptr, k_ptr, slot_ptr, cache_ptr, scores_ptr,
    H: tl.constexpr, C: tl.constexpr, Z: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + head // H)
    key = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    lane = tl.arange(0, WIDTH)
    inside = lane < Z
    q = tl.load(q_ptr + head * Z + lane, mask=inside, other=0).to(WIDE)
    new = tl.load(k_ptr + head * Z + lane, mask=inside, other=0).to(cache_ptr.dtype.element_ty)
    at = (head * C + key[:, None]) * Z + lane[None, :]
    old = tl.load(cache_ptr + at, mask=(key < slot)[:, None] & inside[None, :], other=0).to(WIDE)
    keys = tl.where((key == slot)[:, None], new.to(WIDE)[None, :], old)
    scores = tl.sum(keys * q[None, :], axis=1)
    tl.store(scores_ptr + head * C + key, tl.where(key <= slot, scores, float("-inf")), mask=key < C)
    new = tl.broadcast_to(new[None, :], (KEYS, WIDTH))
    tl.store(cache_ptr + at, new, mask=((key == slot) & (key < C))[:, None] & inside[None, :])


@triton.jit
def _values(
    v_ptr, slot_ptr, scores_ptr, cache_ptr, y_ptr,
    H: tl.constexpr, C: tl.constexpr, V: tl.constexpr, PLACES: tl.constexpr, KEYS: tl.constexpr, SLICE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + head // H)
    place = tl.arange(0, PLACES)
    scores = tl.load(scores_ptr + head * C + place, mask=place < C, other=float("-inf"))
    most = tl.max(scores, axis=0)
    total = tl.sum(exp(scores - most), axis=0)

    feature = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    inside = feature < V
    new = tl.load(v_ptr + head * V + feature, mask=inside, other=0).to(cache_ptr.dtype.element_ty)
    tl.store(cache_ptr + (head * C + slot) * V + feature, new, mask=inside)
    own = exp(tl.load(scores_ptr + head * C + slot) - most)
    y = own * new.to(WIDE)
    for start in range(0, slot, KEYS):
        key = start + tl.arange(0, KEYS)
        seen = key < slot
        weight = exp(tl.load(scores_ptr + head * C + key, mask=seen, other=float("-inf")) - most)
        at = (head * C + key[:, None]) * V + feature[None, :]
        values = tl.load(cache_ptr + at, mask=seen[:, None] & inside[None, :], other=0).to(WIDE)
        y += tl.sum(values * weight[:, None], axis=0)
    tl.store(y_ptr + head * V + feature, (y / total).to(y_ptr.dtype.element_ty), mask=inside)
