"""Checkpoints of a run: directories written aside, hashed, renamed; the newest one that verifies is continued.

    checkpoints/step-00001000/
      manifest.json                  written last: every file with bytes and sha256, every tensor, what the run was,
                                     and the sha256 of all that
      state.json                     every scalar of the run
      tensors/shard-*.safetensors    model.*, optim.exp_avg.*, optim.exp_avg_sq.*, optim.step.*
    checkpoints/best                 JSON pointer to the step of lowest validation loss among those that are kept
    checkpoints/.bad-step-…          a step that did not verify when needed, or was rolled back; never read or removed
    checkpoints/.tmp-… .del-…        half-written, half-removed; removed at the next start

The rename is the commit: a directory that has its name is complete. Random numbers need no file: a step draws them
from a seed made of the run's seed and its own number (training/loop.py). Tensors are safetensors, the rest is JSON;
nothing is unpickled. Not here: the tensors' files (tensor_files.py), when a save is written (saver.py), the lock of a
run (lock.py), model directories (tensors.py), what a step's state means (training/loop.py).
"""

import hashlib
import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, Self, TypeVar

from pydantic import Field, model_validator
from safetensors import SafetensorError
from torch import Tensor

from megalodon.checkpoint.tensor_files import (
    Form,
    Places,
    check_coverage,
    count_files,
    form_of,
    naming,
    only_once,
    read_all_boxes,
    read_tensors,
    refuse_irregular,
    write_tensors,
)
from megalodon.config import Config, show
from megalodon.errors import CheckpointError, EnvironmentFault, one_line

T = TypeVar("T")

FORMAT = "megalodon/checkpoint/2"
RESERVE_BYTES, RESERVE_FILES = 16 * 2**20, 16
JSON_BYTES = 64 * 2**20
"""The longest JSON file that is read."""
_WRITER = secrets.token_hex(4)
"""Tells what this process writes aside from what another one left."""
_STEP = re.compile(r"step-(\d{8,})")


class CheckpointConfig(Config):
    """When a run is saved and what is kept (the `checkpoint:` section of a recipe)."""

    every: int | None = Field(default=1000, ge=1)
    """Steps between two checkpoints; null = by time only."""
    every_minutes: float | None = Field(default=20, gt=0)
    """Minutes between two checkpoints, whichever comes first; null = by steps only."""
    keep_last: int = Field(default=3, ge=1)
    """Newest verified checkpoints that are kept."""
    keep_best: int = Field(default=1, ge=0)
    """Checkpoints of lowest validation loss that are kept."""
    keep_every: int | None = Field(default=None, ge=1)
    """Checkpoints at multiples of this many steps are never removed; null = none."""
    background: bool = True
    """Write while training goes on; the loop waits for a copy of the tensors only. The last save is waited for."""
    on_error: Literal["stop", "continue"] = "stop"
    """What a failed save does to the run; it stops anyway where it was to end with a checkpoint."""
    verify: Literal["full", "fast"] = "full"
    """On load: full compares hashes, fast only sizes."""
    export: bool = True
    """Write the model directory `model/` at the end."""

    @model_validator(mode="after")
    def _two_are_kept(self) -> Self:
        if self.background and self.keep_last < 2:
            raise ValueError("keep_last 1 with background: true; expected keep_last: 2 or more, or background: false")
        return self


class Writers(Protocol):
    """The ranks that write a checkpoint together, as the one of them that is here talks to all."""

    rank: int
    """Of this one; 0 is the main one."""
    size: int
    """How many there are."""

    def from_main(self, value: Callable[[], T]) -> T:
        """Return what the main rank finds; nobody else is asked. What it raises is raised everywhere."""

    def gathered(self, value: T) -> list[T]:
        """Return what all of them have, by rank."""


class _OneProcess:
    rank, size = 0, 1

    def from_main(self, value: Callable[[], T]) -> T:
        return value()

    def gathered(self, value: T) -> list[T]:
        return [value]


class Share(NamedTuple):
    """What one of several ranks knows of a checkpoint that all of them write."""

    forms: Mapping[str, Form]
    """Of every tensor, whole."""
    places: Places
    """Of the parts that this one writes."""
    writers: Writers = _OneProcess()


