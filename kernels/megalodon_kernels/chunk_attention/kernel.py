"""Chunk attention in Triton: weights by tiles, kept for a moment in memory, then products of them with wide values.

Values are 2,048 wide at 7B. An output tile of that width does not fit into registers, and a kernel of the flash kind
would form the scores anew for every slice of the values: 8192 FLOP a pair of query and key with slices of 256. So the
weights are stored. With r the gate, o = P v, y = silu(r) o, a pair takes

    forward   5120 FLOP   lse = log Σ exp(q kᵀ)  ->  P = exp(q kᵀ - lse)  ->  o = P v, y
    backward  9728 FLOP   do = dy silu(r),  dr = dy o σ(r)(1 + r (1 - σ(r))),  delta = rowsum(do o)
                          P again,  dS = P (do vᵀ - delta)  ->  dq = dS k,  dk = dSᵀ q,  dv = Pᵀ do

Kept for the backward: q, k, v, r, o, lse. P and dS live for one slab of the work: the column of key j is j mod RING,
where RING is a multiple of the tile that no tile of queries reaches beyond, so every tile lies in one piece. dk and dv
are sums in registers over all queries of a chunk, in order: no atomics, the same bits every time.

Scores are selected one by one, so a NaN among them stays where it is. In a product it would spread through 0 · NaN to
all rows of a tile: there a tile goes chunk by chunk ("runs"), and reads no operand of another chunk.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megalodon_kernels.chunk_attention.joined import chunks, join
from megalodon_kernels.chunk_attention.open_chunk import still_open
from megalodon_kernels.dispatch import INTERPRETED
from megalodon_kernels.kernel_math import accumulator, mdot, sigmoid
from megalodon_kernels.registration import operator

SLAB_BYTES = 128 << 20
"""Weights that lie in memory at a time. The forward keeps to it; the backward takes at least one head of one sequence,
whose P and dS in bf16 are a little more than 4 L C bytes."""
ELEMENTS = 2048
"""Values of dy that a program of the gate's backward holds: eight for each thread, a bf16 load of 16 bytes."""
_LOG2_E = tl.constexpr(1.4426950408889634)


class Tiles(NamedTuple):
    """`tile` queries by `keys` keys of P; `tile` queries or keys by `columns` of an output; `step` terms at a time.

    `lse_step` is `step` in the log-sum-exp, which goes over the same queries for every tile of keys.
    """

    tile: int
    keys: int
    lse_step: int
    columns: int
    step: int
    warps: int
    stages: int


def tiles(dtype: torch.dtype) -> Tiles:
    """The tile sizes for operands of `dtype`, as compiled for sm_90 (tests/kernels/sm90.py)."""
    if INTERPRETED:
        return Tiles(tile=64, keys=64, lse_step=32, columns=16, step=32, warps=4, stages=1)
    if dtype == torch.bfloat16:
        # All 256 features of the queries stay in shared memory for the log-sum-exp (192 KiB with two stages of keys).
        # 128 x 256 sums take 128 registers of each of 256 threads; three stages of operands 144 KiB.
        return Tiles(tile=128, keys=256, lse_step=256, columns=256, step=64, warps=8, stages=3)
    # Three tf32 products need the high and the low parts of both operands.
    return Tiles(tile=64, keys=64, lse_step=32, columns=128, step=32, warps=8, stages=2)


