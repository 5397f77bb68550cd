"""Queries and keys from one projection: what the op promises, and which implementation runs.

Not here: the projection, the angles (megalodon/model), the attention between them (chunk_attention).
"""

from typing import Any

import torch
from torch import Tensor

from megalodon_kernels.dispatch import Backend, check_shapes, choose
from megalodon_kernels.qk_rope.portable import qk_rope_portable
from megalodon_kernels.qk_rope.reference import qk_rope_reference

MOST_FEATURES = 4096
"""Of a head; a kernel holds whole heads in registers."""


def qk_rope(
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    turn: Tensor,
    *,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Normalise z in each head, make queries and keys of it, turn them by their position.

        ẑ = z / sqrt(mean(z²) + eps) over the Z/H = 2P features of a head
        q = R ((1 + gamma_0) ẑ / sqrt(2P) + beta_0),   k = R ((1 + gamma_1) ẑ / sqrt(2P) + beta_1)

    R turns each pair of adjacent features. Ma et al. 2024, arXiv 2404.08801, section 3.3, computed as the released code
    computes it; rotation by Su et al. 2021, arXiv 2104.09864.

    Args:
        z:      (B, L, Z) float32 or bfloat16 (or float64, then throughout); computed in float32 or better.
        gamma:  (2, Z) float32: the scale minus one, row 0 of queries and row 1 of keys.
        beta:   (2, Z) float32.
        turn:   (B', L, P, 2) float32: cosine and sine of the angle of each pair; B' is B or 1, for all rows alike. It
                gets no gradient. H = Z / 2P.
        eps:    added to the mean square inside the root.
        dtype:  of q and k; None means that of z.
    Returns:
        q:      (B, L, H, 2P) queries, ready for a product without further scale.
        k:      (B, L, H, 2P) keys.
    Raises:
        ValueError: two sizes disagree; the message shows both.
        KernelError: `backend` cannot run this call.
    """
    if z.dim() != 3 or turn.dim() != 4 or not turn.shape[2] or z.shape[2] % (2 * turn.shape[2]):
        raise ValueError(
            f"qk_rope: z is {tuple(z.shape)} and turn {tuple(turn.shape)}; expected (B, L, Z) and (B or 1, L, P, 2) "
            "with Z a multiple of 2P; pass the turn of these tokens"
        )
    (B, L, Z), P = z.shape, turn.shape[2]
    rows = B if len(turn) == B else 1
    known = f"z is {tuple(z.shape)}"
    expected = {"gamma": (gamma, (2, Z)), "beta": (beta, (2, Z)), "turn": (turn, (rows, L, P, 2))}
    check_shapes("qk_rope", known, expected)
    unfit = None if 2 * P <= MOST_FEATURES else f"a head has {2 * P} features, expected at most {MOST_FEATURES}"
    run = IMPLEMENTATIONS[choose("qk_rope", backend, z.device, z.dtype, unfit)]
    with torch.autocast(z.device.type, enabled=False):
        q, k = run(z, gamma, beta, turn.detach(), eps, dtype or z.dtype)
    return q, k


def _triton(*args: Any) -> tuple[Tensor, Tensor]:
    from megalodon_kernels.qk_rope.kernel import qk_rope_triton

    return qk_rope_triton(*args)


IMPLEMENTATIONS = {"reference": qk_rope_reference, "portable": qk_rope_portable, "triton": _triton}
