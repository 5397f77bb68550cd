"""Freed memory stays with the process once that was asked for."""

import subprocess
import sys

import pytest

SCRIPT = """
import torch
from megalodon.profiling.streaming import resident_memory
from megalodon.training.host_memory import keep_freed_memory

if {keep}:
    assert keep_freed_memory()
block = torch.ones(20 << 18)  # 20 MiB
before = resident_memory()
del block
print((before - resident_memory()) >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc settings")
@pytest.mark.parametrize(("keep", "returned"), [(False, 20), (True, 0)])
def test_a_freed_block_stays_only_if_asked(keep: bool, returned: int) -> None:
    ended = subprocess.run([sys.executable, "-c", SCRIPT.format(keep=keep)], capture_output=True, text=True, check=True)
    assert abs(int(ended.stdout) - returned) <= 1
