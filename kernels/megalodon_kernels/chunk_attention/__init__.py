"""Softmax attention inside fixed chunks of a document: what the op promises, and which implementation runs.

Not here: the normalisation and rotation of queries and keys, the projection of the gate (megalodon/model).
"""

from typing import Any

import torch
from torch import Tensor

from megalodon_kernels.chunk_attention.portable import chunk_attention_portable
from megalodon_kernels.chunk_attention.reference import chunk_attention_reference
from megalodon_kernels.dispatch import Backend, check_shapes, choose
from megalodon_kernels.swiglu import swiglu


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    position: Tensor | None = None,
    open_k: Tensor | None = None,
    open_v: Tensor | None = None,
    starts: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    dropout: float = 0.0,
    longest: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend to the tokens of the same chunk of the same document, up to and including oneself.

        y_t = silu(gate_t) ⊙ Σ_j softmax_j(q_t · k_j) v_j   over j ≤ t in the chunk of t: equal ⌊position / chunk_size⌋

    No further scale on the scores: it is in q and k. Megalodon, arXiv 2404.08801, section 3.3.

    Args:
        q, k:       (B, L, H, Z) float32, bfloat16 or float64: rotated queries and keys, B and L ≥ 1.
        v:          (B, L, H, V), the dtype in which the weighted sum is formed.
        chunk_size: C, in tokens.
        position:   (B,) int64: tokens of the current document before this call; None means 0.
        open_k:     (B, P, H, Z): keys of the open chunk. Row b holds its position[b] mod C keys first; what lies behind
                    them is ignored. None means P = 0.
        open_v:     (B, P, H, V): its values.
        starts:     (B, L) bool: True at the first token of a document, where the chunks begin anew.
        gate:       (B, L, H, V) in the dtype of v: the output gate before its SiLU; None means no gate, a factor of 1.
        dropout:    probability that a weight is zeroed after the softmax; the others grow by 1 / (1 - dropout).
        longest:    tokens in the fullest open chunk after the call (`open_chunk.open_lengths`), if the caller knows and
                    has checked position: a GPU is then asked for no number. None: it is asked where that is needed.
    Returns:
        y:          (B, L, H, V) in the dtype of v.
        open_k:     (B, P', H, Z): keys of the chunk that is open after the last token, zero behind each row's own.
        open_v:     (B, P', H, V): its values.
    Raises:
        ValueError: two sizes disagree, or gate and v in dtype; the message shows both.
        KernelError: `backend` cannot run this call.
    """
    if open_k is None or open_v is None:
        open_k, open_v = k[:, :0], v[:, :0]
    # A cache may come from a call in another precision; the dtypes of this call decide.
    open_k, open_v = open_k.to(k.dtype), open_v.to(v.dtype)
    _check(q, k, v, chunk_size, position, open_k, open_v, starts, gate, longest)
    if position is None:
        open_k, open_v = open_k[:, :0], open_v[:, :0]  # at 0 nothing is open
    unfit = f"dropout is {dropout}, expected 0" if dropout else None
    run = IMPLEMENTATIONS[choose("chunk_attention", backend, q.device, q.dtype, unfit, SHARED_MEMORY)]
    with torch.autocast(q.device.type, enabled=False):
        return run(q, k, v, chunk_size, position, open_k, open_v, starts, gate, dropout, longest)


def _portable(
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
    y, open_k, open_v = chunk_attention_portable(
        q, k, v, chunk_size, position, open_k, open_v, starts, dropout, longest
    )
    return (y if gate is None else swiglu(gate, y, backend="portable")), open_k, open_v


def _triton(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from megalodon_kernels.chunk_attention.kernel import chunk_attention_triton

    return chunk_attention_triton(*args)


SHARED_MEMORY = 192 << 10
"""Bytes that the kernel of the log-sum-exp takes, the largest of them."""
IMPLEMENTATIONS = {"reference": chunk_attention_reference, "portable": _portable, "triton": _triton}


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    position: Tensor | None,
    open_k: Tensor,
    open_v: Tensor,
    starts: Tensor | None,
    gate: Tensor | None,
    longest: int | None,
) -> None:
    if q.dim() != 4 or not q.shape[0] or not q.shape[1]:
        raise ValueError(f"chunk_attention: q is {tuple(q.shape)}; expected (B, L, H, Z) with B ≥ 1 and L ≥ 1")
    if chunk_size < 1:
        raise ValueError(f"chunk_attention: chunk_size is {chunk_size}; expected at least 1 token")
    (B, L, H, Z), V, P = q.shape, v.shape[-1], open_k.shape[1]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "k": (k, (B, L, H, Z)),
        "v": (v, (B, L, H, V)),
        "position": (position, (B,)),
        "open_k": (open_k, (B, P, H, Z)),
        "open_v": (open_v, (B, P, H, V)),
        "starts": (starts, (B, L)),
        "gate": (gate, (B, L, H, V)),
    }
    check_shapes("chunk_attention", f"q is {tuple(q.shape)}", expected)
    if q.dtype != k.dtype:
        raise ValueError(
            f"chunk_attention: k is {k.dtype} but q is {q.dtype}; expected the same dtype; cast one of them"
        )
    if gate is not None and gate.dtype != v.dtype:
        raise ValueError(
            f"chunk_attention: gate is {gate.dtype} but v is {v.dtype}; expected the same dtype; cast one of them"
        )
    # Without a position nothing is open, and with C - 1 slots there is room for any: no need to wait for the device.
    if position is None or longest is not None or chunk_size <= P + 1:
        return
    filled = int((position % chunk_size).max())
    if filled > P:
        raise ValueError(
            f"chunk_attention: position says {filled} tokens are in the open chunk but open_k holds {P}; "
            "pass the keys and values that the previous call returned"
        )
