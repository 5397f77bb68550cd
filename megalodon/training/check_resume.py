"""The proof of exact resume: N steps against N/2, save, load, N/2, compared bit by bit.

    found = check_resume(model_config, loader, plan, run, steps=8, scratch=Path("runs/.tmp-check"))
    found.difference            None, or the first thing that differs with both values

Compared are the rows of metrics, the weights, the moments, the position in the data and every other scalar of the two
checkpoints of step N. What a clock or the machine's memory says in a row is left out.
Not here: the loop (loop.py), the files of a checkpoint (checkpoint/store.py).
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalodon.checkpoint.store import Saved, check_space, load_tensors, step_path, verify_step
from megalodon.config import show
from megalodon.data.loader import Samples
from megalodon.errors import InputError
from megalodon.model.architectures import LanguageModelConfig
from megalodon.training.loop import Result, Row, Run, train
from megalodon.training.metrics import MetricsLog
from megalodon.training.plan import Plan

MEASURED = frozenset({"tok_per_s", "seconds", "data_seconds", "peak_share", "memory"})
"""Keys of a row of metrics that say how fast the machine was."""
_TITLES = {"model": "weights", "optim": "moments"}
"""How tensors are called by the first part of their name; all others are averages of weights."""
_STATE_BYTES = 12
"""Of a parameter in a checkpoint: the value and two moments in float32."""


class ResumeCheck(NamedTuple):
    """What was compared, and the first difference."""

    steps: int
    half: int
    """The step after which the second run was stopped, saved and loaded."""
    seconds: float
    """Of all steps, saves and loads together."""
    compared: Mapping[str, int]
    """What was compared -> how many values of it, in the order of comparing."""
    difference: str | None
    """None if both runs are equal bit by bit."""


def check_resume(
    model_config: LanguageModelConfig, loader: Samples, plan: Plan, run: Run, *, steps: int, scratch: Path
) -> ResumeCheck | None:
    """Train `steps` steps twice, once with a stop, a save and a load in the middle, and compare what comes out.

    Args:
        run:     its directory and its milestone are replaced; the schedule stays that of the plan's horizon.
        scratch: an empty directory; the caller removes it.
    Returns:
        What was found; None if the run was asked to stop.
    Raises:
        InputError: fewer than 2 steps, or more than the run has.   EnvironmentFault: the disk is too full.
    """
    if not 2 <= steps <= plan.horizon:
        raise InputError(f"a check of {steps:,} steps; expected 2 to {plan.horizon:,}, the steps of this run")
    check_space(scratch, 2 * _STATE_BYTES * model_config.num_parameters())
    quiet = plan.checkpoint.model_copy(update={"every": None, "every_minutes": None})
    plan = replace(plan, checkpoint=quiet)
    half = steps // 2
    results: list[Result] = []
    for name, stop in (("whole", steps), ("parts", half), ("parts", steps)):
        directory = scratch / name
        directory.mkdir(exist_ok=True)
        results.append(train(model_config, loader, plan, replace(run, directory=directory, stop_at_step=stop)))
        if results[-1].status == "stopped":
            return None
    compared: dict[str, int] = {}
    difference = next(_differences(scratch / "whole", scratch / "parts", steps, compared), None)
    return ResumeCheck(steps, half, sum(result.seconds for result in results), compared, difference)


def _differences(whole: Path, parts: Path, steps: int, compared: dict[str, int]) -> Iterator[str]:
    """Yield what differs between two run directories, in the order in which it arises; count what was compared."""
    rows = [MetricsLog(place / "metrics.jsonl").rows() for place in (whole, parts)]
    compared["losses"] = sum(row["kind"] == "train" for row in rows[0])
    yield from _row_differences(*rows)
    saved = [verify_step(step_path(place / "checkpoints", steps)) for place in (whole, parts)]
    tensors = [_tensors(one) for one in saved]
    for title in ("weights", "moments", "averages"):
        names = [
            [name for name in side if _TITLES.get(name.partition(".")[0], "averages") == title] for side in tensors
        ]
        if any(names):
            compared[title] = sum(tensors[0][name].numel() for name in names[0])
        if names[0] != names[1]:
            yield f"{title}: {len(names[0])} tensors without a stop, {len(names[1])} resumed"
            continue
        for name in names[0]:
            if (index := first_difference(tensors[0][name], tensors[1][name])) is not None:
                values = [side[name][index].item() for side in tensors]
                place = f"{name}[{', '.join(map(str, index))}]"
                yield f"{title}: {place} is {values[0]!r} without a stop, {values[1]!r} resumed"
    leaves = [dict(_leaves(one.state)) for one in saved]
    compared["data position"] = sum(key.startswith("data.") for key in leaves[0])
    compared["other state"] = len(leaves[0]) - compared["data position"]
    for key in sorted(leaves[0].keys() | leaves[1].keys(), key=lambda key: (not key.startswith("data."), key)):
        sides = [side.get(key) for side in leaves]
        if sides[0] != sides[1]:
            yield f"state: {key} is {show(sides[0])} without a stop, {show(sides[1])} resumed"


def _row_differences(whole: list[Row], parts: list[Row]) -> Iterator[str]:
    for a, b in zip(whole, parts, strict=False):
        for key in dict.fromkeys((*a, *b)):
            if key not in MEASURED and a.get(key) != b.get(key):
                yield f"step {a.get('step')}: {key} is {show(a.get(key))} without a stop, {show(b.get(key))} resumed"
    if len(whole) != len(parts):
        yield f"metrics: {len(whole)} rows without a stop, {len(parts)} resumed"


def _tensors(saved: Saved) -> dict[str, Tensor]:
    """Read every tensor of a checkpoint, under its name."""
    listed = saved.manifest["tensors"]
    targets = {name: torch.empty(e["shape"], dtype=getattr(torch, e["dtype"])) for name, e in listed.items()}
    load_tensors(saved, targets)
    return targets


def first_difference(one: Tensor, other: Tensor) -> tuple[int, ...] | None:
    """Return the index of the first element whose bits differ (a NaN equals itself, 0.0 is not -0.0); None if none."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return (0,) * one.dim()
    bits = [side.contiguous().reshape(-1, 1).view(torch.uint8) for side in (one, other)]
    rows = (bits[0] != bits[1]).any(dim=1).nonzero()
    if not len(rows):
        return None
    return tuple(int(i) for i in torch.unravel_index(rows[0, 0], one.shape)) if one.dim() else ()


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
