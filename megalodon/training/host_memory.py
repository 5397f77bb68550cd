"""How the C library treats freed memory while a model trains on the CPU. Not here: memory of a GPU."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h of glibc
_NEVER = -1


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks instead of returning them to the kernel; False where there is no glibc.

    A training step allocates and frees the same large tensors over and over. By default glibc maps each anew, and the
    kernel zeroes every page again: 6 % to 14 % of the step on two AVX-512 cores (docs/results.md). A threshold for
    mapping is no help: glibc takes none above 32 MiB, which is a feed-forward tensor of 16,384 tokens.
    The setting holds for the whole process, so the command decides, not the library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _NEVER, _M_TOP_PAD: 64 << 20}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])
