"""The norm policy `window`: TimestepNorm statistics of the last chunks only, as the released code evaluates long text.

From chunk 8 on, before each second chunk, the statistics of every layer and of the output norm become those that a
fresh pass over the last 6 chunks leaves; averages, keys and values stay. So statistics cover 6 to 8 chunks, and
chunks 0 to 7 are those of the policy `cumulative`, the paper's definition. A pass of 6 chunks for 2 makes reading take
about four times as long. The released code refreshes while reading only; here also while writing, so that what a model
says depends on the ids alone, not on how they came.
Not here: when text is read (session.py).
"""

from collections.abc import Iterable
from itertools import islice
from typing import Literal, cast, get_args

import torch

from megalodon.errors import InputError
from megalodon.model.megalodon import Megalodon
from megalodon.model.state import State

NormStats = Literal["cumulative", "window"]
KEPT = 8
"""Chunks of ids that a session remembers under `window`."""
_FIRST, _EVERY, _COVERED = 8, 2, 6


def check_norm_stats(value: str) -> NormStats:
    """Return the policy of that name. Raises: InputError with the names there are."""
    for known in get_args(NormStats):
        if value == known:
            return cast(NormStats, known)
    raise InputError(f"norm_stats is {value!r}; expected cumulative or window")


def is_due(position: int, chunk_size: int) -> bool:
    """Whether the statistics are replaced before the token at this position is read."""
    return position >= _FIRST * chunk_size and position % (_EVERY * chunk_size) == 0


def refreshed(model: Megalodon, state: State, recent: Iterable[tuple[int, ...]], piece: int) -> State:
    """A state with the statistics of its last 6 chunks.

    Args:
        model:  in evaluation mode.
        state:  of one row, at a chunk boundary.
        recent: the ids of the last chunks before it, at least 6 chunks, the last one last.
        piece:  tokens of one forward pass.
    """
    rest, fresh = (token for chunk in tuple(recent)[-_COVERED:] for token in chunk), None
    with torch.inference_mode():
        while ids := list(islice(rest, piece)):
            _, fresh = model.hidden(torch.tensor(ids, device=model.device)[None], fresh)
    return with_statistics(state, fresh) if fresh else state


def with_statistics(state: State, other: State) -> State:
    """A state with the TimestepNorm statistics of another one, in every layer and the output norm."""
    pairs = zip(state.layers, other.layers, strict=True)
    return state._replace(layers=tuple(own._replace(norm=new.norm) for own, new in pairs), norm=other.norm)
