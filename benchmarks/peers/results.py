"""docs/benchmarks.json: every entry that was measured, and the run each comes from. Not here: how they look (page.py).

    {"format": 1,
     "runs":    {ID: {"date", "device", "cores", "threads", "versions", "commit", "command", "smoke"}},
     "entries": {KEY: {"run": ID, "seconds", "turns", "rates": {SIDE: SPREAD}, "figures": [FIGURE, …]}}}

SPREAD is {"median", "low", "high", "unit"}, FIGURE what `timing.figure` returns; an entry that failed has "error"
instead of rates and figures; "smoke" is there only where it is true. Figures of two machines, or of a smoke test and
of a measurement, do not stand in one document; those of several commits may, and the page says which are of which.
"""

import datetime
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from megalodon.errors import InputError
from megalodon_kernels.measuring import machine

FORMAT = 1
ROOT = Path(__file__).resolve().parents[2]
WRITTEN = ("docs/benchmarks.md", "docs/benchmarks.json", "docs/decode_depth.svg", "docs/train_length.svg", "README.md")
"""What a campaign itself changes in the checkout."""
ORIGIN = ("date", "device", "cores", "threads", "versions", "commit", "command")
MACHINE = ("device", "cores", "threads")
"""What entries of one document must have alike: all of the CPU, and all of the GPU."""

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
    for name, run in runs.items():
        if not isinstance(run, dict) or not run.keys() >= set(ORIGIN):
            raise InputError(f"{path}: run {name} is incomplete; {advice}")
    for key, entry in entries.items():
        if key not in known:
            raise InputError(f"{path}: entry {key} is not measured by this version; {advice}")
        parts = {"rates", "figures", "turns", "seconds"}
        whole = isinstance(entry, dict) and ("error" in entry or parts <= entry.keys())
        if not whole or entry.get("run") not in runs:
            raise InputError(f"{path}: entry {key} is incomplete; {advice}")
    return found


def check_alike(path: Path, document: Document, chosen: Collection[str], origin: Mapping[str, Any]) -> None:
    """Refuse to measure beside figures that stay and are of another machine, or of a smoke test.

    Args:
        chosen: keys that are measured now, on `origin`.
    Raises: InputError.
    """
    advice = "measure everything, without --only, or write elsewhere with --out"
    kinds = {key.startswith("gpu/") for key in chosen}
    for key, entry in document["entries"].items():
        before = document["runs"][entry["run"]]
        if key in chosen:
            continue
        if before.get("smoke", False) != origin.get("smoke", False):
            made = "a smoke test" if before.get("smoke") else "no smoke test"
            raise InputError(f"{path}: the figures of {key} are of {made}; {advice}")
        if key.startswith("gpu/") in kinds and any(before[name] != origin[name] for name in MACHINE):
            raise InputError(f"{path}: {key} was measured on {place(before)}, this is {place(origin)}; {advice}")


def place(run: Mapping[str, Any]) -> str:
    """The machine of a run in words."""
    return f"{run['device']}, {run['cores']} cores, {run['threads']} threads"


def save(path: Path, document: Document) -> None:
    """Write the document; runs that no entry comes from are left out."""
    used = {entry["run"] for entry in document["entries"].values()}
    document["runs"] = {name: run for name, run in document["runs"].items() if name in used}
    write_whole(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a text beside its place first, so that it is never there by half."""
    aside = path.with_suffix(".tmp")
    aside.write_text(text, encoding="utf-8")
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


def origin(command: str, *, smoke: bool = False) -> dict[str, Any]:
    """What figures depend on: processor, cores, threads, versions, commit, date."""
    names = ("torch", "transformers", "megalodon-jax", "jax", "numpy")
    versions = [f"{name} {version}" for name in names if (version := _version(name))]
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    here = machine(torch.device("cpu"))
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "device": ", ".join([here["device"], *gpu]),
        "cores": len(os.sched_getaffinity(0)),
        "threads": here["threads"],
        "versions": ", ".join([f"Python {here['python']}", *versions]),
        "commit": commit(),
        "command": command,
        **({"smoke": True} if smoke else {}),
    }


def commit() -> str:
    """The commit of the code, with a plus if something but the report itself was changed since."""
    name = _git("rev-parse", "--short", "HEAD") or "unknown"
    changed = _git("status", "--porcelain", "--", ".", *(f":!{path}" for path in WRITTEN))
    return name + ("+" if changed else "")


def _git(*arguments: str) -> str:
    """What git prints of this checkout; empty where there is no git, or it says no."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
