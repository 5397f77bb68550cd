"""Freed memory stays with the process once that was asked for; tiny numbers count as zero in training."""

import subprocess
import sys

import pytest

SCRIPT = """
import torch
from megalodon.profiling.streaming import resident_memory
from megalodon.training.host import keep_freed_memory

if {keep}:
    assert keep_freed_memory()
block = torch.ones({size} << 18)  # MiB
before = resident_memory()
del block
print((before - resident_memory()) >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc settings")
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("size", [20, 100])  # glibc maps what is larger than 32 MiB whatever its threshold
def test_a_freed_block_stays_only_if_asked(size: int, keep: bool) -> None:
    script = SCRIPT.format(size=size, keep=keep)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert abs(int(ended.stdout) - (0 if keep else size)) <= 1


def test_tiny_numbers_are_zero_in_every_thread() -> None:
    lines = ["import torch", "from megalodon.training.host import training_here", "torch.set_num_threads(2)"]
    lines += ["x = torch.full((1 << 20,), 1e-39)", "assert float((x * 0.5).min()) > 0"]  # the threads are there already
    lines += ["with training_here():", "    print(float((x * 0.5).abs().max()))"]
    lines += ["assert float((x * 0.5).max()) > 0"]  # and as before when it ends
    ended = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert ended.stdout == "0.0\n"
