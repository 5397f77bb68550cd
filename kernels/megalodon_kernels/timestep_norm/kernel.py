"""TimestepNorm in Triton: statistics of tiles of time, their merge, and a second pass over x that applies them.

A program owns a tile: some steps of one group, or of several narrow ones. Per step and group u = mean(x - c) and
q = mean((x - c)²) matter, with a shift c near the data. A *stretch* of steps of one document is n, c, U = Σ u, Q = Σ q:

    (n, c, U, Q)₁ then (n, c, U, Q)₂ = n₁ + n₂, c₁, U₁ + U₂ + n₂ d, Q₁ + Q₂ + 2 d U₂ + n₂ d²    with d = c₂ - c₁

This is associative; where the second begins a document it alone is taken, by selection. With n_0, mean_0 and var_0 from
before the tile, or before the document, and n_t = n_0 + n:

    mean_t - c = (n_0 (mean_0 - c) + U) / n_t
    var_t = (n_0 (var_0 + (mean_0 - c)²) + Q) / n_t - (mean_t - c)²

c is mean_0, and the first mean of a document about which nothing is known; so the last difference can only cancel what
the steps of one tile moved the mean. A mean is a float64 in memory, the sum of two float32 in a kernel: x - mean is
exact at any offset. Backward, with r = 1/sqrt(var_t + eps), g = dy (1 + weight), W features a group, Σ over a group:

    alpha_t = (-r Σ g - 2 (mean_t - c) beta'_t) / n_t,   beta_t = beta'_t / n_t,   beta'_t = -r³/2 Σ g (x - mean_t)
    A = Σ alpha, B = Σ beta over this and all later steps of the document, with those of the final mean and var
    dx = g r + (A + 2 (x - c) B) / W,    A for another shift: A(c₂) = A(c₁) + 2 (c₂ - c₁) B
    dmean_0 = n_0 (A + 2 (mean_0 - c) B),   dvar_0 = n_0 B   at the first step

There the shift of a step is its own mean. Each direction takes three launches: sums of tiles; their merge, in float64;
the second pass, which sums inside the tile. Documents may begin anywhere. A padded step reads nothing. Statistics of
count 0 get no gradient. Not here: what is checked before (`__init__.py`).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megalodon_kernels.dispatch import INTERPRETED
from megalodon_kernels.kernel_math import accumulator
from megalodon_kernels.registration import operator
from megalodon_kernels.timestep_norm.statistics import Statistics

Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

ELEMENTS = 4096
"""Values of x in a tile, 64 steps of 64 features at the 7B width."""
A_THREAD = 64
"""Values of x that a thread holds. With 32, `_apply` has 35 instructions for each instead of 23: what a row of a tile
needs once is shared by fewer. `_apply_gradients`, which reads two tensors, holds half as many values of each."""
MERGED = 256
"""Tiles that one step of the merge takes together: two for each thread; 512 tiles are 32,768 steps."""

NOTHING = (None, None, None)
"""Statistics that nobody gave."""


def tile(width: int, num_groups: int) -> tuple[int, int]:
    """(steps, groups) of a tile: 64 steps or, of a wide group, fewer; up to 4 narrow groups, so that reads are longer.

    With more groups their sums over time, which are kept for every step, would no longer fit into registers.
    """
    steps = 32 if INTERPRETED else min(64, ELEMENTS // width)
    return steps, max(1, min(4, ELEMENTS // (steps * width), triton.next_power_of_2(num_groups)))


def merging(tiles: int, num_groups: int) -> tuple[int, int]:
    """(tiles at a time, groups) of a program that merges; few tiles in the interpreter, so that tests see a carry."""
    return (4, triton.next_power_of_2(num_groups)) if INTERPRETED else (MERGED, 1)


def timestep_norm_triton(
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
    """See `megalodon_kernels.timestep_norm`."""
    if state is None and prior is not None:
        state = prior.over(len(x))
    y, *after = _TimestepNorm.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, num_groups, eps, *(state or NOTHING), starts, padding, *(prior or NOTHING)
    )
    return y, Statistics(*after)


class _TimestepNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, *known: Any
    ) -> tuple[Tensor, ...]:
        x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
        past = [None if value is None else value.contiguous() for value in known]
        y, mean, rstd, count, *final = timestep_norm_forward(x, weight, bias, num_groups, eps, *past)
        ctx.save_for_backward(x, weight, mean, rstd, count, *final[:2], *past)  # type: ignore[arg-type]
        ctx.bias = bias.dtype  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(final[0])
        return y, *final

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor, _: Tensor, dmean: Tensor, dvar: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # type: ignore[attr-defined]
        cotangents = (dy.contiguous(), dmean.contiguous(), dvar.contiguous())
        dx, d_weight, d_bias, *gradients = timestep_norm_backward(*cotangents, *saved)
        mean0, var0, prior_mean, prior_var = (
            None if of is None else d.to(of.dtype)
            for d, of in zip(gradients, (*saved[8:10], *saved[13:15]), strict=True)
        )
        d_weight, d_bias = d_weight.to(saved[1].dtype), d_bias.to(ctx.bias)  # type: ignore[attr-defined]
        state, prior = (None, mean0, var0), (None, prior_mean, prior_var)
        return dx, d_weight, d_bias, None, None, *state, None, None, *prior


@operator("timestep_norm_forward")
def timestep_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float,
    count0: Tensor | None, mean0: Tensor | None, var0: Tensor | None, starts: Tensor | None, padding: Tensor | None,
    prior_count: Tensor | None, prior_mean: Tensor | None, prior_var: Tensor | None,
) -> Forward:  # fmt: skip
    """-> y; mean, 1/sqrt(var + eps) (B, L, G) and count (B, L) after each step; count, mean, var at the end.

    All contiguous; means and the final var are float64. Without count0 or prior_count nothing is known before the first
    step or before a document.
    """
    y, mean, rstd, count, *final = _empty(x, num_groups)
    (B, L, D), G = x.shape, num_groups
    width, wide = D // G, accumulator(x.dtype)
    T, groups = tile(width, G)
    tiles, warps = triton.cdiv(L, T), max(1, T * groups * width // (32 * A_THREAD))
    begins, lengths = (x.new_empty(B, tiles, dtype=torch.int32) for _ in range(2))
    means, spreads = (x.new_empty(B, tiles, G, dtype=torch.float64) for _ in range(2))
    grid = (B * tiles * triton.cdiv(G, groups),)
    _sum_tiles[grid](
        x, starts, padding, begins, lengths, means, spreads, L, tiles, G, width, T, groups, wide, num_warps=warps
    )
    before = [x.new_empty(B, tiles, dtype=torch.int64), torch.empty_like(means), torch.empty_like(means)]
    prior = (prior_count, prior_mean, prior_var)
    merged, abreast = merging(tiles, G)
    _merge_tiles[(B * triton.cdiv(G, abreast),)](
        begins, lengths, means, spreads, count0, mean0, var0, *prior, *before, *final, tiles, G, merged, abreast
    )
    _apply[grid](
        x, weight, bias, starts, padding, *before, *prior, y, mean, rstd, count, L, tiles, eps,
        G, width, T, groups, wide, num_warps=warps,
    )  # fmt: skip
    return y, mean, rstd, count, final[0], final[1], final[2]


@timestep_norm_forward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float,
    count0: Tensor | None, mean0: Tensor | None, var0: Tensor | None, starts: Tensor | None, padding: Tensor | None,
    prior_count: Tensor | None, prior_mean: Tensor | None, prior_var: Tensor | None,
) -> Forward:  # fmt: skip
    return _empty(x, num_groups)


def _empty(x: Tensor, num_groups: int) -> Forward:
    (B, L, _), G = x.shape, num_groups
    mean, final_mean, final_var = (x.new_empty(*shape, dtype=torch.float64) for shape in ((B, L, G), (B, G), (B, G)))
    rstd = x.new_empty(B, L, G, dtype=torch.promote_types(x.dtype, torch.float32))
    count, final_count = x.new_empty(B, L, dtype=torch.int64), x.new_empty(B, dtype=torch.int64)
    return torch.empty_like(x), mean, rstd, count, final_count, final_mean, final_var


@operator("timestep_norm_backward")
def timestep_norm_backward(
    dy: Tensor, dmean: Tensor, dvar: Tensor,
    x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, count: Tensor, final_count: Tensor, final_mean: Tensor,
    count0: Tensor | None, mean0: Tensor | None, var0: Tensor | None, starts: Tensor | None, padding: Tensor | None,
    prior_count: Tensor | None, prior_mean: Tensor | None, prior_var: Tensor | None,
) -> Gradients:  # fmt: skip
    """-> dx; dweight, dbias (D,) like rstd; float64 gradients of mean0, var0 (B, G) and of the prior's (G,).

    All contiguous. The gradients of what is None are 0.
    """
    (B, L, D), G = x.shape, mean.shape[2]
    width, wide = D // G, accumulator(x.dtype)
    T, groups = tile(width, G)
    tiles, warps = triton.cdiv(L, T), max(1, T * groups * width // (32 * A_THREAD))
    grid = (B * tiles * triton.cdiv(G, groups),)
    dx, d_mean0, d_var0 = torch.empty_like(x), torch.empty_like(dmean), torch.empty_like(dvar)
    begins = x.new_empty(B, tiles, dtype=torch.int32)
    a, b, c, behind_a, behind_b, behind_c = mean.new_empty(6, B, tiles, G)
    steps = (x, dy, weight, mean, rstd, count, starts, padding)
    _sum_tile_gradients[grid](*steps, begins, a, b, c, L, tiles, G, width, T, groups, wide, num_warps=warps)
    merged, abreast = merging(tiles, G)
    _merge_tile_gradients[(B * triton.cdiv(G, abreast),)](
        starts, begins, a, b, c, count0, mean0, var0, final_count, final_mean, dmean, dvar,
        behind_a, behind_b, behind_c, d_mean0, d_var0, L, tiles, G, merged, abreast,
    )  # fmt: skip
    parts = rstd.new_empty(2, B * tiles, D)
    # Nothing is written for a prior that is not there.
    prior_parts = mean.new_zeros(2, B * tiles if prior_count is not None else 1, G)
    _apply_gradients[grid](
        *steps, behind_a, behind_b, behind_c, prior_count, prior_mean, prior_var, dx, *parts, *prior_parts,
        L, tiles, G, width, T, groups, wide, num_warps=2 * warps,
    )  # fmt: skip
    return dx, parts[0].sum(0), parts[1].sum(0), d_mean0, d_var0, prior_parts[0].sum(0), prior_parts[1].sum(0)


@timestep_norm_backward.register_fake
def _(
    dy: Tensor, dmean: Tensor, dvar: Tensor,
    x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, count: Tensor, final_count: Tensor, final_mean: Tensor,
    count0: Tensor | None, mean0: Tensor | None, var0: Tensor | None, starts: Tensor | None, padding: Tensor | None,
    prior_count: Tensor | None, prior_mean: Tensor | None, prior_var: Tensor | None,
) -> Gradients:  # fmt: skip
    D, G = x.shape[2], mean.shape[2]
    parameters = rstd.new_empty(D), rstd.new_empty(D)
    prior = mean.new_empty(G), mean.new_empty(G)
    return torch.empty_like(x), *parameters, torch.empty_like(dmean), torch.empty_like(dvar), *prior


@triton.jit
def split(mean, WIDE: tl.constexpr):
    """A float64 as the sum of two WIDE: differences with the first are exact where they are small."""
    high = mean.to(WIDE)
    return high, (mean - high.to(tl.float64)).to(WIDE)


@triton.jit
def flags(flags_ptr, at, inside):
    """1 where a flag is set; 0 elsewhere, and where there are no flags."""
    found = tl.zeros(at.shape, tl.int32)
    if flags_ptr is not None:
        found = tl.load(flags_ptr + at, mask=inside, other=0).to(tl.int32)
    return found


@triton.jit
def known(count_ptr, mean_ptr, var_ptr, row, group, G: tl.constexpr):
    """Statistics of a row's groups in float64, the count as one number; without a pointer those that know nothing."""
    count = tl.full((), 0, tl.float64)
    mean = tl.zeros(group.shape, tl.float64)
    var = mean + 1
    if count_ptr is not None:
        count = tl.load(count_ptr + row).to(tl.float64)
        mean = tl.load(mean_ptr + row * G + group, mask=group < G, other=0).to(tl.float64)
        var = tl.load(var_ptr + row * G + group, mask=group < G, other=0).to(tl.float64)
    return count, mean, var


