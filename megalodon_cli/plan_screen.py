"""What `--plan` prints: the memory of a device, traffic, time, disk, the limit and what moves it; or all of it as JSON.

Not here: what is predicted, and how (megalodon/profiling/plan.py).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalodon.errors import DataError, RecipeError
from megalodon_cli import console, launch

if TYPE_CHECKING:
    from megalodon.profiling.plan import Edit, RunPlan, Setup
    from megalodon.recipe import Resolved, RunConfig

GIB, MIB = 2**30, 2**20


def show(resolved: "Resolved", gpus: str | None, device: str) -> None:
    """Plan a run and print it. Raises: RecipeError, InputError for what cannot be planned."""
    from megalodon.profiling.plan import edits, plan_run

    config = resolved.pretraining()
    plan = plan_run(setup_of(config, gpus, device))
    changes = edits(plan)
    for line in lines_of(config, plan):
        console.result(line)
    for title, rows in tables_of(plan).items():
        if len(rows) > 1:
            console.result("")
            console.table([[title, *rows[0]], *rows[1:]], right=(1, 2) if title == "exchange" else (1,))
    console.result("")
    for line in verdict_of(config, plan, changes):
        console.result(line)
    console.document("plan", document_of(config, plan, changes))


def setup_of(config: "RunConfig", gpus: str | None, device: str) -> "Setup":
    """Return what the plan of a recipe depends on; of a token store that is there, its size and mean document."""
    from megalodon.profiling.devices import device_spec
    from megalodon.profiling.plan import Setup

    if config.model.lora is not None:
        raise RecipeError("model.lora: adapters belong to a finetuning recipe; expected null", "megalodon recipes ls")
    tokens, documents = _stored(config)
    windows = None if tokens is None else max(0, tokens - 1) // config.data.seq_len
    return Setup(
        config.model_config_for(config.padded_vocab_size()),
        config.train,
        config.optim,
        config.parallel,
        seq_len=config.data.seq_len,
        ranks=ranks_of(gpus),
        device=device_spec(device),
        isolate=config.data.isolate,
        document_tokens=tokens / documents if tokens and documents else None,
        epoch_tokens=windows * config.data.seq_len if windows else None,
    )


def ranks_of(gpus: str | None) -> int:
    """Read `--gpus`; no machine has to be there for the number. Raises: InputError, EnvironmentFault."""
    import torch

    return 1 if gpus is None else launch.count_of(gpus, torch.cuda.device_count())


def _stored(config: "RunConfig") -> tuple[int | None, int | None]:
    """Tokens and documents of the recipe's token store; None where there is none yet."""
    from megalodon.data.shards import open_store

    path = config.data.dir or Path("data") / config.name
    if not (path / "manifest.json").exists():
        return None, None
    try:
        store = open_store(path)
    except DataError as error:
        console.warning(f"{error}; the plan assumes the length of documents")
        return None, None
    return store.num_tokens, store.num_documents


def lines_of(config: "RunConfig", plan: "RunPlan") -> list[str]:
    """Return what is planned: model, devices, layout, batch."""
    setup, layout, device = plan.setup, plan.layout, plan.setup.device
    cut = f" (1 of {layout.cp} pieces of a window of {setup.seq_len:,})" if layout.cp > 1 else ""
    origin = "measured" if device.measured else "assumed"
    speed = f"{_speed(plan) / 1e12:,.3g} TFLOP/s"
    return [
        f"plan {config.name}: {plan.sizes.total:,} parameters on {setup.ranks:,} x {device.title}, "
        f"{'bf16-mixed' if plan.bf16 else 'fp32'}",
        f"  device   {plan.capacity / GIB:.1f} GiB for a rank, {speed} ({origin}: {device.source})",
        f"  layout   dp_replicate {layout.dp_replicate} x dp_shard {layout.dp_shard} x cp {layout.cp} x tp {layout.tp}",
        f"  step     {setup.train.batch_tokens:,} tokens; a rank takes {plan.passes} x {plan.micro_rows} x "
        f"{setup.seq_len // layout.cp:,} tokens{cut}",
    ]


def _speed(plan: "RunPlan") -> float:
    return plan.setup.device.bf16 if plan.bf16 else plan.setup.device.fp32


def tables_of(plan: "RunPlan") -> dict[str, list[list[str]]]:
    """Return the tables of memory and traffic, their first row without its title."""
    memory = [["GiB", "number", "from"]]
    memory += [[part.name, _amount(part.bytes / GIB), part.source, part.how] for part in plan.parts]
    memory.append(["peak of a device", _amount(plan.peak / GIB), "derived", _room(plan)])
    traffic = [["MiB", "ms", "number", "from"]]
    for exchange in plan.exchanges:
        where = "beside the computation" if exchange.overlaps else "waited for"
        size, time = f"{exchange.bytes / MIB:,.1f}", f"{exchange.seconds * 1e3:,.1f}"
        traffic.append([exchange.name, size, time, "derived", f"{exchange.how}; {where}"])
    return {"memory": memory, "exchange": traffic}


def _amount(gib: float) -> str:
    return f"{gib:,.2f}" if gib >= 0.005 or gib == 0 else f"{gib:.1g}"


