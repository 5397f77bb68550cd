"""`make faults`: every campaign and measurement of reliability, one after the other, into docs/reliability.

    python benchmarks/faults                                   all of it, well under 45 minutes on two quiet cores
    python benchmarks/faults --only A,B --kills 20 --seed 7    these sections; the others keep what was measured before

Exit 6 if a figure misses its limit, also one that was measured before. Not here: what a section does (its own script),
how the tables look (report.py).
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import random
import runpy
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import report

ROOT = Path(__file__).resolve().parents[2]
HERE = Path("benchmarks/faults")
DATA = Path("../shared/data/books/train")
"""Real text for the sections that take it, if it lies there and no --data is given."""
DOCUMENT, FIGURES = "reliability.md", "reliability.json"


Figures = Mapping[str, float]


def _at_least(name: str, limit: float) -> tuple[str, Callable[[Figures], bool]]:
    return f"≥ {limit:,.0f}", lambda found: found[name] >= limit


class Part(NamedTuple):
    """A section of the report: a script that writes its figures."""

    title: str
    script: Path
    kills: int | None = None
    """How many processes it kills unless --kills says otherwise; None if it takes no such number."""
    takes_seed: bool = False
    data: str | None = None
    """Its option for a folder of text."""
    options: tuple[str, ...] = ()
    limits: Mapping[str, tuple[str, Callable[[Figures], bool]]] = {}
    """Of a script that writes bare numbers: figure -> its limit, and whether the figures keep to it."""


PARTS = {
    "A": Part("training killed", HERE / "training_kills.py", kills=200, takes_seed=True),
    "B": Part("tokenize killed", HERE / "tokenize_kills.py", kills=50, takes_seed=True, data="--data"),
    "C": Part("power loss", HERE / "power_loss.py", takes_seed=True),
    "list": Part("fault list", HERE / "fault_tests.py"),
    "speed": Part(
        "tokenize: speed",
        Path("benchmarks/tokenize_speed.py"),
        data="--data",
        limits={"of_2_times_1_process": ("≥ 0.9", lambda found: found["of_2_times_1_process"] >= 0.9)},
    ),
    "memory": Part(
        "tokenize: memory",
        Path("benchmarks/tokenize_memory.py"),
        limits={"peak_rss_mb": ("< 600 MB", lambda found: found["peak_rss_mb"] < 600)},
    ),
    "loader": Part(
        "loader",
        Path("benchmarks/loader_speed.py"),
        limits={
            f"{reader}_doc_{length}_tokens_per_s": _at_least(f"{reader}_doc_{length}_tokens_per_s", 50e6)
            for reader in ("mmap", "pread")
            for length in (1024, 4096, 16384)
        },
    ),
    "wait": Part("waiting for data", HERE / "data_wait.py", data="--data"),
    "checkpoint": Part(
        "cost of checkpoints",
        Path("benchmarks/checkpoint_cost.py"),
        options=("books-tiny",),
        limits={
            "share_in_background": ("< 2 % of the time", lambda found: found["share_in_background"] < 0.02),
            "stall_in_background": (
                "≤ 1.25 x copy + 10 ms",
                lambda found: found["stall_in_background"] <= 1.25 * found["copy"] + 0.01,
            ),
        },
    ),
}


def main() -> int:
    """Run the sections that are asked for, write both files. Returns the exit code."""
    given = _options()
    seed = random.SystemRandom().randrange(2**32) if given.seed is None else given.seed
    sections = report.load(given.out / FIGURES)
    for key in given.only:
        sys.stdout.write(f"\n== {key}: {PARTS[key].title}\n")
        sys.stdout.flush()
        sections[key] = _measure(PARTS[key], given.kills, seed, given.data)
        sections = {name: sections[name] for name in PARTS if name in sections}
        report.save(given.out / FIGURES, sections)
        _write_document(given.out / DOCUMENT, sections)
    missed = [key for key, section in sections.items() if not report.passed(section)]
    for key in missed:
        for entry in sections[key]["figures"]:
            if entry["ok"] is False:
                sys.stdout.write(f"{key}: {entry['figure']}: {entry['value']}, expected {entry['limit']}\n")
    sys.stdout.write(f"{len(sections)} of {len(PARTS)} sections measured, {len(missed)} miss\n")
    return 6 if missed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make faults", description="Measure what reliability.md promises.")
    parser.add_argument("--only", default=",".join(PARTS), help=f"sections, of {','.join(PARTS)}")
    parser.add_argument("--kills", type=int, default=None, help="of each campaign; 200 and 50 if left out")
    parser.add_argument("--seed", type=int, default=None, help="drawn and printed if left out")
    parser.add_argument("--data", type=Path, default=None, help="folder of .txt files to tokenize")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the report")
    given = parser.parse_args()
    given.only = given.only.split(",")
    if unknown := [key for key in given.only if key not in PARTS]:
        parser.error(f"--only {unknown[0]}: expected some of {','.join(PARTS)}")
    given.out = given.out.resolve()
    if given.data is None and (ROOT / DATA).is_dir():
        given.data = ROOT / DATA
    return given


def _measure(part: Part, kills: int | None, seed: int, data: Path | None) -> report.Section:
    """Run the script of a section and return its figures with where and when they were measured."""
    options = list(part.options)
    if part.kills is not None:
        options += ["--kills", str(kills or part.kills)]
    if part.takes_seed:
        options += ["--seed", str(seed)]
    if part.data and data:
        options += [part.data, str(data)]
    shown = [word if word != str(data) else "BOOKS" for word in options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        command = [sys.executable, str(ROOT / part.script), *options, "--json", str(path)]
        ended = subprocess.run(command, cwd=ROOT, env=environment, check=False)
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"figures": []}
    if isinstance(numbers := found["figures"], dict):
        found["figures"] = [_judged(name, numbers, part) for name in numbers]
    if not found["figures"]:
        what = f"{part.script} ended with {ended.returncode} and without figures"
        found["figures"] = [report.figure("measured", what, "figures", False)]
    return {
        "title": part.title,
        "command": shlex.join(["python", str(part.script), *shown]),
        "seconds": round(time.monotonic() - began, 1),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **_machine(),
        **{key: value for key, value in found.items() if key not in ("name", "seconds")},
    }


def _judged(name: str, numbers: Figures, part: Part) -> dict[str, Any]:
    limit, keeps = part.limits.get(name, (None, None))
    return report.figure(name.replace("_", " "), numbers[name], limit, keeps(numbers) if keeps else None)


def _machine() -> dict[str, Any]:
    """What a figure depends on besides the code: processor, cores, versions, commit."""
    names = ("torch", "numpy", "sentencepiece", "safetensors")
    versions = [f"Python {platform.python_version()}", *(f"{n} {importlib.metadata.version(n)}" for n in names)]
    return {
        "device": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": ", ".join(versions),
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit of the code, with a plus if something but the report itself was changed since."""
    git = ["git", "-C", str(ROOT)]
    names = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    others = ["status", "--porcelain", "--", ".", f":!docs/{DOCUMENT}", f":!docs/{FIGURES}"]
    changed = subprocess.run([*git, *others], capture_output=True, text=True, check=False)
    return (names.stdout.strip() or "unknown") + ("+" if changed.stdout.strip() else "")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _write_document(path: Path, sections: Mapping[str, report.Section]) -> None:
    """Rewrite the generated tables; the prose around them stays."""
    empty = "# Reliability\n\n<!-- figures -->\n<!-- /figures -->\n\n<!-- faults -->\n<!-- /faults -->\n"
    text = path.read_text(encoding="utf-8") if path.exists() else empty
    items = runpy.run_path(str(ROOT / "tests/faults/fault_list.py"))["ITEMS"]
    text = report.between(text, "figures", report.figure_lines(sections))
    text = report.between(text, "faults", report.fault_lines(items, sections.get("list", {}).get("outcomes", {})))
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
