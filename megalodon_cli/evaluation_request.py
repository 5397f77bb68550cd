"""The options of `megalodon evaluate` -> what is measured, on which models and which text.

Not here: the options themselves (commands/evaluate.py), what is shown and written (evaluation_screen.py).
"""

import importlib.metadata
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from megalodon.errors import InputError
from megalodon_cli import checkpoints, console, run_files
from megalodon_cli.generation import REPORT_SECONDS, duration

if TYPE_CHECKING:
    import torch

    from megalodon.evaluation.context import Choice, Use
    from megalodon.evaluation.corpus import Corpus, Tokens
    from megalodon.evaluation.scoring import How, Scores
    from megalodon.inference.norm_window import NormStats
    from megalodon.inference.session import Writer

EVALS = "evals"
"""Folder of a run that holds its evaluations."""
ROWS = {"cpu": 4, "cuda": 16}
"""Windows that are read side by side."""
PIECES = {"cpu": 1024, "cuda": 8192}
"""Tokens of one pass."""


class Subject(NamedTuple):
    """A model that is evaluated."""

    name: str
    """Short, and no other model's."""
    directory: Path
    run: Path | None
    """The run it came from, if it stands in one."""
    writer: "Writer"
    tokens: "Tokens"
    seq_len: int | None
    """Tokens of a window in its training."""

    def about(self) -> dict[str, Any]:
        """What a report says of it."""
        owner = self.writer.owner
        return {
            "name": self.name,
            "path": str(self.directory),
            "weights_sha256": owner.weights if owner else None,
            "tokenizer_sha256": self.writer.tokenizer.sha256,
            "parameters": self.writer.model.num_parameters(),
            "seq_len": self.seq_len,
            "bos": self.tokens.bos,
            "eos": self.tokens.eos,
        }


@dataclass(frozen=True)
class Request:
    """An evaluation, checked; nothing is measured yet."""

    suite: str
    subjects: Sequence[Subject]
    corpus: "Corpus"
    how: "How"
    device: "torch.device"
    lengths: tuple[int, ...]
    target: int
    windows: int
    rows: int
    folder: Path | None
    """Where results go; None for a model in no run."""

    def measured(self) -> dict[str, Any]:
        """Do it; returns the document. Ctrl-C leaves nothing behind."""
        began = time.perf_counter()
        with console.Progress() as live:
            models = [{**subject.about(), self.suite: self._one(subject, live)} for subject in self.subjects]
        return {
            "suite": self.suite,
            "norm_stats": self.how.norm_stats,
            "dtype": "bf16" if self.how.bf16 else "fp32",
            "device": str(self.device),
            "data": {"name": self.corpus.name, "sha256": self.corpus.sha256, "bytes": self.corpus.size},
            "truncated_tokens": 0,
            "seconds": round(time.perf_counter() - began, 2),
            "version": importlib.metadata.version("megalodon-lm"),
            "models": models,
        }

    def _one(self, subject: Subject, live: console.Progress) -> dict[str, Any]:
        return (self._quick if self.suite == "quick" else self._context)(subject, live).document()

    def _quick(self, subject: Subject, live: console.Progress) -> "Scores":
        from megalodon.evaluation.scoring import score

        meter = Meter(live, f"{subject.name}: scored", self.corpus.size)
        return score(subject.writer.model, self.corpus, subject.tokens, self.how, meter.at)

    def _context(self, subject: Subject, live: console.Progress) -> "Use":
        from megalodon.evaluation.context import cost, measure

        choice = self._windows(subject)
        meter = Meter(live, f"{subject.name}: {len(choice.windows)} windows", cost(choice, self.lengths))
        return measure(
            subject.writer.model,
            choice,
            subject.tokens,
            self.lengths,
            self.how,
            self.rows,
            lambda count: meter.at(count, count),
        )

    def _windows(self, subject: Subject) -> "Choice":
        from megalodon.evaluation.context import choose

        choice = choose(self.corpus, subject.tokens, self.lengths[-1], self.target, self.windows)
        if choice.possible < self.windows:
            console.note(f"the text holds {choice.possible:,} such windows, fewer than --windows {self.windows:,}")
        return choice