def _room(plan: "RunPlan") -> str:
    state = "fits in" if plan.fits else "does not fit in"
    return f"{state} the {plan.capacity / GIB:.1f} GiB of a device"


def verdict_of(config: "RunConfig", plan: "RunPlan", changes: "Sequence[Edit]") -> list[str]:
    """Return where activations lie, the time, the disk, the limit and what moves it."""
    from megalodon.training.activations import PARTS

    kept = sorted(plan.kept.items(), key=lambda part: -part[1])
    shown = " · ".join(f"{PARTS[name]} {_amount(size / GIB)}" for name, size in kept if size > plan.peak / 1000)
    device = plan.setup.device
    speed = "speed measured here" if device.measured else "data sheet"
    time = f"compute {_time(plan.compute_seconds)} ({device.efficiency:.0%} of the {speed}, assumed)"
    if plan.exchanges:
        time += f", exchange {_time(plan.exchange_seconds)}"
    days = f"{plan.steps:,} steps in {_time(plan.seconds)}" if plan.steps and plan.seconds else "length not known yet"
    checkpoint = config.checkpoint
    kept_steps = checkpoint.keep_last + checkpoint.keep_best + 1
    disk = kept_steps * plan.checkpoint + (4 * plan.sizes.total if checkpoint.export else 0)
    lines = [
        f"  activations GiB: {shown} (derived)",
        f"  time     a step {_time(plan.step_seconds)}: {time}",
        f"           {console.amount(plan.tokens_per_second)} tokens/s, {days} (derived from assumed speeds)",
        f"  disk     a checkpoint {console.amount(plan.checkpoint, ' ', 'G')}B, {kept_steps} of them and the model "
        f"{console.amount(disk, ' ', 'G')}B (derived)",
        f"  limit    {plan.limit}" + ("" if changes else "; no key of the recipe moves it here"),
    ]
    for change in changes:
        fits = "fits" if change.plan.fits else "does not fit"
        after = "" if change.plan.seconds is None else f", {_time(change.plan.seconds)}"
        lines.append(
            f"    {change.change} -> {change.plan.peak / GIB:.1f} GiB ({fits}), "
            f"{console.amount(change.plan.tokens_per_second)} tokens/s{after}"
        )
    return lines


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    for unit, size in (("days", 86400), ("hours", 3600), ("min", 60), ("s", 1)):
        if seconds >= size:
            return f"{seconds / size:,.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds * 1e3:.3g} ms"


def _number(value: float | None, unit: str, source: str) -> dict[str, Any]:
    return {"value": value, "unit": unit, "source": source}


def document_of(config: "RunConfig", plan: "RunPlan", changes: "Sequence[Edit]") -> Mapping[str, Any]:
    """Return the plan as JSON: every number with its unit and whether it was measured, derived or assumed."""
    setup, layout, device = plan.setup, plan.layout, plan.setup.device
    given = "measured" if device.measured else "assumed"
    return {
        "recipe": config.name,
        "device": {
            "name": device.name,
            "title": device.title,
            "origin": device.source,
            "memory": _number(plan.capacity, "bytes", given),
            "speed": _number(_speed(plan), "FLOP/s", given),
            "efficiency": _number(device.efficiency, "1", "assumed"),
            "link": _number(device.link, "bytes/s", "assumed"),
            "network": _number(device.network, "bytes/s", "assumed"),
            "devices_of_a_node": device.node if device.card is not None else setup.ranks,
        },
        "ranks": setup.ranks,
        "layout": {name: getattr(layout, name) for name in ("dp_replicate", "dp_shard", "cp", "tp")},
        "precision": "bf16-mixed" if plan.bf16 else "fp32",
        "parameters": plan.sizes.total,
        "island_parameters": plan.sizes.islands,
        "micro_batch": plan.micro_rows,
        "passes": plan.passes,
        "memory": {part.name: _number(part.bytes, "bytes", part.source) | {"from": part.how} for part in plan.parts},
        "activations": {name: _number(size, "bytes", "derived") for name, size in plan.kept.items()},
        "peak": _number(plan.peak, "bytes", "derived"),
        "fits": plan.fits,
        "exchange": {
            x.name: {
                "bytes": _number(round(x.bytes), "bytes", "derived"),
                "seconds": _number(x.seconds, "s", "assumed"),
                "beside_the_computation": x.overlaps,
            }
            for x in plan.exchanges
        },
        "checkpoint": _number(plan.checkpoint, "bytes", "derived"),
        "flops": _number(plan.flops, "FLOP", "derived"),
        "compute_seconds": _number(plan.compute_seconds, "s", "assumed"),
        "exchange_seconds": _number(plan.exchange_seconds, "s", "assumed"),
        "step_seconds": _number(plan.step_seconds, "s", "assumed"),
        "tokens_per_second": _number(plan.tokens_per_second, "1/s", "assumed"),
        "steps": plan.steps,
        "seconds": _number(plan.seconds, "s", "assumed"),
        "limit": plan.limit,
        "edits": [
            {
                "change": edit.change,
                "peak": _number(edit.plan.peak, "bytes", "derived"),
                "fits": edit.plan.fits,
                "tokens_per_second": _number(edit.plan.tokens_per_second, "1/s", "assumed"),
                "seconds": _number(edit.plan.seconds, "s", "assumed"),
            }
            for edit in changes
        ],
    }
