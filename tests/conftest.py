"""What every test runs under: a seed, NaN in uninitialised memory, one thread, Triton's interpreter without a GPU."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: before anything imports one
torch.set_num_threads(1)  # tests are small: a second thread costs more than it brings
torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialised memory with NaN


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@pytest.fixture(autouse=True)
def _no_leaked_switches() -> Iterator[None]:
    yield
    assert torch.is_grad_enabled()
    assert torch.are_deterministic_algorithms_enabled()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).parents[1]
