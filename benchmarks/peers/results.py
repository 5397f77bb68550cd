"""docs/benchmarks.json: every entry that was measured, and the run each comes from. Not here: how they look (page.py).

    {"format": 1,
     "runs":    {ID: {"date", "device", "cores", "threads", "versions", "commit", "command"}},
     "entries": {KEY: {"run": ID, "seconds", "turns", "rates": {SIDE: SPREAD}, "figures": [FIGURE, …]}}}

SPREAD is {"median", "low", "high", "unit"}, FIGURE what `timing.figure` returns; an entry that failed has "error"
instead of rates and figures.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from megalodon.errors import InputError

FORMAT = 1
ROOT = Path(__file__).resolve().parents[2]
WRITTEN = ("docs/benchmarks.md", "docs/benchmarks.json", "docs/decode_depth.svg", "docs/train_length.svg", "README.md")
"""What a campaign itself changes in the checkout."""

Document = dict[str, Any]
Entry = dict[str, Any]


def empty() -> Document:
    """A document in which nothing was measured."""
    return {"format": FORMAT, "runs": {}, "entries": {}}


def load(path: Path, known: Collection[str]) -> Document:
    """Read what was measured before; nothing if the file is not there.

    Args:
        known: keys that this version measures.
    Raises:
        InputError: the file is no document of this format, or holds an entry that is not measured any more.
    """
    if not path.exists():
        return empty()
    advice = "delete it, or write elsewhere with --out"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({' '.join(str(error).split())}); {advice}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        given = found.get("format") if isinstance(found, dict) else type(found).__name__
        raise InputError(f"{path}: format {given}, expected {FORMAT}; {advice}")
    runs, entries = found.get("runs"), found.get("entries")
    if not isinstance(runs, dict) or not isinstance(entries, dict):
        raise InputError(f"{path}: `runs` or `entries` is missing; {advice}")
    for key, entry in entries.items():
        if key not in known:
            raise InputError(f"{path}: entry {key} is not measured by this version; {advice}")
        whole = isinstance(entry, dict) and ("error" in entry or {"rates", "figures", "turns"} <= entry.keys())
        if not whole or entry.get("run") not in runs:
            raise InputError(f"{path}: entry {key} is incomplete; {advice}")
    return found


def save(path: Path, document: Document) -> None:
    """Write the document whole, beside its place first; runs that no entry comes from are left out."""
    used = {entry["run"] for entry in document["entries"].values()}
    document["runs"] = {name: run for name, run in document["runs"].items() if name in used}
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.replace(path)


def missed(document: Document) -> list[str]:
    """A line for every entry that failed and every figure that does not reach its target."""
    lines = []
    for key, entry in document["entries"].items():
        if "error" in entry:
            lines.append(f"{key}: {entry['error']}")
        for found in entry.get("figures", ()):
            if found["reached"] is False:
                lines.append(f"{key}: {found['figure']}: {found['median']:g}, expected {target(found)}")
    return lines


def target(figure: Mapping[str, Any]) -> str:
    """The target of a figure in its unit: `≥ 1.15`, `≤ 55 %`; empty without one."""
    percent = figure["unit"] == "%"
    shown = [
        f"{sign} {limit * 100:g} %" if percent else f"{sign} {limit:g}"
        for sign, limit in (("≥", figure["at_least"]), ("≤", figure["at_most"]))
        if limit is not None
    ]
    return " and ".join(shown)


def origin(command: str) -> dict[str, Any]:
    """What figures depend on besides the code: processor, cores, threads, versions, commit, date."""
    names = ("torch", "transformers", "megalodon-jax", "jax", "numpy")
    versions = [f"{name} {version}" for name in names if (version := _version(name))]
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": ", ".join([_processor(), *gpu]),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
        "commit": _commit(),
        "command": command,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit of the code, with a plus if something but the report itself was changed since."""
    git = ["git", "-C", str(ROOT)]
    names = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    others = ["status", "--porcelain", "--", ".", *(f":!{path}" for path in WRITTEN)]
    changed = subprocess.run([*git, *others], capture_output=True, text=True, check=False)
    return (names.stdout.strip() or "unknown") + ("+" if changed.stdout.strip() else "")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
