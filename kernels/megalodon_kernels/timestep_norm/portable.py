"""TimestepNorm by shifted float64 sums over time: the CPU path, and any device without Triton.

Per step and group only two numbers matter, the mean m and the variance s of its features. With a shift c near the data
(the old mean, or the first m) and n = count, every document by itself:

    mean_t = c + [n_0 (mean_0 - c) + Σ_{i≤t} (m_i - c)] / n_t
    var_t  = [n_0 var_0 + Σ_{i≤t} (s_i + (n_i - 1)/n_i · (m_i - mean_{i-1})²)] / n_t

All terms of the second sum are ≥ 0: nothing cancels. Never E[x²] - E[x]², never differences of prefix sums.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megalodon_kernels.timestep_norm.statistics import Statistics, no_statistics


def timestep_norm_portable(
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
    B, L, _ = x.shape
    fresh = (prior or no_statistics(num_groups, x.device)).over(B)
    past = state or fresh
    # The documents of the batch one behind the other, each with the statistics it begins with.
    sizes, begins = _documents(starts, B, L)
    owner = torch.tensor([b for b, _ in begins], device=x.device)
    new = torch.tensor([is_new for _, is_new in begins], device=x.device)
    count0 = torch.where(new, fresh.count[owner], past.count[owner])
    mean0 = torch.where(new[:, None], fresh.mean[owner].double(), past.mean[owner].double())
    var0 = torch.where(new[:, None], fresh.var[owner].double(), past.var[owner].double())
    if padding is not None:
        x = x.masked_fill(padding[..., None], 0)  # by selection, so that nothing of a padded step is ever read
    valid = None if padding is None else ~padding.flatten()
    steps = torch.ones(B * L, dtype=torch.int64, device=x.device) if valid is None else valid.long()
    count = torch.cat([n + piece.cumsum(0) for n, piece in zip(count0, steps.split(sizes), strict=True)])

    y, mean, var = _TimestepNorm.apply(  # type: ignore[no-untyped-call]
        x.flatten(0, 1), weight, bias, mean0, var0, count0, count, valid, sizes, num_groups, eps
    )
    last = torch.tensor([b for b, _ in begins[1:]] + [B], device=x.device) != owner  # the last document of each row
    ends = (torch.tensor(sizes, device=x.device).cumsum(0) - 1)[last]
    moved = (count[ends] > count0[last])[:, None]
    mean, var = torch.where(moved, mean[last], mean0[last]), torch.where(moved, var[last], var0[last])
    return y.view(x.shape), Statistics(count[ends], mean, var)


def _documents(starts: Tensor | None, B: int, L: int) -> tuple[list[int], list[tuple[int, bool]]]:
    """Lengths of the runs without a start inside, row after row; for each its row and whether it begins a document."""
    if starts is None:
        return [L] * B, [(b, False) for b in range(B)]
    first = starts.clone()
    first[:, 0] = True
    where = first.flatten().nonzero().flatten().tolist()
    is_new = starts.flatten()[where].tolist()
    bounds = [*where, B * L]
    sizes = [b - a for a, b in pairwise(bounds)]
    return sizes, [(at // L, new) for at, new in zip(where, is_new, strict=True)]


def _sums(values: Tensor, sizes: list[int], reverse: bool = False) -> Tensor:
    """Running sums over time inside each document; from its end if `reverse`."""
    if reverse:
        return torch.cat([piece.flip(0).cumsum(0).flip(0) for piece in values.split(sizes)])
    return torch.cat([piece.cumsum(0) for piece in values.split(sizes)])


class _TimestepNorm(torch.autograd.Function):
    """Backward, with r = 1/sqrt(var_t + eps), g = dy (1 + weight), sums over the features of a group:

    a_t = -r Σ g,  b_t = -r³/2 Σ g (x - mean_t);   a, b of the last step += the gradients of the final mean, var
    A_t = Σ_{i≥t} (a_i - 2 (mean_i - c) b_i) / n_i,   B_t = Σ_{i≥t} b_i / n_i
    dx  = g r + [A_t + 2 (x - c) B_t] / size of a group
    dmean_0 = n_0 (A_first + 2 (mean_0 - c) B_first),  dvar_0 = n_0 B_first
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean0: Tensor,
        var0: Tensor,
        count0: Tensor,
        count: Tensor,
        valid: Tensor | None,
        sizes: list[int],
        num_groups: int,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        T, D = x.shape
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        groups = wide.view(T, num_groups, D // num_groups)
        m = groups.mean(-1)
        s = (groups - m[..., None]).square().mean(-1).double()
        m = m.double()
        size, n = torch.tensor(sizes, device=x.device), count.double()[:, None]
        first = size.cumsum(0) - size

        def each(values: Tensor) -> Tensor:
            """A value of each document, at each of its steps."""
            return values.repeat_interleave(size, dim=0)

        old = count0[:, None] > 0
        mean0, var0 = torch.where(old, mean0, 0.0), torch.where(old, var0, 0.0)
        if valid is not None:
            # The shift of a document without a past is its first m: that of its first step which is not padded.
            order = torch.arange(T, device=x.device).masked_fill(~valid, T)
            first_real = torch.stack([piece.min() for piece in order.split(sizes)])
            c = torch.where(old, mean0, m[first_real.clamp(max=T - 1)])
        else:
            c = torch.where(old, mean0, m[first])
        n0 = count0.double()[:, None]
        shift, new = each(c), m - each(c)
        if valid is not None:
            new = torch.where(valid[:, None], new, 0.0)
        n_safe = n.clamp(min=1)
        mean = shift + (each(n0 * (mean0 - c)) + _sums(new, sizes)) / n_safe
        before = mean.roll(1, 0)
        before[first] = c
        spread = s + (n - 1) / n_safe * (m - before).square()
        if valid is not None:
            spread = torch.where(valid[:, None], spread, 0.0)
        var = (each(n0 * var0) + _sums(spread, sizes)) / n_safe
        rs = torch.rsqrt(var + eps)
        centre, scale = mean.to(wide.dtype)[..., None], rs.to(wide.dtype)[..., None]
        normed = ((groups - centre) * scale).view(T, D)
        y = torch.addcmul(bias.to(wide.dtype), normed, 1 + weight.to(wide.dtype))
        if valid is not None:
            y = y.masked_fill(~valid[:, None], 0)
        ends = first + size - 1
        ctx.save_for_backward(x, weight, bias, mean, rs, c, mean0, count0, count, *(() if valid is None else (valid,)))
        ctx.sizes = sizes  # type: ignore[attr-defined]
        return y.to(x.dtype), mean[ends], var[ends]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor, dmean: Tensor, dvar: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rs, c, mean0, count0, count, *rest = ctx.saved_tensors  # type: ignore[attr-defined]
        sizes: list[int] = ctx.sizes  # type: ignore[attr-defined]
        (T, D), G = x.shape, mean.shape[1]
        wide = torch.promote_types(x.dtype, torch.float32)
        dy = dy.to(wide)
        if rest:
            dy = dy.masked_fill(~rest[0][:, None], 0)
        groups = x.to(wide).view(T, G, D // G)
        scale = rs.to(wide)[..., None]
        normed = ((groups - mean.to(wide)[..., None]) * scale).view(T, D)
        d_weight, d_bias = (dy * normed).sum(0), dy.sum(0)
        g = (dy * (1 + weight.to(wide))).view(T, G, D // G)
        a = -rs * g.sum(-1).double()
        b = -0.5 * rs.square() * (g * normed.view_as(g)).sum(-1).double()
        size = torch.tensor(sizes, device=x.device)
        ends = size.cumsum(0) - 1
        a[ends] += dmean
        b[ends] += dvar
        shift = c.repeat_interleave(size, dim=0)
        n = count.double()[:, None].clamp(min=1)
        A = _sums((a - 2 * (mean - shift) * b) / n, sizes, reverse=True)
        B = _sums(b / n, sizes, reverse=True)
        n0, first = count0.double()[:, None], ends - size + 1
        d_mean0 = n0 * (A[first] + 2 * (mean0 - c) * B[first])
        d_var0 = n0 * B[first]
        if rest:
            A, B = (torch.where(rest[0][:, None], piece, 0.0) for piece in (A, B))
        # A + 2 (x - c) B regrouped around the mean, which is near x: two small float32 terms instead of two large ones.
        width = D // G
        level = ((A + 2 * (mean - shift) * B) / width).to(wide)[..., None]
        slope = (2 / width * B).to(wide)[..., None]
        dx = g * scale + level + (groups - mean.to(wide)[..., None]) * slope
        return (
            dx.view(T, D).to(x.dtype),
            d_weight.to(weight.dtype),
            d_bias.to(bias.dtype),
            d_mean0,
            d_var0,
            *(None,) * 6,
        )
