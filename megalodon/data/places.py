"""Directories that appear whole or not at all: written aside, brought to the disk, then given their name.

Not here: what is written into them (megalodon/data/shards.py), work that another process goes on with
(megalodon/data/journal.py).
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from megalodon.errors import DataError


def sync(path: Path) -> None:
    """Bring a file or the names in a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def written_aside(directory: Path) -> Iterator[Path]:
    """Give a directory to write into, which takes its name at the end of the block and vanishes on any error.

    All of it is on the disk before it has its name. What killed processes left of it is removed first.
    Raises: DataError if `directory` already holds something or another process makes it meanwhile, or if a file stands
    where a directory must be made.
    """
    make_place(directory)
    with scratch_beside(directory) as aside:
        yield aside
        for path in (*aside.rglob("*"), aside):
            sync(path)
        give_name(aside, directory)


@contextlib.contextmanager
def scratch_beside(directory: Path) -> Iterator[Path]:
    """Give an empty directory on the disk of `directory`, in the same folder, which vanishes at the end of the block.

    What killed processes left of such ones is removed first. Raises: DataError if one of them cannot be removed.
    """
    aside = directory.parent / f".tmp-{os.getpid()}-{directory.name}"
    _remove_abandoned(directory)
    try:
        aside.mkdir()
    except FileExistsError:
        raise DataError(f"{aside} is left of another process and could not be removed; remove it") from None
    try:
        with _held(aside):
            yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def make_place(directory: Path) -> None:
    """Make the folder that will hold a store. Raises: DataError if its name is taken or a file is in the way."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir()) or directory.samefile(os.curdir)):
        raise DataError(f"{directory} already exists and is not a token store; choose another directory or remove it")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise DataError(f"{directory}: {directory.parent} is not a directory; choose another place") from None


def give_name(aside: Path, directory: Path) -> None:
    """Rename a complete directory to its final name: the commit. Raises: DataError if one has that name meanwhile."""
    try:
        os.replace(aside, directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise DataError(f"{directory} was made by another process meanwhile; the same command opens that one") from None
    sync(directory.parent)


@contextlib.contextmanager
def _held(directory: Path) -> Iterator[bool]:
    """Hold the kernel's lock of a directory, which ends with the process; False if it could not be had."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except OSError:  # another process has it, or this file system has no locks
            held = False
        yield held
    finally:
        os.close(descriptor)


def _remove_abandoned(directory: Path) -> None:
    """Remove what processes that are gone left of `directory`: no such pid here, and no lock held from elsewhere."""
    for path in directory.parent.iterdir():
        match = re.fullmatch(rf"\.tmp-([0-9]+)-{re.escape(directory.name)}", path.name)
        if match and (int(match[1]) == os.getpid() or not _lives(int(match[1]))):
            with contextlib.suppress(OSError), _held(path) as held:
                if held:
                    shutil.rmtree(path)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
