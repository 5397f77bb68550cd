"""The walk from a verb to a kernel is short, and the shell is light. Not here: what the walk computes."""

import importlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megalodon_cli.app import app

ROOTS = ("megalodon_cli", "megalodon", "kernels")
HEAVY = ["torch", "triton", "numpy", "datasets", "sentencepiece", "transformers", "pyarrow"]


def files_below_the_verb(repository: Path) -> list[str]:
    """Our files on the call stack from commands/*.py down to whoever called the spy, the outermost first."""
    frame, files = sys._getframe(2), []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(repository) and path.relative_to(repository).parts[0] in ROOTS:
            files.append(path.relative_to(repository).as_posix())
        frame = frame.f_back
    walk = list(dict.fromkeys(reversed(files)))
    verb = next(number for number, file in enumerate(walk) if "/commands/" in file)
    return walk[verb:]


def spy(monkeypatch: pytest.MonkeyPatch, repository: Path, op: str) -> list[list[str]]:
    """Put a spy in place of the implementation that a CPU takes; returns the walks it sees."""
    walks = []
    implementations = importlib.import_module(f"megalodon_kernels.{op}").IMPLEMENTATIONS
    run = implementations["portable"]

    def watched(*args, **kwargs):
        walks.append(files_below_the_verb(repository))
        return run(*args, **kwargs)

    monkeypatch.setitem(implementations, "portable", watched)
    return walks


def report(repository: Path) -> None:
    """Train a step and write two tokens in this folder; print the walks of either as JSON."""
    patch = pytest.MonkeyPatch()
    walks = {op: spy(patch, repository, op) for op in ("cema", "timestep_norm", "chunk_attention")}
    changes = ["train.max_steps=1", "eval.at_start=false", "eval.every=null", "eval.samples.prompts=[]"]
    found = {}
    for name, arguments in (
        ("pretrain", ["pretrain", "debug", *changes]),
        ("generate", ["generate", "debug", "-p", "the ", "-n", "2", "--seed", "1"]),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        found[name] = {op: list(seen) for op, seen in walks.items()}
        for seen in walks.values():
            seen.clear()
    sys.stdout.write(json.dumps(found) + "\n")


def test_six_files_from_verb_to_kernel(monkeypatch, tmp_path, repository):
    """In a process of its own: after the whole suite the frame of an op was sometimes missing on every stack."""
    monkeypatch.chdir(tmp_path)
    here = str(Path(__file__).parent)
    lines = ["import sys", f"sys.path.insert(0, {here!r})", "from pathlib import Path", "import test_walk"]
    found = json.loads(fresh(*lines, f"test_walk.report(Path({str(repository)!r}))").splitlines()[-1])
    trained = [w for w in found["pretrain"]["cema"] if "megalodon/training/loop.py" in w]
    assert trained[0] == [
        "megalodon_cli/commands/pretrain.py",
        "megalodon/training/loop.py",
        "megalodon/model/megalodon.py",
        "megalodon/model/cema.py",
        "kernels/megalodon_kernels/cema/__init__.py",
    ]
    for op, seen in found["pretrain"].items():
        steps = [w for w in seen if "megalodon/training/loop.py" in w]
        assert steps, f"{op} never ran"
        # the sixth file is the implementation in whose place the spy stands
        assert all(len(w) <= 5 for w in steps if "megalodon/evaluation/perplexity.py" not in w), op
    generated = found["generate"]["cema"]
    assert generated and all(len(w) <= 5 for w in generated), generated[0]


def fresh(*code: str) -> str:
    """Run Python code in a fresh process and return what it prints; it must succeed."""
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_and_completion_load_nothing_heavy():
    loaded = fresh(
        "import contextlib, io, json, sys",
        "from typer.testing import CliRunner",
        "from megalodon_cli.app import app",
        "from megalodon_cli.app import COMMANDS",
        "for line in [[], *[[command] for command in COMMANDS]]:",
        "    assert CliRunner().invoke(app, [*line, '--help']).exit_code == 0",
        "from megalodon_cli import recipe_files",
        "assert 'debug' in recipe_files.complete('de') and 'optim.lr' in recipe_files._keys()",
        f"print(json.dumps([name for name in {HEAVY} if name in sys.modules]))",
    )
    assert json.loads(loaded) == []


def test_importing_the_library_loads_no_torch():
    assert fresh("import sys, megalodon", "print('torch' in sys.modules)") == "False\n"


def test_help_takes_four_tenths_of_a_second():
    def seconds() -> float:
        before = os.times()
        subprocess.run([sys.executable, "-m", "megalodon_cli", "--help"], capture_output=True, check=True)
        after = os.times()  # processor time of the child, so that other work on the machine does not count
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert statistics.median(seconds() for _ in range(5)) <= 0.4
