"""Measure that reading takes constant memory: stream tokens through a model, record resident memory and speed.

Not here: the script that prints it (benchmarks/streaming.py).
"""

import re
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from megalodon.errors import EnvironmentFault, InputError
from megalodon.inference.session import PIECE, Session
from megalodon.model.megalodon import Megalodon, ModelConfig

WARMUP = 20_000
"""Tokens after which memory must no longer grow."""


class Point(NamedTuple):
    """One moment of the measurement."""

    tokens: int
    seconds: float
    resident: int
    """Resident memory of the process (VmRSS), bytes."""


class StreamReport(NamedTuple):
    """What streaming cost."""

    tokens: int
    seconds: float
    num_parameters: int
    piece: int
    state_bytes: int
    points: tuple[Point, ...]

    @property
    def tokens_per_second(self) -> float:
        """Over the whole stream."""
        return self.tokens / self.seconds

    @property
    def growth(self) -> float:
        """Largest resident memory after the warm-up over that at its end, minus one."""
        after = [point.resident for point in self.points if point.tokens >= WARMUP]
        return max(after) / after[0] - 1


def resident_memory() -> int:
    """Resident memory of this process, in bytes. Raises: EnvironmentFault where /proc does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        raise EnvironmentFault("resident memory is read from /proc/self/status, which needs Linux") from None
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) << 10


def stream_memory(
    num_tokens: int,
    model_config: ModelConfig,
    piece: int = PIECE,
    pieces: int = 5,
    seed: int = 0,
    report: Callable[[Point], None] | None = None,
) -> StreamReport:
    """Stream pseudo-random ids through a freshly initialised model in one session.

    Args:
        num_tokens:   how many, at least the warm-up of 20,000.
        model_config: the model; its values do not matter, its sizes do.
        piece:        tokens of one forward pass.
        pieces:       passes between two points of the record; whole ones, so that memory is compared at like moments.
        seed:         of the weights.
        report:       called with each point.
    Raises: InputError for fewer tokens than the warm-up; EnvironmentFault off Linux.
    """
    if num_tokens < WARMUP:
        raise InputError(f"num_tokens is {num_tokens:,}; expected at least the warm-up of {WARMUP:,}")
    model = Megalodon(model_config, seed).eval()
    session = Session(model, piece=piece)
    ids = _ids(model_config.vocab_size)
    points = []
    start = time.perf_counter()
    while session.position < num_tokens:
        session.feed(islice(ids, min(pieces * piece, num_tokens - session.position)))
        points.append(Point(session.position, time.perf_counter() - start, resident_memory()))
        if report:
            report(points[-1])
    seconds, size = points[-1].seconds, session.state.num_bytes()
    return StreamReport(session.position, seconds, model.num_parameters(), piece, size, tuple(points))


def _ids(vocab_size: int) -> Iterator[int]:
    """Ids without end from a fixed linear congruence: the stream itself must not take memory."""
    value = 1
    while True:
        value = (value * 6364136223846793005 + 1442695040888963407) % 2**64
        yield (value >> 33) % vocab_size
