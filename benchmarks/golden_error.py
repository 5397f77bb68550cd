"""Print how far this implementation lies from vectors recorded from the released one: the worst logit and gradient.

    python benchmarks/golden_error.py DIR

DIR holds A, B and C, each with config.json, params, forward and grads.safetensors, as tests/golden reads them. Not
here: hidden values, states and single operations, which the tests compare.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import megalodon
from megalodon.model.loss import cross_entropy


def main() -> None:
    """Compare each dtype with the float64 recording where there is one."""
    folder = Path(sys.argv[1])
    for dtype in (torch.float64, torch.float32):
        logits_error, gradient_error = 0.0, 0.0
        for name in ("A", "B", "C"):
            options = json.loads((folder / name / "config.json").read_text())["model"]
            model = megalodon.from_reference(options, load_file(folder / name / "params.safetensors")).to(dtype)
            forward = load_file(folder / name / "forward.safetensors")
            for full in (full for full in forward if full.startswith("f64/") and full.endswith("/logits")):
                logits, _ = model(forward[f"{full.split('/')[1]}/tokens"])
                logits_error = max(logits_error, (logits - forward[full]).abs().max().item())
            hidden, _ = model.hidden(forward["multi/tokens"])
            total, count = cross_entropy(hidden, model.output_weight, forward["multi/targets"])
            (total / count).backward()
            for full, expected in load_file(folder / name / "grads.safetensors").items():
                parameter = full.split("/", 2)[2]
                if full.startswith("f64/multi/") and "#" not in parameter:
                    error = (model.get_parameter(parameter).grad - expected).abs().max() / expected.abs().max()
                    gradient_error = max(gradient_error, error.item())
        sys.stdout.write(f"{dtype}: logits {logits_error:.1e} absolute, gradients {gradient_error:.1e} relative\n")


if __name__ == "__main__":
    main()
