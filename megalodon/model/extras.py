"""Optional libraries, imported when something asks for them. Not here: what is done with them."""

import contextlib
import importlib
import importlib.util
import logging
from collections.abc import Iterator

from megalodon.errors import EnvironmentFault

_CHATTY = ("torchao", "torch.utils._pytree")
"""Loggers that say at import which compiled parts of torchao do not fit this machine; transformers imports it if it is
installed, whether it is needed or not."""


def check_installed(library: str, needs: str, extra: str) -> None:
    """Raises: EnvironmentFault if a library is not installed: `needs`, such as `--tasks needs`, and the extra."""
    if importlib.util.find_spec(library) is None:
        raise EnvironmentFault(f"{needs} the extra [{extra}]: pip install 'megalodon-lm[{extra}]'")


def require(library: str, needs: str, extra: str) -> None:
    """Import a library. Raises: EnvironmentFault if it is not installed; see `check_installed`."""
    check_installed(library, needs, extra)
    with _quiet():
        importlib.import_module(library)
        if library in ("peft", "transformers"):
            importlib.import_module("transformers.modeling_utils")  # the rest is lazy, and here they speak


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
