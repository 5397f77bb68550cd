"""What SIGINT, SIGTERM and SIGUSR1 do to a training run, and to a command that writes a directory once.

Not here: the loop that asks for the reason to stop.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self


class Signals:
    """The first signal asks the run to stop after its step, the second ends the process by way of what cleans up.

    Before training starts there is nothing to save, so the first one ends it too. One more ends it without cleaning
    up: what is committed stays, what is half-written has a name that nothing reads and the next start removes.
    """

    def __init__(self) -> None:
        self.training = False
        self.number: int | None = None
        self._leaving = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._leaving:
            os._exit(128 + number)
        if self.number is not None or not self.training:
            self._leaving = True
            raise SystemExit(128 + number)
        self.number = number

    def asked(self) -> bool:
        """Whether a signal asks the run to stop."""
        return self.number is not None

    def reason(self) -> str | None:
        """Why the run is to stop, or None."""
        return None if self.number is None else signal.Signals(self.number).name


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the process with 130 and 143, by way of whatever removes what is half-written."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
