"""Keys of the open chunk and of a call as one sequence, and where each chunk of it lies: what the kernels read.

The sequence has S = P + L slots: P for the open chunk, with a row's own keys last, so that they touch the first key of
the call, then L of the call. Nothing is cut, packed or copied to the host. Not here: the kernels.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def join(past: Tensor, new: Tensor, filled: Tensor) -> Tensor:
    """(B, P, ...), of which row b holds filled[b] entries first, and (B, L, ...) -> (B, P + L, ...)."""
    if not past.shape[1]:
        return new
    joined: Tensor = _Join.apply(past, new, filled)  # type: ignore[no-untyped-call]
    return joined


class _Join(torch.autograd.Function):
    """Turns each row's past by P - filled slots: a permutation, whose adjoint is its inverse."""

    @staticmethod
    def forward(ctx: FunctionCtx, past: Tensor, new: Tensor, filled: Tensor) -> Tensor:
        ctx.save_for_backward(filled)
        ctx.P = past.shape[1]  # type: ignore[attr-defined]
        return torch.cat([_turned(past, ctx.P - filled), new], dim=1)  # type: ignore[attr-defined]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (filled,) = ctx.saved_tensors  # type: ignore[attr-defined]
        P = ctx.P  # type: ignore[attr-defined]
        return _turned(grad[:, :P], filled - P), grad[:, P:], None


def _turned(x: Tensor, by: Tensor) -> Tensor:
    """x (B, P, ...) with row b moved by[b] slots to the right, cyclically."""
    slot = torch.arange(x.shape[1], device=x.device) - by[:, None]
    return x[torch.arange(len(x), device=x.device)[:, None], slot % x.shape[1]]


def chunks(filled: Tensor, starts: Tensor | None, chunk_size: int, P: int, L: int) -> tuple[Tensor, Tensor]:
    """First slot of each slot's chunk, and one past its last: two (B, S) int32.

    A slot of the open chunk that holds nothing belongs to a chunk that no token of the call is in.

    Args:
        filled: (B,) int64: tokens in the open chunk before this call.
        starts: (B, L) bool or None: True at the first token of a document.
    """
    B, device = len(filled), filled.device
    t = torch.arange(L, device=device).expand(B, L)
    since = t + filled[:, None]
    if starts is not None:
        since = torch.where(starts.cumsum(1) == 0, since, t - torch.where(starts, t, 0).cummax(dim=1).values)
    slot = torch.arange(P, device=device)
    first = torch.cat([(slot == 0) | (slot == P - filled[:, None]), since % chunk_size == 0], dim=1)
    slot = torch.arange(P + L, device=device).expand(B, P + L)
    begin = torch.where(first, slot, 0).cummax(dim=1).values
    # The first slot of a chunk behind this one; the slots are read backwards, so that "behind" is "before".
    following = torch.where(first, slot, P + L).flip(1).cummin(dim=1).values.flip(1)
    end = torch.nn.functional.pad(following[:, 1:], (0, 1), value=P + L)
    return begin.int(), end.int()
