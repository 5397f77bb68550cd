"""Rows of a run as they come. Not here: how a row is shown (training_screen.py)."""

import os
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import IO

from megalodon_cli.run_files import Row, holder, last_rows, row_of

POLL_SECONDS = 0.5


def follow(run: Path, count: int, *, stay: bool, poll: float = POLL_SECONDS) -> Iterator[Row]:
    """Yield the last `count` rows of a run; with `stay` also those to come, until no process holds the run.

    metrics.jsonl is replaced when a run continues from a checkpoint or rolls back: rows that were shown are not shown
    again, unless the run rolled back, which makes other rows of the same steps.
    """
    if not stay:
        yield from last_rows(run, count)
        return
    with closing(_Followed(run / "metrics.jsonl")) as file:
        rows = list(file.new_rows())
        yield from rows[-count:] if count else ()
        while True:
            held = holder(run) is not None  # asked first: what was written before the end is still read after it
            yield from file.new_rows()
            if not held:
                return
            time.sleep(poll)


class _Followed:
    """A growing file of rows that may be replaced by one that holds fewer of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None
        self._part = ""
        self._last: tuple[int, set[str]] = (-1, set())
        """The last step, and which rows of it were yielded."""
        self._rollbacks, self._known = 0, 0
        """Rows of rollbacks in this file so far, and in any."""

    def new_rows(self) -> Iterator[Row]:
        """Yield the whole rows that came since the last call and were not yielded before."""
        self._reopen()
        while self._file is not None and (chunk := self._file.readline()):
            self._part += chunk
            if not self._part.endswith("\n"):
                return
            row, self._part = row_of(self._part), ""
            if row is not None and self._is_new(row):
                yield row

    def _reopen(self) -> None:
        """Open the file that has the name now."""
        try:
            there = self.path.stat()
        except FileNotFoundError:
            return
        if self._file is not None:
            if os.path.samestat(os.fstat(self._file.fileno()), there):
                return
            self._file.close()
        self._file = self.path.open(encoding="utf-8", errors="replace")
        self._part, self._rollbacks = "", 0

    def _is_new(self, row: Row) -> bool:
        """Whether a row was not yielded yet; it counts as yielded then."""
        (step, names), name = self._last, f"{row.get('kind')} {row.get('event')} {row.get('prompt')}"
        if row.get("event") == "rollback":
            self._rollbacks += 1
            if self._rollbacks <= self._known:
                return False
            self._known, step, names = self._rollbacks, row["step"], set()
        elif row["step"] < step or (row["step"] == step and name in names):
            return False
        self._last = (row["step"], names | {name} if row["step"] == step else {name})
        return True

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
