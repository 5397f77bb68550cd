"""Checkpoints of a run: directories written aside, hashed, renamed; the newest one that verifies is continued.

    checkpoints/step-00001000/
      manifest.json                  written last: every file with bytes and sha256, every tensor, what the run was
      state.json                     every scalar of the run
      tensors/shard-00000.safetensors   model.*, optim.exp_avg.*, optim.exp_avg_sq.*, optim.step.*
    checkpoints/best                 JSON pointer to the step of lowest validation loss among those that are kept
    checkpoints/.bad-step-…          a step that did not verify when it was needed; never read, never removed
    lock.json                        owner of the run directory

The rename is the commit: a directory that has its name is complete. Random numbers need no file: a step draws them
from a seed made of the run's seed and its own number (training/loop.py). Tensors are safetensors, the rest is JSON;
nothing is unpickled. Not here: model directories (tensors.py), what a step's state means (training/loop.py).
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, NamedTuple, Self

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megalodon.config import Config, show
from megalodon.errors import CheckpointError, EnvironmentFault

FORMAT = "megalodon/checkpoint/1"
SHARD_BYTES = 2 * 10**9
RESERVE_BYTES = 16 * 2**20
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
    background: bool = False
    """Write while training goes on."""
    on_error: Literal["stop", "continue"] = "stop"
    """What a failed save does to the run."""
    verify: Literal["full", "fast"] = "full"
    """On load: full compares hashes, fast only sizes."""
    export: bool = True
    """Write the model directory `model/` at the end."""


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
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def replace_json(path: Path, value: object) -> None:
    """Replace a JSON file in one move: a reader sees the old or the new one, never a part."""
    aside = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    write_json(aside, value)
    os.replace(aside, path)
    _sync_directory(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises: CheckpointError if the file is missing or is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}; expected a JSON object")
    return value


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(path: Path) -> None:
    for place, _, files in os.walk(path):
        for name in files:
            with open(Path(place, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_directory(Path(place))


@contextmanager
def staged(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside `target` that takes its name when the block ends, and vanishes if it fails.

    Args:
        replace: an existing directory of that name gives way once the new one is complete.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        _sync_tree(aside)
        if replace and target.exists():
            old = target.with_name(f".del-{target.name}-{os.getpid()}")
            os.rename(target, old)
            os.rename(aside, target)
            shutil.rmtree(old)
        else:
            os.rename(aside, target)
        _sync_directory(target.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def clean_leftovers(root: Path) -> None:
    """Remove what a killed process left half-written or half-deleted; only under the lock of the run."""
    for leftover in (*root.glob(".tmp-*"), *root.glob(".del-*")):
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def steps_in(root: Path) -> list[int]:
    """Return the committed steps below a `checkpoints/` directory, newest first; verified or not."""
    names = [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    return sorted((int(match[1]) for name in names if (match := _STEP.fullmatch(name))), reverse=True)


def step_path(root: Path, step: int) -> Path:
    """Return the directory of a step."""
    return root / f"step-{step:08d}"


def _shards(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Cut a dict of tensors, in order, into pieces of at most SHARD_BYTES (one larger tensor stands alone)."""
    piece: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if piece and size + tensor.nbytes > SHARD_BYTES:
            yield piece
            piece, size = {}, 0
        piece[name] = tensor
        size += tensor.nbytes
    if piece:
        yield piece


def check_space(directory: Path, num_bytes: int) -> None:
    """Raises: EnvironmentFault with both numbers if the disk of `directory` cannot hold `num_bytes` and a reserve."""
    need, free = int(num_bytes * 1.05) + RESERVE_BYTES, shutil.disk_usage(directory).free
    if free < need:
        raise EnvironmentFault(
            f"{directory}: saving needs {need / 1e9:.3f} GB and the disk has {free / 1e9:.3f} GB free",
            "free some space, or choose another -o/--out-dir; committed checkpoints are untouched",
        )


