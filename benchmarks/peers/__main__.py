"""`make bench`: ours beside what a user would pick instead, in one run, into docs/benchmarks and README.

    python benchmarks/peers                                  everything, about an hour on two quiet cores
    python benchmarks/peers --only decode,train/8M/2048      entries by the beginning of their keys; the rest stays
    python benchmarks/peers --only decode --smoke --out /tmp/x   tiny models, one turn: does it run?

An entry runs in a process of its own; JSON, page and pictures are rewritten after each, so a cut run keeps what it has.
Exit 6 if a figure misses its target, also one that was measured before; 3 if a peer is not installed, or nothing
of what is asked for can be measured here. A smoke test has no targets: it ends with 6 if an entry fails.

Not here: what an entry does (train.py, jax_port.py, cema.py, decode.py, gpu.py), how figures look (page.py,
pictures.py).
"""

import argparse
import difflib
import errno
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
from typing import Any

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
from megalodon.training.host import keep_freed_memory

SECTIONS = {"train": train, "jax": jax_port, "cema": cema, "decode": decode, "gpu": gpu}
NEEDS = {"train": ("transformers",), "jax": ("megalodon_jax", "equinox", "optax"), "decode": ("transformers",)}
"""Modules without which a section has no peer."""
PICTURES = "matplotlib"
"""Draws them; needed whatever is measured."""
DOCS = results.ROOT / "docs"
NO_TARGET: dict[str, Any] = {"at_least": None, "at_most": None, "reached": None}
"""What a figure of a tiny model is held to."""
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
    except KeyboardInterrupt:
        if not given.entry:  # Ctrl-C reaches both processes; one of them says so
            sys.stderr.write(f"make bench: interrupted; {given.out} has the entries that were done\n")
        return 130


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description="Measure ours beside its peers.")
    parser.add_argument("--only", help="entries whose key begins with one of these; all if left out")
    parser.add_argument("--turns", type=int, default=timing.LEAST_TURNS, help="of each side (default %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="tiny models and one turn; needs --out")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of page, JSON and pictures")
    parser.add_argument("--entry", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.turns < 1:
        parser.error(f"--turns {given.turns}: expected at least 1")
    given.out = given.out.resolve()
    if given.smoke and given.out == DOCS:
        parser.error("--smoke measures nothing that belongs into docs: give another folder with --out")
    return given


def _contests(smoke: bool) -> dict[str, Callable[[], timing.Contest]]:
    return {key: build for section in SECTIONS.values() for key, build in section.entries(smoke).items()}


def _chosen(only: str | None, known: Sequence[str]) -> list[str]:
    """The keys that are asked for, in the order of the page. Raises: InputError, EnvironmentFault."""
    wanted = [word.strip().rstrip("/") for word in (only or "").split(",") if word.strip()]
    if only is not None and not wanted:
        raise InputError(f"--only `{only}` names no entry; expected some of {', '.join(SECTIONS)}, or leave it out")
    for word in wanted:
        if not any(_belongs(key, word) for key in known):
            near = difflib.get_close_matches(word, known, 1)
            meant = f"did you mean {near[0]}?" if near else f"expected some of {', '.join(SECTIONS)}, or {known[0]}"
            raise InputError(f"--only {word}: no such entry; {meant}")
    chosen = [key for key in known if not wanted or any(_belongs(key, word) for word in wanted)]
    if lacking := gpu.lacking():
        skipped = [key for key in chosen if key.startswith("gpu/") and key in lacking]
        chosen = [key for key in chosen if key not in skipped]
        if not chosen:
            raise EnvironmentFault(f"--only {only}: nothing of it can be measured here: {lacking[skipped[0]]}")
        for key in skipped:
            sys.stdout.write(f"{key}: skipped, {lacking[key]}\n")
    for section in dict.fromkeys(key.partition("/")[0] for key in chosen):
        for name in (*NEEDS.get(section, ()), PICTURES):
            if importlib.util.find_spec(name) is None:
                raise EnvironmentFault(
                    f"section {section} needs {name}, which is not installed here; `make bench` installs it, "
                    "or pip install -c constraints.txt -e '.[bench]'"
                )
    return chosen


def _belongs(key: str, word: str) -> bool:
    return key == word or key.startswith(f"{word}/")


def _campaign(given: argparse.Namespace) -> int:
    known = list(_contests(given.smoke))
    chosen = _chosen(given.only, known)
    document = results.load(given.out / "benchmarks.json", known)
    command = shlex.join(["python", "benchmarks/peers", *sys.argv[1:]])
    origin = results.origin(command, smoke=given.smoke)
    results.check_alike(given.out / "benchmarks.json", document, chosen, origin)
    _publish(given.out, document)  # what cannot be written is found before an hour is spent
    for key in chosen:
        if results.commit() != origin["commit"]:  # the code was changed since the last entry
            origin = results.origin(command, smoke=given.smoke)
        sys.stdout.write(f"== {key}\n")
        sys.stdout.flush()  # the process of the entry writes to the same place
        begin = time.monotonic()
        entry = _apart(key, given)
        seconds = round(time.monotonic() - begin, 1)
        document["runs"][origin["date"]] = origin
        document["entries"][key] = {"run": origin["date"], "seconds": seconds, **entry}
        document["entries"] = {name: document["entries"][name] for name in known if name in document["entries"]}
        _publish(given.out, document)
        for line in page.lines_of(key, document["entries"][key]):
            sys.stdout.write(f"   {line}\n")
    lines = results.missed(document)
    sys.stdout.write("\n".join([*lines, f"{len(document['entries'])} of {len(known)} entries measured"]) + "\n")
    return 6 if lines else 0


def _publish(out: Path, document: results.Document) -> None:
    """Write JSON, page and pictures; README beside the folder of the checkout. Raises: InputError, EnvironmentFault."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        results.save(out / "benchmarks.json", document)
        page.write(out / "benchmarks.md", document)
        pictures.draw(out, document)
        if out == DOCS:
            page.write_readme(results.ROOT / "README.md", document)
    except OSError as error:
        kind = EnvironmentFault if error.errno in (errno.ENOSPC, errno.EDQUOT) else InputError
        said = (error.strerror or str(error)).lower()
        raise kind(f"{error.filename or out}: {said}; --out takes a folder that can be written") from None


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
        if given.smoke:  # tiny models reach nothing
            found["figures"] = [figure | NO_TARGET for figure in found["figures"]]
    except Exception as error:  # whatever a side does wrong, the others are still measured
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    results.write_whole(given.result, json.dumps(found))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception: the process of an entry ends with this one
    sys.exit(main())
