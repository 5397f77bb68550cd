"""Attention inside chunks: where each token stands, by which angles queries and keys turn -> op.

Not here: the projections (megalodon.py), the turning itself, the softmax and the gating (megalodon_kernels).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from megalodon.model.layers import Float32Module
from megalodon.model.state import Prefix
from megalodon_kernels import Backend, chunk_attention


class Place(NamedTuple):
    """Where the tokens of a call stand; the same for every layer.

    Shapes:
        before:  (B,) int64: tokens of the current document before this call; None means 0 in every row.
        after:   (B,) int64: the same after it.
        starts:  (B, L) bool or None: True at the first token of a document.
        longest: tokens in the fullest open chunk after this call, known to the host.
        turn:    (B or 1, L, Z/H/2, 2): cosine and sine by which each token's queries and keys turn.
        prefix:  says what came before, if the call is a piece of a sequence; None: the state does.
    """

    before: Tensor | None
    after: Tensor
    starts: Tensor | None
    longest: int
    turn: Tensor
    prefix: Prefix | None = None


class Rotary(Float32Module):
    """Rotary positions that restart at 0 in every chunk (Su et al. 2021; model released with Megalodon).

    Args:
        head_dim: Z/H, even; adjacent features form a pair.
        base: of the frequencies base^(-2i/head_dim).
    """

    freqs: Tensor

    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        self.register_buffer("freqs", rotary_frequencies(head_dim, base))

    def forward(self, position: Tensor, chunk_size: int) -> Tensor:
        """Positions (B, L) in the document -> rotations (B, L, 1, head_dim/2), complex64 (128 in a float64 model).

        Angles are formed in float64: a float32 product is off by 1.2e-4 rad near position 4096.
        """
        angle = (position % chunk_size)[..., None, None] * self.freqs.double()
        turn = torch.polar(torch.ones_like(angle), angle)
        return turn if self.freqs.dtype == torch.float64 else turn.to(torch.complex64)


def rotary_frequencies(head_dim: int, base: float) -> Tensor:
    """1 / base^(2i/head_dim) for i < head_dim/2, rounded to float32 as the released buffer is: (head_dim/2,).

    Formed on the CPU: for a power on the meta device, where a model that is loaded is laid out, torch imports its
    compiler, which takes longer than the rest of loading.
    """
    exponent = torch.arange(0, head_dim, 2, device="cpu").float() / head_dim
    return (1.0 / (base**exponent)).to(torch.get_default_device())


def document_positions(before: Tensor, starts: Tensor | None, length: int) -> Tensor:
    """Position of each token in its document: (B, L); `before` (B,), or (1,) for rows that are alike, then (1, L)."""
    t = torch.arange(length, device=before.device)
    if starts is None:
        return before[:, None] + t
    t = t.expand(len(starts), length)
    last_start = torch.where(starts, t, 0).cummax(dim=1).values
    return t - last_start + torch.where(starts.cumsum(1) == 0, before[:, None], 0)


class ChunkAttention(nn.Module):
    """silu(r) ⊙ softmax(q kᵀ) v inside each chunk of a document (arXiv 2404.08801, section 3.3); has no parameters.

    Args:
        chunk_size: C, tokens.
        dropout: of the attention weights, in training only.
    """

    def __init__(self, chunk_size: int, dropout: float, backend: Backend = "auto") -> None:
        super().__init__()
        self.chunk_size, self.dropout, self.backend = chunk_size, dropout, backend

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, r: Tensor, place: Place, open_chunk: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Turned queries and keys, values (B, L, H, ·), gate r (B, L, V) before its SiLU -> (B, L, V); the open chunk.

        The keys and values of the chunk that is still open come back for the next call.
        """
        open_k, open_v = open_chunk or (None, None)
        if place.prefix is not None:
            k, v, open_k, open_v = place.prefix.open_chunk(k, v, open_chunk)
        y, open_k, open_v = chunk_attention(
            q,
            k,
            v,
            self.chunk_size,
            place.before,
            open_k,
            open_v,
            place.starts,
            r.view_as(v),
            dropout=self.dropout if self.training else 0.0,
            longest=place.longest,
            backend=self.backend,
        )
        return y.flatten(2), open_k, open_v
