"""The tokens of a store: every task run once, whatever happened before, and put together in the order of the input.

    built = build(work, setup, budget, hub, report)

What a task gives is written down in the journal when it ends; what it means (line numbers, the limit of rejects, the
ledger) is worked out in the order of the tasks, so that it depends neither on the workers nor on interruptions.
Not here: processes (megalodon/data/workers.py), the journal (megalodon/data/journal.py), the manifest
(megalodon/data/prepare.py).
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from megalodon.data.copies import Removed, remove_copies
from megalodon.data.encode import Outcome, Setup
from megalodon.data.hub import hub_texts
from megalodon.data.ingest import Inputs
from megalodon.data.journal import Workspace
from megalodon.data.reading import place
from megalodon.data.tasks import LARGEST_TASK, Spool, Spooled, Task, cut, task_bytes, too_many
from megalodon.data.workers import Budget, Result, run

REJECTS = "rejects.jsonl"

Report = Callable[[int, int, int], None]
"""Told where the work stands: documents, bytes of input, tokens."""


class Hub(NamedTuple):
    """How Hub datasets are read."""

    revisions: Mapping[str, str]
    offline: bool


class Built(NamedTuple):
    """What became of all tasks."""

    shards: list[list[dict[str, Any]]]
    """The manifest's entries of the training and the validation part."""
    counts: dict[str, int]
    """The sums of the tasks' counts, with `duplicate` and `bytes_duplicate`."""
    hub: dict[str, tuple[int, str]]
    """Bytes and sha256 of each Hub dataset."""


def build(work: Workspace, setup: Setup, budget: Budget, hub: Hub, vocab_size: int, report: Report) -> Built:
    """Run what is not done yet and put all of it together.

    Raises: the first error in the order of the input; TooManyRejects above the limit; EnvironmentFault for a killed
    worker or a Hub that cannot be reached.
    """
    builder = _Builder(work, setup, hub, report)
    try:
        for task, result in run(builder.tasks(), setup, budget.workers, builder.advance):
            builder.arrived(task, result)
    finally:
        builder.close()
    removed = Removed(0, 0, 0)
    shards = [[entry[part] for entry in builder.shards if entry[part]] for part in range(2)]
    if setup.dedup:
        shards, removed = remove_copies(  # type: ignore[assignment]
            builder.digests, builder.shards, work.path / "raw", work.store, vocab_size
        )
    counts = builder.counts | {"duplicate": removed.documents, "bytes_duplicate": removed.bytes}
    counts |= {key: counts.get(key, 0) - gone for key, gone in zip(("kept", "bytes", "split"), removed, strict=True)}
    return Built(shards, counts, builder.hub_content())  # type: ignore[arg-type]


