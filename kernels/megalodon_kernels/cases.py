"""Inputs for every op, by name: tests, timings and health checks share them. No two dimensions of a case are equal."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megalodon_kernels.timestep_norm.statistics import Statistics

Inputs = dict[str, Any]


def cases(op: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Iterator[tuple[str, Inputs]]:
    """Yield (name, keyword arguments) for `op`: one token, odd lengths, with and without state and document starts."""
    draw = torch.Generator().manual_seed(seed)
    if op in TOKENWISE:
        for length in (1, 37, 150):
            yield f"L{length}", TOKENWISE[op](length, dtype, draw)
        return
    for length in (1, 37, 150):
        for with_state in (False, True):
            for with_starts in (False, True):
                name = f"L{length}" + "-state" * with_state + "-starts" * with_starts
                yield name, STATEFUL[op](length, with_state, with_starts, dtype, draw)


def _starts(batch: int, length: int, draw: torch.Generator) -> Tensor:
    """Documents of 1 to 29 tokens; the first row does not begin with one."""
    starts = torch.rand(batch, length, generator=draw) < 0.08
    starts[0, 0] = False
    starts[-1, length // 2] = True
    return starts


def _cema(length: int, with_state: bool, with_starts: bool, dtype: torch.dtype, draw: torch.Generator) -> Inputs:
    B, D, N = 2, 5, 3
    alpha, delta, theta = (torch.rand(D, N, generator=draw, dtype=torch.float64) for _ in range(3))
    normal = {
        "x": (B, length, D),
        "gamma": (D, N, 2),
        "omega": (D,),
        **({"h0": (B, D, N, 2)} if with_state else {}),
    }
    inputs: Inputs = {name: torch.randn(shape, generator=draw, dtype=dtype) for name, shape in normal.items()}
    inputs |= {"p": alpha.to(dtype), "log_decay": torch.log1p(-0.99 * alpha * delta), "angle": 3 * theta}
    return inputs | ({"starts": _starts(B, length, draw)} if with_starts else {})


def _timestep_norm(
    length: int, with_state: bool, with_starts: bool, dtype: torch.dtype, draw: torch.Generator
) -> Inputs:
    B, D, G = 2, 24, 3
    inputs: Inputs = {
        "x": torch.randn(B, length, D, generator=draw, dtype=dtype) + 3,
        "weight": 0.1 * torch.randn(D, generator=draw, dtype=dtype),
        "bias": 0.1 * torch.randn(D, generator=draw, dtype=dtype),
        "num_groups": G,
    }
    if with_state:
        # The last row has seen nothing: whatever its mean and variance say must not matter.
        count = torch.randint(1, 9, (B,), generator=draw)
        count[-1] = 0
        mean = 3 + torch.randn(B, G, generator=draw, dtype=torch.float64)
        var = 0.5 + torch.rand(B, G, generator=draw, dtype=torch.float64)
        inputs["state"] = Statistics(count, mean, var)
    return inputs | ({"starts": _starts(B, length, draw)} if with_starts else {})


def _chunk_attention(
    length: int, with_state: bool, with_starts: bool, dtype: torch.dtype, draw: torch.Generator
) -> Inputs:
    B, H, Z, V, C = 3, 2, 4, 5, 16
    shapes = {"q": (B, length, H, Z), "k": (B, length, H, Z), "v": (B, length, H, V)}
    inputs: Inputs = {name: torch.randn(shape, generator=draw, dtype=dtype) for name, shape in shapes.items()}
    inputs["chunk_size"] = C
    if with_state:
        inputs["position"] = torch.tensor([3 * C + 6, 11, C])
        inputs["open_k"] = torch.randn(B, 11, H, Z, generator=draw, dtype=dtype)
        inputs["open_v"] = torch.randn(B, 11, H, V, generator=draw, dtype=dtype)
    if with_starts:
        # Half of the cases have a gate, too.
        inputs["gate"] = torch.randn(B, length, H, V, generator=draw, dtype=dtype)
    return inputs | ({"starts": _starts(B, length, draw)} if with_starts else {})


def _rms_norm(length: int, dtype: torch.dtype, draw: torch.Generator) -> Inputs:
    B, D = 2, 21
    x = torch.randn(B, length, D, generator=draw, dtype=dtype) + 1
    return {"x": x, "weight": 0.1 * torch.randn(D, generator=draw, dtype=dtype)}


def _layer_norm(length: int, dtype: torch.dtype, draw: torch.Generator) -> Inputs:
    inputs = _rms_norm(length, dtype, draw)
    return inputs | {"bias": 0.1 * torch.randn(inputs["weight"].shape, generator=draw, dtype=dtype)}


def _swiglu(length: int, dtype: torch.dtype, draw: torch.Generator) -> Inputs:
    B, F = 2, 19
    return {name: 3 * torch.randn(B, length, F, generator=draw, dtype=dtype) for name in ("a", "b")}


def _qk_rope(length: int, dtype: torch.dtype, draw: torch.Generator) -> Inputs:
    B, H, P = 4, 2, 3
    inputs: Inputs = {"z": torch.randn(B, length, H * 2 * P, generator=draw, dtype=dtype)}
    for name in ("gamma", "beta"):
        inputs[name] = 0.1 * torch.randn(2, H * 2 * P, generator=draw, dtype=dtype)
    # A long case shares its positions, the others have their own in each row.
    angle = 6 * torch.rand(1 if length > 37 else B, length, P, generator=draw, dtype=dtype)
    return inputs | {"turn": torch.stack([angle.cos(), angle.sin()], -1)}


def _linear_cross_entropy(length: int, dtype: torch.dtype, draw: torch.Generator) -> Inputs:
    D, V, classes = 5, 11, 9
    targets = torch.randint(classes, (length,), generator=draw)
    targets[3::5] = -100
    return {
        "hidden": torch.randn(length, D, generator=draw, dtype=dtype),
        "weight": torch.randn(V, D, generator=draw, dtype=dtype),
        "targets": targets,
        "block": 16,
        "num_classes": classes,
        "z_loss": 0.1,
    }


STATEFUL = {"cema": _cema, "timestep_norm": _timestep_norm, "chunk_attention": _chunk_attention}
"""Ops that remember earlier tokens: with a state and document starts, and without."""
TOKENWISE = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "swiglu": _swiglu,
    "qk_rope": _qk_rope,
    "linear_cross_entropy": _linear_cross_entropy,
}
"""Ops that treat every token by itself: no state, no document starts."""
