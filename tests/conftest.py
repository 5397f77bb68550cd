"""What every test runs under: a seed, NaN in uninitialised memory, one thread, no user's environment."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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