@triton.jit
def place(tiles, G: tl.constexpr, STEPS: tl.constexpr, GROUPS: tl.constexpr):
    """This program's row, the number of its tile in the batch, the tile's first step; block of groups, the groups."""
    blocks = tl.cdiv(G, GROUPS)
    program = tl.program_id(0).to(tl.int64)
    number, block = program // blocks, program % blocks
    return number // tiles, number, number % tiles * STEPS, block, block * GROUPS + tl.arange(0, GROUPS)


@triton.jit
def features(step, group, G: tl.constexpr, WIDTH: tl.constexpr):
    """Where the features of some steps and groups are: (STEPS, GROUPS, WIDTH)."""
    return (step[:, None] * G + group[None, :])[:, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def _sum_tiles(
    x_ptr, starts_ptr, padding_ptr, begins_ptr, length_ptr, mean_ptr, spread_ptr, L, tiles,
    G: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, GROUPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Whether a document begins in a tile; of the steps since: how many, their mean, Σ squared deviations from it."""
    row, number, first, block, group = place(tiles, G, STEPS, GROUPS)
    t = first + tl.arange(0, STEPS)
    step, inside = row * L + t, t < L
    begun = tl.cumsum(flags(starts_ptr, step, inside), axis=0)
    documents = tl.max(begun, axis=0)
    taken = inside & (begun == documents) & (flags(padding_ptr, step, inside) == 0)
    mask = taken[:, None, None] & (group < G)[None, :, None]
    x = tl.load(x_ptr + features(step, group, G, WIDTH), mask=mask, other=0).to(WIDE)
    n = tl.sum(taken.to(tl.int32), axis=0)
    values = tl.maximum(n, 1).to(WIDE) * WIDTH
    c = tl.sum(tl.sum(x, axis=2), axis=0) / values
    x = tl.where(mask, x - c[None, :, None], 0)
    # c is off by the roundings of a sum; what they leave is found again, as a small mean.
    rest = tl.sum(tl.sum(x, axis=2), axis=0) / values
    spread = tl.sum(tl.sum(x * x, axis=2), axis=0) / WIDTH - n.to(WIDE) * rest * rest
    at, in_groups = number * G + group, group < G
    tl.store(mean_ptr + at, c.to(tl.float64) + rest.to(tl.float64), mask=in_groups)
    tl.store(spread_ptr + at, spread.to(tl.float64), mask=in_groups)
    if block == 0:
        tl.store(begins_ptr + number, documents)
        tl.store(length_ptr + number, n)


@triton.jit
def _joined(begins1, n1, mean1, w1, begins2, n2, mean2, w2):
    """Two stretches as one: steps, mean, Σ squared deviations from it; the second alone where it begins a document."""
    alone = (begins2 > 0) | (n1 == 0)
    n = n1 + n2
    share = n2 / tl.where(n > 0, n, 1)
    d = mean2 - mean1
    mean = tl.where(alone, mean2, mean1 + share * d)
    w = tl.where(alone, w2, w1 + w2 + d * d * share * n1)
    return begins1 | begins2, tl.where(begins2 > 0, n2, n), mean, w


@triton.jit
def _merge_tiles(
    begins_ptr, length_ptr, mean_ptr, spread_ptr,
    count0_ptr, mean0_ptr, var0_ptr, prior_count_ptr, prior_mean_ptr, prior_var_ptr,
    before_count_ptr, before_mean_ptr, before_var_ptr, final_count_ptr, final_mean_ptr, final_var_ptr, tiles,
    G: tl.constexpr, TILES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """What is known before each tile of a row, and at its end."""
    row, _, _, block, group = place(1, G, 0, GROUPS)
    in_groups, none = group < G, tl.zeros((TILES, GROUPS), tl.float64)
    prior_count, prior_mean, prior_var = known(prior_count_ptr, prior_mean_ptr, prior_var_ptr, 0, group, G)
    count0, mean, var = known(count0_ptr, mean0_ptr, var0_ptr, row, group, G)
    count = count0 + tl.zeros((GROUPS,), tl.float64)
    start = row * tiles * G + group
    if block == 0:
        tl.store(before_count_ptr + row * tiles, count0.to(tl.int64))
    tl.store(before_mean_ptr + start, mean, mask=in_groups)
    tl.store(before_var_ptr + start, var, mask=in_groups)
    for first in range(0, tiles, TILES):
        k = first + tl.arange(0, TILES)
        number = row * tiles + k
        inside = (k < tiles)[:, None] & in_groups[None, :]
        at = number[:, None] * G + group[None, :]
        begins = none.to(tl.int32) + tl.load(begins_ptr + number, mask=k < tiles, other=0)[:, None]
        n = none + tl.load(length_ptr + number, mask=k < tiles, other=0)[:, None]
        tile_mean = tl.load(mean_ptr + at, mask=inside, other=0)
        w = tl.load(spread_ptr + at, mask=inside, other=0)
        begins, n, tile_mean, w = tl.associative_scan((begins, n, tile_mean, w), 0, _joined)
        old_count = tl.where(begins > 0, prior_count, count[None, :])
        old_mean = tl.where(begins > 0, prior_mean[None, :], mean[None, :])
        old_var = tl.where(begins > 0, prior_var[None, :], var[None, :])
        _anew, counts, means, w = _joined(0, old_count, old_mean, old_var * old_count, 0, n, tile_mean, w)
        # Without a step nothing moves, not even what carries no weight.
        means = tl.where(n > 0, means, old_mean)
        variances = tl.where(n > 0, w / tl.where(counts > 0, counts, 1), old_var)
        # What is known behind a tile is known before the next.
        onward = k + 1 < tiles
        if block == 0:
            tl.store(before_count_ptr + number + 1, tl.max(counts, axis=1).to(tl.int64), mask=onward)
        tl.store(before_mean_ptr + at + G, means, mask=onward[:, None] & in_groups[None, :])
        tl.store(before_var_ptr + at + G, variances, mask=onward[:, None] & in_groups[None, :])
        # A tile beyond the last has no steps: behind it is the end.
        last = (tl.arange(0, TILES) == TILES - 1)[:, None]
        count = tl.sum(tl.where(last, counts, 0), axis=0)
        mean = tl.sum(tl.where(last, means, 0), axis=0)
        var = tl.sum(tl.where(last, variances, 0), axis=0)
    if block == 0:
        tl.store(final_count_ptr + row, tl.max(count, axis=0).to(tl.int64))
    tl.store(final_mean_ptr + row * G + group, mean, mask=in_groups)
    tl.store(final_var_ptr + row * G + group, var, mask=in_groups)


@triton.jit
def _then(begins1, n1, c1, u1, q1, begins2, n2, c2, u2, q2):
    """Two stretches as one: steps, shift, Σ u, Σ q; the second alone where it begins a document. See the head."""
    alone = (begins2 > 0) | (n1 == 0)
    d = c2 - c1
    u = tl.where(alone, u2, u1 + (u2 + n2 * d))
    q = tl.where(alone, q2, q1 + (q2 + d * (2 * u2 + n2 * d)))
    return begins1 | begins2, tl.where(begins2 > 0, n2, n1 + n2), tl.where(alone, c2, c1), u, q


@triton.jit
def _apply(
    x_ptr, weight_ptr, bias_ptr, starts_ptr, padding_ptr, before_count_ptr, before_mean_ptr, before_var_ptr,
    prior_count_ptr, prior_mean_ptr, prior_var_ptr, y_ptr, mean_ptr, rstd_ptr, count_ptr, L, tiles, eps,
    G: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, GROUPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y, and the statistics up to and including each step."""
    row, number, first, block, group = place(tiles, G, STEPS, GROUPS)
    t = first + tl.arange(0, STEPS)
    step, inside = row * L + t, t < L
    in_groups, start = group < G, flags(starts_ptr, step, inside)
    real = inside & (flags(padding_ptr, step, inside) == 0)
    at = features(step, group, G, WIDTH)
    x = tl.load(x_ptr + at, mask=real[:, None, None] & in_groups[None, :, None], other=0).to(WIDE)
    m = tl.sum(x, axis=2) / WIDTH

    old_count, old_mean, old_var = known(before_count_ptr, before_mean_ptr, before_var_ptr, number, group, G)
    prior_count, prior_mean, prior_var = known(prior_count_ptr, prior_mean_ptr, prior_var_ptr, 0, group, G)
    # (STEPS, 1) and (STEPS, GROUPS): what the document of a step brought into this tile.
    anew = (tl.cumsum(start, axis=0) > 0)[:, None]
    n0 = tl.where(anew, prior_count, old_count)
    mean0, rest0 = split(tl.where(anew, prior_mean[None, :], old_mean[None, :]), WIDE)
    var0 = tl.where(anew, prior_var[None, :], old_var[None, :]).to(WIDE)
    c = tl.where(n0 > 0, mean0, m)
    x -= c[:, :, None]
    none = tl.zeros((STEPS, GROUPS), WIDE)
    n = none + real[:, None].to(WIDE)
    u = tl.where(n > 0, tl.sum(x, axis=2) / WIDTH, none)
    q = tl.where(n > 0, tl.sum(x * x, axis=2) / WIDTH, none)
    begins = none.to(tl.int32) + start[:, None]
    _, n, shift, u, q = tl.associative_scan((begins, n, c, u, q), 0, _then)

    count = n0 + n.to(tl.float64)
    one_of = 1 / tl.where(count > 0, count, 1).to(WIDE)
    # n0 / count, and mean0 - shift; what has no weight is not even looked at.
    share = n0.to(WIDE) * one_of
    d = tl.where(n0 > 0, rest0, 0)
    moved = share * d + u * one_of
    var = tl.where(n0 > 0, share * (var0 + d * d), 0) + q * one_of - moved * moved
    rstd = 1 / tl.sqrt(tl.maximum(var, 0) + eps)
    x = (x + ((c - shift) - moved)[:, :, None]) * rstd[:, :, None]
    in_width = tl.arange(0, WIDTH)
    feature = group[:, None] * WIDTH + in_width[None, :]
    scale = 1 + tl.load(weight_ptr + feature, mask=in_groups[:, None], other=0).to(WIDE)
    bias = tl.load(bias_ptr + feature, mask=in_groups[:, None], other=0).to(WIDE)
    y = tl.where(real[:, None, None], x * scale[None, :, :] + bias[None, :, :], 0)
    written = inside[:, None] & in_groups[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=written[:, :, None])
    stats = step[:, None] * G + group[None, :]
    tl.store(mean_ptr + stats, shift.to(tl.float64) + moved.to(tl.float64), mask=written)
    tl.store(rstd_ptr + stats, rstd, mask=written)
    if block == 0:
        tl.store(count_ptr + step, tl.max(count, axis=1).to(tl.int64), mask=inside)


@triton.jit
def _step_gradients(
    x_ptr, dy_ptr, weight_ptr, mean_ptr, rstd_ptr, count_ptr, step, group, inside, real,
    G: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dy, (x - mean) r, g r, r of some steps and groups; alpha and beta; their shift, and the mean minus it."""
    at, in_groups = features(step, group, G, WIDTH), group < G
    here = real[:, None] & in_groups[None, :]
    stats, known_there = step[:, None] * G + group[None, :], inside[:, None] & in_groups[None, :]
    # Of padded steps too: sums over time pass through their shift, which must be near the others.
    c, rest = split(tl.load(mean_ptr + stats, mask=known_there, other=0), WIDE)
    rstd = tl.load(rstd_ptr + stats, mask=known_there, other=1)
    one_of = 1 / tl.load(count_ptr + step, mask=real, other=1).to(WIDE)[:, None]
    feature = group[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    scale = 1 + tl.load(weight_ptr + feature, mask=in_groups[:, None], other=0).to(WIDE)
    dy = tl.load(dy_ptr + at, mask=here[:, :, None], other=0).to(WIDE)
    x = tl.load(x_ptr + at, mask=here[:, :, None], other=0).to(WIDE)
    normed = ((x - c[:, :, None]) - rest[:, :, None]) * rstd[:, :, None]
    g = dy * scale[None, :, :] * rstd[:, :, None]
    beta = tl.where(here, -0.5 * one_of * rstd * tl.sum(g * normed, axis=2), 0)
    alpha = tl.where(here, -one_of * tl.sum(g, axis=2) - 2 * rest * beta, 0)
    return dy, normed, g, rstd, alpha, beta, c, rest


@triton.jit
def _before(begins1, a1, b1, c1, begins2, a2, b2, c2):
    """A, B, shift at the first step of stretch 2, which 1 follows in time; not over a step where a document begins."""
    alone = begins2 > 0
    a = tl.where(alone, a2, a2 + (a1 + 2 * (c2 - c1) * b1))
    return begins1 | begins2, a, tl.where(alone, b2, b1 + b2), c2


@triton.jit
def _sum_tile_gradients(
    x_ptr, dy_ptr, weight_ptr, mean_ptr, rstd_ptr, count_ptr, starts_ptr, padding_ptr, begins_ptr, a_ptr, b_ptr, c_ptr,
    L, tiles,
    G: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, GROUPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Whether a document begins behind a step of a tile; A and B of the steps before that, by the first step's mean."""
    row, number, first, block, group = place(tiles, G, STEPS, GROUPS)
    t = first + tl.arange(0, STEPS)
    step, inside = row * L + t, t < L
    begun = tl.cumsum(flags(starts_ptr, step, inside & (t > first)), axis=0)
    inside &= begun == 0
    real = inside & (flags(padding_ptr, step, inside) == 0)
    _, _, _, _, alpha, beta, c, _ = _step_gradients(
        x_ptr, dy_ptr, weight_ptr, mean_ptr, rstd_ptr, count_ptr, step, group, inside, real, G, WIDTH, WIDE
    )
    at, in_groups = number * G + group, group < G
    shift = tl.load(mean_ptr + (row * L + first) * G + group, mask=in_groups, other=0).to(WIDE)
    a = tl.sum(tl.where(inside[:, None], alpha + 2 * (shift[None, :] - c) * beta, 0), axis=0)
    tl.store(a_ptr + at, a.to(tl.float64), mask=in_groups)
    tl.store(b_ptr + at, tl.sum(beta, axis=0).to(tl.float64), mask=in_groups)
    tl.store(c_ptr + at, shift.to(tl.float64), mask=in_groups)
    if block == 0:
        tl.store(begins_ptr + number, tl.max(flags(starts_ptr, step + 1, t + 1 < L), axis=0))


@triton.jit
def _merge_tile_gradients(
    starts_ptr, begins_ptr, a_ptr, b_ptr, c_ptr, count0_ptr, mean0_ptr, var0_ptr, final_count_ptr, final_mean_ptr,
    dmean_ptr, dvar_ptr, behind_a_ptr, behind_b_ptr, behind_c_ptr, dmean0_ptr, dvar0_ptr, L, tiles,
    G: tl.constexpr, TILES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """A, B, shift of what comes behind each tile of a row, from the last; the gradients of the first mean and var."""
    row, _, _, _, group = place(1, G, 0, GROUPS)
    in_groups, none = group < G, tl.zeros((TILES, GROUPS), tl.float64)
    own = row * G + group
    # The final statistics are those of the last step.
    one_of = 1 / tl.maximum(tl.load(final_count_ptr + row), 1).to(tl.float64)
    c = tl.load(final_mean_ptr + own, mask=in_groups, other=0)
    a = tl.load(dmean_ptr + own, mask=in_groups, other=0).to(tl.float64) * one_of
    b = tl.load(dvar_ptr + own, mask=in_groups, other=0).to(tl.float64) * one_of
    end = (row * tiles + tiles - 1) * G + group
    tl.store(behind_a_ptr + end, a, mask=in_groups)
    tl.store(behind_b_ptr + end, b, mask=in_groups)
    tl.store(behind_c_ptr + end, c, mask=in_groups)
    for done in range(0, tiles, TILES):
        k = tiles - 1 - done - tl.arange(0, TILES)
        number, inside = row * tiles + k, (k >= 0)[:, None] & in_groups[None, :]
        at = number[:, None] * G + group[None, :]
        begins = none.to(tl.int32) + tl.load(begins_ptr + number, mask=k >= 0, other=0)[:, None]
        tile_a = tl.load(a_ptr + at, mask=inside, other=0)
        tile_b = tl.load(b_ptr + at, mask=inside, other=0)
        tile_c = tl.load(c_ptr + at, mask=inside, other=0)
        begins, tile_a, tile_b, tile_c = tl.associative_scan((begins, tile_a, tile_b, tile_c), 0, _before)
        _anew, all_a, all_b, all_c = _before(0, a[None, :], b[None, :], c[None, :], begins, tile_a, tile_b, tile_c)
        earlier = (k >= 1)[:, None] & in_groups[None, :]
        tl.store(behind_a_ptr + at - G, all_a, mask=earlier)
        tl.store(behind_b_ptr + at - G, all_b, mask=earlier)
        tl.store(behind_c_ptr + at - G, all_c, mask=earlier)
        last = (tl.arange(0, TILES) == TILES - 1)[:, None]
        a = tl.sum(tl.where(last, all_a, 0), axis=0)
        b = tl.sum(tl.where(last, all_b, 0), axis=0)
        c = tl.sum(tl.where(last, all_c, 0), axis=0)
    count0, mean0, _ = known(count0_ptr, mean0_ptr, var0_ptr, row, group, G)
    seen = count0 > 0
    if starts_ptr is not None:
        seen = seen & (tl.load(starts_ptr + row * L).to(tl.int32) == 0)
    tl.store(dmean0_ptr + own, tl.where(seen, count0 * (a + 2 * (mean0 - c) * b), 0), mask=in_groups)
    tl.store(dvar0_ptr + own, tl.where(seen, count0 * b, 0), mask=in_groups)


@triton.jit
def _apply_gradients(
    x_ptr, dy_ptr, weight_ptr, mean_ptr, rstd_ptr, count_ptr, starts_ptr, padding_ptr,
    behind_a_ptr, behind_b_ptr, behind_c_ptr, prior_count_ptr, prior_mean_ptr, prior_var_ptr,
    dx_ptr, dweight_ptr, dbias_ptr, dprior_mean_ptr, dprior_var_ptr, L, tiles,
    G: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, GROUPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dx; a tile's part of the gradients of weight, bias and prior."""
    row, number, first, _, group = place(tiles, G, STEPS, GROUPS)
    t = first + STEPS - 1 - tl.arange(0, STEPS)
    step, inside, in_groups = row * L + t, t < L, group < G
    real = inside & (flags(padding_ptr, step, inside) == 0)
    dy, normed, g, rstd, alpha, beta, c, rest = _step_gradients(
        x_ptr, dy_ptr, weight_ptr, mean_ptr, rstd_ptr, count_ptr, step, group, inside, real, G, WIDTH, WIDE
    )
    own = number * G + group
    feature = own[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    dweight = tl.sum(tl.where(real[:, None, None], dy * normed, 0), axis=0)
    tl.store(dweight_ptr + feature, dweight, mask=in_groups[:, None])
    tl.store(dbias_ptr + feature, tl.sum(dy, axis=0), mask=in_groups[:, None])

    ends = tl.zeros((STEPS, GROUPS), tl.int32) + flags(starts_ptr, step + 1, t + 1 < L)[:, None]
    ends, a, b, _shift = tl.associative_scan((ends, alpha, beta, c), 0, _before)
    behind_a = tl.load(behind_a_ptr + own, mask=in_groups, other=0).to(WIDE)
    behind_b = tl.load(behind_b_ptr + own, mask=in_groups, other=0).to(WIDE)
    behind_c, behind_rest = split(tl.load(behind_c_ptr + own, mask=in_groups, other=0), WIDE)
    d = (c - behind_c[None, :]) - behind_rest[None, :]
    a = tl.where(ends > 0, a, a + (behind_a[None, :] + 2 * d * behind_b[None, :]))
    b = tl.where(ends > 0, b, b + behind_b[None, :])

    level, slope = (a + 2 * rest * b) / WIDTH, 2 * b / (WIDTH * rstd)
    dx = g + level[:, :, None] + normed * slope[:, :, None]
    dx = tl.where(real[:, None, None], dx, 0)
    mask = (inside[:, None] & in_groups[None, :])[:, :, None]
    tl.store(dx_ptr + features(step, group, G, WIDTH), dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if prior_count_ptr is not None:
        prior_count, prior_mean, _ = known(prior_count_ptr, prior_mean_ptr, prior_var_ptr, 0, group, G)
        begins = (flags(starts_ptr, step, inside) > 0)[:, None]
        prior_a = a.to(tl.float64) + 2 * (prior_mean[None, :] - c.to(tl.float64)) * b.to(tl.float64)
        dmean = prior_count * tl.sum(tl.where(begins, prior_a, 0), axis=0)
        dvar = prior_count * tl.sum(tl.where(begins, b.to(tl.float64), 0), axis=0)
        tl.store(dprior_mean_ptr + own, tl.where(prior_count > 0, dmean, 0), mask=in_groups)
        tl.store(dprior_var_ptr + own, tl.where(prior_count > 0, dvar, 0), mask=in_groups)