class Saved(NamedTuple):
    """A committed, verified checkpoint."""

    path: Path
    step: int
    manifest: dict[str, Any]
    state: dict[str, Any]


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_file(path: Path) -> dict[str, Any]:
    """Return the size and hash of a file as they stand in a manifest."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def write_json(path: Path, value: object) -> None:
    """Write JSON (no NaN, no infinity) and force it to the disk."""
    # names of files that are no text in the encoding of this process keep their bytes
    with naming(path), path.open("w", encoding="utf-8", errors="surrogateescape") as file:
        json.dump(value, file, indent=1, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def replace_json(path: Path, value: object) -> None:
    """Replace a JSON file in one move: a reader sees the old or the new one, never a part."""
    aside = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    write_json(aside, value)
    os.replace(aside, path)
    sync_directory(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object: names once, finite numbers. Raises: CheckpointError if the file is missing or is none."""
    refuse_irregular(path)
    try:
        if (size := path.stat().st_size) > JSON_BYTES:
            raise CheckpointError(f"{path} has {size:,} bytes; expected at most {JSON_BYTES:,}")
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, object_pairs_hook=only_once, parse_float=_finite, parse_constant=_finite)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}; expected a JSON object")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no finite number")
    return value


def sync_directory(path: Path) -> None:
    """Force the names in a directory to the disk. Raises: OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(path: Path) -> None:
    for place, _, files in os.walk(path):
        for name in files:
            with naming(Path(place, name)), open(Path(place, name), "rb") as file:
                os.fsync(file.fileno())
        sync_directory(Path(place))


def make_directory(path: Path) -> list[Path]:
    """Create a directory and its missing parents, and force their names to the disk: what it will hold hangs on them.

    Returns: what was missing, the innermost first.
    Raises: OSError.
    """
    missing = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for place in missing:
        sync_directory(place.parent)
    return missing


@contextmanager
def staged(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside `target` that takes its name when the block ends, and vanishes if it fails.

    Args:
        replace: an existing directory of that name gives way once the new one is complete; if it cannot, it stays.
    """
    make_directory(target.parent)
    aside = target.with_name(f".tmp-{target.name}-{_WRITER}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        _sync_tree(aside)
        if replace and target.exists():
            _exchange(target, aside)
        else:
            os.rename(aside, target)
        sync_directory(target.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _exchange(target: Path, aside: Path) -> None:
    """Give the name of a directory to another one and remove the first; if that fails it has its name back."""
    old = target.with_name(f".del-{target.name}-{_WRITER}")
    os.rename(target, old)
    try:
        os.rename(aside, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)  # it has lost its name; the next start removes what is left of it


def clean_leftovers(root: Path) -> None:
    """Remove what a killed process left half-written or half-deleted; only under the lock of the run.

    Raises: EnvironmentFault if something cannot be removed.
    """
    for leftover in (*root.glob(".tmp-*"), *root.glob(".del-*")):
        try:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        except OSError as error:
            raise EnvironmentFault(f"{leftover}, left by a run that was killed, cannot be removed: {error}") from error


def steps_in(root: Path) -> list[int]:
    """Return the committed steps below a `checkpoints/` directory, newest first; verified or not.

    Raises: EnvironmentFault if the directory cannot be read.
    """
    try:
        names = [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    except OSError as error:
        raise EnvironmentFault(f"{root} cannot be read: {error.strerror}") from error
    return sorted((int(match[1]) for name in names if (match := _STEP.fullmatch(name))), reverse=True)


def step_path(root: Path, step: int) -> Path:
    """Return the directory of a step."""
    return root / f"step-{step:08d}"


def check_space(directory: Path, num_bytes: int, num_files: int = 1) -> None:
    """Check that the disk of `directory` can hold so many bytes and files, and a reserve.

    Raises: EnvironmentFault with both numbers.
    """
    disk = os.statvfs(directory)
    need, free = int(num_bytes * 1.05) + RESERVE_BYTES, disk.f_bavail * disk.f_frsize
    wanted, nodes = num_files + RESERVE_FILES, disk.f_favail
    hint = "free some space, or choose another -o/--out-dir; committed checkpoints are untouched"
    if free < need:
        raise EnvironmentFault(
            f"{directory}: saving needs {need / 1e9:.3f} GB and the disk has {free / 1e9:.3f} GB free", hint
        )
    if disk.f_files and nodes < wanted:  # a file system that counts none says 0
        raise EnvironmentFault(f"{directory}: saving needs {wanted:,} inodes and the disk has {nodes:,} free", hint)


def save_step(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    about: Mapping[str, Any],
    go_on: Callable[[], None] = lambda: None,
    share: Share | None = None,
) -> Path:
    """Commit a checkpoint and return its directory; a valid one of this step is kept as it is.

    Several ranks call it at the same time: each writes and hashes its own files, the main one all others, and none
    returns before the commit. An error of one is an error of all.

    Args:
        root:    the `checkpoints/` directory of the run, the same on all ranks.
        tensors: everything that is restored bit by bit, under unique names; none shares its memory with another.
        state:   the scalars of the run; JSON without NaN. The main rank's are saved.
        about:   what else the manifest records: frozen values, data fingerprint, versions, valid_loss; likewise.
        go_on:   called before each file that is large, and before the last; what it raises ends the save.
        share:   if `tensors` are what one of several ranks writes.
    Raises:
        EnvironmentFault: too little disk space, a file could not be written, or what was written does not hold every
            tensor exactly once; nothing is left behind. RuntimeError: a rank is lost; the next start tidies up.
    """
    target = step_path(root, step)
    forms, places, writers = share or Share({name: form_of(tensor) for name, tensor in tensors.items()}, {})
    with ExitStack() as opened:

        def begin() -> Path | None:
            make_directory(root)
            if target.exists():
                try:
                    verify_step(target)
                    return None
                except CheckpointError:
                    set_aside(target)
            check_space(root, sum(form.num_bytes for form in forms.values()), writers.size * count_files(tensors))
            aside = opened.enter_context(staged(target))
            (aside / "tensors").mkdir()
            return aside

        def commit(aside: Path, files: Mapping[str, Any]) -> None:
            check_coverage(read_all_boxes(aside / "tensors", len(forms)), forms, aside)
            write_json(aside / "state.json", dict(state))
            described = {"state.json": describe_file(aside / "state.json"), **dict(sorted(files.items()))}
            listed = {name: {"shape": list(form.shape), "dtype": form.dtype} for name, form in forms.items()}
            manifest = {"format": FORMAT, "step": step, **about, "files": described, "tensors": listed}
            go_on()
            write_json(aside / "manifest.json", {**manifest, "sha256": _digest(manifest)})
            opened.close()

        try:
            if (aside := writers.from_main(begin)) is not None:
                files = _written(aside / "tensors", tensors, go_on, places, writers)
                writers.from_main(lambda: commit(aside, files))
        except (OSError, SafetensorError, CheckpointError) as error:
            raise EnvironmentFault(f"step {step} could not be saved in {root}: {error}") from error
    return target


def _written(
    directory: Path, tensors: Mapping[str, Tensor], go_on: Callable[[], None], places: Places, writers: Writers
) -> dict[str, dict[str, Any]]:
    """Write the tensors of all ranks; what they wrote. An error is told to all before it is raised, by each."""
    mine: dict[str, dict[str, Any]] | Exception
    try:
        found = write_tensors(directory, tensors, go_on, places=places, rank=writers.rank)
        mine = {f"tensors/{name}": about for name, about in found.items()}
    except Exception as error:
        mine = error
    files: dict[str, dict[str, Any]] = {}
    for rank, told in enumerate(writers.gathered(mine)):
        one = mine if rank == writers.rank else told  # its own error knows where it comes from
        if isinstance(one, OSError) and writers.size > 1:
            raise OSError(f"rank {rank}: {one}") from one
        if isinstance(one, Exception):
            raise one
        files |= one
    return files


def _digest(manifest: Mapping[str, Any]) -> str:
    """Return the sha256 of what a manifest says, apart from the digest itself."""
    said = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def set_aside(step: Path) -> None:
    """Take its name from a step that does not verify, so that nothing counts it; its files stay.

    Raises: EnvironmentFault if it cannot be renamed.
    """
    try:
        os.rename(step, step.with_name(f".bad-{step.name}-{time.time_ns()}"))
    except OSError as error:
        raise EnvironmentFault(f"{step} does not verify and cannot be set aside: {error.strerror}") from error


def check_files(directory: Path, files: object, *, hashes: bool = True) -> None:
    """Compare files with their recorded sizes and hashes, `{name: {"bytes": …, "sha256": …}}` as it was read.

    Raises:
        CheckpointError: a file is missing, has another size or other bytes; the message names it and both values. Or
            the record is not of this form, or names a file outside the directory.
    """
    if not isinstance(files, Mapping):
        raise CheckpointError(f"{directory}: its list of files is {show(files)}; expected names with bytes and sha256")
    for name, recorded in files.items():
        entry = recorded if isinstance(recorded, Mapping) else {}
        if not isinstance(entry.get("bytes"), int) or not isinstance(entry.get("sha256"), str):
            raise CheckpointError(f"{directory}: {name} is listed as {show(recorded)}; expected bytes and sha256")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(
                f"{directory}: {name} is listed, which lies outside; expected a file of this directory"
            )
        path = directory / name
        try:
            if not path.is_file():
                raise CheckpointError(f"{path} is missing")
            size = path.stat().st_size
            if size != recorded["bytes"]:
                raise CheckpointError(f"{path} has {size:,} bytes; {recorded['bytes']:,} were written")
            if hashes and (found := sha256_file(path)) != recorded["sha256"]:
                raise CheckpointError(f"{path} has sha256 {found[:12]}…; {recorded['sha256'][:12]}… was written")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def verify_step(path: Path, verify: Literal["full", "fast"] = "full") -> Saved:
    """Return a committed checkpoint after checking every file, and what the files say they hold, against its manifest.

    Args:
        verify: full compares sizes and hashes, fast only sizes; the headers of the tensors' files are read by both.
    Raises:
        CheckpointError: what is wrong with which file.
    """
    try:
        manifest = _manifest(path, hashes=verify == "full")
        if path != step_path(path.parent, step := int(manifest["step"])):
            raise CheckpointError(f"{path / 'manifest.json'} is that of step {step:,}; expected that of {path.name}")
        forms = _forms(manifest)
        check_coverage(read_all_boxes(path / "tensors", len(forms)), forms, path)
        return Saved(path, step, manifest, read_json(path / "state.json"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path / 'manifest.json'} is not a manifest of ours: {error!r}") from error


def _manifest(path: Path, *, hashes: bool) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are those that it lists, by size or by hash."""
    name = path / "manifest.json"
    manifest = read_json(name)
    if (form := manifest.get("format")) != FORMAT:
        raise CheckpointError(f"{name} has format {show(form)}; this version of megalodon reads {FORMAT}")
    if (digest := _digest(manifest)) != manifest.get("sha256"):
        raise CheckpointError(f"{name} has sha256 {digest[:12]}…; {show(manifest.get('sha256'))} was written")
    check_files(path, manifest.get("files"), hashes=hashes)
    known = {"manifest.json", *manifest["files"]}
    found = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    if extra := sorted(found - known):
        raise CheckpointError(f"{path} holds files that were not written by us: {', '.join(extra)}")
    return manifest


def _forms(manifest: Mapping[str, Any]) -> dict[str, Form]:
    return {name: Form(tuple(entry["shape"]), entry["dtype"]) for name, entry in manifest["tensors"].items()}


def newest_good_step(
    root: Path, verify: Literal["full", "fast"] = "full", before: int | None = None
) -> tuple[Saved | None, list[str]]:
    """Return the newest checkpoint that verifies, and what is wrong with each newer one; None if none was committed.

    Args:
        before: only older steps than this one count.
    Raises:
        CheckpointError: checkpoints were committed but none verifies; the message has the reason of each.
        EnvironmentFault: the directory cannot be read.
    """
    faults: list[str] = []
    for step in steps_in(root):
        if before is not None and step >= before:
            continue
        try:
            return verify_step(step_path(root, step), verify), faults
        except CheckpointError as error:
            faults.append(str(error))
    if faults:
        raise CheckpointError(f"no checkpoint in {root} can be used: {'; '.join(faults)}")
    return None, []


def load_tensors(saved: Saved, targets: Mapping[str, Tensor], places: Places = MappingProxyType({})) -> None:
    """Fill live tensors in place from a checkpoint that must hold exactly these, with equal shapes and dtypes.

    Args:
        places: of those that are a part of a tensor, one rank's of several.
    Raises:
        CheckpointError: the first of the missing, unexpected and different tensors; nothing was changed then. Or a file
            that verified cannot be read any more; the targets are worth nothing then.
    """
    listed = _forms(saved.manifest)
    wanted = {name: form_of(target, places[name][1] if name in places else None) for name, target in targets.items()}
    problems = [f"{name} is missing" for name in wanted if name not in listed]
    problems += [f"{name} is unexpected" for name in listed if name not in wanted]
    differ = [name for name, form in wanted.items() if listed.get(name, form) != form]
    problems += [f"{name} is {listed[name]}, expected {wanted[name]}" for name in differ]
    if problems:
        raise CheckpointError(f"{saved.path} does not fit this model: {one_line(problems)}")
    boxes = read_all_boxes(saved.path / "tensors", len(wanted))
    check_coverage(boxes, wanted, saved.path)
    read_tensors(boxes, targets, places)


def retain(root: Path, config: CheckpointConfig, committed: int | None = None) -> list[int]:
    """Remove the checkpoints that nothing asks to keep, point `best` at the best of the others; return the removed.

    Called after a new commit only, and never fails because of an older one: a step that is visibly damaged (its
    manifest, or the size of a file) has no score, does not count as one of the last, and is left as it is.
    A directory loses its name before its files.

    Args:
        committed: the step just saved; always kept.
    Raises:
        EnvironmentFault: a checkpoint cannot be removed, or `best` not be written.
    """
    scores = _scores(root)
    ranked = sorted((loss, step) for step, loss in scores.items() if loss is not None)
    keep = {committed, *list(scores)[: config.keep_last], *(step for _, step in ranked[: config.keep_best])}
    keep |= {step for step in scores if config.keep_every and step % config.keep_every == 0}
    removed = [step for step in scores if step not in keep]
    point_at_best(root, {step: loss for step, loss in scores.items() if step in keep})
    try:
        for step in removed:
            doomed = root / f".del-{step_path(root, step).name}-{_WRITER}"
            os.rename(step_path(root, step), doomed)
            shutil.rmtree(doomed)
    except OSError as error:
        raise EnvironmentFault(f"older checkpoints in {root} could not be removed: {error}") from error
    return removed


def point_at_best(root: Path, scores: Mapping[int, float | None] | None = None) -> None:
    """Let `best` name the step of lowest validation loss, the older of equal ones; remove it if no step has a score.

    Args:
        scores: of the steps that may be named; None for all that are sound.
    Raises:
        EnvironmentFault: `best` cannot be written.
    """
    found = _scores(root) if scores is None else scores
    ranked = sorted((loss, step) for step, loss in found.items() if loss is not None)
    try:
        if not ranked:
            (root / "best").unlink(missing_ok=True)
        elif _best(root) != (best := {"step": ranked[0][1], "valid_loss": ranked[0][0]}):
            replace_json(root / "best", best)
    except OSError as error:
        raise EnvironmentFault(f"{root / 'best'} could not be written: {error}") from error


def _scores(root: Path) -> dict[int, float | None]:
    """Validation loss of every step that is not visibly damaged, newest first."""
    scores: dict[int, float | None] = {}
    for step in steps_in(root):
        with suppress(CheckpointError):
            loss = _manifest(step_path(root, step), hashes=False).get("valid_loss")
            scores[step] = loss if isinstance(loss, int | float) else None
    return scores


def _best(root: Path) -> dict[str, Any] | None:
    """What `best` says; None if it is not there or says nothing."""
    with suppress(CheckpointError):
        return read_json(root / "best")
    return None
