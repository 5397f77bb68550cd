"""The kernels that form the gradients of CEMA's parameters. The mathematics stands in kernel.py."""

import triton
import triton.language as tl

from megalodon_kernels.cema.kernel_walk import (
    entry_of,
    load_pairs,
    load_powers,
    load_rows,
    parts,
    state_at,
    state_offsets,
    states,
    times,
)
from megalodon_kernels.kernel_math import mdot

NUM_SUMS = tl.constexpr(15)
"""Planes (D, N) that `parameter_sums` hands to `parameter_gradients`, complex ones as two: A; Σ q^t S, Σ t q^t S,
Σ t q^(T-1-t) Z over t; Σ q^τ k, Σ τ q^τ k over τ; Re Σ q^(T-1-t) Z; n q^n g h of the last row, of n tokens."""


@triton.jit
def _diagonal(x, BN: tl.constexpr):
    """(BD, BN, BN) -> (BD, BN)."""
    n = tl.arange(0, BN)
    return tl.sum(tl.where((n[:, None] == n[None, :])[None, :, :], x, 0), axis=1)


@triton.jit
def _store_pair(ptr, re, im, at, inside, PLANE: tl.constexpr):
    tl.store(ptr + at, re, mask=inside)
    tl.store(ptr + PLANE + at, im, mask=inside)


