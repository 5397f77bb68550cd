"""The chunk that is open behind a call: how many tokens it has, and their keys and values. Not here: attention."""

import torch
from torch import Tensor


def open_lengths(filled: Tensor, starts: Tensor | None, chunk_size: int, num_tokens: int) -> Tensor:
    """Tokens in the open chunk of each row behind a call of `num_tokens`: (B,) int64.

    Args:
        filled: (B,) int64: the same before the call.
        starts: (B, L) bool or None: True at the first token of a document.
    """
    since = filled + num_tokens
    if starts is not None:
        since = torch.where(starts.any(1), starts.flip(1).long().argmax(1) + 1, since)
    return since % chunk_size


def still_open(
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    filled: Tensor | None,
    open_k: Tensor,
    open_v: Tensor,
    starts: Tensor | None,
    longest: int | None,
) -> tuple[Tensor, Tensor]:
    """Keys and values of the chunk that is open behind the last token, each row's own first, zeros behind them.

    Args:
        k, v: (B, L, H, ·) of the call; open_k, open_v: (B, P, H, ·) of the chunk that was open before it.
        filled: (B,) int64: tokens in that; None means 0.
        longest: the largest of `open_lengths`; None: the device is asked, unless all rows end at the same place.
    """
    (B, L), P, device = k.shape[:2], open_k.shape[1], k.device
    if starts is None and not P:
        # Copies: a view would keep all keys and values of the call alive.
        last = L // chunk_size * chunk_size
        return k[:, last:].clone(), v[:, last:].clone()
    if filled is None:
        filled = torch.zeros(B, dtype=torch.int64, device=device)
    length = open_lengths(filled, starts, chunk_size, L)
    longest = int(length.max()) if longest is None else longest
    if not longest:
        return k.new_empty(B, 0, *k.shape[2:]), v.new_empty(B, 0, *v.shape[2:])
    # Behind one another lie the row's `filled` old entries and its L new ones; the open chunk is the end of that.
    slot = torch.arange(longest, device=device)
    source = filled[:, None] + L - length[:, None] + slot  # counted from the row's first old entry
    source = torch.where(source < filled[:, None], source, source - filled[:, None] + P).clamp(max=P + L - 1)
    batch = torch.arange(B, device=device)[:, None]
    used = (slot < length[:, None])[..., None, None]
    both = [torch.cat([old, new], dim=1)[batch, source] for old, new in ((open_k, k), (open_v, v))]
    return torch.where(used, both[0], 0), torch.where(used, both[1], 0)
