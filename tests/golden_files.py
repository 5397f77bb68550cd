"""Vectors recorded from the released implementation, read from shared/golden beside the checkout if they are there."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden vectors at {GOLDEN}")


@cache
def read(name: str) -> dict[str, Tensor]:
    """All tensors of one file."""
    return load_file(GOLDEN / f"{name}.safetensors")


def has(*parts: str) -> bool:
    """Whether a folder of vectors is there."""
    return GOLDEN.joinpath(*parts).exists()


@cache
def options(model: str) -> dict[str, Any]:
    """Everything in the config.json of one golden model."""
    return json.loads((GOLDEN / model / "config.json").read_text())


def names(name: str, prefix: str) -> list[str]:
    """Names in one file that begin with `prefix`; empty when the vectors are absent."""
    return sorted(n for n in read(name) if n.startswith(prefix)) if GOLDEN.is_dir() else []