def read(
    given: Sequence[str] | None,
    suite: str,
    data: Path | None,
    concatenate: bool,
    lengths: str,
    target: str,
    windows: int,
    norm_stats: "NormStats",
    batch_size: str,
    device: str,
    dtype: Literal["auto", "fp32", "bf16"],
    output_path: Path | None,
) -> Request:
    """Check everything and load the models. Raises: InputError and its kin, before anything is measured."""
    from megalodon.evaluation.scoring import How
    from megalodon.profiling import numbers
    from megalodon.training.host_memory import keep_freed_memory
    from megalodon.training.plan import device_named

    place = device_named(device)
    many = ROWS[place.type] if batch_size == "auto" else numbers.counts(batch_size, "--batch-size")[0]
    contexts = tuple(sorted({0, *numbers.counts(lengths, "--lengths")}))
    size = numbers.counts(target, "--target", 2)[0]
    bf16 = dtype == "bf16" or (dtype == "auto" and place.type == "cuda")
    if place.type == "cpu":
        keep_freed_memory()
    directories = (
        [checkpoints.model_directory(name) for name in given] if given else [checkpoints.model_directory(None)]
    )
    folder = destination(directories[0], output_path)
    text = None if data is None else text_of(data, concatenate=concatenate)
    subjects = load(directories, place)
    return Request(
        suite,
        subjects,
        text or validation(subjects[0], concatenate=concatenate),
        How(norm_stats, bf16, PIECES[place.type]),
        place,
        contexts,
        size,
        windows,
        many,
        folder,
    )


def run_of(directory: Path) -> Path | None:
    """The run that a model directory stands in."""
    return directory.parent if (directory.parent / "run.json").is_file() else None


def load(directories: Sequence[Path], device: "torch.device") -> list[Subject]:
    """Load models onto a device. Raises: InputError for one given twice; CheckpointError, DataError."""
    from megalodon.checkpoint.tensors import read_model_info
    from megalodon.evaluation.corpus import Tokens
    from megalodon.inference.session import load_writer

    real = [directory.resolve() for directory in directories]
    if twice := next((d for d, path in zip(directories, real, strict=True) if real.count(path) > 1), None):
        raise InputError(f"{twice} is given twice; expected different models")
    names = [(directory.parent if run_of(directory) else directory).resolve().name for directory in directories]
    found = []
    for directory, name in zip(directories, names, strict=True):
        writer, run = load_writer(directory), run_of(directory)
        writer.model.to(device)
        eos = bool(run_files.recipe_values(run).get("data.eos", True)) if run else True
        adapter = (directory / "adapter_config.json").is_file()
        seq_len = None if adapter else read_model_info(directory).get("seq_len")
        tokens = Tokens(writer.tokenizer, writer.bos, eos)
        own = name if names.count(name) == 1 else str(directory)
        found.append(Subject(own, directory, run, writer, tokens, seq_len if isinstance(seq_len, int) else None))
    return found


def text_of(data: Path, *, concatenate: bool) -> "Corpus":
    """The text of --data. Raises: DataError."""
    from megalodon.evaluation.corpus import Concatenated, files

    found = files(data)
    return Concatenated(found) if concatenate else found


def validation(subject: Subject, *, concatenate: bool) -> "Corpus":
    """The validation part of the run of a model. Raises: InputError if there is none."""
    from megalodon.data.prepare import VALID, open_prepared
    from megalodon.evaluation.corpus import Concatenated, StoreCorpus

    run = subject.run
    if run is None:
        raise InputError(f"{subject.directory} is in no run, so it has no validation part; expected --data FILE|DIR")
    values = run_files.recipe_values(run)
    if values.get("kind", "pretrain") != "pretrain":
        raise InputError(f"{run} was tuned on examples, which are not scored here; expected --data FILE|DIR")
    store = Path(str(values.get("data.dir") or f"data/{values.get('name')}"))
    if not (store / VALID / "manifest.json").is_file():
        raise InputError(
            f"{run} was validated on {store / VALID}, which is not there; expected --data FILE|DIR, or the folder that "
            "it was trained in as working directory"
        )
    prepared = open_prepared(store)
    if not prepared.valid.num_documents:
        raise InputError(f"{store} holds no validation text; expected --data FILE|DIR")
    found = StoreCorpus(prepared.valid, prepared.tokenizer)
    return Concatenated(found) if concatenate else found


def destination(directory: Path, output_path: Path | None) -> Path | None:
    """Where results go: --output-path, else RUN/evals, else nowhere. Raises: InputError for a file in the way."""
    run = run_of(directory)
    folder = output_path or (run / EVALS if run else None)
    if folder is not None and folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; expected a folder for the results")
    return folder


class Meter:
    """Progress of one part of an evaluation, as a live line with speed and time left."""

    def __init__(self, live: console.Progress, title: str, total: int) -> None:
        self._live, self._title, self._total = live, title, total
        self._began = self._told = time.perf_counter()

    def at(self, done: int, tokens: int) -> None:
        """So much of the total is done, after so many tokens."""
        now = time.perf_counter()
        passed, keep = max(now - self._began, 1e-9), now - self._told >= REPORT_SECONDS
        self._told = now if keep else self._told
        share = min(1.0, done / max(1, self._total))
        left = duration(passed * (1 - share) / max(share, 1e-9))
        text = f"{self._title}: {tokens:,} tokens, {tokens / passed:,.0f} tok/s, {share:.0%}, {left} left"
        self._live.update(text, share=share, keep=keep)