def save_step(
    root: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], about: Mapping[str, Any]
) -> Path:
    """Commit a checkpoint and return its directory; a valid one of this step is kept as it is.

    Args:
        root:    the `checkpoints/` directory of the run.
        tensors: everything that is restored bit by bit, under unique names.
        state:   the scalars of the run; JSON without NaN.
        about:   what else the manifest records: frozen values, data fingerprint, versions, valid_loss.
    Raises:
        EnvironmentFault: too little disk space, or a file could not be written; nothing is left behind.
    """
    target = step_path(root, step)
    root.mkdir(parents=True, exist_ok=True)
    if target.exists():
        try:
            verify_step(target)
            return target
        except CheckpointError:
            set_aside(target)
    check_space(root, sum(tensor.nbytes for tensor in tensors.values()))
    try:
        with staged(target) as aside:
            (aside / "tensors").mkdir()
            listed: dict[str, Any] = {}
            for number, piece in enumerate(_shards(tensors)):
                name = f"tensors/shard-{number:05d}.safetensors"
                save_file({key: tensor.detach().cpu().contiguous() for key, tensor in piece.items()}, aside / name)
                for key, tensor in piece.items():
                    listed[key] = {"shape": list(tensor.shape), "dtype": _dtype(tensor), "file": name}
            write_json(aside / "state.json", dict(state))
            files = sorted(path for path in aside.rglob("*") if path.is_file())
            described = {path.relative_to(aside).as_posix(): describe_file(path) for path in files}
            manifest = {"format": FORMAT, "step": step, **about, "files": described, "tensors": listed}
            write_json(aside / "manifest.json", manifest)
    except (OSError, SafetensorError) as error:
        raise EnvironmentFault(f"step {step} could not be saved in {root}: {error}") from error
    return target


def set_aside(step: Path) -> None:
    """Take its name from a step that does not verify, so that nothing counts it; its files stay."""
    os.rename(step, step.with_name(f".bad-{step.name}-{time.time_ns()}"))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


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
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        size = path.stat().st_size
        if size != recorded["bytes"]:
            raise CheckpointError(f"{path} has {size:,} bytes; {recorded['bytes']:,} were written")
        if hashes and (found := sha256_file(path)) != recorded["sha256"]:
            raise CheckpointError(f"{path} has sha256 {found[:12]}…; {recorded['sha256'][:12]}… was written")


def verify_step(path: Path, verify: Literal["full", "fast"] = "full") -> Saved:
    """Return a committed checkpoint after checking every file against its manifest.

    Raises:
        CheckpointError: what is wrong with which file.
    """
    manifest = read_json(path / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path / 'manifest.json'} has format {manifest.get('format')!r}; expected {FORMAT!r}")
    try:
        check_files(path, manifest.get("files"), hashes=verify == "full")
        known = {"manifest.json", *manifest["files"]}
        found = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
        if extra := sorted(found - known):
            raise CheckpointError(f"{path} holds files that were not written by us: {', '.join(extra)}")
        return Saved(path, int(manifest["step"]), manifest, read_json(path / "state.json"))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path / 'manifest.json'} is not a manifest of ours: {error!r}") from error


def newest_good_step(root: Path, verify: Literal["full", "fast"] = "full") -> tuple[Saved | None, list[str]]:
    """Return the newest checkpoint that verifies, and what is wrong with each newer one; None if none was committed.

    Raises:
        CheckpointError: checkpoints were committed but none verifies; the message has the reason of each.
    """
    faults: list[str] = []
    for step in steps_in(root):
        try:
            return verify_step(step_path(root, step), verify), faults
        except CheckpointError as error:
            faults.append(str(error))
    if faults:
        raise CheckpointError(f"no checkpoint in {root} can be used: {'; '.join(faults)}")
    return None, []


