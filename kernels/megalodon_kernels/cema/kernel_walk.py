"""The kernel that runs CEMA, forward and backward in time, and what the kernels of this op share.

The mathematics stands in kernel.py, where the launchers are. Shapes inside a program: BD channels, BN states (N
padded), M boundaries, T tokens of a row. A complex value is two tensors, `_re` and `_im`.
"""

import triton
import triton.language as tl

from megalodon_kernels.dispatch import INTERPRETED
from megalodon_kernels.kernel_math import cos_sin, mdot, then, then_selecting

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def tables(
    p_ptr, gamma_ptr, omega_ptr, log2_decay_ptr, turns_ptr, powers_ptr, k_ptr,
    N: tl.constexpr, BN: tl.constexpr, T: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """q^0 … q^T of one channel, (2, T + 1, BN), real parts first; and its k, (T,)."""
    d = tl.program_id(0).to(tl.int64)
    n, t = tl.arange(0, BN), tl.arange(0, T)
    at, inside = d * N + n, n < N
    log2_decay = tl.load(log2_decay_ptr + at, mask=inside, other=0)
    turns = tl.load(turns_ptr + at, mask=inside, other=0)
    p = tl.load(p_ptr + at, mask=inside, other=0).to(WIDE)
    gamma_re, gamma_im = load_pairs(gamma_ptr, at, inside, WIDE)
    powers_ptr += d * (2 * (T + 1) * BN)
    re, im = _power(log2_decay[None, :], turns[None, :], t[:, None], WIDE)
    tl.store(powers_ptr + t[:, None] * BN + n[None, :], re)
    tl.store(powers_ptr + (T + 1 + t)[:, None] * BN + n[None, :], im)
    k = tl.sum(re * (p * gamma_re)[None, :] - im * (p * gamma_im)[None, :], axis=1)
    k += tl.where(t == 0, tl.load(omega_ptr + d).to(WIDE), 0)
    tl.store(k_ptr + d * T + t, k)
    re, im = _power(log2_decay, turns, T, WIDE)
    tl.store(powers_ptr + T * BN + n, re)
    tl.store(powers_ptr + (2 * T + 1) * BN + n, im)


@triton.jit
def _power(log2_decay, turns, exponent, WIDE: tl.constexpr):
    """q^exponent. In float64 up to the angle within a turn: a rounded angle times t would be far off."""
    turn = turns * exponent
    size = tl.exp2((log2_decay * exponent).to(WIDE))
    cos, sin = cos_sin((turn - tl.floor(turn)).to(WIDE))
    return size * cos, size * sin


@triton.jit
def load_powers(powers_ptr, d, exponent, n, D: tl.constexpr, BN: tl.constexpr, T: tl.constexpr):
    """q^exponent from what `tables` wrote; d, exponent and n broadcast to one shape."""
    at = (d.to(tl.int64) * (2 * (T + 1)) + exponent) * BN + n
    inside = (d < D) & (n < BN)
    re = tl.load(powers_ptr + at, mask=inside, other=0)
    return re, tl.load(powers_ptr + at + (T + 1) * BN, mask=inside, other=0)


@triton.jit
def load_pairs(ptr, at, inside, WIDE: tl.constexpr):
    """The pairs (re, im) number `at`."""
    re = tl.load(ptr + at * 2, mask=inside, other=0).to(WIDE)
    return re, tl.load(ptr + at * 2 + 1, mask=inside, other=0).to(WIDE)


@triton.jit
def parts(x, SPLIT: tl.constexpr):
    """x as (high, low), two bfloat16 whose sum is good to 2⁻¹⁶; without SPLIT x itself, twice."""
    high, low = x, x
    if SPLIT:
        # Cut off, not rounded: one instruction, and the rest is exact.
        high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        low = (x - high).to(tl.bfloat16)
        high = high.to(tl.bfloat16)
    return high, low


@triton.jit
def times(x, high, low, acc, SPLIT: tl.constexpr):
    """acc + x @ (high + low), x exact in its dtype."""
    acc = mdot(x, high, acc)
    if SPLIT:
        acc = mdot(x, low, acc)
    return acc


@triton.jit
def _parts_times(high, low, x, acc, SPLIT: tl.constexpr):
    """acc + (high + low) @ x, x exact in its dtype."""
    acc = mdot(high, x, acc)
    if SPLIT:
        acc = mdot(low, x, acc)
    return acc


@triton.jit
def row_offsets(first, begin, end, d, D: tl.constexpr, T: tl.constexpr, REVERSED: tl.constexpr):
    """Where tokens first … first + T - 1 of each row lie, (BD, M, T), and which of them are in begin … end - 1."""
    t = tl.arange(0, T)
    token = first[:, None] + (T - 1 - t if REVERSED else t)[None, :]
    inside = (token >= begin[:, None]) & (token < end[:, None])
    at = token.to(tl.int64)[None, :, :] * D + d[:, None, None]
    return at, inside[None, :, :] & (d < D)[:, None, None]


@triton.jit
def load_rows(ptr, first, begin, end, d, D: tl.constexpr, T: tl.constexpr, REVERSED: tl.constexpr):
    """The values at `row_offsets`, 0 where there is none."""
    at, inside = row_offsets(first, begin, end, d, D, T, REVERSED)
    return tl.load(ptr + at, mask=inside, other=0)


@triton.jit
def state_offsets(batch, num_slots, first, d, n, D: tl.constexpr, BN: tl.constexpr, T: tl.constexpr):
    """Where g behind the full rows that begin at `first` lies, (BD, M, BN): its real part, D BN before the imaginary.

    No two full rows begin within the same T tokens, so that B num_slots places hold them all.
    """
    slot = (batch * num_slots + first // T) * (2 * D * BN)
    return slot[None, :, None] + (d[:, None] * BN + n[None, :])[:, None, :]


@triton.jit
def entry_of(table_ptr, boundary, num_rows, length, T: tl.constexpr):
    """Twice the first token behind a boundary, plus 1 if a document begins there: an entry of `row_table`."""
    if table_ptr is not None:
        entry = tl.load(table_ptr + boundary, mask=(boundary >= 0) & (boundary <= num_rows), other=0)
        return tl.where(boundary > num_rows, 2 * length, entry)
    else:
        return 2 * tl.minimum(tl.maximum(boundary, 0) * T, length)


@triton.jit
def states(
    E_re, E_im, decay_re, decay_im, h_re, h_im, step_re, step_im, i, i0, linked, SELECT: tl.constexpr
):  # fmt: skip
    """The state at boundaries i = i0 … i0 + M - 1, (BD, M, BN), from the one before them, h (BD, BN).

    `step` is the decay from there to i0, where at the very first boundary the state is h itself. A boundary that is not
    linked begins with 0, by selection; E is 0 there.
    """
    enters = ((i == i0) & linked)[None, :, None]
    step_re, step_im = tl.where(i0 > 0, step_re, 1), tl.where(i0 > 0, step_im, 0)
    E_re += tl.where(enters, (step_re * h_re - step_im * h_im)[:, None, :], 0)
    E_im += tl.where(enters, (step_re * h_im + step_im * h_re)[:, None, :], 0)
    if SELECT:
        decay_re = tl.where(linked[None, :, None], decay_re, 0)
        decay_im = tl.where(linked[None, :, None], decay_im, 0)
    if _INTERPRETED:
        return _states_by_doubling(decay_re, decay_im, E_re, E_im, i.shape[0])
    elif SELECT:
        _, _, E_re, E_im = tl.associative_scan((decay_re, decay_im, E_re, E_im), 1, then_selecting)
        return E_re, E_im
    else:
        _, _, E_re, E_im = tl.associative_scan((decay_re, decay_im, E_re, E_im), 1, then)
        return E_re, E_im


@triton.jit
def _states_by_doubling(a_re, a_im, b_re, b_im, M: tl.constexpr):
    """The same scan in log M steps of whole tiles: the interpreter's own takes a millisecond for each single number."""
    m = tl.zeros(b_re.shape, tl.int32) + tl.arange(0, M)[None, :, None]
    reach = 1
    while reach < M:
        back, has = tl.maximum(m - reach, 0), m >= reach
        c_re, c_im, d_re, d_im = then_selecting(
            tl.gather(a_re, back, 1), tl.gather(a_im, back, 1), tl.gather(b_re, back, 1), tl.gather(b_im, back, 1),
            a_re, a_im, b_re, b_im,
        )  # fmt: skip
        a_re, a_im = tl.where(has, c_re, a_re), tl.where(has, c_im, a_im)
        b_re, b_im = tl.where(has, d_re, b_re), tl.where(has, d_im, b_im)
        reach *= 2
    return b_re, b_im


@triton.jit
def state_at(H_re, H_im, i, wanted):
    """The state at boundary `wanted`, (BD, BN)."""
    here = (i == wanted)[None, :, None]
    return tl.sum(tl.where(here, H_re, 0), axis=1), tl.sum(tl.where(here, H_im, 0), axis=1)


@triton.jit
def _weighed_powers(
    powers_ptr, p, gamma_re, gamma_im, d, n, D: tl.constexpr, BN: tl.constexpr, T: tl.constexpr, REVERSED: tl.constexpr
):
    """V, (BD, T, BN), and C, (BD, BN, T), whose imaginary part is negated: Re(C h) is a sum of two products."""
    t = tl.arange(0, T)
    if REVERSED:
        w_re, w_im, r_re, r_im = gamma_re, gamma_im, p, tl.zeros_like(p)
        into, out = T - t, t
    else:
        w_re, w_im, r_re, r_im = p, tl.zeros_like(p), gamma_re, gamma_im
        into, out = T - 1 - t, t + 1
    re, im = load_powers(powers_ptr, d[:, None, None], into[None, :, None], n[None, None, :], D, BN, T)
    V_re = re * w_re[:, None, :] - im * w_im[:, None, :]
    V_im = re * w_im[:, None, :] + im * w_re[:, None, :]
    re, im = load_powers(powers_ptr, d[:, None, None], out[None, None, :], n[None, :, None], D, BN, T)
    C_re = re * r_re[:, :, None] - im * r_im[:, :, None]
    C_im = re * r_im[:, :, None] + im * r_re[:, :, None]
    return V_re, V_im, C_re, -C_im


@triton.jit
def walk(
    x_ptr, y_ptr, h0_ptr, last_ptr, states_ptr, p_ptr, gamma_ptr, powers_ptr, k_ptr, table_ptr, num_rows_ptr,
    length, num_slots,
    D: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, M: tl.constexpr, T: tl.constexpr,
    REVERSED: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Forward: x, h0 -> y, the last state. REVERSED: dy, gradient of the last state -> dx, gradient of h0, and g."""
    batch = tl.program_id(1).to(tl.int64)
    d, n, t = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BN), tl.arange(0, T)
    at, inside = d[:, None] * N + n[None, :], (d < D)[:, None] & (n < N)[None, :]
    SIGN: tl.constexpr = -1 if REVERSED else 1
    x_ptr += batch * length * D
    y_ptr += batch * length * D
    num_rows = (length + T - 1) // T
    if table_ptr is not None:
        table_ptr += batch * (length + 1)
        num_rows = tl.load(num_rows_ptr + batch)

    p = tl.load(p_ptr + at, mask=inside, other=0).to(WIDE)
    gamma_re, gamma_im = load_pairs(gamma_ptr, at, inside, WIDE)
    V_re, V_im, C_re, C_im = _weighed_powers(powers_ptr, p, gamma_re, gamma_im, d, n, D, BN, T, REVERSED)
    V_re_high, V_re_low = parts(V_re, SPLIT)
    V_im_high, V_im_low = parts(V_im, SPLIT)
    C_re_high, C_re_low = parts(C_re, SPLIT)
    C_im_high, C_im_low = parts(C_im, SPLIT)
    lag = t[None, None, :] - t[None, :, None]
    at_lag = d.to(tl.int64)[:, None, None] * T + lag
    K_high, K_low = parts(tl.load(k_ptr + at_lag, mask=(lag >= 0) & (d < D)[:, None, None], other=0), SPLIT)
    row_re, row_im = load_powers(powers_ptr, d[:, None], T, n[None, :], D, BN, T)
    # The last row may be short: it lies before the last boundary forward, behind the second one backward.
    last_row = entry_of(table_ptr, num_rows - 1, num_rows, length, T) >> 1
    short_re, short_im = load_powers(powers_ptr, d[:, None], length - last_row, n[None, :], D, BN, T)
    short_at = 1 if REVERSED else num_rows
    h_re, h_im = tl.zeros((BD, BN), WIDE), tl.zeros((BD, BN), WIDE)
    if h0_ptr is not None:
        h_re, h_im = load_pairs(h0_ptr + batch * D * N * 2, at, inside, WIDE)
        h_im *= SIGN

    for i0 in range(0, num_rows + 1, M):
        i = i0 + tl.arange(0, M)
        boundary = num_rows - i if REVERSED else i
        entry = entry_of(table_ptr, boundary, num_rows, length, T)
        # The row before the boundary is before … middle - 1, the row behind it middle … behind - 1.
        middle, linked = entry >> 1, entry & 1 == 0
        before = entry_of(table_ptr, boundary - 1, num_rows, length, T) >> 1
        behind = entry_of(table_ptr, boundary + 1, num_rows, length, T) >> 1
        flows = linked & (i > 0)
        if REVERSED:
            source = load_rows(x_ptr, middle, middle, tl.where(flows, behind, middle), d, D, T, REVERSED)
        else:
            source = load_rows(x_ptr, middle - T, tl.where(flows, before, middle), middle, d, D, T, REVERSED)
        E_re = times(source, V_re_high, V_re_low, tl.zeros((BD, M, BN), WIDE), SPLIT)
        E_im = times(source, V_im_high, V_im_low, tl.zeros((BD, M, BN), WIDE), SPLIT)
        is_short = (i == short_at)[None, :, None]
        decay_re = tl.where(is_short, short_re[:, None, :], row_re[:, None, :])
        decay_im = tl.where(is_short, short_im[:, None, :], row_im[:, None, :])
        step_re, step_im = tl.where(i0 == short_at, short_re, row_re), tl.where(i0 == short_at, short_im, row_im)
        H_re, H_im = states(
            E_re, E_im, decay_re, decay_im, h_re, h_im, step_re, step_im, i, i0, linked, table_ptr is not None
        )
        h_re, h_im = state_at(H_re, H_im, i, tl.minimum(i0 + M - 1, num_rows))
        H_re_high, H_re_low = parts(H_re, SPLIT)
        H_im_high, H_im_low = parts(H_im, SPLIT)

        if states_ptr is not None:
            # Through a product with 1: else the compiler runs the scan again, in the layout that the store would like.
            one = (n[:, None] == n[None, :]).to(WIDE).to(H_re_high.dtype)[None, :, :]
            one = tl.broadcast_to(one, (BD, BN, BN))
            g_re = _parts_times(H_re_high, H_re_low, one, tl.zeros((BD, M, BN), WIDE), SPLIT)
            g_im = _parts_times(H_im_high, H_im_low, one, tl.zeros((BD, M, BN), WIDE), SPLIT)
            to = state_offsets(batch, num_slots, before, d, n, D, BN, T)
            kept = (flows & (boundary > 0))[None, :, None] & (d < D)[:, None, None]
            tl.store(states_ptr + to, g_re.to(states_ptr.dtype.element_ty), mask=kept)
            tl.store(states_ptr + to + D * BN, g_im.to(states_ptr.dtype.element_ty), mask=kept)

        if REVERSED:
            # The last row, if short, aligned to its end: out of that the gradient of the final state comes.
            first, begin, end = tl.where(boundary == num_rows, length - T, before), before, middle
        else:
            first, begin, end = middle, middle, behind
        to, kept = row_offsets(first, begin, end, d, D, T, REVERSED)
        Y = _parts_times(H_re_high, H_re_low, C_re_high, tl.zeros((BD, M, T), WIDE), SPLIT)
        Y = _parts_times(H_im_high, H_im_low, C_im_high, Y, SPLIT)
        if SPLIT:
            Y = mdot(H_im_high, C_im_low, mdot(H_re_high, C_re_low, Y))
        # Last, so that x can have the shared memory of the states.
        Y = times(tl.load(x_ptr + to, mask=kept, other=0), K_high, K_low, Y, SPLIT)
        tl.store(y_ptr + to, Y.to(y_ptr.dtype.element_ty), mask=kept)

    last_ptr += batch * D * N * 2
    tl.store(last_ptr + at * 2, h_re.to(last_ptr.dtype.element_ty), mask=inside)
    tl.store(last_ptr + at * 2 + 1, (h_im * SIGN).to(last_ptr.dtype.element_ty), mask=inside)
