"""Megalodon beside a Llama of the same size: rates tuned alike, then both trained over seeds; table and curves.

    python benchmarks/compare.py --train books/train --valid books/valid            # the pair books-tiny, in hours
    python benchmarks/compare.py --recipe quickstart --steps 60 --seeds 1 --out /tmp/x.json

First each model is trained for a quarter of the horizon at the same rates, twice as high from one to the next; where
the best one stands at an end, the row is continued. Then each is trained at its best rate for the whole horizon, once
a seed; a pair of runs of one seed reads the same windows in the same order. Every run that has ended is kept in the
JSON file and every run that has begun in the folder, so the same command continues after a stop. From the file alone
`--page docs/results.md` writes the section between the marks, and the picture beside it.
Not here: training itself (megalodon), which runs in processes of its own, several at a time on a few cores each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

MARKS = "<!-- compare: written by benchmarks/compare.py -->", "<!-- /compare -->"
QUARTER = 4
Row = dict[str, Any]


class Wanted(NamedTuple):
    """One run."""

    recipe: str
    rate: float
    seed: int
    steps: int

    @property
    def key(self) -> str:
        """Its name in the file and in the folder."""
        return f"{self.recipe} lr {self.rate:g} seed {self.seed} steps {self.steps}"


class Runs:
    """The runs of a comparison: those of the file, and those that are still to be made."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self._lock = given, threading.Lock()
        self.found: dict[str, Row] = json.loads(given.out.read_text())["runs"] if given.out.exists() else {}

    def make(self, wanted: Sequence[Wanted]) -> None:
        """Train what is missing, several at a time, and note each as it ends."""
        missing = [one for one in wanted if one.key not in self.found]
        with ThreadPoolExecutor(self.given.jobs) as pool:
            list(pool.map(self._train, missing))  # raises what a run raised

    def _train(self, one: Wanted) -> None:
        run = self.given.folder / one.key.replace(" ", "-")
        tuned = one.steps == self.given.steps
        changes = [f"optim.lr={one.rate:g}", f"train.seed={one.seed}", f"train.max_steps={one.steps}"]
        every = max(1, one.steps // 8) if tuned else one.steps  # scoring costs a third of training on as many tokens
        changes += [f"eval.every={every}", f"eval.at_start={tuned}", "eval.samples.prompts=[]"]
        changes += [f"checkpoint.export={tuned}"]
        sys.stderr.write(f"{one.key}: {run}\n")
        megalodon(self.given, "pretrain", one.recipe, *changes, "-o", str(run))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        evaluations = [row for row in rows if row["kind"] == "eval"]
        about = json.loads((run / "run.json").read_text())
        row = {
            "bits_per_byte": evaluations[-1]["bits_per_byte"],
            "loss": evaluations[-1]["valid_loss"],
            "tokens": about["tokens"],
            "parameters": about["parameters"],
            "curve": [[e["tokens"], e["bits_per_byte"]] for e in evaluations],
        }
        with self._lock:
            self.found[one.key] = row
            self.write()
        sys.stderr.write(f"{one.key}: {row['bits_per_byte']:.4f} bits per byte\n")

    def write(self) -> None:
        """Keep what was found, whole or not at all."""
        g = self.given
        about = {"recipe": g.recipe, "steps": g.steps, "seeds": g.seeds, "rates": g.rates}
        aside = g.out.with_suffix(".part")
        aside.write_text(json.dumps({**about, "runs": dict(sorted(self.found.items()))}, indent=1) + "\n")
        aside.replace(g.out)

    def sweep(self, recipe: str) -> dict[float, float]:
        """Rate -> bits per byte after a quarter of the horizon, as far as they are known, lowest rate first."""
        seed, steps = self.given.seeds[0], self.given.steps // QUARTER
        known = {
            rate: self.found[one.key]["bits_per_byte"]
            for rate in _rates(self.given.rates)
            if (one := Wanted(recipe, rate, seed, steps)).key in self.found
        }
        return dict(sorted(known.items()))

    def final(self, recipe: str) -> list[Row]:
        """The runs of the whole horizon at the best rate of the sweep, a seed each."""
        best = _best(self.sweep(recipe))
        return [self.found[Wanted(recipe, best, seed, self.given.steps).key] for seed in self.given.seeds]


def _rates(first: Sequence[float]) -> list[float]:
    """Every rate a sweep may come to: those given, and the powers of two around them."""
    return sorted({*first, *(min(first) / 2**n for n in range(1, 5)), *(max(first) * 2**n for n in range(1, 5))})


def _best(sweep: dict[float, float]) -> float:
    return min(sweep, key=lambda rate: sweep[rate])


def tune(runs: Runs, recipes: Sequence[str]) -> None:
    """Sweep both models over the same rates, and on as long as the best of either stands at an end."""
    seed, steps, rates = runs.given.seeds[0], runs.given.steps // QUARTER, set(runs.given.rates)
    while True:
        runs.make([Wanted(recipe, rate, seed, steps) for rate in sorted(rates) for recipe in recipes])
        best = [_best(runs.sweep(recipe)) for recipe in recipes]
        more = {min(rates) / 2} if min(rates) in best else set()
        more |= {max(rates) * 2} if max(rates) in best else set()
        if not more or not more <= set(_rates(runs.given.rates)):
            return
        rates |= more


def megalodon(given: argparse.Namespace, *command: str) -> None:
    """Run a command on the data of the comparison; its own words go to stderr. Ends with its code if it fails."""
    data = [f"data.dir={given.folder / 'data'}"]
    data += [f"data.sources.0.path={given.train}"] if given.train else []
    data += [f"data.valid.path={given.valid}"] if given.valid else []
    threads = max(1, (os.cpu_count() or 1) // given.jobs)
    done = subprocess.run(
        [sys.executable, "-m", "megalodon_cli", *command, *data],
        stdout=sys.stderr if given.verbose else subprocess.DEVNULL,
        stderr=None if given.verbose else subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit {done.returncode}: {(done.stderr or '').strip()[-2000:]}")


def page(runs: Runs, recipes: Sequence[str], picture: str) -> Iterator[str]:
    """The section of the page, in Markdown lines."""
    g, finals = runs.given, [runs.final(recipe) for recipe in recipes]
    ours, theirs = ([row["bits_per_byte"] for row in final] for final in finals)
    tokens = finals[0][0]["tokens"]
    sizes = " and ".join(f"{final[0]['parameters']:,}" for final in finals)
    rates = [_best(runs.sweep(recipe)) for recipe in recipes]
    below = sum(a < b for a, b in zip(ours, theirs, strict=True))
    yield f"`{g.recipe}` and `{recipes[1]}`: {sizes} parameters, {tokens:,} tokens, the same windows in the same order."
    yield f"Validation bits per byte; Megalodon is lower in {below} of {len(ours)} seeds."
    yield ""
    yield f"| seed | Megalodon, lr {rates[0]:g} | Llama, lr {rates[1]:g} | difference |"
    yield "| ---: | ---: | ---: | ---: |"
    for seed, a, b in zip(g.seeds, ours, theirs, strict=True):
        yield f"| {seed} | {a:.4f} | {b:.4f} | {a - b:+.4f} |"
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    cells = " | ".join(_spread(values) for values in (ours, theirs, differences))
    yield f"| mean ± sd | {cells} |"
    yield ""
    yield f"![Validation bits per byte over tokens, both models, every seed]({picture})"
    yield ""
    steps = g.steps // QUARTER
    yield f"Rates, after {steps} steps (a quarter of the horizon, its own schedule), seed {g.seeds[0]}, bits per byte:"
    yield ""
    sweeps = [runs.sweep(recipe) for recipe in recipes]
    every = sorted(sweeps[0].keys() | sweeps[1].keys())
    yield f"| peak rate | {' | '.join(f'{rate:g}' for rate in every)} |"
    yield f"| --- | {' | '.join('---:' for _ in every)} |"
    for name, sweep in zip(("Megalodon", "Llama"), sweeps, strict=True):
        best = _best(sweep)
        shown = [("-" if r not in sweep else f"**{sweep[r]:.4f}**" if r == best else f"{sweep[r]:.4f}") for r in every]
        yield f"| {name} | {' | '.join(shown)} |"


def _spread(values: Sequence[float]) -> str:
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.4f} ± {sd:.4f}"


def draw(runs: Runs, recipes: Sequence[str], file: Path) -> None:
    """The curves of every seed, and the sweep."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "compare"  # the same picture, the same bytes
    import matplotlib.pyplot as plt

    figure, (curves, sweep) = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    for name, recipe, color in zip(("Megalodon", "Llama"), recipes, ("C0", "C1"), strict=True):
        for number, row in enumerate(runs.final(recipe)):
            points = [(tokens / 1e6, bits) for tokens, bits in row["curve"] if tokens]
            curves.plot(*zip(*points, strict=True), color=color, alpha=0.8, label=None if number else name)
        sweep.plot(*zip(*runs.sweep(recipe).items(), strict=True), "o-", color=color, label=name)
    curves.set(xlabel="million tokens", ylabel="validation bits per byte")
    sweep.set(xlabel="peak learning rate, a quarter of the horizon", xscale="log")
    for axis in (curves, sweep):
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(file, metadata={"Date": None})


def around(target: Path) -> tuple[str, str]:
    """What stands before and behind the section of a page. Exits if it has no place for one."""
    before, first, rest = (target.read_text() if target.is_file() else "").partition(MARKS[0])
    _, last, after = rest.partition(MARKS[1])
    if not first or not last:
        sys.exit(f"{target}: no place for the section; expected a line {MARKS[0]} and a line {MARKS[1]}")
    return before, after


def put(text: str, target: Path) -> None:
    """Replace what stands between the marks of a page."""
    before, after = around(target)
    target.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")


def main() -> None:
    """Train what is missing, then write the section and the picture."""
    parser = argparse.ArgumentParser(description="Megalodon and a Llama of the same size, trained alike.")
    parser.add_argument("--recipe", default="books-tiny", help="the pair is NAME and NAME-llama")
    parser.add_argument("--train", type=Path, help="folder of .txt files, for a recipe that needs one")
    parser.add_argument("--valid", type=Path, help="the same, held out; without it the recipe's own part")
    parser.add_argument("--steps", type=int, default=256, help="horizon; the sweep takes a quarter of it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; the cores are shared out")
    parser.add_argument("--folder", type=Path, default=Path("runs/compare"), help="where the runs go")
    parser.add_argument("--out", type=Path, default=Path("docs/comparison.json"), help="what was found")
    parser.add_argument("--page", type=Path, help="page whose section is written, its picture beside it")
    parser.add_argument("--verbose", action="store_true", help="show what the runs say")
    given = parser.parse_args()
    recipes = (given.recipe, f"{given.recipe}-llama")
    if given.page:
        around(given.page)  # not after hours
    given.folder.mkdir(parents=True, exist_ok=True)
    runs = Runs(given)
    if not (given.folder / "data" / "manifest.json").exists():
        megalodon(given, "tokenize", given.recipe)
    tune(runs, recipes)
    finals = [Wanted(r, _best(runs.sweep(r)), seed, given.steps) for seed in given.seeds for r in recipes]
    runs.make(finals)
    picture = given.out.with_suffix(".svg")
    draw(runs, recipes, picture)
    text = "\n".join(page(runs, recipes, picture.name))
    sys.stdout.write(text + "\n")
    if given.page:
        put(text, given.page)


if __name__ == "__main__":
    main()
