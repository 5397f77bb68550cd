"""Further places for what a run logs: TensorBoard, Weights & Biases, trackio (`log.to`), beside metrics.jsonl.

    require(("tensorboard",))                       EnvironmentFault if its extra is not installed
    sinks = Sinks(names, directory, report)         a report for the loop: calls `report`, then every sink
    sinks.open(config)                              once the run can go on; sinks.close() at its end

Names of scalars are stable: train/loss, eval/valid_loss, eval/loss_at_position/256, health/…, event/skip, each against
the step. A run that continues goes on in the same TensorBoard folder, W&B run or trackio run, no step twice. A sink
that fails in mid-run is given up with one warning: metrics.jsonl is the truth. Nothing is imported that is not named.
Not here: metrics.jsonl (metrics.py), what the user sees (the command prints).
"""

import importlib
import importlib.util
import io
import json
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from megalodon.errors import EnvironmentFault
from megalodon.training.metrics import MetricsLog

Row = Mapping[str, Any]
KINDS = ("train", "eval", "health", "event")
"""Rows that have scalars."""
PROJECT = "megalodon"
"""The project of W&B and trackio in which the runs stand."""


class Sink(Protocol):
    """A place that takes rows of metrics in the order of training."""

    def write(self, row: Row) -> None:
        """Take the scalars of a row."""

    def close(self) -> None:
        """Write out what is still in memory."""


def require(names: Sequence[str]) -> None:
    """Raises: EnvironmentFault if the package of one of these sinks is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise EnvironmentFault(f"log.to: {name} needs the extra [{name}]: pip install 'megalodon-lm[{name}]'")


def scalars(row: Row) -> dict[str, float]:
    """Return the finite numbers of a row under their stable names; none for a row of text."""
    kind = row["kind"]
    if kind == "event":
        return {f"event/{row['event']}": 1.0}
    values = {key: value for key, value in row.items() if key not in ("kind", "step")}
    if "by_position" in values:
        values["loss_at_position"] = values.pop("by_position")
    return dict(_leaves(kind, values)) if kind in KINDS else {}


def _leaves(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(f"{name}/{key}", item)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _leaves(f"{name}/{number}", item)
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield name, float(value)


def _load(module: str) -> Any:
    """Import a module of a sink's package, which may have no types and is imported only where it is named."""
    return importlib.import_module(module)


