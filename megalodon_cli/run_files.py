"""RUN -> what its directory says: state, metrics, checkpoints, recipe, ledger. Quick, and without torch.

Not here: what is shown of it (commands/runs.py), drawings (curves.py, figures.py), the lock (checkpoint/lock.py).
"""

import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalodon.checkpoint.lock import STALE_SECONDS
from megalodon.errors import DataError, InputError, RecipeError
from megalodon_cli import console
from megalodon_cli.checkpoints import RUNS

if TYPE_CHECKING:
    from megalodon.config import Node

Row = dict[str, Any]
BLOCK = 1 << 16
"""Bytes of metrics.jsonl that are read at a time, from its end."""
RECENT = 32
"""Training steps whose speed is averaged."""
STEP = re.compile(r"step-(\d{8,})")
FIGURES = ("loss", "valid_loss", "bits_per_byte", "tok_per_s")


def directories() -> list[Path]:
    """Return the run directories here, the newest first."""
    found = [path.parent for path in RUNS.glob("*/run.json")]
    return sorted(found, key=lambda path: (path / "run.json").stat().st_mtime, reverse=True)


def complete(incomplete: str) -> list[str]:
    """Return the runs here whose name begins so, for shell completion; `runs/` may stand before it."""
    prefix = f"{RUNS}/" if incomplete.startswith(f"{RUNS}/") else ""
    return [text for path in directories() if (text := prefix + path.name).startswith(incomplete)]


def find(name: str) -> Path:
    """Return the directory of a run. Raises: InputError if there is none, with the runs that are here."""
    if not name:
        raise InputError("RUN is empty; expected a run directory, or a name under runs/", "megalodon runs ls")
    for path in (Path(name), RUNS / name):
        if (path / "run.json").is_file():
            return path
    here = ", ".join(path.name for path in directories()) or "none"
    at = name if Path(name).is_dir() else str(RUNS / name)
    raise InputError(f"{at} is not a run: no run.json; runs here: {here}")