@triton.jit
def parameter_sums(
    x_ptr, dy_ptr, h0_ptr, d_last_ptr, states_ptr, p_ptr, powers_ptr, table_ptr, num_rows_ptr, sums_ptr, d_omega_ptr,
    length, num_slots,
    D: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, M: tl.constexpr, T: tl.constexpr,
    SPLIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The sums of one batch row, (NUM_SUMS, D, N), and its part of domega, (D,).

    What the gradients make of them is left to `parameter_gradients`: here it would need registers that are not there.
    """
    batch = tl.program_id(1).to(tl.int64)
    d, n, t = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BN), tl.arange(0, T)
    at, inside = d[:, None] * N + n[None, :], (d < D)[:, None] & (n < N)[None, :]
    x_ptr += batch * length * D
    dy_ptr += batch * length * D
    num_rows = (length + T - 1) // T
    if table_ptr is not None:
        table_ptr += batch * (length + 1)
        num_rows = tl.load(num_rows_ptr + batch)

    p = tl.load(p_ptr + at, mask=inside, other=0).to(WIDE)
    re, im = load_powers(powers_ptr, d[:, None, None], (T - 1 - t)[None, :, None], n[None, None, :], D, BN, T)
    V_re_high, V_re_low = parts(re * p[:, None, :], SPLIT)
    V_im_high, V_im_low = parts(im * p[:, None, :], SPLIT)
    row_re, row_im = load_powers(powers_ptr, d[:, None], T, n[None, :], D, BN, T)
    h_re, h_im = tl.zeros((BD, BN), WIDE), tl.zeros((BD, BN), WIDE)
    if h0_ptr is not None:
        h_re, h_im = load_pairs(h0_ptr + batch * D * N * 2, at, inside, WIDE)

    S_re, S_im = tl.zeros((BD, T, BN), WIDE), tl.zeros((BD, T, BN), WIDE)
    Z_re, Z_im = tl.zeros((BD, T, BN), WIDE), tl.zeros((BD, T, BN), WIDE)
    A_re, A_im = tl.zeros((BD, BN, BN), WIDE), tl.zeros((BD, BN, BN), WIDE)
    P = tl.zeros((BD, T, T), WIDE)
    for i0 in range(0, num_rows, M):
        i = i0 + tl.arange(0, M)
        entry = entry_of(table_ptr, i, num_rows, length, T)
        middle, linked = entry >> 1, entry & 1 == 0
        before = entry_of(table_ptr, i - 1, num_rows, length, T) >> 1
        entry = entry_of(table_ptr, i + 1, num_rows, length, T)
        behind, goes_on = entry >> 1, (entry & 1 == 0) & (i + 1 < num_rows)
        source = load_rows(x_ptr, middle - T, tl.where(linked & (i > 0), before, middle), middle, d, D, T, False)
        E_re = times(source, V_re_high, V_re_low, tl.zeros((BD, M, BN), WIDE), SPLIT)
        E_im = times(source, V_im_high, V_im_low, tl.zeros((BD, M, BN), WIDE), SPLIT)
        decay_re = tl.broadcast_to(row_re[:, None, :], (BD, M, BN))
        decay_im = tl.broadcast_to(row_im[:, None, :], (BD, M, BN))
        H_re, H_im = states(
            E_re, E_im, decay_re, decay_im, h_re, h_im, row_re, row_im, i, i0, linked, table_ptr is not None
        )
        h_re, h_im = state_at(H_re, H_im, i, tl.minimum(i0 + M - 1, num_rows - 1))

        # Backwards in time, as are the powers that x will meet.
        x = load_rows(x_ptr, middle, middle, behind, d, D, T, True)
        dy = tl.permute(load_rows(dy_ptr, middle, middle, behind, d, D, T, False), (0, 2, 1))
        P = mdot(dy, x, P)
        x = tl.permute(x, (0, 2, 1))
        of = states_ptr + state_offsets(batch, num_slots, middle, d, n, D, BN, T)
        kept = goes_on[None, :, None] & (d < D)[:, None, None]
        g_re, g_im = tl.load(of, mask=kept, other=0), tl.load(of + D * BN, mask=kept, other=0)
        Z_re, Z_im = mdot(x, g_re, Z_re), mdot(x, g_im, Z_im)
        # Of the products of g and h only the diagonal counts, but it costs least as one more product of matrices.
        minus_g_im = tl.permute((-g_im.to(WIDE)).to(g_im.dtype), (0, 2, 1))
        g_re, g_im = tl.permute(g_re, (0, 2, 1)), tl.permute(g_im, (0, 2, 1))
        high, low = parts(H_re, SPLIT)
        S_re = times(dy, high, low, S_re, SPLIT)
        A_re, A_im = times(g_re, high, low, A_re, SPLIT), times(g_im, high, low, A_im, SPLIT)
        high, low = parts(H_im, SPLIT)
        S_im = times(dy, high, low, S_im, SPLIT)
        A_re, A_im = times(minus_g_im, high, low, A_re, SPLIT), times(g_re, high, low, A_im, SPLIT)

    sums_ptr += batch * (NUM_SUMS * D * N)
    _store_pair(sums_ptr, _diagonal(A_re, BN), _diagonal(A_im, BN), at, inside, D * N)
    if d_last_ptr is not None:
        # Behind the last row is the gradient of the final state; powers count from the row's end.
        g_re, g_im = load_pairs(d_last_ptr + batch * D * N * 2, at, inside, WIDE)
        g_im = -g_im
        last_row = entry_of(table_ptr, num_rows - 1, num_rows, length, T) >> 1
        token = length - 1 - t
        kept = (token >= last_row)[None, :] & (d < D)[:, None]
        x = tl.load(x_ptr + token.to(tl.int64)[None, :] * D + d[:, None], mask=kept, other=0).to(WIDE)
        Z_re += x[:, :, None] * g_re[:, None, :]
        Z_im += x[:, :, None] * g_im[:, None, :]
        size = length - last_row
        re, im = load_powers(powers_ptr, d[:, None], size, n[None, :], D, BN, T)
        re, im = re * h_re - im * h_im, re * h_im + im * h_re
        re, im = size * (re * g_re - im * g_im), size * (re * g_im + im * g_re)
        _store_pair(sums_ptr + 13 * D * N, re, im, at, inside, D * N)

    # Sums along the diagonals of P, whose columns run backwards: each row is moved to the left by its number.
    t3 = t[None, :, None]
    column = T - 1 - t3 + t[None, None, :] + tl.zeros((BD, T, T), tl.int32)
    k = tl.sum(tl.where(column < T, tl.gather(P, tl.minimum(column, T - 1), axis=2), 0), axis=1)
    tl.store(d_omega_ptr + batch * D + d, tl.sum(tl.where((t == 0)[None, :], k, 0), axis=1), mask=d < D)
    # The three sums over q^t, and the same with a factor t.
    q_re, q_im = load_powers(powers_ptr, d[:, None, None], t3, n[None, None, :], D, BN, T)
    re, im = q_re * S_re - q_im * S_im, q_re * S_im + q_im * S_re
    _store_pair(sums_ptr + 2 * D * N, tl.sum(re, axis=1), tl.sum(im, axis=1), at, inside, D * N)
    _store_pair(sums_ptr + 4 * D * N, tl.sum(t3 * re, axis=1), tl.sum(t3 * im, axis=1), at, inside, D * N)
    re, im = q_re * Z_re - q_im * Z_im, q_re * Z_im + q_im * Z_re
    tl.store(sums_ptr + 12 * D * N + at, tl.sum(re, axis=1), mask=inside)
    _store_pair(sums_ptr + 6 * D * N, tl.sum(t3 * re, axis=1), tl.sum(t3 * im, axis=1), at, inside, D * N)
    re, im = q_re * k[:, :, None], q_im * k[:, :, None]
    _store_pair(sums_ptr + 8 * D * N, tl.sum(re, axis=1), tl.sum(im, axis=1), at, inside, D * N)
    _store_pair(sums_ptr + 10 * D * N, tl.sum(t3 * re, axis=1), tl.sum(t3 * im, axis=1), at, inside, D * N)


@triton.jit
def _total(ptr, at, inside, batch, STRIDE: tl.constexpr):
    """The sum over batch rows, always in their order."""
    total = tl.load(ptr + at, mask=inside, other=0)
    for _ in range(1, batch):
        ptr += STRIDE
        total += tl.load(ptr + at, mask=inside, other=0)
    return total


@triton.jit
def _total_pair(ptr, at, inside, batch, D: tl.constexpr, N: tl.constexpr):
    re = _total(ptr, at, inside, batch, NUM_SUMS * D * N)
    return re, _total(ptr + D * N, at, inside, batch, NUM_SUMS * D * N)


@triton.jit
def parameter_gradients(
    sums_ptr, d_last_ptr, p_ptr, gamma_ptr, powers_ptr, d_p_ptr, d_log_decay_ptr, d_angle_ptr, d_gamma_ptr, batch,
    D: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What `parameter_sums` found in each batch row -> the gradients of BLOCK of the D N averages."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < D * N
    d, n = at // N, at % N
    p = tl.load(p_ptr + at, mask=inside, other=0).to(WIDE)
    gamma_re, gamma_im = load_pairs(gamma_ptr, at, inside, WIDE)
    a_re, a_im = _total_pair(sums_ptr, at, inside, batch, D, N)
    s_re, s_im = _total_pair(sums_ptr + 2 * D * N, at, inside, batch, D, N)
    s1_re, s1_im = _total_pair(sums_ptr + 4 * D * N, at, inside, batch, D, N)
    z1_re, z1_im = _total_pair(sums_ptr + 6 * D * N, at, inside, batch, D, N)
    k_re, k_im = _total_pair(sums_ptr + 8 * D * N, at, inside, batch, D, N)
    k1_re, k1_im = _total_pair(sums_ptr + 10 * D * N, at, inside, batch, D, N)
    z_re = _total(sums_ptr + 12 * D * N, at, inside, batch, NUM_SUMS * D * N)

    # S meets q^(t+1) = q q^t.
    q_re, q_im = load_powers(powers_ptr, d, 1, n, D, BN, T)
    s_re, s_im = q_re * s_re - q_im * s_im, q_re * s_im + q_im * s_re
    s1_re, s1_im = q_re * s1_re - q_im * s1_im, q_re * s1_im + q_im * s1_re
    d_p = z_re + gamma_re * k_re - gamma_im * k_im
    d_gamma_re, d_gamma_im = s_re + p * k_re, -s_im - p * k_im
    # All that gamma weighs in c; then c.
    re, im = s_re + s1_re + p * k1_re, s_im + s1_im + p * k1_im
    row_re, row_im = load_powers(powers_ptr, d, T, n, D, BN, T)
    c_re = gamma_re * re - gamma_im * im + p * z1_re + T * (row_re * a_re - row_im * a_im)
    c_im = gamma_re * im + gamma_im * re + p * z1_im + T * (row_re * a_im + row_im * a_re)
    if d_last_ptr is not None:
        re, im = _total_pair(sums_ptr + 13 * D * N, at, inside, batch, D, N)
        c_re += re
        c_im += im

    tl.store(d_p_ptr + at, d_p.to(d_p_ptr.dtype.element_ty), mask=inside)
    tl.store(d_log_decay_ptr + at, c_re.to(d_log_decay_ptr.dtype.element_ty), mask=inside)
    tl.store(d_angle_ptr + at, -c_im.to(d_angle_ptr.dtype.element_ty), mask=inside)
    tl.store(d_gamma_ptr + at * 2, d_gamma_re.to(d_gamma_ptr.dtype.element_ty), mask=inside)
    tl.store(d_gamma_ptr + at * 2 + 1, d_gamma_im.to(d_gamma_ptr.dtype.element_ty), mask=inside)
