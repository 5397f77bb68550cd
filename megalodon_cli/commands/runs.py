"""`megalodon runs`: what was trained here and how it went. Not here: training (megalodon/training).

Reads what a run left on disk (run.json, metrics.jsonl, its recipe's token store), so it is quick and needs no torch.
"""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from megalodon.errors import DataError, InputError
from megalodon_cli import console
from megalodon_cli.checkpoints import RUNS

BLOCKS = " ▁▂▃▄▅▆▇█"
HEIGHT = 10
"""Lines of the curve in the terminal."""


def complete(incomplete: str) -> list[str]:
    """Return the runs here whose name begins so, for shell completion."""
    return [path.name for path in _directories() if path.name.startswith(incomplete)]


runs = typer.Typer(help="List and show runs.")

Run = Annotated[
    str, typer.Argument(metavar="RUN", help="A run directory, or a name under runs/.", autocompletion=complete)
]


def _directories() -> list[Path]:
    """Run directories here, the newest first."""
    found = [path.parent for path in RUNS.glob("*/run.json")]
    return sorted(found, key=lambda path: (path / "run.json").stat().st_mtime, reverse=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _metrics(run: Path) -> list[dict[str, Any]]:
    """Every whole line of metrics.jsonl; the torn last line of a killed process is left out, and what is no object."""
    path, rows = run / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return [row for row in rows if isinstance(row, dict)]


def _find(name: str) -> Path:
    if not name:
        raise InputError("RUN is empty; expected a run directory, or a name under runs/", "megalodon runs ls")
    for path in (Path(name), RUNS / name):
        if (path / "run.json").is_file():
            return path
    here = ", ".join(path.name for path in _directories()) or "none"
    at = name if Path(name).is_dir() else str(RUNS / name)
    raise InputError(f"{at} is not a run: no run.json; runs here: {here}")


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"


def _last(rows: Sequence[dict[str, Any]], kind: str, key: str) -> Any:
    return next((row[key] for row in reversed(rows) if row.get("kind") == kind and row.get(key) is not None), None)


def _listed(run: Path) -> dict[str, Any]:
    """A run as `ls` shows it: one that cannot be read is `broken` and hides no other."""
    try:
        return _summary(run, _read(run / "run.json"))
    except DataError as error:
        console.warning(str(error))
        return _summary(run, {"status": "broken"})


def _summary(run: Path, state: dict[str, Any]) -> dict[str, Any]:
    rows = _metrics(run)
    return {
        "name": run.name,
        "status": state.get("status"),
        "step": _last(rows, "train", "step") or state.get("step") or 0,
        "steps": state.get("steps"),
        "loss": _last(rows, "train", "loss"),
        "valid_loss": _last(rows, "eval", "valid_loss"),
        "bits_per_byte": _last(rows, "eval", "bits_per_byte"),
        "age_seconds": round(time.time() - (run / "run.json").stat().st_mtime),
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


@runs.command("ls")
def list_runs() -> None:
    """List the runs under runs/: status, step, training loss, validation loss and bits per byte, age.

    Examples:

        megalodon runs ls

        megalodon runs ls --json

        megalodon runs ls | head -5
    """
    found = [_listed(run) for run in _directories()]
    if not found:
        console.note("no runs here: no runs/*/run.json; start one with: megalodon pretrain quickstart")
    rows = [["run", "status", "step", "loss", "valid", "bits/byte", "age"]]
    for run in found:
        step = f"{run['step']:,}" + (f"/{run['steps']:,}" if run["steps"] else "")
        numbers = [_number(run[key]) for key in ("loss", "valid_loss", "bits_per_byte")]
        rows.append([run["name"], str(run["status"]), step, *numbers, _age(run["age_seconds"])])
    if found:
        console.table(rows, right=(2, 3, 4, 5, 6))
    console.document("runs-ls", found)


def curve(points: Sequence[tuple[int, float]], width: int, height: int = HEIGHT) -> list[str]:
    """Draw values over steps as `height` lines of text, each column the mean of its part of the steps."""
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    if not finite:
        return []
    first, last = finite[0][0], finite[-1][0]
    width = max(1, min(width, len(finite)))
    columns: list[list[float]] = [[] for _ in range(width)]
    for step, value in finite:
        columns[min(width - 1, (step - first) * width // max(1, last - first + 1))].append(value)
    means = [sum(column) / len(column) if column else None for column in columns]
    known = [mean for mean in means if mean is not None]
    low, high = min(known), max(known)
    levels = [None if m is None else 1 + round((m - low) / (high - low or 1) * (height * 8 - 1)) for m in means]
    lines = []
    for row in reversed(range(height)):
        bar = "".join(" " if level is None else BLOCKS[max(0, min(8, level - row * 8))] for level in levels)
        label = f"{high:8.3f}" if row == height - 1 else f"{low:8.3f}" if row == 0 else " " * 8
        lines.append(f"{label} │{bar}".rstrip())
    return [*lines, f"{'step':>8} └ {first:,} to {last:,}"]


@runs.command("show")
def show(run: Run) -> None:
    """Show a run: its status, the curve of its training loss, its scores, its ledger and what to do next.

    Examples:

        megalodon runs show quickstart

        megalodon runs show runs/quickstart --json

        megalodon runs show quickstart --color never
    """
    path = _find(run)
    state = _read(path / "run.json")
    summary, rows = _summary(path, state), _metrics(path)
    of = f" of {summary['steps']:,}" if summary["steps"] else ""
    console.result(f"{path}: {summary['status']}, step {summary['step']:,}{of}, {_age(summary['age_seconds'])} ago")
    points = [(row["step"], row["loss"]) for row in rows if row.get("kind") == "train" and row.get("loss") is not None]
    if points:
        console.result("\ntraining loss, nats per token")
        for line in curve(points, console.width() - 12):
            console.result(line)
    evaluations = [row for row in rows if row.get("kind") == "eval"]
    if evaluations:
        console.result()
        head = [["step", "validation loss", "bits/byte"]]
        numbers = [
            [f"{e['step']:,}", _number(e.get("valid_loss")), _number(e.get("bits_per_byte"))] for e in evaluations
        ]
        console.table(head + numbers[-8:], right=(0, 1, 2))
        if state.get("unigram_bits_per_byte") is not None:
            console.result(f"a unigram model of the same tokens: {state['unigram_bits_per_byte']:.3f} bits/byte")
    ledger = _ledger(path)
    if ledger:
        console.result()
        for line in ledger:
            console.result(line)
    following = [str(command) for command in state.get("next") or ()]
    if following:
        console.result("\nnext: " + "\n      ".join(following))
    document = {
        **summary,
        "run": state,
        "train": points,
        "evaluations": evaluations,
        "ledger": ledger,
        "next": following,
    }
    console.document("runs-show", document)


def _ledger(run: Path) -> list[str]:
    """The ledger of the token store that the run's recipe names, as `tokenize` printed it; none if it is gone."""
    recipe = run / "recipe.yaml"
    if not recipe.is_file():
        return []
    from megalodon.config import read_layer
    from megalodon.data.prepare import Ledger

    tree = read_layer(recipe)
    directory, name = (node.value if (node := tree.find(key)) else None for key in (["data", "dir"], ["name"]))
    if not (manifest := Path(str(directory or f"data/{name}")) / "manifest.json").is_file():
        return []
    stored = _read(manifest).get("ledger")
    if not isinstance(stored, dict) or set(stored) != set(Ledger._fields) or {*map(type, stored.values())} != {int}:
        return []
    return Ledger(**stored).lines()
