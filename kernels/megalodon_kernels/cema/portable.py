"""CEMA by chunked matrix products: the CPU path, and any device without Triton.

A document is cut into rows of T tokens. Inside a row the average is a T×T Toeplitz matrix for each channel; between
rows only the state travels. With k[τ] = Re Σ_n gamma p q^τ (+ omega at τ = 0) and u = Σ_t q^(T-1-t) x_t of a row:

    y = K x + Re Σ_n gamma q^(t+1) h     K[i, j] = k[i - j] for i ≥ j;  h the state before the row
    h ← q^T h + p u                      at the end of a batch row, n ≤ T tokens into its last row, n instead of T

The backward pass is written out. It keeps x and the states between rows, and forms everything else anew; both passes
work span by span, so that what they form stays in the caches. Not here: the powers of q (tables.py), a kernel of length
L.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megalodon_kernels.cema.tables import Sums, Tables, as_complex, as_pairs, power
from megalodon_kernels.rows import Rows, cut, features_first

# Twice the row doubles the work of K and the memory of its table, and halves the loop over rows and the states that are
# kept: as many bytes as x in float32.
ROW = 32
# Tokens and channels whose intermediate values exist at a time. Forward and backward at (1, 4096, 512, 16) on two
# AVX-512 cores: 39 ms so, 44 ms in blocks of 256 channels, 45 ms in spans of 2048 tokens.
SPAN = 8192
CHANNELS = 512


def cema_portable(
    x: Tensor,
    p: Tensor,
    log_decay: Tensor,
    angle: Tensor,
    gamma: Tensor,
    omega: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `megalodon_kernels.cema`."""
    rows = cut(x, ROW, starts)
    y, h = _Cema.apply(x, p, log_decay, angle, gamma, omega, h0, rows)  # type: ignore[no-untyped-call]
    return y, h


