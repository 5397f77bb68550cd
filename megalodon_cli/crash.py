"""The report of an error nobody expected: traceback, versions, recipe. No data, no values of variables, no environment.

It goes into the run directory if the command works on one, else into the folder for temporary files.
Not here: errors a user can act on (megalodon/errors.py).
"""

import os
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

from megalodon_cli import console

_PACKAGES = ("megalodon-lm", "torch", "triton", "numpy", "typer", "pydantic", "safetensors", "sentencepiece")


def report(error: Exception, command: str) -> str:
    """Write the report and print one line that says where it is; return that line."""
    run = console.settings().run
    text = "\n".join([f"megalodon {command}", *_versions(), "", "".join(traceback.format_exception(error))])
    if run:
        text += f"\nrecipe\n{run[1]}"
    written = _write(text)
    where = written or "below; no place for a report can be written"
    message = f"internal: {type(error).__name__}: {error} in {_place(error)}; this is a bug. Details: {where}"
    message = " ".join(message.split())
    console.error(message, excerpt="" if written else text)
    return message


def _write(text: str) -> Path | None:
    for place in _places():
        try:
            place.write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError:
            continue
        return place
    return None


def _places() -> Iterator[Path]:
    import tempfile

    run = console.settings().run
    if run and (run[0] / "run.json").exists():
        yield run[0] / "crash.txt"
    try:
        yield Path(tempfile.gettempdir()) / f"megalodon-crash-{os.getpid()}.txt"
    except FileNotFoundError:  # there is no folder for temporary files
        return


def _place(error: Exception) -> str:
    """Return `folder/file.py:line` of the innermost frame that is neither the standard library's nor a package's."""
    frames = traceback.extract_tb(error.__traceback__)
    foreign = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), "<")
    ours = [frame for frame in frames if not frame.filename.startswith(foreign)]
    frame = (ours or frames)[-1]
    return f"{Path(frame.filename).parent.name}/{Path(frame.filename).name}:{frame.lineno}"


def _versions() -> Iterator[str]:
    import importlib.metadata
    import platform

    yield f"python {platform.python_version()} on {platform.platform()}"
    for name in _PACKAGES:
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{name} not installed"
