"""CEMA by chunked matrix products: the CPU path, and any device without Triton.

A document is cut into rows of T tokens. Inside a row the average is a T×T Toeplitz matrix for each channel; between
rows only the state travels. With k[τ] = Re Σ_n gamma p q^τ (+ omega at τ = 0):

    y = K x + Re(C h)          K[i, j] = k[i - j] for i ≥ j;  C[n, t] = gamma q^(t+1);  h the state before the row
    h ← q^T h + V x            V[t, n] = p q^(T-1-t)

All powers of q are formed in float64 from log q, as an outer product of two short ranges. Not here: a kernel of
length L.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megalodon_kernels.rows import Rows, cut

# Twice the row doubles the work of K and halves that of the loop over rows. Forward and backward on two AVX-512 cores
# at (B, L, D, N) = (2, 4096, 256, 16): 0.09 s with rows of 32, 0.08 s with 64, 0.13 s with 128.
ROW = 64


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
    B, L, D = x.shape
    rows = cut(x, ROW, starts)
    R, T = rows.length.shape[1], rows.width
    compute = torch.promote_types(x.dtype, torch.float32)
    state_dtype = compute if h0 is None else h0.dtype
    carry = torch.promote_types(torch.promote_types(state_dtype, compute), torch.complex64)

    powers = _powers(torch.complex(log_decay.double(), angle.double()), T)
    p64, gamma64 = p.double(), torch.view_as_complex(gamma.double())
    into = p64[..., None] * powers[..., :T]  # (D, N, T): p q^τ
    kernel = (gamma64[..., None] * into).sum(1).real
    kernel = torch.cat([kernel[:, :1] + omega.double()[:, None], kernel[:, 1:]], dim=1)
    matrix = _toeplitz(kernel.to(compute))  # (D, T, T), transposed
    # Real pairs side by side, real parts first: Re(C h) is then one real product.
    into = into.flip(-1)
    V = torch.cat([into.real, into.imag], dim=1).mT.to(compute)  # (D, T, 2N)
    out = gamma64[..., None] * powers[..., 1:]
    C = torch.cat([out.real, -out.imag], dim=1).to(compute)  # (D, 2N, T)

    packed = rows.pack(x.to(compute)).permute(3, 0, 1, 2).contiguous().view(D, B * R, T)
    gain = _as_complex(torch.bmm(packed, V)).to(carry).view(D, B, R, -1)  # V x of every row
    before = None if h0 is None else torch.view_as_complex(h0).to(carry).transpose(0, 1)
    h = _carry(powers[..., T].to(carry), gain, before, rows)  # (D, B, R, N): the state before each row

    N = h.shape[-1]
    pairs = torch.view_as_real(h).movedim(-1, -2).reshape(D, B * R, 2 * N).to(compute)
    y = torch.baddbmm(torch.bmm(packed, matrix), pairs, C)
    if y.requires_grad:
        # The gradient comes back channel-last; one copy here saves the products of the backward a copy per channel.
        y.register_hook(torch.Tensor.contiguous)
    y = rows.unpack(y.view(D, B, R, T).permute(1, 2, 3, 0), L)
    last = _last_state(packed.view(D, B, R, T), h, rows, p64, powers)
    return y.to(x.dtype), torch.view_as_real(last).to(state_dtype)


def _powers(log_q: Tensor, T: int) -> Tensor:
    """q^0 … q^T as (D, N, T+1) complex128: q^(8a+b) = q^(8a) q^b takes T/8 + 8 exponentials instead of T."""
    step = 8
    low = torch.exp(log_q[..., None] * torch.arange(step, device=log_q.device))
    high = torch.exp(log_q[..., None] * (torch.arange(T // step + 1, device=log_q.device) * step))
    return (high[..., None] * low[..., None, :]).flatten(-2)[..., : T + 1]


def _toeplitz(kernel: Tensor) -> Tensor:
    """(D, T) -> (D, T, T): the transposed K, [j, i] = kernel[i - j] for i ≥ j, else 0.

    Lay T copies of (kernel, T zeros) end to end and read them as rows shorter by one: each row moves one to the right.
    """
    D, T = kernel.shape
    wide = torch.cat([kernel, kernel.new_zeros(D, T)], dim=1)
    moved = wide[:, None].expand(D, T, 2 * T).reshape(D, 2 * T * T)[:, : T * (2 * T - 1)]
    return moved.view(D, T, 2 * T - 1)[..., :T]


def _as_complex(pairs: Tensor) -> Tensor:
    """(..., 2N), real parts first -> (..., N) complex."""
    real, imaginary = pairs.chunk(2, dim=-1)
    return torch.complex(real, imaginary)


def _carry(decay: Tensor, gain: Tensor, h0: Tensor | None, rows: Rows) -> Tensor:
    """The state before each row: (D, N), (D, B, R, N), (D, B, N) -> (D, B, R, N)."""
    if h0 is None:
        h0 = torch.zeros_like(gain[:, :, 0])
    states: Tensor = _Carry.apply(decay, gain, h0, rows.begins)  # type: ignore[no-untyped-call]
    return states


class _Carry(torch.autograd.Function):
    """h_0 = h0, h_{r+1} = decay ⊙ h_r + gain_r; a row that begins a document starts from 0, by selection.

    Backward, with G_r the gradient of h_r: G_r += conj(decay) G_{r+1}, dgain_r = G_{r+1}, ddecay = Σ conj(h_r) G_{r+1}.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, decay: Tensor, gain: Tensor, h0: Tensor, begins: Tensor) -> Tensor:
        states = torch.empty_like(gain)
        fresh = begins.any(dim=0).tolist()
        h = h0
        for r in range(gain.shape[2]):
            if r:
                h = torch.addcmul(gain[:, :, r - 1], decay[:, None], h)
            if fresh[r]:
                h = h.masked_fill(begins[:, r, None], 0)
            states[:, :, r] = h
        ctx.save_for_backward(decay, states, begins)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        decay, states, begins = ctx.saved_tensors  # type: ignore[attr-defined]
        back, fresh = decay.conj().resolve_conj()[:, None], begins.any(dim=0).tolist()
        d_gain = torch.zeros_like(states)
        g = torch.zeros_like(states[:, :, 0])
        for r in reversed(range(states.shape[2])):
            g = torch.addcmul(grad[:, :, r], back, g)
            if fresh[r]:
                g = g.masked_fill(begins[:, r, None], 0)
            if r:
                d_gain[:, :, r - 1] = g
        d_decay = (states.conj() * d_gain).sum((1, 2))
        return d_decay, d_gain, g, None


def _last_state(packed: Tensor, h: Tensor, rows: Rows, p: Tensor, powers: Tensor) -> Tensor:
    """The state after the last token of each batch row, whose last row may be short: (B, D, N) complex."""
    T = rows.width
    batch = torch.arange(len(rows.length), device=h.device)
    row = (rows.length > 0).sum(1) - 1
    length = rows.length[batch, row]
    # Move each last row to the right end, so that token t has T-1-t tokens behind it whatever the row's length.
    source = torch.arange(T, device=h.device) - (T - length)[:, None]  # (B, T)
    tokens = packed[:, batch, row].transpose(0, 1)  # (B, D, T)
    shifted = tokens.gather(-1, source.clamp(min=0)[:, None].expand_as(tokens))
    shifted = shifted.masked_fill((source < 0)[:, None], 0).double()
    into = torch.view_as_real((p[..., None] * powers[..., :T]).flip(-1))  # (D, N, T, 2)
    gain = torch.view_as_complex(torch.einsum("bdt,dntc->bdnc", shifted, into))
    decay = powers[..., length].movedim(-1, 0)  # (B, D, N)
    return decay * h[:, batch, row].transpose(0, 1) + gain
