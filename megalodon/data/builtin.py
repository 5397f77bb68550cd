"""Text that needs no download: the source files of this Python's own library, and seeded sentences for tests.

Not here: reading and counting (megalodon/data/ingest.py).
"""

import os
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from megalodon.errors import DataError, EnvironmentFault

_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_DATA_TABLES = {"encodings", "pydoc_data"}
_OPTIONAL_PROGRAMS = {"idlelib", "lib2to3", "turtledemo"}
_SKIPPED_FOLDERS = _NOT_LIBRARY | _DATA_TABLES | _OPTIONAL_PROGRAMS
_SKIPPED_FILES = frozenset({"html/entities.py"})
_FEWEST_FILES = 100
_NUM_TEXTS = 512


def stdlib_files(root: Path | None, key: str) -> list[tuple[Path, str]]:
    """Return the .py files of Python's library with their relative paths, sorted.

    root: the library's folder; None takes that of the running interpreter. key: the recipe key that names it.
    Raises: EnvironmentFault if this Python's library does not lie on disk as .py files; DataError if `root` has none.
    """
    place = root or Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, subfolders, names in os.walk(place):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(place).as_posix()
            # _sysconfigdata*.py is written at build time and holds the paths of one machine.
            if name.endswith(".py") and relative not in _SKIPPED_FILES and not name.startswith("_sysconfigdata"):
                found.append((path, relative))
    if root is not None and not found:
        raise DataError(
            f"{key}: {root} {'holds no .py files' if root.is_dir() else 'is not a folder'}; expected a library"
        )
    if root is None and len(found) < _FEWEST_FILES:
        raise EnvironmentFault(
            f"Python's standard library is not readable as .py files in {place} ({len(found)} found)",
            hint=f"{key}=DIR names a folder that holds it",
        )
    return sorted(found, key=lambda pair: pair[1])


_NAMES = ["Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Ida", "Jonas"]
_THINGS = ["bridge", "garden", "lantern", "letter", "market", "mountain", "river", "ship", "song", "tower", "window"]
_QUALITIES = ["bright", "cold", "distant", "gentle", "heavy", "narrow", "old", "quiet", "small", "strange", "wooden"]
_ACTIONS = ["built", "crossed", "described", "followed", "found", "left", "painted", "remembered", "sold", "watched"]
_TIMES = ["at dawn", "in the evening", "after the rain", "before supper", "for many years", "on the last day"]


def generated_texts() -> Iterator[str]:
    """Yield 512 short texts of seeded, English-like sentences, about 700 bytes each: the same on every machine.

    Each text keeps to one person and one thing, so that context helps: a model can learn it, and learns more from more.
    """
    rng = random.Random(20240412)

    def pick(words: list[str]) -> str:
        return words[int(rng.random() * len(words))]

    for _ in range(_NUM_TEXTS):
        name, thing = pick(_NAMES), pick(_THINGS)
        sentences = []
        for _ in range(10 + int(rng.random() * 8)):
            other = thing if rng.random() < 0.6 else pick(_THINGS)
            sentences.append(f"{name} {pick(_ACTIONS)} the {pick(_QUALITIES)} {other} {pick(_TIMES)}.")
        yield f"The {thing} of {name}\n\n" + " ".join(sentences) + "\n"
