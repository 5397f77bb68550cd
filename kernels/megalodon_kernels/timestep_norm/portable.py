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

from megalodon_kernels.rows import features_first, features_last
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
        x, weight, bias, mean0, var0, count0, count, valid, sizes, num_groups, eps
    )
    last = torch.tensor([b for b, _ in begins[1:]] + [B], device=x.device) != owner  # the last document of each row
    ends = (torch.tensor(sizes, device=x.device).cumsum(0) - 1)[last]
    moved = (count[ends] > count0[last])[:, None]
    mean, var = torch.where(moved, mean[last], mean0[last]), torch.where(moved, var[last], var0[last])
    return y, Statistics(count[ends], mean, var)


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
    """Running sums of (G, T) over time inside each document; from its end if `reverse`."""
    if reverse:
        return torch.cat([piece.flip(1).cumsum(1).flip(1) for piece in values.split(sizes, dim=1)], dim=1)
    return torch.cat([piece.cumsum(1) for piece in values.split(sizes, dim=1)], dim=1)


class _Documents:
    """The documents of a batch one behind the other: T tokens in all."""

    def __init__(self, sizes: list[int], device: torch.device) -> None:
        self.sizes = sizes
        self.size = torch.tensor(sizes, device=device)
        self.last = self.size.cumsum(0) - 1
        self.first = self.last - self.size + 1

    def each(self, values: Tensor) -> Tensor:
        """A value of each document, at each of its steps: (G, documents) -> (G, T), or (G, 1) if there is only one."""
        return values if len(self.sizes) == 1 else values.repeat_interleave(self.size, dim=1)


def _channels_first(x: Tensor, dtype: torch.dtype, num_groups: int) -> Tensor:
    """(B, L, D) -> (G, D/G, B·L) in memory."""
    return features_first(x).to(dtype).view(num_groups, -1, x.shape[0] * x.shape[1])


class _TimestepNorm(torch.autograd.Function):
    """Backward, with r = 1/sqrt(var_t + eps), z = (x - mean_t) r, g = dy (1 + weight), sums over a group:

    a_t = -r Σ g,  b_t = -r²/2 Σ g z;   a, b of the last step += the gradients of the final mean, var
    A_t = Σ_{i≥t} (a_i - 2 (mean_i - c) b_i) / n_i,   B_t = Σ_{i≥t} b_i / n_i
    dx  = g r + [A_t + 2 (x - c) B_t] / size of a group
    dmean_0 = n_0 (A_first + 2 (mean_0 - c) B_first),  dvar_0 = n_0 B_first

    Features come first in memory, time last: statistics are sums of whole lines, and CEMA wants its input so.
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
        wide = torch.promote_types(x.dtype, torch.float32)
        documents = _Documents(sizes, x.device)
        groups = _channels_first(x, wide, num_groups)
        m = groups.mean(1)
        z = groups - m[:, None]
        s = z.square().mean(1).double()
        m = m.double()
        mean, var, c = _running(m, s, mean0.T, var0.T, count0, count, valid, documents)
        rs = torch.rsqrt(var + eps)
        torch.sub(groups, mean.to(wide)[:, None], out=z).mul_(rs.to(wide)[:, None])
        w, b = (1 + weight.to(wide)).view(num_groups, -1, 1), bias.to(wide).view(num_groups, -1, 1)
        y = torch.addcmul(b, z, w).view(len(weight), *x.shape[:2])
        if valid is not None:
            y.masked_fill_(~valid.view(x.shape[:2]), 0)
        past = mean0.T, count0, count, *(() if valid is None else (valid,))
        ctx.save_for_backward(z, weight, mean, rs, c, *past)
        ctx.documents, ctx.bias_dtype = documents, bias.dtype  # type: ignore[attr-defined]
        return y.to(x.dtype).permute(1, 2, 0), mean[:, documents.last].T, var[:, documents.last].T

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor, dmean: Tensor, dvar: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, mean, rs, c, mean0, count0, count, *rest = ctx.saved_tensors  # type: ignore[attr-defined]
        documents: _Documents = ctx.documents  # type: ignore[attr-defined]
        (G, width, _), dtype = z.shape, dy.dtype
        if rest:
            dy = dy.masked_fill(~rest[0].view((*dy.shape[:2], 1)), 0)
        shape = dy.permute(2, 0, 1).shape
        dy = _channels_first(dy, z.dtype, G)
        w = (1 + weight.to(z.dtype)).view(G, width, 1)
        product = dy * z
        d_weight, d_bias = product.sum(-1), dy.sum(-1)
        a = -rs * torch.bmm(w.mT, dy)[:, 0]
        b = -0.5 * rs.square() * torch.bmm(w.mT, product)[:, 0]
        a[:, documents.last] += dmean.T
        b[:, documents.last] += dvar.T
        old, n = documents.each(c), count.clamp(min=1)
        A = _sums((a - 2 * (mean - old) * b) / n, documents.sizes, reverse=True)
        B = _sums(b / n, documents.sizes, reverse=True)
        first = documents.first
        d_mean0 = count0 * (A[:, first] + 2 * (mean0 - c) * B[:, first])
        d_var0 = count0 * B[:, first]
        if rest:
            A, B = (torch.where(rest[0], piece, 0.0) for piece in (A, B))
        # A + 2 (x - c) B regrouped around the mean, which is near x: two small float32 terms instead of two large ones.
        level = ((A + 2 * (mean - old) * B) / width).to(z.dtype)
        slope = (2 / width * B / rs).to(z.dtype)
        dx = (dy * w).mul_(rs.to(z.dtype)[:, None]).addcmul_(z, slope[:, None]).add_(level[:, None])
        return (
            features_last(dx.to(dtype).view(shape)),
            d_weight.flatten().to(weight.dtype),
            d_bias.flatten().to(ctx.bias_dtype),  # type: ignore[attr-defined]
            d_mean0.T,
            d_var0.T,
            *(None,) * 6,
        )


def _running(
    m: Tensor,
    s: Tensor,
    mean0: Tensor,
    var0: Tensor,
    count0: Tensor,
    count: Tensor,
    valid: Tensor | None,
    documents: _Documents,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance so far at every step, (G, T), and the shift c of every document, (G, documents); float64."""
    old = count0 > 0
    mean0, var0 = torch.where(old, mean0, 0.0), torch.where(old, var0, 0.0)
    first = documents.first
    if valid is not None:
        # The shift of a document without a past is its first m: that of its first step which is not padded.
        T = len(valid)
        order = torch.arange(T, device=valid.device).masked_fill(~valid, T)
        first = torch.stack([piece.min() for piece in order.split(documents.sizes)]).clamp(max=T - 1)
    c = torch.where(old, mean0, m[:, first])
    shift, n = documents.each(c), count.double().clamp(min=1)
    new = m - shift
    if valid is not None:
        new = torch.where(valid, new, 0.0)
    mean = shift + (documents.each(count0 * (mean0 - c)) + _sums(new, documents.sizes)) / n
    before = mean.roll(1, 1)
    before[:, documents.first] = c
    spread = torch.addcmul(s, (n - 1) / n, (m - before).square_())
    if valid is not None:
        spread = torch.where(valid, spread, 0.0)
    return mean, (documents.each(count0 * var0) + _sums(spread, documents.sizes)) / n, c
