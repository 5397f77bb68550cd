"""How this process treats freed memory and tiny numbers while a model trains on the CPU. Not here: a GPU's.

Both settings hold for the whole process, so the command decides, not the library.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h of glibc
_NEVER = -1


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks instead of returning them to the kernel; False where there is no glibc.

    A training step allocates and frees the same large tensors over and over. By default glibc maps each anew, and the
    kernel zeroes every page again: 6 % to 14 % of the step on two AVX-512 cores (docs/results.md). A threshold for
    mapping is no help: glibc takes none above 32 MiB, which is a feed-forward tensor of 16,384 tokens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _NEVER, _M_TOP_PAD: 64 << 20}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])


@contextmanager
def training_here() -> Iterator[None]:
    """Make the CPU of this process ready for training: freed memory is kept, numbers below 1.2e-38 count as zero.

    The processor takes a hundred times as long over such a number, and a model that strays makes many: a step of the
    Llama beside books-tiny at four times the best rate grew from 13 s to 80 s within 50 steps (docs/decisions.md).
    """
    keep_freed_memory()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
