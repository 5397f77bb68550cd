"""`megalodon runs`: what was trained here and how it went; saving, stopping and cleaning up a run.

Not here: training (megalodon/training), reading a run directory (run_files.py), drawing (curves.py, figures.py),
following a run and cleaning it up (run_tail.py, run_clean.py).
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from megalodon.errors import DataError, InputError
from megalodon_cli import console, run_files
from megalodon_cli.curves import curve, overlay

runs = typer.Typer(help="List, show, follow, compare, stop and clean up runs.")

Run = Annotated[
    str,
    typer.Argument(metavar="RUN", help="A run directory, or a name under runs/.", autocompletion=run_files.complete),
]
Runs = Annotated[
    list[str],
    typer.Argument(metavar="RUN…", help="Run directories, or names under runs/.", autocompletion=run_files.complete),
]


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"


def _listed(run: Path) -> dict[str, Any]:
    """A run as `ls` shows it: one that cannot be read is `broken` and hides no other."""
    try:
        return run_files.summary(run, run_files.read(run / "run.json"))
    except DataError as error:
        console.warning(str(error))
        return run_files.summary(run, {"status": "broken"})


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _figures(run: dict[str, Any]) -> list[str]:
    """Name, status, step and scores of a run, as columns of a table."""
    step = f"{run['step']:,}" + (f"/{run['steps']:,}" if run["steps"] else "")
    numbers = [_number(run[key]) for key in ("loss", "valid_loss", "bits_per_byte")]
    speed = "-" if run["tok_per_s"] is None else console.amount(run["tok_per_s"])
    return [run["name"], run["status"], step, *numbers, speed, _age(run["age_seconds"])]


HEAD = ["run", "status", "step", "loss", "valid", "bits/byte", "tok/s", "age"]
RIGHT = (2, 3, 4, 5, 6, 7)


@runs.command("ls")
def list_runs() -> None:
    """List the runs under runs/: status, step, training loss, validation loss, bits per byte, speed, age.

    Examples:

        megalodon runs ls

        megalodon runs ls --json

        megalodon runs ls | head -5
    """
    found = [_listed(run) for run in run_files.directories()]
    if found:
        console.table([HEAD, *map(_figures, found)], right=RIGHT)
    else:
        console.note("no runs here: no runs/*/run.json; start one with: megalodon pretrain quickstart")
    console.document("runs-ls", found)


@runs.command("show")
def show(run: Run) -> None:
    """Show a run: status, curve, scores, loss by position, memory of its layers, events, checkpoints, what to do next.

    Examples:

        megalodon runs show quickstart

        megalodon runs show runs/quickstart --json

        megalodon runs show quickstart --color never
    """
    from megalodon_cli import run_report

    path = run_files.find(run)
    found = run_report.describe(path)
    summary = found["summary"]
    of = f" of {summary['steps']:,}" if summary["steps"] else ""
    age = _age(summary["age_seconds"])
    console.result(f"{path}: {summary['status']}, step {summary['step']:,}{of}, {age} ago")
    if error := found["run"].get("error"):
        console.result(f"error: {error}")
    drawn = curve(found["train"], console.width() - 12)
    for line in ("\ntraining loss, nats per token", *drawn) if drawn else ():
        console.result(line)
    for _, rows in run_report.tables(found):
        console.result()
        console.table(rows, right=tuple(range(len(rows[0]))))
    for title, lines in run_report.sections(found):
        console.result(f"\n{title}")
        for line in lines:
            console.result(f"  {line}")
    if found["next"]:
        console.result("\nnext: " + "\n      ".join(found["next"]))
    console.document("runs-show", {**summary, **{key: value for key, value in found.items() if key != "summary"}})


@runs.command("tail")
def tail(
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends, or Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Lines from the end to begin with.")] = 10,
) -> None:
    """Print the last lines of a run's metrics; with -f also those to come. With --json: as they stand, a line each.

    Examples:

        megalodon runs tail quickstart

        megalodon runs tail quickstart -f

        megalodon runs tail quickstart -n 1 --json
    """
    from megalodon_cli.run_tail import follow as following
    from megalodon_cli.training_screen import line_of

    path = run_files.find(run)
    horizon = run_files.read(path / "run.json").get("steps")

    try:
        for row in following(path, lines, stay=follow):
            console.result(line_of(row, horizon))
            console.stream(row)
    except KeyboardInterrupt:
        return
    if follow:
        console.note(f"{path}: {run_files.status(path, run_files.read(path / 'run.json'))}")


@runs.command("compare")
def compare(
    names: Runs,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Also draw the curves into this .png or .svg.")
    ] = None,
) -> None:
    """Compare runs: where their recipes differ, their scores, their training losses over tokens.

    Examples:

        megalodon runs compare debug debug-slow

        megalodon runs compare debug debug-slow --json

        megalodon runs compare debug debug-slow --plot curves.png
    """
    from megalodon_cli import figures

    paths = [run_files.find(name) for name in names]
    if len(paths) < 2 or len({path.resolve() for path in paths}) < len(paths):
        raise InputError(f"runs compare: expected two or more different runs, got {' '.join(names)}")
    if plot is not None:
        figures.check(plot)
    short = [path.name for path in paths]
    labels = short if len(set(short)) == len(short) else [str(path) for path in paths]
    values = [run_files.recipe_values(path) for path in paths]
    keys = dict.fromkeys(key for recipe in values for key in recipe if key != "name")
    differences = {key: [recipe.get(key) for recipe in values] for key in keys}
    differences = {key: row for key, row in differences.items() if any(value != row[0] for value in row)}
    summaries = [{**_listed(path), "name": label} for path, label in zip(paths, labels, strict=True)]
    metrics = {label: run_files.metrics(path) for path, label in zip(paths, labels, strict=True)}
    curves = {label: run_files.points(rows, "train", "loss", "tokens") for label, rows in metrics.items()}
    _print_comparison(labels, differences, summaries, curves)
    if plot is not None:
        figures.plot_comparison(metrics, plot)
        console.info(f"drawn: {plot}")
    document = {"runs": summaries, "differences": differences, "curves": curves, "plot": str(plot) if plot else None}
    console.document("runs-compare", document)


def _print_comparison(
    labels: Sequence[str], differences: dict[str, list[Any]], summaries: list[dict[str, Any]], curves: dict[str, Any]
) -> None:
    from megalodon.config import show as shown

    if differences:
        console.table([["recipe", *labels], *([key, *map(shown, row)] for key, row in differences.items())])
    else:
        console.result("the recipes do not differ")
    console.result()
    console.table([HEAD, *map(_figures, summaries)], right=RIGHT)
    lines = overlay(curves, console.width() - 12, 14)
    for line in ("\ntraining loss, nats per token, over tokens", *lines) if lines else ():
        console.result(line)


@runs.command("plot")
def plot_command(
    run: Run,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="A .png or .svg; the terminal if left out.")
    ] = None,
) -> None:
    """Draw a run: losses, learning rate, gradient norm, speed, loss by position, memory of the layers.

    Examples:

        megalodon runs plot quickstart

        megalodon runs plot quickstart -o curves.png

        megalodon runs plot runs/quickstart -o curves.svg
    """
    from megalodon_cli import figures

    path = run_files.find(run)
    if out is not None:
        figures.check(out)
    rows = run_files.metrics(path)
    if not any(row.get("kind") == "train" for row in rows):
        raise InputError(f"{path} has no training step to draw yet", f"megalodon runs show {path.name}")
    if out is not None:
        figures.plot_run(path.name, rows, run_files.read(path / "run.json").get("unigram_bits_per_byte"), out)
        console.info(f"drawn: {out}")
    else:
        _draw(rows)
    console.document("runs-plot", {"file": str(out) if out else None})


def _draw(rows: Sequence[run_files.Row]) -> None:
    panels = [("train", "loss", "training loss, nats per token", 10), ("eval", "valid_loss", "validation loss", 6)]
    panels += [("train", "lr", "learning rate", 4), ("train", "grad_norm", "gradient norm before clipping", 4)]
    for number, (kind, key, title, height) in enumerate(panels):
        lines = curve(run_files.points(rows, kind, key), console.width() - 12, height)
        if lines:
            console.result(("\n" if number else "") + title)
        for line in lines:
            console.result(line)


def _ask(run: str, what: str) -> Path:
    """Leave a file in a run directory that its process looks for between two steps."""
    path = run_files.find(run)
    owner = run_files.holder(path)
    if owner is None:
        state = run_files.status(path, run_files.read(path / "run.json"))
        raise InputError(f"{path} is {state}: no process holds it, so there is nothing to {what}")
    (path / what).touch()
    console.result(f"{path}: process {owner['pid']} on {owner['host']} will {what} after its step")
    console.document(f"runs-{what}", {"run": str(path), "asked": what, "owner": owner})
    return path


@runs.command("save")
def save(run: Run) -> None:
    """Let a running run save a checkpoint after its step.

    Examples:

        megalodon runs save quickstart

        megalodon runs save runs/quickstart

        megalodon runs save quickstart --json
    """
    _ask(run, "save")


@runs.command("stop")
def stop(run: Run) -> None:
    """Let a running run finish its step, save and stop; the command that started it continues it.

    Examples:

        megalodon runs stop quickstart

        megalodon runs stop runs/quickstart

        megalodon runs stop quickstart --json
    """
    _ask(run, "stop")


@runs.command("clean")
def clean(
    run: Run,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Free disk space: list what a run no longer needs, ask, remove it.

    Kept: the newest checkpoint that verifies, the best one, those of checkpoint.keep_every, and model/.

    Examples:

        megalodon runs clean quickstart

        megalodon runs clean quickstart --yes

        megalodon runs clean quickstart --yes --json
    """
    from megalodon.checkpoint.lock import RunLock
    from megalodon_cli import run_clean

    path = run_files.find(run)
    with RunLock(path):
        found = run_clean.removable(path)
        total = sum(item.bytes for item in found)
        rows = [
            [str(item.path.relative_to(path)), console.amount(item.bytes, " ", "G") + "B", item.why] for item in found
        ]
        console.table([["in " + str(path), "size", "why"], *rows] if found else [], right=(1,))
        if not found:
            console.result(f"{path}: nothing to remove")
        elif not yes:
            _confirm(f"remove these {len(found)}, {console.amount(total, ' ', 'G')}B?", f"megalodon runs clean {run}")
        run_clean.remove(found)
    if found:
        console.result(f"{path}: removed {len(found)}, {console.amount(total, ' ', 'G')}B")
    removed = [{"path": str(item.path), "bytes": item.bytes, "why": item.why} for item in found]
    console.document("runs-clean", {"run": str(path), "removed": removed, "bytes": total})


def _confirm(question: str, command: str) -> None:
    """Ask before something is removed. Raises: InputError if nobody can answer, typer.Exit if the answer is no."""
    if console.wants_json() or not sys.stdin.isatty():
        raise InputError(f"{question} nobody can be asked here; nothing was removed", f"{command} --yes")
    if not typer.confirm(question, err=True):
        console.result("nothing was removed")
        raise typer.Exit
