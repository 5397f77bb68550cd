"""Tables that CEMA multiplies rows of tokens with: powers of q, the kernel of a row, and what their gradients make.

Exponentials are formed in float64 from log q; a table of powers is the outer product of two short ranges of them. A
complex number is a pair of real ones in memory, so that one real matrix product serves both parts. Not here: tokens.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

_STEP = 8


class Tables(NamedTuple):
    """What a row of T tokens is multiplied with.

    Shapes:
        powers: (D, T, N) complex: q^t.
        behind: (D, T, N) complex: q^(T-1-t), what is left of token t at the end of the row.
        kernel: (D, T, T): K transposed, [j, i] = k[i - j] for i ≥ j, else 0.
        p, gamma, q: (D, 1, N), the last two complex.
    """

    powers: Tensor
    behind: Tensor
    kernel: Tensor
    p: Tensor
    gamma: Tensor
    q: Tensor

    @classmethod
    def of(
        cls, p: Tensor, log_decay: Tensor, angle: Tensor, gamma: Tensor, omega: Tensor, T: int, dtype: torch.dtype
    ) -> Self:
        """Form them in `dtype`, float32 or float64, and the complex type that belongs to it."""
        t = torch.arange(max(T, _STEP), device=p.device)
        low, high = (power(log_decay, angle, part, dtype) for part in (t[:_STEP], t[:T:_STEP]))
        powers = (high[:, :, None] * low[:, None]).flatten(1, 2)[:, :T]
        p, gamma = p.to(dtype)[:, None], torch.view_as_complex(gamma.to(dtype))[:, None]
        k = torch.bmm(as_pairs(powers), as_pairs((p * gamma).conj()).mT)[..., 0]  # (D, T)
        k[:, 0] += omega.to(dtype)
        # w[a + b], with w = (T-1 zeros, k), is row T-1-a of the table.
        kernel = pad(k, (T - 1, 0)).unfold(-1, T, 1).flip(1)
        return cls(powers, powers.flip(1), kernel, p, gamma, low[:, 1:2])

    def gain(self, tokens: Tensor) -> Tensor:
        """p u, what rows of tokens (D, M, T) add to the state: (D, M, N) complex."""
        return as_complex(torch.bmm(tokens, as_pairs(self.behind))).mul_(self.p)

    def tokens_gradient(self, G: Tensor) -> Tensor:
        """What rows get from the gradients G (D, M, N) of the states behind them: (D, M, T)."""
        return torch.bmm(as_pairs(self.p * G), as_pairs(self.behind).mT)


def power(log_decay: Tensor, angle: Tensor, t: Tensor | int, dtype: torch.dtype) -> Tensor:
    """q^t, formed in float64 and rounded to the complex of `dtype`: (D, N), (T,) -> (D, T, N)."""
    t = torch.as_tensor(t, device=angle.device).view(-1, 1)
    size, turn = (log_decay.double()[:, None] * t).exp_(), angle.double()[:, None] * t
    # torch.polar is about four times slower.
    return torch.complex((size * turn.cos()).to(dtype), size.mul_(turn.sin_()).to(dtype))


def as_pairs(z: Tensor) -> Tensor:
    """(..., N) complex -> (..., 2N), so that Σ pairs(a) pairs(b) = Re Σ conj(a) b."""
    return torch.view_as_real(z.resolve_conj()).flatten(-2)


def as_complex(pairs: Tensor) -> Tensor:
    """The inverse of `as_pairs`."""
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))


class Sums:
    """Gradients of p, log_decay, angle, gamma, omega, gathered over rows of tokens.

        dk[τ] = Σ_t dy_t x_(t-τ),   domega = dk[0],   dp = Σ Re(G conj(u)) + Σ_τ dk[τ] Re(gamma q^τ)
        dgamma = conj(q) Σ conj(s h) + Σ_τ dk[τ] conj(p q^τ)
        dlog q = Σ_t t conj(q^t) d(q^t) + conj(gamma q) Σ conj(s h): no negative powers, right also as q -> 0

    Sums over rows; s = Σ_t q^t dy_t, u = Σ_t q^(T-1-t) x_t, h the state before a row, G the gradient of that behind it.
    """

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        D, T, N = tables.powers.shape
        new = tables.p.new_zeros
        self.products = new(D, T, T)  # x dyᵀ
        self.d_powers, self.d_behind = new(D, T, 2 * N), new(D, T, 2 * N)
        self.d_p, self.d_read = new(D, N), as_complex(new(D, 2 * N))
        self.d_log_q = as_complex(new(D, 2 * N, dtype=torch.float64))

    def add_output(self, tokens: Tensor, dy: Tensor, s: Tensor, h: Tensor) -> None:
        """Of y, by way of the kernel and of the states before: (D, M, T) twice, (D, M, N) twice."""
        self.products.baddbmm_(tokens.mT, dy)
        self.d_powers.baddbmm_(dy.mT, as_pairs((h * (self.tables.gamma * self.tables.q)).conj()))
        self.d_read += _total(s * h).conj()

    def add_input(self, tokens: Tensor, G: Tensor) -> None:
        """Of the states behind rows of tokens (D, M, T), from the gradients G (D, M, N) of these."""
        u = torch.bmm(tokens, as_pairs(self.tables.behind))
        self.d_p += (u * as_pairs(G)).unflatten(-1, (-1, 2)).sum((1, 3))
        self.d_behind.baddbmm_(tokens.mT, as_pairs(self.tables.p * G))

    def add_carry(self, h: Tensor, decay: Tensor, steps: Tensor | int, G: Tensor) -> None:
        """Of decay h, decay = q^steps (D, M or 1, N), from its gradients G (D, M, N)."""
        self.d_log_q += _total((steps * decay * h).conj() * G)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What the five coefficients get, in their shapes."""
        powers, _, _, p, gamma, q = self.tables
        D, T, _ = powers.shape
        # With T zeros behind each line, read with lines one longer, a diagonal is a column.
        dk = pad(self.products, (0, T)).as_strided((D, T, T), (2 * T * T, 2 * T + 1, 1)).sum(1)
        t = torch.arange(T, dtype=dk.dtype, device=dk.device)
        moments = as_complex(torch.bmm(torch.stack([dk, t * dk], dim=1), as_pairs(powers)))
        level, slope = moments[:, :1], moments[:, 1:]  # Σ_τ dk[τ] q^τ, Σ_τ τ dk[τ] q^τ
        d_read = self.d_read[:, None]
        d_gamma = q.conj() * d_read + (p * level).conj()
        d_powers = as_complex(self.d_powers) + as_complex(self.d_behind).flip(1)
        d_log_q = self.d_log_q + _total(d_powers * (t[:, None] * powers).conj())
        d_log_q += ((gamma * q).conj() * d_read + (p * gamma * slope).conj())[:, 0]
        d_p = self.d_p + (gamma * level).real[:, 0]
        return d_p, d_log_q.real, d_log_q.imag, torch.view_as_real(d_gamma[:, 0].resolve_conj()), dk[:, 0]


def _total(z: Tensor) -> Tensor:
    """Sum over the middle dimension: (D, M, N) complex -> (D, N)."""
    return torch.view_as_complex(torch.view_as_real(z.resolve_conj()).sum(1))
