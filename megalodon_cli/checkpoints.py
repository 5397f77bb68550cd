"""CKPT -> model directory: a model directory, a run directory, or the name of a run under runs/.

Not here: loading and verifying (megalodon/checkpoint/tensors.py).
"""

from pathlib import Path

from megalodon.errors import InputError
from megalodon_cli import console

RUNS = Path("runs")


def model_directory(given: str | None) -> Path:
    """Return the model directory that the user means; without CKPT that of the newest finished run, named on stderr.

    Raises: InputError if there is none, with what is there.
    """
    if given is None:
        return _newest()
    path = Path(given)
    for run in (path, RUNS / given):
        if (run / "run.json").is_file():
            return _model_of(run)
        if run.is_dir():
            return run
    hint = ", ".join(_finished()) or "none"
    raise InputError(
        f"{given}: no such directory, and no run {RUNS / given}; "
        f"expected a model directory or a run (finished runs here: {hint})"
    )


def _model_of(run: Path) -> Path:
    if not (run / "model").is_dir():
        raise InputError(f"{run} has no finished model (no {run / 'model'}); let the run finish first")
    console.note(f"{run}: using {run / 'model'}")
    return run / "model"


def _finished() -> list[str]:
    """Names of the runs that have a model, oldest first."""
    found = [run.parent for run in RUNS.glob("*/run.json") if (run.parent / "model").is_dir()]
    return [run.name for run in sorted(found, key=lambda run: (run / "model").stat().st_mtime_ns)]


def _newest() -> Path:
    if not (names := _finished()):
        raise InputError(
            f"no CKPT given and no finished run under {RUNS}; expected a model directory or a run: "
            "megalodon generate CKPT -p TEXT"
        )
    model = RUNS / names[-1] / "model"
    console.note(f"no CKPT given: using the newest finished run, {model}")
    return model