def load_tensors(saved: Saved, targets: Mapping[str, Tensor]) -> None:
    """Fill live tensors in place from a checkpoint that must hold exactly these, with equal shapes and dtypes.

    Raises:
        CheckpointError: the full list of missing, unexpected and different tensors; nothing was changed then.
    """
    listed = saved.manifest["tensors"]
    problems = [f"{name} is missing" for name in targets if name not in listed]
    problems += [f"{name} is unexpected" for name in listed if name not in targets]
    for name, target in targets.items():
        if name in listed:
            came = (tuple(listed[name]["shape"]), listed[name]["dtype"])
            if came != (tuple(target.shape), _dtype(target)):
                problems.append(f"{name} is {came[1]} {came[0]}, expected {_dtype(target)} {tuple(target.shape)}")
    if problems:
        raise CheckpointError(f"{saved.path} does not fit this model: {'; '.join(problems)}")
    try:
        for file in dict.fromkeys(entry["file"] for entry in listed.values()):
            with safe_open(saved.path / file, framework="pt") as tensors, torch.no_grad():
                for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                    targets[name].copy_(tensors.get_tensor(name))
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(f"{saved.path} cannot be read: {error}") from error


def retain(root: Path, config: CheckpointConfig, committed: int | None = None) -> list[int]:
    """Remove the checkpoints that nothing asks to keep, point `best` at the best of the others; return the removed.

    Called after a new commit only, and never fails because of an older one: a step that is visibly damaged (its
    manifest, or the size of a file) has no score, does not count as one of the last, and is left as it is.
    A directory loses its name before its files.

    Args:
        committed: the step just saved; always kept.
    """
    scores: dict[int, float | None] = {}  # of every sound step, newest first
    for step in steps_in(root):
        with suppress(CheckpointError):
            loss = verify_step(step_path(root, step), "fast").manifest.get("valid_loss")
            scores[step] = loss if isinstance(loss, int | float) else None
    ranked = sorted((loss, step) for step, loss in scores.items() if loss is not None)
    keep = {committed, *list(scores)[: config.keep_last], *(step for _, step in ranked[: config.keep_best])}
    keep |= {step for step in scores if config.keep_every and step % config.keep_every == 0}
    removed = [step for step in scores if step not in keep]
    if best := next(((loss, step) for loss, step in ranked if step in keep), None):
        replace_json(root / "best", {"step": best[1], "valid_loss": best[0]})
    else:
        (root / "best").unlink(missing_ok=True)
    for step in removed:
        doomed = root / f".del-{step_path(root, step).name}"
        os.rename(step_path(root, step), doomed)
        shutil.rmtree(doomed)
    return removed


class RunLock:
    """Holds `lock.json` of a run directory while the context lasts, so that two trainers never share one.

    The kernel's file lock decides; the file's content only tells who it is. A process that died holds nothing.

    Raises (on entering):
        CheckpointError: a live process holds the run, or another host left its name in the file.
    """

    def __init__(self, directory: Path, *, force: bool = False) -> None:
        self.path, self.force = directory / "lock.json", force
        self.taken_over: str | None = None
        """Who left the run without unlocking it; None if nobody did."""
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = False
        except BlockingIOError:
            held = True
        file.seek(0)
        try:
            owner = json.loads(file.read() or "{}")
        except ValueError:
            owner = {}
        who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')} since {owner.get('started', '?')}"
        elsewhere = owner.get("host", socket.gethostname()) != socket.gethostname()
        if held or (elsewhere and not self.force):
            file.close()
            state = "is held by" if held else "was left locked by"
            hint = None if held else "if that process is gone: --force-unlock"
            raise CheckpointError(f"{self.path.parent} {state} {who}; one trainer per run", hint)
        self.taken_over = who if owner else None
        mine = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        file.truncate(0)
        file.write(json.dumps(mine) + "\n")
        file.flush()
        self._file = file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file:
            self._file.truncate(0)
            self._file.close()
            self._file = None
