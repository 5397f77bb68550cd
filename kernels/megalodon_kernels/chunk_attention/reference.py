"""Chunk attention token by token in float64: the meaning of the op. Slow on purpose; tests compare with it."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def chunk_attention_reference(
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
    """See `megalodon_kernels.chunk_attention`. Computes in float64 and rounds once, at the end."""
    rows, keys, values = [], [], []
    for b in range(len(q)):
        pos = 0 if position is None else int(position[b])
        chunk_k, chunk_v = list(open_k[b, : pos % chunk_size]), list(open_v[b, : pos % chunk_size])
        y = []
        for t in range(q.shape[1]):
            if starts is not None and bool(starts[b, t]):
                pos = 0
            if pos % chunk_size == 0:
                chunk_k, chunk_v = [], []
            chunk_k.append(k[b, t])
            chunk_v.append(v[b, t])
            scores = (torch.stack(chunk_k).double() * q[b, t].double()).sum(-1)  # (j, H)
            weights = torch.nn.functional.dropout(scores.softmax(0), dropout, training=dropout > 0)
            y.append((weights[..., None] * torch.stack(chunk_v).double()).sum(0))
            pos += 1
        rows.append(torch.stack(y))
        is_open = pos % chunk_size != 0
        keys.append(torch.stack(chunk_k) if is_open else k[b, :0])
        values.append(torch.stack(chunk_v) if is_open else v[b, :0])
    width = max(len(piece) for piece in keys)  # what `longest` is, if it was given
    open_k = torch.stack([pad(piece, (0, 0, 0, 0, 0, width - len(piece))) for piece in keys])
    open_v = torch.stack([pad(piece, (0, 0, 0, 0, 0, width - len(piece))) for piece in values])
    mixed = torch.stack(rows)
    if gate is not None:
        mixed = torch.nn.functional.silu(gate.double()) * mixed
    return mixed.to(v.dtype), open_k, open_v
