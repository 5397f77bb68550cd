"""CKPT -> model directory: a model directory, a run directory, or the name of a run under runs/.

Not here: loading and verifying (megalodon/checkpoint/tensors.py).
"""

from pathlib import Path

from megalodon.errors import InputError
from megalodon_cli import console

RUNS = Path("runs")


def model_directory(given: str | None) -> Path:
    """Return the model directory that the user means; without CKPT that of the newest finished run, named on stderr.

    A folder that holds neither a model nor a run does not hide the run of that name.
    Raises: InputError if there is none, with what is there.
    """
    if given is None:
        return _newest()
    if not given:
        raise InputError("CKPT is empty; expected a model directory or a run, or leave it out")
    places = (Path(given), RUNS / given)
    for place in places:
        if (place / "run.json").is_file():
            return _model_of(place)
        if (place / "config.json").is_file():
            return place
    for place in places:
        if place.is_dir():
            return place
    hint = ", ".join(_finished()) or "none"
    raise InputError(
        f"{given}: no such directory, and no run {RUNS / given}; "
        f"expected a model directory or a run (finished runs here: {hint})"
    )


def complete(incomplete: str) -> list[str]:
    """Return the finished runs whose name begins so, for shell completion; `runs/` may stand before it."""
    prefix = f"{RUNS}/" if incomplete.startswith(f"{RUNS}/") else ""
    return [text for name in _finished() if (text := prefix + name).startswith(incomplete)]


def _model_of(run: Path) -> Path:
    if not (run / "model").is_dir():
        command = run / "command.txt"
        how = command.read_text(encoding="utf-8", errors="replace").strip() if command.is_file() else ""
        raise InputError(
            f"{run} has no finished model (no {run / 'model'}); expected a run that has ended: the command that "
            f"started it continues it{': ' + how if how else ''}"
        )
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