class TensorBoard:
    """Event files in `logs/tensorboard/`; a run that goes back takes later steps out of what was written before."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "logs" / "tensorboard"
        self._continued = self.path.is_dir()
        """Whether earlier files may hold steps that come again."""
        self._last = -1
        self._writer = self._file()

    def _file(self) -> Any:
        return _load("tensorboard.summary.writer.event_file_writer").EventFileWriter(str(self.path))

    def rewind(self, step: int) -> None:
        """Begin a new file that takes every scalar of `step` and later out of the earlier ones."""
        proto = _load("tensorboard.compat.proto.event_pb2")
        self._writer.close()
        self._writer = self._file()
        start = proto.SessionLog(status=proto.SessionLog.START)
        self._writer.add_event(proto.Event(wall_time=time.time(), step=step, session_log=start))
        self._continued, self._last = False, -1

    def write(self, row: Row) -> None:
        """Take the scalars of a row; a training step that was there already (after a rollback) replaces it."""
        event = _load("tensorboard.compat.proto.event_pb2").Event
        summary = _load("tensorboard.compat.proto.summary_pb2").Summary
        step = int(row["step"])
        train = row["kind"] == "train"
        if self._continued or (train and step <= self._last):
            self.rewind(step)
        self._last = step if train else self._last
        values = [summary.Value(tag=name, simple_value=value) for name, value in scalars(row).items()]
        self._writer.add_event(event(wall_time=time.time(), step=step, summary=summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class _Forward:
    """Tells which rows a place may take that cannot go back: those beyond every step that it has of their kind.

    Args:
        sent: the last step of each kind that an earlier process sent.
    """

    def __init__(self, sent: Mapping[str, int]) -> None:
        self._floor, self._top = dict(sent), dict(sent)

    def takes(self, row: Row) -> bool:
        """Whether the row is new. Rows of a continued run are those that were sent, bit by bit, so nothing is lost."""
        kind, step = row["kind"], int(row["step"])
        if kind == "train" and step <= self._top.get("train", -1):
            self._floor = dict(self._top)
        self._top[kind] = max(step, self._top.get(kind, -1))
        return step > self._floor.get(kind, -1)


class WeightsAndBiases:
    """A run of W&B, its files in `logs/wandb/`, its id in `logs/wandb.json`.

    Args:
        sent:    the last step of each kind that an earlier process logged.
        config:  what the run is, shown beside its curves.
        offline: keep everything in the run directory; `wandb sync` uploads it.
    """

    def __init__(self, directory: Path, sent: Mapping[str, int], config: Row, offline: bool) -> None:
        wandb = _load("wandb")
        identity, known = _identity(directory, "wandb")
        self._forward = _Forward(sent if known else {})
        self._run = wandb.init(
            project=PROJECT,
            name=directory.name,
            id=identity,
            dir=str(directory / "logs"),
            config=dict(config),
            resume=None if offline else "allow",  # offline parts join by their id when they are uploaded
            mode="offline" if offline else "online",
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
        )

    def write(self, row: Row) -> None:
        """Take the scalars of a row, unless its step was sent before."""
        if self._forward.takes(row):
            self._run.log(scalars(row), step=int(row["step"]))

    def close(self) -> None:
        """Upload what is left."""
        self._run.finish()


class Trackio:
    """A run of trackio, kept where trackio keeps its runs; its name there ends in the id of `logs/trackio.json`.

    Args:
        sent:   the last step of each kind that an earlier process logged.
        config: what the run is, shown beside its curves.
    """

    def __init__(self, directory: Path, sent: Mapping[str, int], config: Row) -> None:
        identity, known = _identity(directory, "trackio")
        self._forward = _Forward(sent if known else {})
        name = f"{directory.name}-{identity}"
        with _quiet():
            self._run = _load("trackio").init(
                project=PROJECT, name=name, config=dict(config), resume="allow", embed=False
            )

    def write(self, row: Row) -> None:
        """Take the scalars of a row, unless its step was sent before."""
        if self._forward.takes(row):
            self._run.log(scalars(row), step=int(row["step"]))

    def close(self) -> None:
        """Write out what is left."""
        with _quiet():
            self._run.finish()


def _quiet() -> AbstractContextManager[Any]:
    """Keep a library from printing how to open its dashboard: stdout is for results."""
    return redirect_stdout(io.StringIO())


def _identity(directory: Path, sink: str) -> tuple[str, bool]:
    """Return the id under which a sink knows this run in every process that continues it; whether it was there."""
    path = directory / "logs" / f"{sink}.json"
    if path.is_file():
        return str(json.loads(path.read_text(encoding="utf-8"))["id"]), True
    path.parent.mkdir(exist_ok=True)
    identity = secrets.token_hex(4)
    path.write_text(json.dumps({"id": identity}) + "\n", encoding="utf-8")
    return identity, False


class Sinks:
    """A report for the loop that hands every row on: to `report` first, then to each sink.

    Args:
        names:     of `log.to`.
        directory: of the run; its metrics.jsonl is as the last process left it.
        report:    receives every row, and a warning about a sink that fails.
    """

    def __init__(self, names: Sequence[str], directory: Path, report: Callable[[dict[str, Any]], None]) -> None:
        self.names, self.directory, self.report = names, directory, report
        self._log = MetricsLog(directory / "metrics.jsonl")
        self._sent = {row["kind"]: int(row["step"]) for row in self._log.rows()} if names else {}
        self._sinks: dict[str, Sink] = {}

    def open(self, config: Row, *, offline: bool = False) -> None:
        """Open every sink; called once the run can go on, before its first step.

        Args:
            config:  what the run is, for the places that show it.
            offline: no network.
        Raises:
            EnvironmentFault: a sink cannot be opened.
        """
        make: dict[str, Callable[[], Sink]] = {
            "tensorboard": lambda: TensorBoard(self.directory),
            "wandb": lambda: WeightsAndBiases(self.directory, self._sent, config, offline),
            "trackio": lambda: Trackio(self.directory, self._sent, config),
        }
        for name in self.names:
            try:
                self._sinks[name] = make[name]()
            except Exception as error:  # whatever a foreign package raises
                raise EnvironmentFault(f"log.to: {name} cannot be opened: {_line(error)}") from error

    def __call__(self, row: dict[str, Any]) -> None:
        """Hand on a row; a note that the run was resumed takes TensorBoard back to that step."""
        self.report(row)
        if row["kind"] in KINDS:
            self._each(lambda sink: sink.write(row))
        elif row.get("event") == "resumed" and isinstance(board := self._sinks.get("tensorboard"), TensorBoard):
            kept = [old for old in self._log.rows() if old["step"] == row["step"] and old["kind"] in KINDS]
            self._each(lambda sink: _go_back(sink, row["step"], kept) if sink is board else None)

    def close(self) -> None:
        """Close every sink."""
        self._each(lambda sink: sink.close())
        self._sinks.clear()

    def _each(self, act: Callable[[Sink], None]) -> None:
        """Do something with every sink; one that fails is given up with a warning."""
        for name, sink in list(self._sinks.items()):
            try:
                act(sink)
            except Exception as error:  # whatever a foreign package raises: the run is worth more than its picture
                del self._sinks[name]
                text = f"log.to: {name} failed and is given up: {_line(error)}; metrics.jsonl has everything"
                self.report({"kind": "warning", "text": text})


def _go_back(sink: Any, step: int, kept: Sequence[Row]) -> None:
    """Take a step and all later ones out of TensorBoard, and write what the run kept of that step again."""
    sink.rewind(step)
    for row in kept:
        sink.write(row)


def _line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())
