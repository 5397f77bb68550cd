"""A recording of our own, kept as text: logits, loss, gradient norms of one tiny model; the initial values of a seed.

It guards what the laws cannot see: that the same weights, and the same seed, mean the same model tomorrow. The weights
of the first part come from integers, so that no library's random numbers enter. `python tests/golden/test_recorded.py`
prints the file anew.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import tiny_config

from megalodon.model.loss import cross_entropy
from megalodon.model.megalodon import Megalodon

FILE = Path(__file__).parent / "recorded.json"


def integers(count: int, below: int, seed: int) -> torch.Tensor:
    """A linear congruence: (count,) ints in [0, below)."""
    found, value = [], seed
    for _ in range(count):
        value = (value * 6364136223846793005 + 1442695040888963407) % 2**64
        found.append((value >> 33) % below)
    return torch.tensor(found)


def measure() -> dict[str, Any]:
    """Everything that is recorded."""
    model = Megalodon(tiny_config(swiglu=True, rescale_nffn=True), seed=5).double()
    initial = {name: [p.sum().item(), p.norm().item()] for name, p in model.named_parameters()}
    for number, parameter in enumerate(model.parameters()):
        values = integers(parameter.numel(), 1001, number) / 1000 - 0.5
        parameter.data = values.double().view(parameter.shape)
    tokens, targets = (integers(74, 53, seed).view(2, 37) for seed in (1, 2))
    starts = torch.zeros(2, 37, dtype=torch.bool)
    starts[0, [5, 6, 29]] = starts[1, 17] = True
    hidden, _ = model.hidden(tokens, None, starts)
    total, count = cross_entropy(hidden, model.output_weight, targets)
    (total / count).backward()
    return {
        "logits": model(tokens, None, starts)[0][1, ::9, ::13].flatten().tolist(),
        "loss": (total / count).item(),
        "gradient_norms": {name: p.grad.norm().item() for name, p in model.named_parameters()},
        "initial": initial,
    }


def test_the_same_weights_are_the_recorded_model() -> None:
    recorded, found = json.loads(FILE.read_text()), measure()
    assert found["loss"] == pytest.approx(recorded["loss"], abs=1e-12)
    assert found["logits"] == pytest.approx(recorded["logits"], abs=1e-11)
    assert found["gradient_norms"] == pytest.approx(recorded["gradient_norms"], rel=1e-9, abs=1e-12)


def test_the_same_seed_is_the_recorded_model() -> None:
    """To 1e-4: processors without AVX2 draw normal numbers that differ in the last bits."""
    recorded, found = json.loads(FILE.read_text())["initial"], measure()["initial"]
    assert found.keys() == recorded.keys()
    for name, values in found.items():
        assert values == pytest.approx(recorded[name], rel=1e-4, abs=1e-4), name


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))  # noqa: T201
