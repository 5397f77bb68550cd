"""Tables that CEMA multiplies rows of tokens with, and what the parameters get from the gradients of the tables.

A state is read and written by way of tables alone, into which p and gamma are folded: a pass over a table costs less
than one over the states. Exponentials are formed in float64 from log q; a table is the outer product of two short
ranges of powers. A complex number is a pair of real ones in memory, so that one real matrix product serves both parts.
Not here: tokens.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

_STEP = 8


class Tables(NamedTuple):
    """What a row of T tokens is multiplied with.

    Shapes:
        enter:  (D, T, 2N), pairs of p q^(T-1-t): what token t adds to the state behind the row.
        leave:  (D, T, 2N), pairs of conj(gamma q^(t+1)): what token t reads of the state before the row.
        kernel: (D, T, T): K transposed, [j, i] = k[i - j] for i ≥ j, else 0.
        decay:  (D, N) complex128: q^T.
    """

    enter: Tensor
    leave: Tensor
    kernel: Tensor
    decay: Tensor

    @classmethod
    def of(
        cls, p: Tensor, log_decay: Tensor, angle: Tensor, gamma: Tensor, omega: Tensor, T: int, dtype: torch.dtype
    ) -> Self:
        """Form them in `dtype`, float32 or float64."""
        powers, p = Powers(log_decay, angle, T), p.to(dtype)
        gamma = torch.view_as_complex(gamma.to(dtype).contiguous())
        enter = as_pairs(powers.backward(dtype, p))
        leave = as_pairs(powers.forward(dtype, gamma * powers.q.to(gamma.dtype), conj=True))
        # k[t + 1] = Re Σ_n p conj(leave[t])
        later = torch.bmm(as_pairs(torch.complex(p, torch.zeros_like(p)))[:, None], leave[:, : T - 1].mT)[:, 0]
        now = (p * gamma.real).sum(1) + omega.to(dtype)
        # w[a + b], with w = (T-1 zeros, k), is row T-1-a of the table.
        w = torch.cat([later.new_zeros(len(p), T - 1), now[:, None], later], dim=1)
        return cls(enter, leave, w.unfold(-1, T, 1).flip(1), powers.decay)


class Powers:
    """q^0 to q^(T-1), as the outer product of two short ranges, which are formed in complex128 by products."""

    def __init__(self, log_decay: Tensor, angle: Tensor, T: int) -> None:
        size, turn = log_decay.double().exp(), angle.double()
        # torch.polar is about four times slower.
        self.q = torch.complex(size * turn.cos(), size * turn.sin())
        self._length = T
        self._low = _geometric(torch.ones_like(self.q), self.q, _STEP)
        step = self._low[-1] * self.q
        self._high = _geometric(self._low[0], step, -(-T // _STEP))
        past = len(self._high) * _STEP - T  # powers too many
        self.decay = self._high[-1] * (step if not past else self._low[_STEP - past])

    def forward(self, dtype: torch.dtype, factor: Tensor | None = None, *, conj: bool = False) -> Tensor:
        """q^t, times `factor` (D, N), conjugated if `conj`: (D, T, N) in the complex of `dtype`."""
        return self._outer(self._high, self._low, dtype, factor, conj)[:, : self._length]

    def backward(self, dtype: torch.dtype, factor: Tensor | None = None, *, conj: bool = False) -> Tensor:
        """The same from the end: q^(T-1-t)."""
        return self._outer(self._high[::-1], self._low[::-1], dtype, factor, conj)[:, -self._length :]

    @staticmethod
    def _outer(high: list[Tensor], low: list[Tensor], dtype: torch.dtype, factor: Tensor | None, conj: bool) -> Tensor:
        a, b = (torch.stack(x, dim=1).to(dtype.to_complex()) for x in (high, low))
        a = a if factor is None else a * factor[:, None]
        if conj:
            a, b = a.conj_physical(), b.conj_physical()
        return (a[:, :, None] * b[:, None]).flatten(1, 2)


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

    def add_carry(self, h: Tensor, decay: Tensor, steps: int, G: Tensor) -> None:
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
        powers, p, gamma = Powers(log_decay, angle, T), p.to(dtype), torch.view_as_complex(gamma.to(dtype).contiguous())
        q, table = powers.q.to(gamma.dtype), powers.forward(dtype)
        # Read with lines one longer, a diagonal is a column; behind its end it has met the triangle that is now 0.
        lines = products.triu_().as_strided((D, T - 1, T), (T * T, T + 1, 1))
        dk = lines.sum(1)
        dk[:, 0] += products[:, -1, -1]
        t = torch.arange(T, dtype=dtype, device=dk.device)
        weights = torch.stack([torch.ones_like(t), t])  # Σ_t and Σ_t t of what follows
        into = _weighted(weights.flip(1), as_complex(F).mul_(powers.backward(dtype, conj=True)))
        out_of = _weighted(weights, as_complex(E).mul_(table)).conj()
        inside = as_complex(torch.bmm(weights * dk[:, None], as_pairs(table))).conj()  # (D, 2, N)
        d_p = (into[:, 0] + gamma.conj() * inside[:, 0]).real
        d_gamma = q.conj() * out_of[:, 0] + p * inside[:, 0]
        d_log_q = p * into[:, 1] + gamma.conj() * (q.conj() * (out_of[:, 0] + out_of[:, 1]) + p * inside[:, 1])
        d_log_q = d_log_q + self._carried
        return d_p, d_log_q.real, d_log_q.imag, torch.view_as_real(d_gamma.resolve_conj()), dk[:, 0]


def power(log_decay: Tensor, angle: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
    """q^t, formed in float64 and rounded to the complex of `dtype`: (D, N), (T,) -> (D, T, N)."""
    t = t.view(-1, 1)
    size, turn = (log_decay.double()[:, None] * t).exp_(), angle.double()[:, None] * t
    # torch.polar is about four times slower.
    return torch.complex((size * turn.cos()).to(dtype), size.mul_(turn.sin_()).to(dtype))


def as_pairs(z: Tensor) -> Tensor:
    """(..., N) complex -> (..., 2N), so that Σ pairs(a) pairs(b) = Re Σ conj(a) b."""
    return torch.view_as_real(z).flatten(-2)


def as_complex(pairs: Tensor) -> Tensor:
    """The inverse of `as_pairs`."""
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))


def _geometric(first: Tensor, ratio: Tensor, count: int) -> list[Tensor]:
    terms = [first]
    for _ in range(count - 1):
        terms.append(terms[-1] * ratio)
    return terms


def _weighted(weights: Tensor, z: Tensor) -> Tensor:
    """Sums over t with weights (2, T): (D, T, N) complex -> (D, 2, N)."""
    return as_complex(torch.matmul(weights, as_pairs(z)))


def _total(z: Tensor) -> Tensor:
    """Sum over the rows: (M, D, N) complex -> (D, N)."""
    return torch.view_as_complex(torch.view_as_real(z).sum(0))