class _Cema(torch.autograd.Function):
    """Both passes, block by block of channels, which do not know of each other."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        p: Tensor,
        log_decay: Tensor,
        angle: Tensor,
        gamma: Tensor,
        omega: Tensor,
        h0: Tensor | None,
        rows: Rows,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        state_dtype = wide if h0 is None else h0.dtype
        carry = torch.promote_types(state_dtype, wide)
        packed, end = _pack(x, rows), _End(rows)
        D, B, R, T = packed.shape
        # The states of a row lie together: the scan over rows is one short call a row.
        states = x.new_empty(R + 1, D, B, p.shape[1], dtype=carry.to_complex())
        states[0] = 0 if h0 is None else torch.view_as_complex(h0.to(carry).contiguous()).transpose(0, 1)
        y, h = torch.empty_like(packed), torch.empty_like(states[0])
        for c in _blocks(D, CHANNELS):
            tables = Tables.of(p[c], log_decay[c], angle[c], gamma[c], omega[c], T, wide)
            _forward(packed[c], tables, tables.decay[:, None].to(states.dtype), states[:, c], y[c], rows)
            if end.whole:
                h[c] = states[-1, c]
                continue
            gain = as_complex(torch.bmm(end.tokens(x[..., c], wide), tables.enter))
            h[c] = power(log_decay[c], angle[c], end.length, carry) * end.of_states(states[:, c]) + gain
        ctx.save_for_backward(x, p, log_decay, angle, gamma, omega, states)
        ctx.rows, ctx.state_dtype = rows, state_dtype  # type: ignore[attr-defined]
        ctx.set_materialize_grads(False)
        return _unpack(y, rows, x.shape[1]), torch.view_as_real(h.transpose(0, 1)).to(state_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        x, p, log_decay, angle, gamma, omega, states = ctx.saved_tensors  # type: ignore[attr-defined]
        rows: Rows = ctx.rows  # type: ignore[attr-defined]
        carry, wide = states.real.dtype, torch.promote_types(x.dtype, torch.float32)
        packed, d_packed = _pack(x, rows), _pack(torch.zeros_like(x) if dy is None else dy, rows)
        dx, end = torch.empty_like(packed), _End(rows)
        d_h0, tail = torch.empty_like(states[0]), x.new_empty(x.shape[-1], len(x), rows.width, dtype=wide)
        # (D, B, N); a gradient may lie as autograd expanded it.
        d_final = None if dh is None else torch.view_as_complex(dh.to(carry).contiguous()).transpose(0, 1)
        gradients = []
        for c in _blocks(x.shape[-1], CHANNELS):
            tables = Tables.of(p[c], log_decay[c], angle[c], gamma[c], omega[c], rows.width, wide)
            sums = Sums() if any(ctx.needs_input_grad[1:6]) else None  # type: ignore[attr-defined]
            arriving = None
            if d_final is not None:
                decay, G = power(log_decay[c], angle[c], end.length, carry), d_final[c]
                arriving, pairs = decay.conj() * G, as_pairs(G.contiguous()).to(wide)
                tail[c] = torch.bmm(pairs, tables.enter.mT)
                if sums:
                    sums.add_input(end.tokens(x[..., c], wide), pairs)
                    before = end.of_states(states[:, c])
                    for b, steps in enumerate(end.length.tolist()):
                        sums.add_carry(before[None, :, b], decay[:, b], steps, G[None, :, b])
            decay = tables.decay[:, None].to(states.dtype)
            passed = packed[c], d_packed[c], tables, decay, states[:, c], arriving, end, dx[c], rows, sums
            d_h0[c] = _backward(*passed)
            gradients.append(sums.gradients(p[c], log_decay[c], angle[c], gamma[c]) if sums else (None,) * 5)
        d_x = _unpack(dx, rows, x.shape[1])
        if d_final is not None:
            d_x[:, -rows.width :] += tail.permute(1, 2, 0).masked_fill(end.absent[..., None], 0)
        d_coefficients = (torch.cat(parts) if sums else None for parts in zip(*gradients, strict=True))
        d_state = torch.view_as_real(d_h0.transpose(0, 1)).to(ctx.state_dtype)  # type: ignore[attr-defined]
        return d_x, *d_coefficients, d_state if ctx.needs_input_grad[6] else None, None  # type: ignore[attr-defined]


def _forward(x: Tensor, tables: Tables, decay: Tensor, states: Tensor, y: Tensor, rows: Rows) -> None:
    """From rows x (D, B, R, T) and the first of the states (R + 1, D, B, N): the other states and y, both in place."""
    begins, wide = rows.begins.any(dim=0).tolist(), tables.kernel.dtype
    states[0].masked_fill_(rows.begins[:, 0, None], 0)
    for span in _spans(rows):
        tokens = x[:, :, span].flatten(1, 2).to(wide)
        seen = states[span.start : span.stop + 1]
        seen[1:] = as_complex(torch.bmm(tokens, tables.enter)).unflatten(1, (x.shape[1], -1)).permute(2, 0, 1, 3)
        row = seen.unbind(0)
        for r in range(len(row) - 1):
            row[r + 1].addcmul_(decay, row[r])
            after = span.start + r + 1
            if after < len(begins) and begins[after]:
                row[r + 1].masked_fill_(rows.begins[:, after, None], 0)
        _products(tokens, tables.kernel, _beside_tokens(seen[:-1], wide), tables.leave.mT, y[:, :, span])


def _backward(
    x: Tensor,
    dy: Tensor,
    tables: Tables,
    decay: Tensor,
    states: Tensor,
    arriving: Tensor | None,
    end: "_End",
    dx: Tensor,
    rows: Rows,
    sums: Sums | None,
) -> Tensor:
    """Fill dx and the sums; return the gradient of the first state (D, B, N):

        dh = Σ_t dy_t conj(gamma q^(t+1)) + conj(q^T) G   is the G of the row before, 0 where this row begins a document
        dx = Kᵀ dy + Re Σ_n conj(p q^(T-1-t)) G

    Args:
        arriving: (D, B, N): what the final state adds to that before the last row of each batch row.
    """
    back, begins, wide = decay.conj().resolve_conj(), rows.begins.any(dim=0).tolist(), tables.kernel.dtype
    ends, first = end.row.tolist(), torch.zeros_like(states[0])
    for span in reversed(_spans(rows)):
        d_out = dy[:, :, span].flatten(1, 2).to(wide)
        # Of the state before each row of the span, and behind it that of the state after the last one.
        G = torch.empty_like(states[span.start : span.stop + 1])
        G[:-1] = as_complex(torch.bmm(d_out, tables.leave)).unflatten(1, (x.shape[1], -1)).permute(2, 0, 1, 3)
        G[-1] = first
        if arriving is not None:
            for b, last in enumerate(ends):
                if span.start <= last < span.stop:
                    G[last - span.start, :, b] += arriving[:, b]
        row = G.unbind(0)
        for r in reversed(range(len(row) - 1)):
            row[r].addcmul_(back, row[r + 1])
            if begins[span.start + r]:
                row[r].masked_fill_(rows.begins[:, span.start + r, None], 0)
        first, behind = row[0], _beside_tokens(G[1:], wide)
        _products(d_out, tables.kernel.mT, behind, tables.enter.mT, dx[:, :, span])
        if sums:
            tokens, h = x[:, :, span].flatten(1, 2).to(wide), states[span]
            sums.add_output(tokens, d_out, _beside_tokens(h, wide))
            sums.add_input(tokens, behind)
            h_rows, G_rows = (z.transpose(1, 2).flatten(0, 1) for z in (h, G[1:]))
            sums.add_carry(h_rows, decay[:, 0], rows.width, G_rows)
    return first


def _products(tokens: Tensor, kernel: Tensor, states: Tensor, table: Tensor, out: Tensor) -> None:
    """tokens kernel + states table, into `out` (D, B, R, T): with no copy where that is one piece of the same dtype."""
    if out.is_contiguous() and out.dtype == tokens.dtype:
        torch.bmm(tokens, kernel, out=out.flatten(1, 2)).baddbmm_(states, table)
    else:
        out.copy_(torch.bmm(tokens, kernel).baddbmm_(states, table).view(out.shape))


def _beside_tokens(states: Tensor, dtype: torch.dtype) -> Tensor:
    """States of rows (R, D, B, N), laid out as the tokens of these rows are: pairs (D, B·R, 2N) in `dtype`."""
    return as_pairs(states.permute(1, 2, 0, 3).contiguous()).flatten(1, 2).to(dtype)


class _End:
    """The last row of each batch row, which may be short.

    Shapes:
        row, length: (B,) int64: which row it is, tokens in it.
        absent: (B, T) bool: where no token is once they are moved to the right end of the row.
        whole: every batch row ends with its last row, and that is full.
    """

    def __init__(self, rows: Rows) -> None:
        self.row = (rows.length > 0).sum(1) - 1
        length = rows.length.gather(1, self.row[:, None])
        self.length = length[:, 0]
        self.absent = torch.arange(rows.width, device=length.device) < rows.width - length
        self.whole = bool((rows.length[:, -1] == rows.width).all())

    def of_states(self, states: Tensor) -> Tensor:
        """The states before these rows: (R + 1, D, B, N) -> (D, B, N)."""
        return states[self.row, :, torch.arange(len(self.row), device=states.device)].transpose(0, 1)

    def tokens(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Their tokens, zeros before them: (B, L, D) -> (D, B, T)."""
        tail = x[:, -self.absent.shape[1] :].masked_fill(self.absent[..., None], 0)
        return tail.permute(2, 0, 1).contiguous().to(dtype)


def _blocks(size: int, block: int) -> list[slice]:
    return [slice(i, min(i + block, size)) for i in range(0, size, block)]


def _spans(rows: Rows) -> list[slice]:
    B, R = rows.length.shape
    return _blocks(R, max(1, SPAN // (B * rows.width)))


def _pack(x: Tensor, rows: Rows) -> Tensor:
    """(B, L, D) -> (D, B, R, T) in memory, which costs no copy where x lies so and no row is short."""
    B, R = rows.length.shape
    return features_first(rows.pack(x).flatten(1, 2)).view(-1, B, R, rows.width)


def _unpack(x: Tensor, rows: Rows, length: int) -> Tensor:
    """The inverse: (D, B, R, T) -> (B, L, D), which still lies in the memory as x does where no row is short."""
    return rows.unpack(x.permute(1, 2, 3, 0), length)
