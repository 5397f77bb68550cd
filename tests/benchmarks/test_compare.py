"""`make compare`: what is trained in which order, what is kept, what the page says; the training itself is pretend."""

import argparse
import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compare.py"


@pytest.fixture
def compare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def given(tmp_path: Path, **changes: object) -> argparse.Namespace:
    values = {"recipe": "pair", "train": None, "valid": None, "steps": 40, "seeds": [1, 2], "rates": [1e-3, 2e-3]}
    values |= {"jobs": 2, "folder": tmp_path / "runs", "out": tmp_path / "found.json", "verbose": False}
    return argparse.Namespace(**(values | changes))


@pytest.fixture
def trained(compare: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Commands that were called; ours is best at a rate of 4e-3, theirs at 1e-3, ours lower by 0.25 at its best."""
    commands: list[str] = []

    def pretend(_: argparse.Namespace, *command: str) -> None:
        changes = dict(change.split("=") for change in command if "=" in change)
        rate, steps, seed = float(changes["optim.lr"]), int(changes["train.max_steps"]), int(changes["train.seed"])
        ours = command[1] == "pair"
        bits = 2 + abs(math.log2(rate / (4e-3 if ours else 1e-3))) + 0.1 * seed - (0.25 if ours else 0) - steps / 100
        run = Path(command[command.index("-o") + 1])
        run.mkdir(parents=True)
        rows = [{"kind": "eval", "tokens": n * 10, "bits_per_byte": bits + 1 - n, "valid_loss": 1.0} for n in (0, 1)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (run / "run.json").write_text(json.dumps({"tokens": 10, "parameters": 7_000 if ours else 7_001}))
        commands.append(f"{command[1]} {rate:g} {seed} {steps}")

    monkeypatch.setattr(compare, "megalodon", pretend)
    return commands


def test_rates_are_swept_alike_and_on_past_an_end(compare: ModuleType, trained: list[str], tmp_path: Path):
    runs = compare.Runs(given(tmp_path))
    compare.tune(runs, ("pair", "pair-llama"))
    # Theirs is best at the lowest rate, ours at the highest: one more on either side, and for both models.
    assert sorted(trained) == sorted(
        f"{name} {rate:g} 1 10" for name in ("pair", "pair-llama") for rate in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
    )
    assert compare._best(runs.sweep("pair")) == 4e-3 and compare._best(runs.sweep("pair-llama")) == 1e-3


def test_what_has_ended_is_kept_and_not_trained_again(compare: ModuleType, trained: list[str], tmp_path: Path):
    compare.tune(compare.Runs(given(tmp_path)), ("pair", "pair-llama"))
    count = len(trained)
    compare.tune(compare.Runs(given(tmp_path)), ("pair", "pair-llama"))
    assert len(trained) == count == len(json.loads((tmp_path / "found.json").read_text())["runs"])


def test_a_page_without_a_place_is_refused_before_anything_is_trained(
    compare: ModuleType, trained: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = ["--page", str(tmp_path / "none.md"), "--out", str(tmp_path / "x.json"), "--folder", str(tmp_path / "r")]
    monkeypatch.setattr("sys.argv", ["compare.py", *options])
    with pytest.raises(SystemExit, match="no place for the section"):
        compare.main()
    assert not trained


def test_a_run_that_fails_ends_it_and_loses_none(compare: ModuleType, trained: list[str], tmp_path: Path):
    runs, pretend = compare.Runs(given(tmp_path, jobs=1)), compare.megalodon

    def failing(g: argparse.Namespace, *command: str) -> None:
        if "optim.lr=0.002" in command:
            raise SystemExit("exit 4")
        pretend(g, *command)

    compare.megalodon = failing
    with pytest.raises(SystemExit, match="exit 4"):
        compare.tune(runs, ("pair", "pair-llama"))
    kept = json.loads((tmp_path / "found.json").read_text())["runs"]
    assert sorted(kept) == ["pair lr 0.001 seed 1 steps 10", "pair-llama lr 0.001 seed 1 steps 10"]


def test_the_page_pairs_seeds_and_stands_between_its_marks(compare: ModuleType, trained: list[str], tmp_path: Path):
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    recipes, runs = ("pair", "pair-llama"), compare.Runs(given(tmp_path))
    compare.tune(runs, recipes)
    best = {recipe: compare._best(runs.sweep(recipe)) for recipe in recipes}
    runs.make([compare.Wanted(recipe, best[recipe], seed, 40) for seed in (1, 2) for recipe in recipes])
    lines = list(compare.page(runs, recipes, "found.svg"))
    assert "7,000 and 7,001 parameters, 10 tokens" in lines[0]
    assert "lower in 2 of 2 seeds" in lines[1]
    assert "| 1 | 1.4500 | 1.7000 | -0.2500 |" in lines and "| 2 | 1.5500 | 1.8000 | -0.2500 |" in lines
    assert "| mean ± sd | 1.5000 ± 0.0707 | 1.7500 ± 0.0707 | -0.2500 ± 0.0000 |" in lines
    assert "| Megalodon | 4.7500 | 3.7500 | 2.7500 | **1.7500** | 2.7500 |" in lines
    target = tmp_path / "page.md"
    target.write_text(f"before\n{compare.MARKS[0]}\nold\n{compare.MARKS[1]}\nafter\n")
    compare.put("new", target)
    assert target.read_text() == f"before\n{compare.MARKS[0]}\nnew\n{compare.MARKS[1]}\nafter\n"
    compare.draw(runs, recipes, tmp_path / "found.svg")
    assert "validation bits per byte" in (tmp_path / "found.svg").read_text()
    (tmp_path / "bare.md").write_text("nothing")
    with pytest.raises(SystemExit, match="no place for the section"):
        compare.put("new", tmp_path / "bare.md")
