"""Tables that CEMA multiplies rows of tokens with, and what the parameters get from the gradients of the tables.

A state is read and written by way of tables alone, into which p and gamma are folded: a pass over a table costs less
than one over the states. Exponentials are formed in float64 from log q; a table is the outer product of two short
ranges of powers. A complex number is a pair of real ones in memory, so that one real matrix product serves both parts.
Not here: tokens.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

_STEP = 8


class Tables(NamedTuple):
    """What a row of T tokens is multiplied with.

    Shapes:
        enter:  (D, T, 2N), pairs of p q^(T-1-t): what token t adds to the state behind the row.
        leave:  (D, T, 2N), pairs of conj(gamma q^(t+1)): what token t reads of the state before the row.
        kernel: (D, T, T): K transposed, [j, i] = k[i - j] for i ≥ j, else 0.
    """

    enter: Tensor
    leave: Tensor
    kernel: Tensor

    @classmethod
    def of(
        cls, p: Tensor, log_decay: Tensor, angle: Tensor, gamma: Tensor, omega: Tensor, T: int, dtype: torch.dtype
    ) -> Self:
        """Form them in `dtype`, float32 or float64."""
        low, high = _ranges(log_decay, angle, T, dtype)
        q, p, gamma = low[:, 1:2], p.to(dtype)[:, None], torch.view_as_complex(gamma.to(dtype))[:, None]
        enter = as_pairs(_outer(high.flip(1) * p, low.flip(1))[:, -T:])
        leave = as_pairs(_outer((high * (gamma * q)).conj().resolve_conj(), low.conj().resolve_conj())[:, :T])
        k = pad(torch.bmm(leave[:, : T - 1], as_pairs(torch.complex(p, torch.zeros_like(p))).mT)[..., 0], (1, 0))
        k[:, 0] = (p * gamma.real).sum((1, 2)) + omega.to(dtype)
        # w[a + b], with w = (T-1 zeros, k), is row T-1-a of the table.
        return cls(enter, leave, pad(k, (T - 1, 0)).unfold(-1, T, 1).flip(1))


class Sums:
    """What the five coefficients get, gathered over rows of tokens, by way of the tables.

        dk[τ] = Σ_t dy_t x_(t-τ),   F_t = Σ x_t G,   E_t = Σ dy_t h     sums over rows
        domega   = dk[0]
        dp       = Re Σ_t conj(q^t) F_(T-1-t) + Re Σ_τ dk[τ] gamma q^τ
        dgamma   = Σ_t conj(q^(t+1) E_t) + Σ_τ dk[τ] conj(p q^τ)
        dlog q   = p Σ_t t conj(q^t) F_(T-1-t) + Σ_t (t+1) conj(gamma q^(t+1) E_t) + Σ_τ τ dk[τ] conj(p gamma q^τ)
                   + Σ steps conj(q^steps h) G: no negative powers, right also as q -> 0

    h is the state before a row, G the gradient of that behind it, steps the tokens of the row.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._carried: Tensor | float = 0.0

    def add_output(self, tokens: Tensor, dy: Tensor, h: Tensor) -> None:
        """Of y, by way of the kernel and of the states before: (D, M, T) twice, pairs (D, M, 2N)."""
        self._add("kernel", tokens, dy)
        self._add("leave", dy, h)

    def add_input(self, tokens: Tensor, G: Tensor) -> None:
        """Of the states behind rows of tokens (D, M, T), from the gradients G, pairs (D, M, 2N), of these."""
        self._add("enter", tokens, G)

    def add_carry(self, h: Tensor, decay: Tensor, steps: Tensor | int, G: Tensor) -> None:
        """Of decay h, decay = q^steps (D, N) in each of M rows, from its gradients G; both (M, D, N)."""
        # Once more in float64: there are as many terms as rows in the whole sequence.
        self._carried = self._carried + steps * decay.conj() * _total(torch.conj_physical(h).mul_(G)).to(
            torch.complex128
        )

    def _add(self, name: str, a: Tensor, b: Tensor) -> None:
        if name in self._sums:
            self._sums[name].baddbmm_(a.mT, b)
        else:
            self._sums[name] = torch.bmm(a.mT, b)

    def gradients(
        self, p: Tensor, log_decay: Tensor, angle: Tensor, gamma: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Those of p, log_decay, angle, gamma, omega, in their shapes."""
        products, E, F = (self._sums[name] for name in ("kernel", "leave", "enter"))
        (D, T, _), dtype = products.shape, products.dtype
        low, high = (x.conj().resolve_conj() for x in _ranges(log_decay, angle, T, dtype))
        powers, q = _outer(high, low)[:, :T], low[:, 1].conj()  # the powers are those of conj(q)
        p, gamma = p.to(dtype), torch.view_as_complex(gamma.to(dtype))
        # With T zeros behind each line, read with lines one longer, a diagonal is a column.
        dk = pad(products, (0, T)).as_strided((D, T, T), (2 * T * T, 2 * T + 1, 1)).sum(1)
        t = torch.arange(T, dtype=dtype, device=dk.device)
        weights = torch.stack([torch.ones_like(t), t])  # Σ_t and Σ_t t of what follows
        both = as_complex(torch.stack([F.flip(1), E], dim=1))  # (D, 2, T, N)
        both[:, 1].conj_physical_()
        into, out_of = as_complex(torch.matmul(weights, as_pairs(both.mul_(powers[:, None])))).unbind(1)
        inside = as_complex(torch.bmm(weights * dk[:, None], as_pairs(powers)))  # (D, 2, N)
        d_p = (into[:, 0] + gamma.conj() * inside[:, 0]).real
        d_gamma = q.conj() * out_of[:, 0] + p * inside[:, 0]
        d_log_q = p * into[:, 1] + gamma.conj() * (q.conj() * (out_of[:, 0] + out_of[:, 1]) + p * inside[:, 1])
        d_log_q = d_log_q + self._carried
        return d_p, d_log_q.real, d_log_q.imag, torch.view_as_real(d_gamma), dk[:, 0]


def power(log_decay: Tensor, angle: Tensor, t: Tensor | int, dtype: torch.dtype) -> Tensor:
    """q^t, formed in float64 and rounded to the complex of `dtype`: (D, N), (T,) -> (D, T, N)."""
    t = torch.as_tensor(t, device=angle.device).view(-1, 1)
    size, turn = (log_decay.double()[:, None] * t).exp_(), angle.double()[:, None] * t
    # torch.polar is about four times slower.
    return torch.complex((size * turn.cos()).to(dtype), size.mul_(turn.sin_()).to(dtype))


def as_pairs(z: Tensor) -> Tensor:
    """(..., N) complex -> (..., 2N), so that Σ pairs(a) pairs(b) = Re Σ conj(a) b."""
    return torch.view_as_real(z).flatten(-2)


def as_complex(pairs: Tensor) -> Tensor:
    """The inverse of `as_pairs`."""
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))


def _ranges(log_decay: Tensor, angle: Tensor, T: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """q^0 to q^7, and q^0, q^8, q^16 ... : whose outer product has the first T powers, and up to 7 more."""
    steps = torch.arange(-(-T // _STEP), device=angle.device) * _STEP
    powers = power(log_decay, angle, torch.cat([torch.arange(_STEP, device=angle.device), steps]), dtype)
    return powers[:, :_STEP], powers[:, _STEP:]


def _outer(high: Tensor, low: Tensor) -> Tensor:
    return (high[:, :, None] * low[:, None]).flatten(1, 2)


def _total(z: Tensor) -> Tensor:
    """Sum over the rows: (M, D, N) complex -> (D, N)."""
    return torch.view_as_complex(torch.view_as_real(z).sum(0))
