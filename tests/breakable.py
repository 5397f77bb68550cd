"""Training runs of a few steps through the command line, for tests that break them. Not here: what is broken."""

import json
import shutil
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from megalodon_cli.app import app

SIZES = {"model_dim": 24, "z_dim": 12, "num_heads": 2, "value_dim": 34, "ffn_hidden_dim": 29, "cema_ndim": 3}
TINY = (
    *(f"model.{key}={value}" for key, value in SIZES.items()),
    *("model.norm_num_groups=4", "model.chunk_size=10", "data.seq_len=37", "train.batch_tokens=148"),
    *("train.max_steps=8", "eval.tokens=300", "eval.every=2", "eval.samples.prompts=[]"),
    *("checkpoint.every=2", "checkpoint.keep_last=3", "checkpoint.background=false", "log.every=1"),
)
RUN = Path("runs/debug")
CHECKPOINTS = RUN / "checkpoints"


def command(*words: str, stdin: bytes | None = None) -> Result:
    """Run a command line in this process."""
    return CliRunner().invoke(app, list(words), input=stdin)


def pretrain(*words: str) -> Result:
    """Train the debug recipe, shrunk, in runs/debug of the current directory."""
    return command("pretrain", "debug", *TINY, *words)


def stopped_run(folder: Path) -> Path:
    """A folder with the data and a run that stopped after step 6 with checkpoints of steps 2, 4 and 6; made once."""
    whole = folder / "stopped"
    if not whole.exists():
        whole.mkdir()
        done = pretrain("-o", str(whole / RUN), f"data.dir={whole}/data/debug", "--stop-at-step", "6")
        assert done.exit_code == 0, done.output
    return whole


def copy_of(whole: Path, here: Path) -> None:
    """Copy a stopped run into a folder."""
    shutil.copytree(whole, here, dirs_exist_ok=True)


def step(number: int) -> Path:
    """The checkpoint of a step in the current directory."""
    return CHECKPOINTS / f"step-{number:08d}"


def errors(result: Result) -> list[str]:
    """The `error:` lines of a result, which must show no traceback."""
    assert "Traceback" not in result.output, result.output
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


def record() -> dict[str, Any]:
    """run.json of the run."""
    found: dict[str, Any] = json.loads((RUN / "run.json").read_text())
    return found


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below one, hidden ones too, with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}
