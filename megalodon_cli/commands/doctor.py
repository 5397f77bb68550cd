"""`megalodon doctor`: what works on this machine, what to do about the rest.

Not here: the checks (megalodon/profiling/health.py).
"""

import os
import shutil
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megalodon.errors import EnvironmentFault
from megalodon_cli import console, joining, launch

if TYPE_CHECKING:
    from megalodon.profiling.health import Check

PATIENCE = timedelta(minutes=2)
"""What ranks wait for one another here."""


def doctor(
    gpus: Annotated[str | None, typer.Option(metavar="N|all", help="Also let N processes talk to one another.")] = None,
) -> None:
    """Check this machine: versions, devices, every op against its reference, tokenizers, disk, the command's name.

    A line each: ✓ works, ✗ is broken (with what to do), – is not there and not needed. Ends with exit code 3 if
    something needed is broken. Takes a few seconds.

    Examples:

        megalodon doctor

        megalodon doctor --gpus 2 --json

        megalodon doctor --log-file doctor.txt -v
    """
    launch.start_if_asked(gpus, "auto")
    if joining.is_helper():
        _collectives()
        return
    from megalodon.profiling.health import checks

    found = [*checks(), _writable(Path.cwd()), _name_on_path(), *_collectives()]
    width = max(len(check.name) for check in found)
    for check in found:
        mark = console.mark("skipped" if check.ok is None else "ok" if check.ok else "bad")
        console.result(f"{mark} {check.name.ljust(width)}  {check.detail}")
        if check.fix and not check.ok:
            console.result(f"  {'':{width}}  {check.fix}")
    broken = [check for check in found if check.ok is False]
    if broken:
        raise EnvironmentFault(
            f"{len(broken)} of {len(found)} checks failed: {', '.join(check.name for check in broken)}"
        )
    console.document("doctor", [check._asdict() for check in found])


def _collectives() -> "list[Check]":
    """What several ranks say to one another; nothing of one process."""
    with joining.joined("auto", PATIENCE) as team:
        if team.world is None:
            return []
        import torch

        from megalodon.profiling.collectives import collectives

        device = team.device("auto") if torch.cuda.is_available() else "cpu"
        return [collectives(joining.everybody(), torch.device(device))]


def _writable(folder: Path) -> "Check":
    """Runs and data are written below the current folder."""
    from megalodon.profiling.health import Check

    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".megalodon-"):
            return Check("write access", True, f"{folder} can be written")
    except OSError as error:
        fix = "change to a folder of yours: runs/ and data/ are made in the current one"
        return Check("write access", False, f"{folder}: {error.strerror}", fix)


def _name_on_path() -> "Check":
    """Another distribution of the name `megalodon` installs a command of this name too."""
    from megalodon.profiling.health import Check

    first = shutil.which("megalodon")
    ours = Path(sys.executable).parent / "megalodon"
    if first is None:
        return Check(
            "name on PATH", None, f"no command megalodon on PATH; this one runs as {sys.executable} -m megalodon_cli"
        )
    if ours.exists() and not os.path.samefile(first, ours):
        fix = f"another project's command comes first; call {ours}, or put its folder first on PATH"
        return Check("name on PATH", False, f"megalodon is {first}", fix)
    return Check("name on PATH", True, f"megalodon is {first}")
