"""Work done ahead in threads, in bounded amount and known order: the next batches while a step computes.

What comes out is what a direct call would give, for any number of threads: each piece of work is a pure function of
its place, asked for by its place. Not here: what a batch holds (megalodon/data/loader.py).
"""

import concurrent.futures
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
_TICK = 0.1
"""Seconds of one wait: between two of them Python runs what signals asked for."""


class Prefetch(Generic[T]):
    """`get(place)` returns `read(place)`, computed ahead where the places go on in steps of `stride`.

    Any other place is a jump: what was ahead is dropped, and the work begins anew there. Threads start at the first
    `get`. Close it when done, also after an error.

    Args:
        read:    a pure function that threads may call at once.
        ahead:   results computed beyond the one asked for.
    """

    def __init__(self, read: Callable[[int], T], stride: int, *, ahead: int = 2, threads: int = 1) -> None:
        self._read, self._stride, self._ahead = read, stride, ahead
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, "prefetch")
        self._pending: dict[int, concurrent.futures.Future[T]] = {}

    def get(self, place: int) -> T:
        """Return `read(place)`. Raises: whatever it raised in its thread; RuntimeError after `close`."""
        wanted = [place + n * self._stride for n in range(self._ahead + 1)]
        for stale in self._pending.keys() - set(wanted):
            self._pending.pop(stale).cancel()
        for each in wanted:
            if each not in self._pending:
                self._pending[each] = self._pool.submit(self._read, each)
        result = self._pending[place]
        while not result.done():
            concurrent.futures.wait([result], timeout=_TICK)
        del self._pending[place]
        return result.result()

    def close(self) -> None:
        """Drop what was not asked for and end the threads, after the piece each is at."""
        self._pool.shutdown(cancel_futures=True)
        self._pending.clear()
