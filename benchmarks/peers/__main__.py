"""`make bench`: ours beside what a user would pick instead, in one run, into docs/benchmarks and README.

    python benchmarks/peers                                  everything, about an hour on two quiet cores
    python benchmarks/peers --only decode,train/8M/2048      entries by the beginning of their keys; the rest stays
    python benchmarks/peers --only decode --smoke --out /tmp/x   tiny models, one turn: does it run?

An entry runs in a process of its own; the JSON is rewritten after each, so a cut run keeps what it has. Exit 6 if a
figure misses its target, also one that was measured before; 3 if a peer is not installed. Not here: what an entry
does (train.py, jax_port.py, cema.py, decode.py, gpu.py), how figures look (page.py, pictures.py).
"""

import argparse
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cema
import decode
import gpu
import jax_port
import page
import pictures
import results
import timing
import train
from megalodon.errors import EnvironmentFault, InputError, MegalodonError
from megalodon.training.host_memory import keep_freed_memory

SECTIONS = {"train": train, "jax": jax_port, "cema": cema, "decode": decode, "gpu": gpu}
NEEDS = {"train": ("transformers",), "jax": ("megalodon_jax", "equinox", "optax"), "decode": ("transformers",)}
"""Modules without which a section has no peer."""
LIMIT = 2400
"""Seconds an entry may take; compilation and the longest rows included."""


def main() -> int:
    """Measure the entries that are asked for, write what they found. Returns the exit code."""
    given = _options()
    try:
        if given.entry:
            _measure(given)
            return 0
        return _campaign(given)
    except MegalodonError as error:
        sys.stderr.write(f"make bench: {error}\n")
        return error.exit_code


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description="Measure ours beside its peers.")
    parser.add_argument("--only", default="", help="entries whose key begins with one of these; all if left out")
    parser.add_argument("--turns", type=int, default=timing.LEAST_TURNS, help="of each side (default %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="tiny models and one turn; needs --out")
    parser.add_argument("--out", type=Path, default=results.ROOT / "docs", help="folder of page, JSON and pictures")
    parser.add_argument("--entry", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.turns < 1:
        parser.error(f"--turns {given.turns}: expected at least 1")
    if given.smoke and given.out == results.ROOT / "docs":
        parser.error("--smoke measures nothing that belongs into docs: give another folder with --out")
    return given


def _contests(smoke: bool) -> dict[str, Callable[[], timing.Contest]]:
    return {key: build for section in SECTIONS.values() for key, build in section.entries(smoke).items()}


def _chosen(only: str, known: Sequence[str]) -> list[str]:
    """The keys that are asked for, in the order of the page. Raises: InputError, EnvironmentFault."""
    wanted = [word.strip().rstrip("/") for word in only.split(",") if word.strip()]
    for word in wanted:
        if not any(_belongs(key, word) for key in known):
            raise InputError(
                f"--only {word}: no such entry; expected some of {', '.join(SECTIONS)} or a key: {', '.join(known)}"
            )
    chosen = [key for key in known if not wanted or any(_belongs(key, word) for word in wanted)]
    if lacking := gpu.lacking():
        skipped = [key for key in chosen if key.startswith("gpu/") and key in lacking]
        for key in skipped:
            sys.stdout.write(f"{key}: skipped, {lacking[key]}\n")
        chosen = [key for key in chosen if key not in skipped]
    for section in {key.partition("/")[0]: None for key in chosen}:
        for name in NEEDS.get(section, ()):
            if importlib.util.find_spec(name) is None:
                raise EnvironmentFault(
                    f"section {section} needs {name}, which is not installed here; `make bench` installs it, "
                    f"or pip install -c constraints.txt -e '.[bench]', or leave {section} out with --only"
                )
    return chosen


def _belongs(key: str, word: str) -> bool:
    return key == word or key.startswith(f"{word}/")


def _campaign(given: argparse.Namespace) -> int:
    known = list(_contests(given.smoke))
    chosen = _chosen(given.only, known)
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "benchmarks.json"
    document = results.load(path, known)
    options = [word for word in sys.argv[1:] if word]
    origin = results.origin(shlex.join(["python", "benchmarks/peers", *options]))
    document["runs"][origin["date"]] = origin
    for key in chosen:
        sys.stdout.write(f"== {key}\n")
        sys.stdout.flush()
        begin = time.monotonic()
        entry = _apart(key, given)
        seconds = round(time.monotonic() - begin, 1)
        document["entries"][key] = {"run": origin["date"], "seconds": seconds, **entry}
        document["entries"] = {name: document["entries"][name] for name in known if name in document["entries"]}
        results.save(path, document)
        page.write(given.out / "benchmarks.md", document)
        for line in page.lines_of(key, document["entries"][key]):
            sys.stdout.write(f"   {line}\n")
    pictures.draw(given.out, document)
    if given.out == results.ROOT / "docs":
        page.write_readme(results.ROOT / "README.md", document)
    lines = results.missed(document)
    sys.stdout.write("\n".join([*lines, f"{len(document['entries'])} of {len(known)} entries measured"]) + "\n")
    return 6 if lines else 0


def _apart(key: str, given: argparse.Namespace) -> results.Entry:
    """Measure an entry in a process of its own: fresh memory, and a crash is a line of the page."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "entry.json"
        command = [sys.executable, str(Path(__file__).parent), "--entry", key, "--result", str(path)]
        command += ["--turns", str(1 if given.smoke else given.turns), "--out", str(given.out)]
        command += ["--smoke"] if given.smoke else []
        try:
            ended = subprocess.run(command, cwd=results.ROOT, env=environment, check=False, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return {"error": f"not done in {LIMIT} s"}
        if not path.exists():
            return {"error": f"its process ended with {ended.returncode} and without figures"}
        found: results.Entry = json.loads(path.read_text(encoding="utf-8"))
        return found


def _measure(given: argparse.Namespace) -> None:
    """In the process of one entry: build it, let its sides take turns, write what was found or what went wrong."""
    keep_freed_memory()  # as `megalodon pretrain` does on a CPU; for every side alike
    try:
        contest = _contests(given.smoke)[given.entry]()
        rates = timing.take_turns(contest.sides, given.turns, lambda line: sys.stderr.write(f"   {line}\n") and None)
        found: results.Entry = {
            "turns": given.turns,
            "rates": {
                name: {**timing.spread(values), "unit": contest.units.get(name, "tokens/s")}
                for name, values in rates.items()
            },
            "figures": [*(ratio.figure(rates) for ratio in contest.figures), *contest.constants],
        }
    except Exception as error:  # whatever a side does wrong, the others are still measured
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    given.result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception: the process of an entry ends with this one
    sys.exit(main())