class _Builder:
    """Hands out tasks, writes down what they give, and takes account of it in order."""

    def __init__(self, work: Workspace, setup: Setup, hub: Hub, report: Report) -> None:
        self.work, self.setup, self.hub, self.report = work, setup, hub, report
        self.counts: dict[str, int] = {}
        self.shards: list[list[dict[str, Any] | None]] = []
        self.digests: list[Path | None] = []
        self._spooled: dict[int, Spooled] = {}
        self._of_source: dict[int, list[Spooled]] = {}
        self._waiting: dict[int, tuple[Task, Result]] = {}
        self._last = (-1, -1, 0)  # source, file and lines so far of the file read last
        self._rejects: IO[bytes] | None = None
        self._documents = self._tokens = self._finished = self._begun = 0
        (work.store / REJECTS).unlink(missing_ok=True)

    # ---------------------------------------------------------------------------------------------- handing out

    def tasks(self) -> Iterator[Task]:
        """Yield the tasks that are not done yet; those that are arrive on the way."""
        number = 0
        known = sum(file.size for inputs in self.setup.sources for file in inputs.files)
        for source, inputs in enumerate(self.setup.sources):
            own = self._of_hub if inputs.config.hf is not None else self._of_files
            for task in own(number, source, inputs, task_bytes(known)):
                number = task.number + 1
                if done := self.work.done(_key(task)):
                    self._begun += done["outcome"]["counts"]["bytes"]
                    self._documents += done["outcome"]["counts"]["read"]
                    self._account(task, Outcome(**done["outcome"]))
                else:
                    yield task

    def _of_files(self, number: int, source: int, inputs: Inputs, limit: int) -> Iterator[Task]:
        for count, (parts, size) in enumerate(cut(inputs, limit)):
            yield Task(number + count, source, parts, size)

    def _of_hub(self, number: int, source: int, inputs: Inputs, limit: int) -> Iterator[Task]:
        """Spool a dataset, as far as it is not done, into pieces that workers read and that are removed then."""
        name, skip = inputs.config.name, 0
        spool: Spool | None = None
        while True:
            path = self.work.path / "spool" / f"{number:05d}.jsonl"
            task = Task(number, source, (), 0, str(path))
            if done := self.work.done(_key(task)):
                spooled = Spooled(*done["spooled"])
                if spool:
                    spool.skip(spooled.rows)
                else:
                    skip += spooled.rows
            else:
                if spool is None:
                    rows = hub_texts(inputs.config, self.hub.revisions.get(name), self.hub.offline, skip)
                    spool = Spool(rows)
                spooled = spool.write(path, LARGEST_TASK)
            self._spooled[number] = spooled
            self._of_source.setdefault(source, []).append(spooled)
            yield task._replace(size=spooled.size)
            if spooled.last:
                return
            number += 1

    # ---------------------------------------------------------------------------------------------- taking in

    def advance(self, documents: int, size: int, tokens: int) -> None:
        """Report progress inside tasks."""
        self._documents += documents
        self._tokens += tokens
        self._begun += size
        self.report(self._documents, self._finished + self._begun, self._tokens)

    def arrived(self, task: Task, result: Result) -> None:
        """Write down what a task gave, then account for it when all before it are accounted for."""
        if isinstance(result, Outcome) and not result.over:
            value = {"outcome": result._asdict()}
            if task.spool:
                value["spooled"] = list(self._spooled[task.number])  # type: ignore[assignment]
            self.work.add(_key(task), value, self._files(result))
        if task.spool:
            Path(task.spool).unlink(missing_ok=True)
        self._account(task, result)

    def _files(self, outcome: Outcome) -> list[dict[str, Any]]:
        """Return the files of a task with their names inside the workspace."""
        folders = [path.relative_to(self.work.path).as_posix() for path in self.setup.parts]
        found = list(outcome.side)
        for folder, shard in zip(folders, outcome.shards, strict=True):
            found += [{**file, "name": f"{folder}/{file['name']}"} for file in (shard["files"] if shard else ())]
        return found

    def _account(self, task: Task, result: Result) -> None:
        self._waiting[task.number] = (task, result)
        while (following := len(self.shards)) in self._waiting:
            self._account_for(*self._waiting.pop(following))

    def _account_for(self, task: Task, result: Result) -> None:
        """Take account of one task; all before it are. Raises: what it ended with, or TooManyRejects."""
        if not isinstance(result, Outcome):
            raise result
        side = {Path(file["name"]).suffix: self.work.path / file["name"] for file in result.side}
        if ".rejects" in side:
            self._take_rejects(task, side[".rejects"])
        for file, lines in result.lines:
            before = self._last[2] if self._last[:2] == (task.source, file) else 0
            self._last = (task.source, file, before + lines)
        if task.spool:
            before = self._last[2] if self._last[:2] == (task.source, 0) else 0
            self._last = (task.source, 0, before + self._spooled[task.number].rows)
        self.counts = {key: self.counts.get(key, 0) + count for key, count in result.counts.items()}
        self.shards.append(result.shards)
        self.digests.append(side.get(".digests"))
        self._finished += task.size
        self._begun -= result.counts["bytes"]

    def _take_rejects(self, task: Task, path: Path) -> None:
        """Append the rejects of one task to those of the store. Raises: TooManyRejects at the first above the limit."""
        inputs, count = self.setup.sources[task.source], self.counts.get("rejected", 0)
        if self._rejects is None:
            self._rejects = (self.work.store / REJECTS).open("wb")
        with path.open("rb") as stream:
            for line in stream:
                record = json.loads(line)
                before = self._last[2] if self._last[:2] == (task.source, record["file"]) else 0
                number = before + record["line"]
                if task.spool:
                    where = f"hf:{inputs.config.hf}: row {number}"
                else:
                    where = place(inputs.files[record["file"]], number, record["at"])
                count += 1
                if count > self.setup.limit:
                    raise too_many(where, record["reason"], count, self.setup.limit)
                shown = json.dumps({"place": where, "reason": record["reason"]}, ensure_ascii=False)
                # A file name that is not UTF-8 becomes \udcXX, which JSON reads back as the same name.
                self._rejects.write(shown.encode("utf-8", "backslashreplace") + b"\n")

    def close(self) -> None:
        """Close what is open."""
        if self._rejects is not None:
            self._rejects.close()

    def hub_content(self) -> dict[str, tuple[int, str]]:
        """Return bytes and sha256 of the Hub datasets, from those of their pieces."""
        found: dict[str, tuple[int, str]] = {}
        for source, inputs in enumerate(self.setup.sources):
            if inputs.config.hf is not None:
                pieces = self._of_source[source]
                digest = hashlib.sha256("".join(f"{piece.rows} {piece.sha256}\n" for piece in pieces).encode())
                found[inputs.config.name] = (sum(piece.size for piece in pieces), digest.hexdigest())
        return found


def _key(task: Task) -> str:
    return f"task-{task.name}"
