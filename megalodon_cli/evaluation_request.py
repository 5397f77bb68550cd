"""The options of `megalodon evaluate` -> what is measured, on which models and which text, and the measuring.

Not here: the options themselves (commands/evaluate.py), models and text (evaluation_models.py), what is shown and
written (evaluation_screen.py).
"""

import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from megalodon_cli import checkpoints, console
from megalodon_cli.evaluation_models import Subject, destination, load, text_of, validation
from megalodon_cli.generation import REPORT_SECONDS, duration

if TYPE_CHECKING:
    import torch

    from megalodon.evaluation.compare import ContextDifference, Difference
    from megalodon.evaluation.context import Use
    from megalodon.evaluation.corpus import Corpus
    from megalodon.evaluation.scoring import How, Scores

Suite = Literal["quick", "context"]
PARTS: Mapping[Suite, tuple[str, ...]] = {"quick": ("quick",), "context": ("context",)}
"""What a suite is made of."""
ROWS = {"cpu": 4, "cuda": 16}
"""Windows that are read side by side."""
PIECES = {"cpu": 1024, "cuda": 8192}
"""Tokens of one pass."""


class Options(NamedTuple):
    """What the command line says."""

    models: Sequence[str]
    compare: Sequence[str]
    suite: Suite
    data: Path | None
    concatenate: bool
    lengths: str
    target: str
    windows: int
    norm_stats: Literal["cumulative", "window"]
    batch_size: str
    device: str
    dtype: Literal["auto", "fp32", "bf16"]
    output_path: Path | None


class Found(Protocol):
    """What one part of an evaluation found about one model."""

    def document(self) -> dict[str, Any]:
        """As JSON."""
        ...


@dataclass(frozen=True)
class Request:
    """An evaluation, checked; nothing is measured yet."""

    options: Options
    subjects: Sequence[Subject]
    corpus: "Corpus"
    how: "How"
    device: "torch.device"
    lengths: tuple[int, ...]
    """Of context, ascending, 0 first."""
    target: int
    rows: int
    folder: Path | None
    """Where results go; None for a model in no run."""

    def measured(self) -> dict[str, Any]:
        """Do it; returns the document. Ctrl-C leaves nothing behind."""
        began, parts = time.perf_counter(), PARTS[self.options.suite]
        measures: dict[str, Callable[[Subject, console.Progress], Found]] = {
            "quick": self._quick,
            "context": self._context,
        }
        with console.Progress() as live:
            found = [{part: measures[part](subject, live) for part in parts} for subject in self.subjects]
        comparisons = [
            difference.document()
            for number in range(1, len(found))
            for part in parts
            if (difference := self._difference(part, number, [own[part] for own in found]))
        ]
        return {
            "suite": self.options.suite,
            "norm_stats": self.how.norm_stats,
            "dtype": "bf16" if self.how.bf16 else "fp32",
            "device": str(self.device),
            "data": {"name": self.corpus.name, "sha256": self.corpus.sha256, "bytes": self.corpus.size},
            "truncated_tokens": 0,
            "seconds": round(time.perf_counter() - began, 2),
            "version": importlib.metadata.version("megalodon-lm"),
            "models": [
                {**subject.about(), **{part: result.document() for part, result in own.items()}}
                for subject, own in zip(self.subjects, found, strict=True)
            ],
            "comparisons": comparisons,
        }

    def _difference(self, part: str, number: int, found: Sequence[Any]) -> "Difference | ContextDifference | None":
        """What a model is worth beside the first one."""
        from megalodon.evaluation.compare import context_difference, difference

        own, first = self.subjects[number], self.subjects[0]
        if part == "quick":
            return difference(own.name, found[number], first.name, found[0])
        if part != "context":
            return None
        if (own.tokens.tokenizer.sha256, own.tokens.bos) != (first.tokens.tokenizer.sha256, first.tokens.bos):
            console.note(f"{own.name} and {first.name} have other tokens, so their windows differ and are not paired")
            return None
        return context_difference(own.name, found[number], first.name, found[0])

    def _quick(self, subject: Subject, live: console.Progress) -> "Scores":
        from megalodon.evaluation.scoring import score

        meter = Meter(live, f"{subject.name}: scored", self.corpus.size)
        return score(subject.writer.model, self.corpus, subject.tokens, self.how, meter.at)

    def _context(self, subject: Subject, live: console.Progress) -> "Use":
        from megalodon.evaluation.context import choose, cost, measure

        asked = self.options.windows
        choice = choose(self.corpus, subject.tokens, self.lengths[-1], self.target, asked)
        if choice.possible < asked:
            console.note(f"the text holds {choice.possible:,} such windows, fewer than --windows {asked:,}")
        meter = Meter(live, f"{subject.name}: {len(choice.windows)} windows", cost(choice, self.lengths))
        model, told = subject.writer.model, lambda count: meter.at(count, count)
        return measure(model, choice, subject.tokens, self.lengths, self.how, self.rows, told)


def read(options: Options) -> Request:
    """Check everything and load the models. Raises: InputError and its kin, before anything is measured."""
    from megalodon.evaluation.scoring import How
    from megalodon.profiling import numbers
    from megalodon.training.host_memory import keep_freed_memory
    from megalodon.training.plan import device_named

    device, batch = device_named(options.device), options.batch_size
    rows = ROWS[device.type] if batch == "auto" else numbers.counts(batch, "--batch-size")[0]
    lengths = tuple(sorted({0, *numbers.counts(options.lengths, "--lengths")}))
    target = numbers.counts(options.target, "--target", 2)[0]
    bf16 = options.dtype == "bf16" or (options.dtype == "auto" and device.type == "cuda")
    if device.type == "cpu":
        keep_freed_memory()
    names = [*(list[str | None](options.models) or [None]), *options.compare]
    directories = [checkpoints.model_directory(name) for name in names]
    folder = destination(directories[0], options.output_path)
    text = None if options.data is None else text_of(options.data, concatenate=options.concatenate)
    subjects = load(directories, device)
    text = text or validation(subjects, concatenate=options.concatenate)
    how = How(options.norm_stats, bf16, PIECES[device.type])
    return Request(options, subjects, text, how, device, lengths, target, rows, folder)


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
