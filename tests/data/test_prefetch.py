"""Work ahead changes nothing but the time: same results, bounded, errors where they belong, no hang."""

import random
import signal
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from megalodon.data.prefetch import Prefetch


class Work:
    """A function of its place that counts its calls and can be held up."""

    def __init__(self) -> None:
        self.called: list[int] = []
        self.free = threading.Event()
        self.free.set()

    def __call__(self, place: int) -> int:
        self.called.append(place)
        assert self.free.wait(60)
        return place * place


@pytest.fixture
def work() -> Iterator[Work]:
    made = Work()
    yield made
    made.free.set()


def prefetch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("ahead", [0, 1, 2, 7])
def test_it_returns_what_a_direct_call_would(work: Work, threads: int, ahead: int) -> None:
    batches = Prefetch(work, 3, ahead=ahead, threads=threads)
    assert prefetch_threads() == []
    places = [0, 3, 6, 9, 12, 300, 303, 6, 9, 9, 9, 11, 14]
    assert [batches.get(place) for place in places] == [place * place for place in places]
    batches.close()
    assert prefetch_threads() == []
    with pytest.raises(RuntimeError):
        batches.get(17)


def test_it_computes_ahead_and_no_further(work: Work) -> None:
    batches = Prefetch(work, 10, ahead=2)
    batches.get(0)
    batches.get(10)
    batches.close()
    assert set(work.called) <= {0, 10, 20, 30}
    assert work.called[:2] == [0, 10]


def test_after_a_jump_nothing_stale_is_left(work: Work) -> None:
    batches = Prefetch(work, 1, ahead=4)
    batches.get(0)
    work.free.clear()
    asked = threading.Thread(target=batches.get, args=(100,))
    asked.start()
    work.free.set()
    asked.join(60)
    assert not asked.is_alive()
    assert batches._pending.keys() == {101, 102, 103, 104}
    batches.close()


def test_an_error_comes_where_its_batch_is_asked_for_and_not_before() -> None:
    def read(place: int) -> int:
        if place == 2:
            raise ValueError("the file was cut at 7")
        return place

    batches = Prefetch(read, 1, ahead=3, threads=2)
    assert [batches.get(0), batches.get(1)] == [0, 1]
    for _ in range(2):
        with pytest.raises(ValueError, match="cut at 7"):
            batches.get(2)
    assert batches.get(3) == 3
    batches.close()


def test_a_wait_ends_with_a_signal(work: Work) -> None:
    work.free.clear()
    batches = Prefetch(work, 1)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            batches.get(0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    work.free.set()
    batches.close()


def test_it_draws_from_no_global_generator(work: Work) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist()
    batches = Prefetch(work, 1, ahead=3, threads=2)
    for place in range(5):
        batches.get(place)
    batches.close()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
