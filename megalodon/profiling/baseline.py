"""An older measurement beside a new one: whether the two can be compared, and what became slower.

Not here: measuring (timing.py), the exit code of the command.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from megalodon.errors import InputError
from megalodon.profiling.meter import REST, Row
from megalodon_kernels.measuring import machine

SCHEMA = "megalodon/profile/1"
SAME = ("device", "threads")
"""What two measurements must have been made on alike."""


class Change(NamedTuple):
    """A row that both measurements have."""

    key: str
    before_ms: float
    after_ms: float

    @property
    def slowdown(self) -> float:
        """0.1 is a tenth slower, below 0 is faster."""
        return self.after_ms / self.before_ms - 1


def load(path: Path, device: torch.device) -> dict[str, float]:
    """Return the milliseconds of an older measurement, by key.

    Args:
        device: what is measured now.
    Raises: InputError: no such file, not a profile, another schema, another machine; a line each.
    """
    header = machine(device)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: {(error.strerror or str(error)).lower()}; expected what profile -o F.json wrote"
        ) from None
    except (ValueError, RecursionError):  # also bytes that are not UTF-8
        raise InputError(f"{path} is not JSON, or cut short; expected what profile -o F.json wrote") from None
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise InputError(f"{path}: its schema is {schema!s:.40}, expected {SCHEMA}; measure the baseline again")
    try:
        result = document["result"]
        old = {name: result["header"][name] for name in SAME}
        found = milliseconds([Row(**row) for row in result["rows"]])
        if not found or not all(0 < ms < math.inf for ms in found.values()):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{path}: a part of the profile is missing or damaged; measure the baseline again") from None
    if old["device"] != header["device"]:
        raise InputError(f"{path} was measured on {old['device']}, this is {header['device']}: not comparable")
    if old["threads"] != header["threads"]:
        raise InputError(
            f"{path} was measured with {old['threads']} threads, these are {header['threads']}: not comparable"
        )
    return found


def milliseconds(rows: Sequence[Row]) -> dict[str, float]:
    """Return what is compared of a measurement: the median of every row, by its key, but not what is left of a step.

    That is the difference of a step and its parts, near zero and of either sign: a share of it says nothing.
    """
    return {row.key: float(row.ms) for row in rows if row.name != REST}