def read(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises: DataError if it cannot be read or is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def row_of(line: str) -> Row | None:
    """Return the row on a line of metrics.jsonl; None for a torn line and for what is no row."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def metrics(run: Path) -> list[Row]:
    """Return every row of metrics.jsonl; the torn last line of a killed process is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    return [row for line in lines if (row := row_of(line)) is not None]


def backwards(path: Path) -> Iterator[str]:
    """Yield the whole lines of a file from its end, reading no more of it than is asked for."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        at, rest = file.seek(0, os.SEEK_END), b""
        while at > 0:
            size = min(BLOCK, at)
            at = file.seek(at - size)
            first, *lines = (file.read(size) + rest).split(b"\n")
            yield from (line.decode(errors="replace") for line in reversed(lines) if line)
            rest = first
        if rest:
            yield rest.decode(errors="replace")


def last_rows(run: Path, count: int) -> list[Row]:
    """Return the last rows of metrics.jsonl, oldest first."""
    found: list[Row] = []
    for line in backwards(run / "metrics.jsonl"):
        if len(found) == count:
            break
        if (row := row_of(line)) is not None:
            found.append(row)
    return found[::-1]


def holder(run: Path) -> dict[str, Any] | None:
    """Return who holds a run now (pid, host, started); None if no living process does.

    On this host the kernel's lock decides, and it is asked only about a process that lives: an owner that died holds
    nothing. Another host's kernel cannot be asked: there the heartbeat of the lock file decides.
    """
    path = run / "lock.json"
    try:
        with path.open(encoding="utf-8") as file:
            owner: Any = json.loads(file.read() or "{}")
            if not isinstance(owner, dict) or "pid" not in owner:
                return None
            if owner.get("host") != socket.gethostname():
                return owner if time.time() - path.stat().st_mtime < STALE_SECONDS else None
            os.kill(int(owner["pid"]), 0)
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
    except (BlockingIOError, PermissionError):
        return dict(owner)
    except (OSError, ValueError):  # no lock, no such process, a file that is just being written
        return None


def status(run: Path, state: Mapping[str, Any]) -> str:
    """Return running, stopped, finished, failed; interrupted for a run whose process died."""
    if holder(run) is not None:
        return "running"
    said = str(state.get("status", "broken"))
    return "interrupted" if said == "running" else said


def summary(run: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run as `ls` shows it; only the end of metrics.jsonl is read.

    step, steps, tokens; loss of the last step; valid_loss, bits_per_byte of the last evaluation; tok_per_s, the mean of
    the last steps; age_seconds since it last wrote.
    """
    train: list[Row] = []
    evaluation: Row = {}
    for line in backwards(run / "metrics.jsonl"):
        if train and evaluation and len(train) >= RECENT:
            break
        wanted = (len(train) < RECENT and '"train"' in line) or (not evaluation and '"eval"' in line)
        row = row_of(line) if wanted else None
        if row and row.get("kind") == "train" and len(train) < RECENT:
            train.append(row)
        elif row and row.get("kind") == "eval" and not evaluation:
            evaluation = row
    speeds = [row["tok_per_s"] for row in train if row.get("tok_per_s")]
    written = [path.stat().st_mtime for name in ("run.json", "metrics.jsonl") if (path := run / name).is_file()]
    return {
        "name": run.name,
        "status": status(run, state),
        "step": (train[0]["step"] if train else 0) or state.get("step") or 0,
        "steps": state.get("steps"),
        "tokens": (train[0].get("tokens") if train else None) or state.get("tokens"),
        "loss": next((row["loss"] for row in train if row.get("loss") is not None), None),
        "valid_loss": evaluation.get("valid_loss"),
        "bits_per_byte": evaluation.get("bits_per_byte"),
        "tok_per_s": round(sum(speeds) / len(speeds), 1) if speeds else None,
        "age_seconds": max(0, round(time.time() - max(written))),
    }


def points(rows: Sequence[Row], kind: str, key: str, against: str = "step") -> list[tuple[int, float]]:
    """Return (step, value) of every row of a kind that has the value; `against` may be `tokens`."""
    return [
        (row[against], row[key])
        for row in rows
        if row.get("kind") == kind and isinstance(row.get(key), int | float) and isinstance(row.get(against), int)
    ]


def size(path: Path) -> int:
    """Return the bytes of a file or of everything below a directory."""
    return sum(item.stat().st_size for item in (path.rglob("*") if path.is_dir() else [path]) if item.is_file())


def checkpoints(run: Path) -> list[dict[str, Any]]:
    """Return the committed checkpoints, oldest first: step, bytes, valid_loss, and whether it is the best."""
    root = run / "checkpoints"
    pointer = root / "best"
    best = read(pointer).get("step") if pointer.is_file() else None
    found = []
    for path in sorted(root.glob("step-*")):
        if (match := STEP.fullmatch(path.name)) and path.is_dir():
            manifest = path / "manifest.json"
            loss = read(manifest).get("valid_loss") if manifest.is_file() else None
            found.append(
                {"step": int(match[1]), "bytes": size(path), "valid_loss": loss, "best": int(match[1]) == best}
            )
    return found


def recipe_values(run: Path) -> dict[str, Any]:
    """Return the dotted keys and values of the recipe of a run; of its frozen values if recipe.yaml is gone."""
    tree = _tree(run)
    return (
        {key: node.plain() for key, node in _leaves(tree)} if tree else dict(read(run / "run.json").get("frozen", {}))
    )


def overrides(run: Path) -> dict[str, Any]:
    """Return the values of a run's recipe that are no defaults, with where each comes from."""
    found: dict[str, Any] = {}
    for key, node in _leaves(tree) if (tree := _tree(run)) else ():
        origin = node.place.text.rpartition("# ")[2].strip()
        if "# " in node.place.text and origin != "default":
            found[key] = {"value": node.plain(), "origin": origin}
    return found


def _tree(run: Path) -> "Node | None":
    """Return the recipe of a run; None if there is none. One that cannot be read is a warning: the rest still can."""
    from megalodon.config import read_layer

    path = run / "recipe.yaml"
    try:
        return read_layer(path) if path.is_file() else None
    except RecipeError as error:
        console.warning(str(error))
        return None


def _leaves(node: "Node", path: str = "") -> "Iterator[tuple[str, Node]]":
    """Yield (dotted key, node) of every value that is no section; entries of a list of sections by name or number."""
    value = node.value
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _leaves(child, f"{path}.{key}" if path else key)
    elif isinstance(value, tuple) and any(isinstance(child.value, dict) for child in value):
        for number, child in enumerate(value):
            name = child.child("name")
            yield from _leaves(child, f"{path}.{name.value if name else number}")
    else:
        yield path, node


def ledger(run: Path) -> list[str]:
    """Return the ledger of the token store that a run's recipe names, as it was printed; none if it is gone."""
    tree = _tree(run)
    if tree is None:
        return []
    from megalodon.data.prepare import Ledger

    if isinstance(store := read(run / "run.json").get("examples"), str):
        return _examples_ledger(Path(store) / "manifest.json")
    directory, name = (node.value if (node := tree.find(key)) else None for key in (["data", "dir"], ["name"]))
    if not (manifest := Path(str(directory or f"data/{name}")) / "manifest.json").is_file():
        return []
    stored = read(manifest).get("ledger")
    if not isinstance(stored, dict) or set(stored) != set(Ledger._fields) or {*map(type, stored.values())} != {int}:
        return []
    return Ledger(**stored).lines()


def _examples_ledger(manifest: Path) -> list[str]:
    from megalodon.data.examples import ExamplesLedger

    stored = read(manifest).get("ledger") if manifest.is_file() else None
    if not isinstance(stored, dict) or set(stored) != set(ExamplesLedger._fields):
        return []
    counts = [value for key, value in stored.items() if key != "policy"]
    return ExamplesLedger(**stored).lines() if {*map(type, counts)} == {int} else []
