"""What several ranks say to each other besides tensors: words, numbers, errors; by way of the host.

    talk = Talk(group)                      # on every rank of a group over gloo
    step = talk.from_main(find_step)        # the main rank finds it, all have it, or its error

All ranks call the same methods in the same order; two threads of a rank need a group each.
"""

import copy
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar, cast

import torch.distributed as dist

T = TypeVar("T")


class Talk:
    """See above."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.common: Exception | None = None
        """The last error that was raised everywhere, as this rank raised it."""

    def from_main(self, value: Callable[[], T]) -> T:
        """Return what the main rank says; nobody else is asked. What it raises is raised everywhere."""
        told: list[Any] = [None, None]
        raised: Exception | None = None
        if self.rank == 0:
            try:
                told = [value(), None]
            except Exception as error:
                raised, told = error, [None, _sendable(error)]
        dist.broadcast_object_list(told, src=0, group=self._group)
        if told[1] is not None:
            self.common = raised or told[1]
            raise self.common
        return cast(T, told[0])

    def gathered(self, value: T) -> list[T]:
        """Return what all say, by rank; an error may be one of the values."""
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, _sendable(value) if isinstance(value, Exception) else value, group=self._group)
        return told


def _sendable(error: Exception) -> Exception:
    """Return the error itself, or one that says the same if it cannot be sent, or made again on another rank."""
    try:
        ForkingPickler.dumps(error)
        copy.deepcopy(error)
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