def chunk_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    position: Tensor | None,
    open_k: Tensor,
    open_v: Tensor,
    starts: Tensor | None,
    gate: Tensor | None,
    dropout: float,
    longest: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `megalodon_kernels.chunk_attention`; dropout is 0."""
    B, L = q.shape[:2]
    filled = torch.zeros(B, dtype=torch.int64, device=q.device) if position is None else position % chunk_size
    # What lies behind C - 1 slots can belong to no open chunk.
    past_k, past_v = open_k[:, : chunk_size - 1], open_v[:, : chunk_size - 1]
    begin, end = chunks(filled, starts, chunk_size, past_k.shape[1], L)
    keys, values = join(past_k, k, filled), join(past_v, v, filled)
    y: Tensor = _Attention.apply(q, keys, values, gate, begin, end, chunk_size)  # type: ignore[no-untyped-call]
    return y, *still_open(k, v, chunk_size, filled, open_k, open_v, starts, longest)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor | None,
        begin: Tensor,
        end: Tensor,
        chunk_size: int,
    ) -> Tensor:
        q, k, v, gate = q.contiguous(), k.contiguous(), v.contiguous(), None if gate is None else gate.contiguous()
        y, mixed, lse = attention_forward(q, k, v, gate, begin, end, chunk_size)
        ctx.save_for_backward(q, k, v, gate, y if gate is None else mixed, lse, begin, end)  # type: ignore[arg-type]
        ctx.chunk_size = chunk_size  # type: ignore[attr-defined]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, gate, mixed, lse, begin, end = ctx.saved_tensors  # type: ignore[attr-defined]
        chunk_size = ctx.chunk_size  # type: ignore[attr-defined]
        dq, dk, dv, d_gate = attention_backward(dy.contiguous(), q, k, v, gate, mixed, lse, begin, end, chunk_size)
        return dq, dk, dv, None if gate is None else d_gate, None, None, None


class _Slab(NamedTuple):
    """Some of the work: `size` tiles of queries from number `first` on, tile by tile, head by head, row by row."""

    first: int
    size: int
    tiles_a_head: int
    ring: int


def _slabs(q: Tensor, num_slots: int, chunk_size: int, t: Tiles, bytes_a_weight: int, whole: bool) -> Iterator[_Slab]:
    """Cut the tiles of queries so that the weights of a slab take SLAB_BYTES, `whole` heads at a time or not."""
    B, L, H, _ = q.shape
    # A tile of queries sees keys from C - 1 before its first to its last, and these from one border of tiles on.
    ring = t.keys * triton.cdiv(min(chunk_size + t.tile + t.keys - 2, num_slots), t.keys)
    tiles_a_head = triton.cdiv(L, t.tile)
    unit = tiles_a_head if whole else 1
    size = unit * max(1, SLAB_BYTES // (unit * t.tile * ring * bytes_a_weight))
    total = B * H * tiles_a_head
    for first in range(0, total, size):
        yield _Slab(first, min(size, total - first), tiles_a_head, ring)


def _weights(q: Tensor, k: Tensor, dtype: torch.dtype, lse: Tensor, begin: Tensor, slab: _Slab) -> Tensor:
    """P of a slab in `dtype`: (queries, ring), undefined where no query of a tile sees a key of the tile."""
    (_, L, H, Z), S, t = q.shape, k.shape[1], tiles(torch.promote_types(q.dtype, dtype))
    weights = q.new_empty(slab.size * t.tile, slab.ring, dtype=dtype)
    _score[(slab.ring // t.keys, slab.size)](
        q, k, lse, begin, weights, L, S, slab.ring, slab.tiles_a_head, slab.first,
        H, Z, t.tile, t.keys, t.step, accumulator(q.dtype), num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return weights


@operator("chunk_attention_forward")
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, begin: Tensor, end: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """All contiguous -> y (B, L, H, V) like v, y before the gate (empty without one), lse (B, L, H) in base 2.

    q (B, L, H, Z), k (B, S, H, Z), v (B, S, H, V), gate (B, L, H, V), begin and end (B, S): see `joined.py`.
    """
    (B, L, H, Z), S, V = q.shape, k.shape[1], v.shape[-1]
    t, wide = tiles(torch.promote_types(q.dtype, v.dtype)), accumulator(q.dtype)
    y = v.new_empty(B, L, H, V)
    mixed = v.new_empty(0) if gate is None else torch.empty_like(y)
    lse = q.new_empty(B, L, H, dtype=_wide(q))
    step = min(t.lse_step, _block(Z)) if t.lse_step >= Z else t.step
    _log_sum_exp[(triton.cdiv(L, t.tile), B * H)](
        q, k, begin, lse, L, S, H, Z, t.tile, step, wide, num_warps=t.warps, num_stages=2
    )
    for slab in _slabs(q, S, chunk_size, t, v.itemsize, whole=False):
        weights = _weights(q, k, v.dtype, lse, begin, slab)
        columns = min(t.columns, _block(V))
        _mix[(triton.cdiv(V, columns), slab.size)](
            weights, v, gate, begin, end, y, mixed, L, S, slab.ring, slab.tiles_a_head, slab.first,
            H, V, t.tile, columns, t.step, wide, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return y, mixed, lse


@attention_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, begin: Tensor, end: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    y = v.new_empty(*q.shape[:3], v.shape[-1])
    mixed = v.new_empty(0) if gate is None else torch.empty_like(y)
    return y, mixed, q.new_empty(q.shape[:3], dtype=_wide(q))


@operator("chunk_attention_backward")
def attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    mixed: Tensor,
    lse: Tensor,
    begin: Tensor,
    end: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the forward took and gave, `mixed` being y without a gate -> dq, dk, dv, dgate (empty without a gate)."""
    (B, L, H, Z), S, V = q.shape, k.shape[1], v.shape[-1]
    t, wide = tiles(torch.promote_types(q.dtype, v.dtype)), accumulator(q.dtype)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    d_gate, d_mixed = (v.new_empty(0), dy) if gate is None else (torch.empty_like(gate), torch.empty_like(dy))
    delta = torch.empty_like(lse)
    block = triton.next_power_of_2(V)
    rows = max(1, ELEMENTS // block)
    _ungate[(triton.cdiv(B * L * H, rows),)](
        dy, mixed, gate, d_mixed, d_gate, delta, B * L * H, V, block, rows, wide, num_warps=8
    )
    for slab in _slabs(q, S, chunk_size, t, v.itemsize + q.itemsize, whole=True):
        weights = _weights(q, k, v.dtype, lse, begin, slab)
        d_scores = torch.empty_like(weights, dtype=q.dtype)
        _d_score[(slab.ring // t.keys, slab.size)](
            d_mixed, v, weights, delta, begin, d_scores, L, S, slab.ring, slab.tiles_a_head, slab.first,
            H, V, t.tile, t.keys, t.step, wide, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
        columns = min(t.columns, _block(Z))
        _mix[(triton.cdiv(Z, columns), slab.size)](
            d_scores, k, None, begin, end, dq, None, L, S, slab.ring, slab.tiles_a_head, slab.first,
            H, Z, t.tile, columns, t.step, wide, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
        heads, first_head = slab.size // slab.tiles_a_head, slab.first // slab.tiles_a_head
        for summands, x, out, width in ((d_scores, q, dk, Z), (weights, d_mixed, dv, V)):
            columns = min(t.columns, _block(width))
            _collect[(triton.cdiv(width, columns), triton.cdiv(S, t.tile), heads)](
                summands, x, begin, end, out, L, S, slab.ring, slab.tiles_a_head, first_head,
                H, width, t.tile, columns, t.step, wide, num_warps=t.warps, num_stages=t.stages,
            )  # fmt: skip
    return dq, dk, dv, d_gate


@attention_backward.register_fake
def _(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    mixed: Tensor,
    lse: Tensor,
    begin: Tensor,
    end: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_gate = v.new_empty(0) if gate is None else torch.empty_like(gate)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), d_gate


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _block(width: int) -> int:
    """Columns that hold `width`: a power of two, at least the 16 that a tensor core takes."""
    columns: int = max(16, triton.next_power_of_2(width))
    return columns


@triton.jit
def _inner_products(
    x_ptr, y_ptr, x_row, y_row, x_inside, y_inside,
    WIDTH: tl.constexpr, STRIDE: tl.constexpr,
    TILE: tl.constexpr, KEYS: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Σ_c x[i, c] y[j, c] for TILE rows i and KEYS rows j of two tensors whose rows lie STRIDE apart."""
    total = tl.full((TILE, KEYS), 0, WIDE)
    for c in range(0, WIDTH, STEP):
        column = c + tl.arange(0, STEP)
        real = (column < WIDTH)[None, :]
        x = tl.load(x_ptr + x_row[:, None] * STRIDE + column[None, :], mask=x_inside[:, None] & real, other=0)
        y = tl.load(y_ptr + y_row[:, None] * STRIDE + column[None, :], mask=y_inside[:, None] & real, other=0)
        total = mdot(x, tl.trans(y), total)
    return total


@triton.jit
def _log_sum_exp(
    q_ptr, k_ptr, begin_ptr, lse_ptr, L, S,
    H: tl.constexpr, Z: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """lse (base 2) of a tile of queries, over all its keys from the first to the last."""
    t0 = tl.program_id(0) * TILE
    b, h, P = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H, S - L
    query = t0 + tl.arange(0, TILE)
    inside = query < L
    begin = tl.load(begin_ptr + b * S + P + query, mask=inside, other=0)
    first = tl.load(begin_ptr + b * S + P + t0) // TILE * TILE
    largest = tl.full((TILE,), float("-inf"), WIDE)
    total = tl.full((TILE,), 0, WIDE)
    q_row, k_row = q_ptr + h * Z, k_ptr + h * Z
    for j0 in range(first, P + tl.minimum(t0 + TILE, L), TILE):
        key = j0 + tl.arange(0, TILE)
        score = _inner_products(
            q_row, k_row, b * L + query, b * S + key, inside, key < S, Z, H * Z, TILE, TILE, STEP, WIDE
        )
        score = tl.where(_allowed(query, key, begin, P), score * _LOG2_E, float("-inf"))
        higher = tl.maximum(largest, tl.max(score, axis=1))
        # Before its first key a row has seen nothing: -inf minus -inf would be NaN.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(largest - shift) + tl.sum(tl.exp2(score - shift[:, None]), axis=1)
        largest = higher
    tl.store(lse_ptr + (b * L + query) * H + h, largest + tl.log2(total), mask=inside)


@triton.jit
def _score(
    q_ptr, k_ptr, lse_ptr, begin_ptr, weights_ptr, L, S, RING, tiles_a_head, first_tile,
    H: tl.constexpr, Z: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """P of TILE queries and KEYS keys; 0 where a query may not look."""
    local = tl.program_id(1)
    head, t0 = (first_tile + local) // tiles_a_head, (first_tile + local) % tiles_a_head * TILE
    b, h, P = (head // H).to(tl.int64), head % H, S - L
    j0 = (tl.load(begin_ptr + b * S + P + t0) // KEYS + tl.program_id(0)) * KEYS
    if j0 >= P + tl.minimum(t0 + TILE, L):
        return
    query, key = t0 + tl.arange(0, TILE), j0 + tl.arange(0, KEYS)
    inside = query < L
    score = _inner_products(
        q_ptr + h * Z, k_ptr + h * Z, b * L + query, b * S + key, inside, key < S, Z, H * Z, TILE, KEYS, STEP, WIDE
    )
    begin = tl.load(begin_ptr + b * S + P + query, mask=inside, other=0)
    lse = tl.load(lse_ptr + (b * L + query) * H + h, mask=inside, other=0)
    allowed = _allowed(query, key, begin, P) & inside[:, None]
    weight = tl.where(allowed, tl.exp2(score * _LOG2_E - lse[:, None]), 0.0)
    at = _place(local, j0, RING, TILE, KEYS)
    tl.store(weights_ptr + at, weight.to(weights_ptr.dtype.element_ty))


@triton.jit
def _d_score(
    do_ptr, v_ptr, weights_ptr, delta_ptr, begin_ptr, ds_ptr, L, S, RING, tiles_a_head, first_tile,
    H: tl.constexpr, V: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dS of the same tile, from P."""
    local = tl.program_id(1)
    head, t0 = (first_tile + local) // tiles_a_head, (first_tile + local) % tiles_a_head * TILE
    b, h, P = (head // H).to(tl.int64), head % H, S - L
    j0 = (tl.load(begin_ptr + b * S + P + t0) // KEYS + tl.program_id(0)) * KEYS
    if j0 >= P + tl.minimum(t0 + TILE, L):
        return
    query, key = t0 + tl.arange(0, TILE), j0 + tl.arange(0, KEYS)
    inside = query < L
    d_weight = _inner_products(
        do_ptr + h * V, v_ptr + h * V, b * L + query, b * S + key, inside, key < S, V, H * V, TILE, KEYS, STEP, WIDE
    )
    begin = tl.load(begin_ptr + b * S + P + query, mask=inside, other=0)
    delta = tl.load(delta_ptr + (b * L + query) * H + h, mask=inside, other=0)
    allowed = _allowed(query, key, begin, P) & inside[:, None]
    at = _place(local, j0, RING, TILE, KEYS)
    d_score = tl.load(weights_ptr + at).to(WIDE) * (d_weight - delta[:, None])
    # A weight of 0 would let the NaN of a key of another document through.
    tl.store(ds_ptr + at, tl.where(allowed, d_score, 0.0).to(ds_ptr.dtype.element_ty))


@triton.jit
def _allowed(query, key, begin, P):
    """Whether each query sees each slot: from the beginning of its chunk to itself."""
    return (key[None, :] >= begin[:, None]) & (key[None, :] <= P + query[:, None])


@triton.jit
def _place(local, j0, RING, TILE: tl.constexpr, KEYS: tl.constexpr):
    """Where the weights of tile `local` of a slab and the keys from j0 on are kept."""
    row = local.to(tl.int64) * TILE + tl.arange(0, TILE)
    return row[:, None] * RING + (tl.multiple_of(j0 % RING, KEYS) + tl.arange(0, KEYS))[None, :]


@triton.jit
def _mix(
    weights_ptr, x_ptr, gate_ptr, begin_ptr, end_ptr, out_ptr, mixed_ptr, L, S, RING, tiles_a_head, first_tile,
    H: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out_t = Σ_j weights[t, j] x_j for a tile of queries, run by run; with a gate, silu(gate) times that."""
    local = tl.program_id(1)
    head, t0 = (first_tile + local) // tiles_a_head, (first_tile + local) % tiles_a_head * TILE
    b, h, P = (head // H).to(tl.int64), head % H, S - L
    query, column = t0 + tl.arange(0, TILE), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    real = (column < WIDTH)[None, :]
    row = weights_ptr + (local.to(tl.int64) * TILE + tl.arange(0, TILE))[:, None] * RING
    step = tl.arange(0, STEP)[:, None] * (H * WIDTH) + column[None, :]
    low, stop = t0, tl.minimum(t0 + TILE, L)
    while low < stop:
        begin = tl.load(begin_ptr + b * S + P + low)
        high = tl.minimum(tl.load(end_ptr + b * S + P + low) - P, stop)
        total = tl.full((TILE, COLUMNS), 0, WIDE)
        for j0 in range(begin // STEP * STEP, P + high, STEP):
            weights = tl.load(row + (tl.multiple_of(j0 % RING, STEP) + tl.arange(0, STEP))[None, :])
            key = j0 + tl.arange(0, STEP)
            seen = (key >= begin) & (key < P + high)
            x = tl.load(x_ptr + ((b * S + j0) * H + h) * WIDTH + step, mask=seen[:, None] & real, other=0)
            total = mdot(weights, x, total)
        run = ((query >= low) & (query < high))[:, None] & real
        # Counted from the run, or the compiler would form all addresses ahead of the loop and keep them in registers.
        at, place = ((b * L + low) * H + h) * WIDTH, (query - low)[:, None] * (H * WIDTH) + column[None, :]
        if gate_ptr is not None:
            mixed = total.to(mixed_ptr.dtype.element_ty)
            tl.store(mixed_ptr + at + place, mixed, mask=run)
            gate = tl.load(gate_ptr + at + place, mask=run, other=0).to(WIDE)
            total = mixed.to(WIDE) * gate * sigmoid(gate)
        tl.store(out_ptr + at + place, total.to(out_ptr.dtype.element_ty), mask=run)
        low = high


@triton.jit
def _collect(
    weights_ptr, x_ptr, begin_ptr, end_ptr, out_ptr, L, S, RING, tiles_a_head, first_head,
    H: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out_j = Σ_t weights[t, j] x_t for a tile of keys, run by run."""
    head = first_head + tl.program_id(2)
    b, h, P = (head // H).to(tl.int64), head % H, S - L
    s0 = tl.program_id(1) * TILE
    key, column = s0 + tl.arange(0, TILE), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    real = (column < WIDTH)[None, :]
    first_row = tl.program_id(2).to(tl.int64) * tiles_a_head * TILE
    ring = weights_ptr + (tl.multiple_of(s0 % RING, TILE) + tl.arange(0, TILE))[None, :]
    step = tl.arange(0, STEP)[:, None] * (H * WIDTH) + column[None, :]
    low, stop = s0, tl.minimum(s0 + TILE, S)
    while low < stop:
        end = tl.load(end_ptr + b * S + low)
        high = tl.minimum(end, stop)
        # Queries of this chunk that see its key `low`; none where the slot is empty.
        first, last = tl.maximum(low - P, 0), end - P
        total = tl.full((TILE, COLUMNS), 0, WIDE)
        for t0 in range(first // STEP * STEP, last, STEP):
            query = t0 + tl.arange(0, STEP)
            weights = tl.load(ring + (first_row + query)[:, None] * RING)
            used = (query >= first) & (query < last)
            x = tl.load(x_ptr + ((b * L + t0) * H + h) * WIDTH + step, mask=used[:, None] & real, other=0)
            total = mdot(tl.trans(weights), x, total)
        run = ((key >= low) & (key < high))[:, None] & real
        at, place = ((b * S + low) * H + h) * WIDTH, (key - low)[:, None] * (H * WIDTH) + column[None, :]
        tl.store(out_ptr + at + place, total.to(out_ptr.dtype.element_ty), mask=run)
        low = high


@triton.jit
def _ungate(
    dy_ptr, mixed_ptr, gate_ptr, do_ptr, dgate_ptr, delta_ptr, num_rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """do, dgate and delta of some queries and heads; without a gate, do is dy and only delta is formed."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    real = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    do = tl.load(dy_ptr + at, mask=real, other=0).to(WIDE)
    mixed = tl.load(mixed_ptr + at, mask=real, other=0).to(WIDE)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + at, mask=real, other=0).to(WIDE)
        share = sigmoid(gate)
        d_gate = do * mixed * share * (1 + gate * (1 - share))
        tl.store(dgate_ptr + at, d_gate.to(dgate_ptr.dtype.element_ty), mask=real)
        # Rounded as the products will read it, so that do vᵀ and delta cancel where they should.
        rounded = (do * gate * share).to(do_ptr.dtype.element_ty)
        tl.store(do_ptr + at, rounded, mask=real)
        do = rounded.to(WIDE)
    tl.store(delta_ptr + row, tl.sum(do * mixed, axis=1), mask=row < num_rows)
