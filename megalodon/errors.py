"""The errors a user can act on, and the exit code of each. Not here: `KernelError` (megalodon_kernels/dispatch.py).

MegalodonError               1   the run failed
├── InputError               2   what the user gave: options, recipes, files; nothing was started
│   ├── RecipeError          2   one or more places in a recipe or on the command line
│   ├── DataError            2   text, token store or tokenizer files
│   └── CheckpointError      2   model directories and checkpoints
├── EnvironmentFault         3   a missing extra, device, disk space or network
├── OutOfMemory              4   with what would fit
├── NumericalError           5   the loss or the gradients are no longer finite
├── CheckFailed              6   a check says no
└── Stopped                 75   stopped early, with a verified checkpoint; the same command continues
"""

from collections.abc import Sequence

SHOWN = 8
"""Faults that a message names; the others are counted."""


class MegalodonError(Exception):
    """Base of every error a user can act on: `str(error)` is one line, `hint` an optional second one."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class InputError(MegalodonError):
    """What the user gave cannot be used; nothing was started."""

    exit_code = 2


class RecipeError(InputError):
    """One or more places in a recipe or on the command line are wrong; the message has a line for each."""


class DataError(InputError):
    """Text, a token store or a tokenizer cannot be used."""


class CheckpointError(InputError):
    """A model directory or a checkpoint is missing, incomplete or does not fit."""


class EnvironmentFault(MegalodonError):
    """This machine lacks what was asked for: an extra, a device, disk space, the network."""

    exit_code = 3


class OutOfMemory(MegalodonError):
    """The device's memory does not suffice."""

    exit_code = 4


class NumericalError(MegalodonError):
    """The loss or the gradients are no longer finite."""

    exit_code = 5


class CheckFailed(MegalodonError):
    """A check says no: parity, hash, ledger, regression, truncation."""

    exit_code = 6


class Stopped(MegalodonError):
    """The run stopped early with a verified checkpoint; the same command continues it."""

    exit_code = 75


def one_line(faults: Sequence[str]) -> str:
    """Return the faults in one line: the first few, and how many more there are."""
    more = len(faults) - SHOWN
    return "; ".join(faults[:SHOWN]) + (f"; and {more:,} more" if more > 0 else "")
