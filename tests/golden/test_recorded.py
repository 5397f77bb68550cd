"""A recording of our own: initial values, logits, loss and gradient norms of one tiny model, kept as text.

It guards what the laws cannot see: that a seed means the same model tomorrow. Recorded in float64 by `python
tests/golden/test_recorded.py`, which prints the file anew.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import random_starts, random_tokens, tiny_config

from megalodon.model.loss import cross_entropy
from megalodon.model.megalodon import Megalodon

FILE = Path(__file__).parent / "recorded.json"


def measure() -> dict[str, Any]:
    """Everything that is recorded."""
    torch.set_num_threads(1)
    model = Megalodon(tiny_config(swiglu=True, rescale_nffn=True), seed=5).double()
    tokens, starts = random_tokens(2, 37), random_starts(2, 37)
    hidden, _ = model.hidden(tokens, None, starts)
    total, count = cross_entropy(hidden, model.output_weight, random_tokens(2, 37, seed=1))
    (total / count).backward()
    return {
        "sums": {name: p.sum().item() for name, p in model.named_parameters()},
        "logits": model(tokens, None, starts)[0][1, ::9, ::13].flatten().tolist(),
        "loss": (total / count).item(),
        "gradient_norms": {name: p.grad.norm().item() for name, p in model.named_parameters()},
    }


def test_the_model_of_a_seed_is_the_recorded_one() -> None:
    recorded, found = json.loads(FILE.read_text()), measure()
    assert found["loss"] == pytest.approx(recorded["loss"], abs=1e-12)
    assert found["logits"] == pytest.approx(recorded["logits"], abs=1e-11)
    for kind in ("sums", "gradient_norms"):
        assert found[kind] == pytest.approx(recorded[kind], rel=1e-9, abs=1e-12)


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))  # noqa: T201
