"""Chunk attention in row blocks of library matrix products: the CPU path, and any device without Triton.

The tokens are laid out as (rows, chunk), so that one batched product serves all chunks; queries go block by block, each
block only over the keys it may see. Probabilities are computed again in the backward pass instead of being kept.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import pad

from megalodon_kernels.chunk_attention.open_chunk import still_open
from megalodon_kernels.rows import cut

# Queries a block: the block on the diagonal is half wasted, so smaller is less work and more calls.
BLOCK = 128


def chunk_attention_portable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    position: Tensor | None,
    open_k: Tensor,
    open_v: Tensor,
    starts: Tensor | None,
    dropout: float,
    longest: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `megalodon_kernels.chunk_attention`."""
    L, filled = q.shape[1], None if position is None else position % chunk_size
    rows = cut(q, chunk_size, starts, filled)
    packed_q, packed_k, packed_v = rows.pack(q), rows.pack(k), rows.pack(v)
    P = open_k.shape[1]
    if P and filled is not None:
        # Only the first row of each batch row can continue an open chunk; a start on its first token closes that one.
        begins = rows.begins[:, :1]
        past = torch.arange(P, device=q.device) < torch.where(begins, 0, filled[:, None])  # (B, P)
        allowed = pad(past, (0, rows.width), value=True)
        # What is not the past of this row is selected away: a weight of 0 would still let its NaN through.
        old_k, old_v = (torch.where(past[..., None, None], x, 0) for x in (open_k, open_v))
        keys = torch.cat([old_k[:, None], packed_k[:, :1]], dim=2)
        values = torch.cat([old_v[:, None], packed_v[:, :1]], dim=2)
        y = _attend(packed_q[:, :1], keys, values, allowed[:, None], dropout)
        if rows.length.shape[1] > 1:
            body = _attend(packed_q[:, 1:], packed_k[:, 1:], packed_v[:, 1:], None, dropout)
            y = torch.cat([y, body], dim=1)
    else:
        y = _attend(packed_q, packed_k, packed_v, None, dropout)
    return rows.unpack(y, L), *still_open(k, v, chunk_size, filled, open_k, open_v, starts, longest)


def _attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, dropout: float) -> Tensor:
    """(B, R, T, H, ·) -> (B, R, T, H, V); query t sees all keys but the last T-1-t, where `allowed` (B, R, keys)."""
    B, R, T, H, _ = q.shape
    flat = [x.permute(0, 1, 3, 2, 4).flatten(0, 2) for x in (q, k, v)]  # (B·R·H, time, width)
    if allowed is not None:
        allowed = allowed[:, :, None].expand(B, R, H, allowed.shape[-1]).flatten(0, 2)
    y: Tensor = _Attention.apply(*flat, allowed, dropout)  # type: ignore[no-untyped-call]
    return y.view(B, R, H, T, -1).permute(0, 1, 3, 2, 4)


class _Block(NamedTuple):
    """Queries [begin, end) and the keys they may see, [0, keys)."""

    begin: int
    end: int
    keys: int


def _blocks(num_queries: int, num_keys: int) -> list[_Block]:
    past, starts = num_keys - num_queries, range(0, num_queries, BLOCK)
    ends = [min(start + BLOCK, num_queries) for start in starts]
    return [_Block(start, end, past + end) for start, end in zip(starts, ends, strict=True)]


def _weights(q: Tensor, k: Tensor, block: _Block, allowed: Tensor | None) -> Tensor:
    """Softmax of q kᵀ of a block, in float32 or better; exactly 0 where a query may not look."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.bmm(q[:, block.begin : block.end].to(wide), k[:, : block.keys].to(wide).mT)
    size = block.end - block.begin
    later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    scores[..., -size:].masked_fill_(later, float("-inf"))
    if allowed is not None:
        scores.masked_fill_(~allowed[:, None, : block.keys], float("-inf"))
    return scores.softmax(-1)


class _Attention(torch.autograd.Function):
    """Backward: dP = dy vᵀ (dropped and scaled as P), dS = P (dP - rowsum(dP P)), dq = dS k, dk = dSᵀ q, dv = Pᵀ dy."""

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, dropout: float) -> Tensor:
        y = v.new_empty(*q.shape[:2], v.shape[-1])
        kept = []
        for block in _blocks(q.shape[1], k.shape[1]):
            weights = _weights(q, k, block, allowed)
            if dropout:
                keep = torch.rand_like(weights) >= dropout
                weights = torch.where(keep, weights / (1 - dropout), 0.0)
                kept.append(keep)
            y[:, block.begin : block.end] = torch.bmm(weights.to(v.dtype), v[:, : block.keys])
        ctx.save_for_backward(q, k, v, *kept)
        ctx.allowed, ctx.dropout = allowed, dropout  # type: ignore[attr-defined]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, *kept = ctx.saved_tensors  # type: ignore[attr-defined]
        allowed, dropout = ctx.allowed, ctx.dropout  # type: ignore[attr-defined]
        wide = torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k, dtype=wide), torch.empty_like(v, dtype=wide)
        # From the last block, which sees every key and so leaves no gradient to set to zero before.
        for i, block in reversed(list(enumerate(_blocks(q.shape[1], k.shape[1])))):
            own, seen = slice(block.begin, block.end), slice(0, block.keys)
            weights = used = _weights(q, k, block, allowed)
            d_weights = torch.bmm(dy[:, own], v[:, seen].mT).to(wide)
            if dropout:
                d_weights = torch.where(kept[i], d_weights / (1 - dropout), 0.0)
                used = torch.where(kept[i], weights / (1 - dropout), 0.0)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, wide)
            dq[:, own] = torch.bmm(d_scores, k[:, seen].to(wide))
            add = block.keys < k.shape[1]
            _put_product(dk[:, seen], d_scores.mT, q[:, own].to(wide), add)
            _put_product(dv[:, seen], used.mT.to(dy.dtype), dy[:, own], add)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


def _put_product(total: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """total = a b, or total += a b; in one pass where the dtypes agree."""
    if a.dtype != total.dtype:
        product = torch.bmm(a, b)
        total.add_(product) if add else total.copy_(product)
    elif add:
        total.baddbmm_(a, b)
    else:
        torch.bmm(a, b, out=total)
