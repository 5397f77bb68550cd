"""The options that `pretrain` and `finetune` share, each declared once, and what they mean together.

Not here: what is done with them (training_command.py).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from megalodon.errors import InputError, RecipeError
from megalodon_cli import console, recipe_files


def _directory(text: str) -> Path:
    if not text:
        raise InputError("-o/--out-dir: expected a directory such as runs/mine, got an empty name")
    return Path(text)


Recipes = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE… [key=value …]",
        help="Shipped names or files ending in .yaml (also as -c FILE), and changes such as optim.lr=1e-3.",
        autocompletion=recipe_files.complete,
    ),
]
NoPrepare = Annotated[
    bool, typer.Option("--no-prepare", help="Refuse to tokenise missing data.", rich_help_panel="Data")
]
Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda or cuda:N; auto = a GPU if there is one.", rich_help_panel="Run")
]
Gpus = Annotated[
    str | None,
    typer.Option(
        metavar="N|all",
        help="Train with N processes: on N GPUs, on a CPU with its cores divided; under torchrun or srun leave it out. "
        "With --plan any number.",
        rich_help_panel="Run",
    ),
]
ReadingGpus = Annotated[
    str | None,
    typer.Option(
        "--gpus",
        metavar="N|all",
        help="Read long text with N processes, each a piece of it; on a CPU they share its cores.",
        rich_help_panel="Run",
    ),
]
Planned = Annotated[
    bool,
    typer.Option(
        "--plan",
        help="Print memory, traffic, time and disk of the run, predicted, and end; for any --gpus and --device.",
        rich_help_panel="Run",
    ),
]
PlannedDevice = Annotated[
    str,
    typer.Option(
        help="auto, cpu, cuda or cuda:N; auto = a GPU if there is one. With --plan also a device that is not here: "
        "a100-40, a100-80, h100, h200, b200, l40s, rtx3090, rtx4090.",
        rich_help_panel="Run",
    ),
]
Resume = Annotated[
    str,
    typer.Option(
        metavar="auto|never|STEP_DIR",
        help="auto continues the run that is in the directory; never refuses one; STEP_DIR continues from exactly "
        "that step: in its own run it must be the newest, with another -o it begins a branch.",
        rich_help_panel="Run",
    ),
]
MaxSteps = Annotated[str | None, typer.Option(help="Horizon in steps, = train.max_steps.", rich_help_panel="Run")]
MaxTokens = Annotated[
    str | None, typer.Option(help="Horizon in tokens such as 2M, = train.max_tokens.", rich_help_panel="Run")
]
MaxTime = Annotated[
    str | None, typer.Option(help="Stop and save after this time, such as 90s, 20m or 2h.", rich_help_panel="Run")
]
StopAtStep = Annotated[int | None, typer.Option(min=1, help="Stop and save after this step.", rich_help_panel="Run")]
Profile = Annotated[
    str | None, typer.Option(metavar="A..B", help="Trace steps A to B into RUN/profile.", rich_help_panel="Run")
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="Bit by bit the same each time, = train.deterministic=true; slower.",
        rich_help_panel="Run",
    ),
]
AllowChange = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY", help="Continue although this frozen key differs.", rich_help_panel="Run"),
]
ForceUnlock = Annotated[
    bool, typer.Option("--force-unlock", help="Take over a run another host left locked.", rich_help_panel="Run")
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="One real step, evaluation, save, load and export, all removed again.",
        rich_help_panel="Run",
    ),
]
CheckResume = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=2,
        help="Prove exact resume: N steps against N/2, save, load, N/2; exit 6 names the first difference.",
        rich_help_panel="Run",
    ),
]
OutDir = Annotated[
    Path | None,
    typer.Option(
        "--out-dir",
        "--output-dir",
        "-o",
        parser=_directory,
        metavar="DIRECTORY",
        help="The run; runs/NAME if left out.",
        rich_help_panel="Output",
    ),
]


class How(NamedTuple):
    """How a run is carried out; nothing of it changes what is trained."""

    max_seconds: float | None
    stop_at_step: int | None
    traced: tuple[int, int] | None
    """First and last step of a trace."""
    force_unlock: bool
    dry_run: bool
    check_resume: int | None

    @property
    def scratch(self) -> bool:
        """Whether nothing of it is kept."""
        return self.dry_run or self.check_resume is not None


def how(
    command: str,
    *,
    max_time: str | None,
    stop_at_step: int | None,
    profile: str | None,
    force_unlock: bool,
    dry_run: bool,
    check_resume: int | None,
) -> How:
    """Read the options that say how. Raises: InputError, RecipeError for values that cannot be, also together."""
    seconds, traced = _seconds(max_time), _steps(profile)
    ways: dict[str, object] = {"--dry-run": dry_run, "--check-resume": check_resume, "--stop-at-step": stop_at_step}
    _one_of({**ways, "--max-time": seconds, "--profile": profile})
    if console.wants_json() and not dry_run and not check_resume:
        raise InputError(f"--json: {command} prints a document only with --dry-run or --check-resume")
    return How(seconds, stop_at_step, traced, force_unlock, dry_run, check_resume)


def only(option: str, others: Mapping[str, object]) -> None:
    """Raises: InputError if an option that only looks is given beside one that says how to run."""
    if given := [name for name, value in others.items() if value]:
        raise InputError(f"{option} and {given[0]} are both given; expected one of them")


def keys_of(changes: Mapping[str, str | None], deterministic: bool) -> list[str]:
    """Return options that are short names of keys as changes of the recipe.

    app.spelled writes them so in their place on the line; they reach a caller from Python as they are.
    """
    found = [f"{key}={value}" for key, value in changes.items() if value is not None]
    return [*found, *(["train.deterministic=true"] if deterministic else [])]


def _one_of(ways: Mapping[str, object]) -> None:
    """Raises: InputError for a check beside another way to end."""
    given = [option for option, value in ways.items() if value]
    if len(given) > 1 and given[0] in ("--dry-run", "--check-resume"):
        raise InputError(f"{given[0]} and {given[1]} are both given; expected one of them")


def _seconds(text: str | None) -> float | None:
    from megalodon.config import parse_duration

    try:
        seconds = None if text is None else float(str(parse_duration(text)))
    except ValueError as error:
        raise RecipeError(f"--max-time: {error}") from None
    if seconds == 0:
        raise RecipeError(f"--max-time: `{text}` leaves no time for a step; expected a time such as 90s, 20m or 2h")
    return seconds


def _steps(text: str | None) -> tuple[int, int] | None:
    """Read `A..B`. Raises: RecipeError for anything but 1 <= A <= B."""
    if text is None:
        return None
    first, _, last = text.partition("..")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise RecipeError(f"--profile: expected steps A..B with 1 <= A <= B such as 5..8, got `{text}`")
    return int(first), int(last)
