"""The options of `megalodon evaluate` -> what is measured, on which models and which text, and the measuring.

Not here: the options themselves (commands/evaluate.py), models and text (evaluation_models.py), what is shown and
written (evaluation_screen.py).
"""

import difflib
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from megalodon.errors import CheckFailed, InputError
from megalodon_cli import checkpoints, console
from megalodon_cli.evaluation_models import Subject, destination, load, text_of, validation
from megalodon_cli.generation import REPORT_SECONDS, duration

if TYPE_CHECKING:
    import torch

    from megalodon.evaluation.answers import Plan, Recall
    from megalodon.evaluation.compare import ContextDifference, Difference
    from megalodon.evaluation.context import Choice, Use
    from megalodon.evaluation.corpus import Corpus
    from megalodon.evaluation.harness import Results as HarnessResults
    from megalodon.evaluation.harness import Tasks
    from megalodon.evaluation.questions import Questions, Results
    from megalodon.evaluation.scoring import How, Scores

Suite = Literal["quick", "context", "recall", "long", "harness", "qa"]
PARTS: Mapping[Suite, tuple[str, ...]] = {
    "quick": ("quick",),
    "context": ("context",),
    "recall": ("recall",),
    "long": ("quick", "context", "recall"),
    "harness": ("harness",),
    "qa": ("qa",),
}
"""What a suite is made of."""
ON_TEXT = frozenset({"quick", "context"})
"""Parts that need text; recall takes it where there is some."""
USED_BY: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(("data", "concatenate"), frozenset({"quick", "context", "recall"})),
    "plot": frozenset({"quick", "context", "recall"}),
    "lengths": frozenset({"context", "recall", "harness"}),
    **dict.fromkeys(("limit", "log_samples"), frozenset({"recall", "harness", "qa"})),
    "recall": frozenset({"recall"}),
    **dict.fromkeys(("include_path", "num_fewshot", "apply_chat_template"), frozenset({"harness"})),
    **dict.fromkeys(("extract", "stop", "raw"), frozenset({"qa"})),
}
"""Options that only these parts heed; the others have defaults, which are no request."""
LENGTHS = "1Ki,4Ki,16Ki"
RECALL_SAMPLES = 10
PROMPT_BYTES = 24
"""Memory a token of a prompt of recall takes while it is put together."""
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
    lengths: str | None
    target: str
    windows: int
    recall: str | None
    tasks: str | None
    include_path: Path | None
    num_fewshot: int | None
    limit: int | None
    apply_chat_template: bool
    qa: Path | None
    fields: str
    extract: str | None
    max_new_tokens: int
    stop: Sequence[str]
    raw: bool
    norm_stats: Literal["cumulative", "window"]
    batch_size: str
    seed: int
    device: str
    dtype: Literal["auto", "fp32", "bf16"]
    output_path: Path | None
    log_samples: bool
    plot: Path | None


class Found(Protocol):
    """What one part of an evaluation found about one model."""

    def document(self) -> dict[str, Any]:
        """As JSON."""
        ...


class Evaluation(NamedTuple):
    """What was found."""

    document: dict[str, Any]
    samples: list[dict[str, Any]]
    """Every question with its answer; empty if they were not kept."""

    def check_truncation(self) -> None:
        """Raises: CheckFailed if text was cut, or a task cuts or drops long examples by itself."""
        cutting = self.document["cutting_tasks"]
        if self.document["truncated_tokens"] or cutting:
            by = f"; tasks that cut or drop long examples by themselves: {', '.join(cutting)}" if cutting else ""
            raise CheckFailed(f"{self.document['truncated_tokens']:,} tokens were truncated{by}")


@dataclass(frozen=True)
class Request:
    """An evaluation, checked; nothing is measured yet."""

    options: Options
    subjects: Sequence[Subject]
    corpus: "Corpus | None"
    how: "How"
    device: "torch.device"
    lengths: tuple[int, ...]
    target: int
    rows: int
    folder: Path | None
    """Where results go; None for a model in no run."""
    choices: "Mapping[str, Choice]"
    """Name of a model -> its windows, of context."""
    plan: "Plan | None"
    """Of recall."""
    questions: "Questions | None"
    tasks: "Tasks | None"
    """Of the harness."""

    def with_passes(self, tokens: int | None) -> "Request":
        """The same in passes of another length; None leaves it."""
        return self if tokens is None else replace(self, how=self.how._replace(piece=tokens))

    def measured(self) -> Evaluation:
        """Do it. Ctrl-C leaves nothing behind."""
        began, parts = time.perf_counter(), PARTS[self.options.suite]
        measures: dict[str, Callable[[Subject, console.Progress], Found]] = {
            "quick": self._quick,
            "context": self._context,
            "recall": self._recall,
            "harness": self._harness,
            "qa": self._qa,
        }
        with console.Progress() as live:
            found = [{part: measures[part](subject, live) for part in parts} for subject in self.subjects]
        comparisons = [
            difference.document()
            for number in range(1, len(found))
            for part in parts
            if (difference := self._difference(part, number, [own[part] for own in found]))
        ]
        data = self.corpus and {"name": self.corpus.name, "sha256": self.corpus.sha256, "bytes": self.corpus.size}
        models = [
            {**subject.about(), **{part: result.document() for part, result in own.items()}}
            for subject, own in zip(self.subjects, found, strict=True)
        ]
        document = {
            "suite": self.options.suite,
            "norm_stats": self.how.norm_stats,
            "dtype": "bf16" if self.how.bf16 else "fp32",
            "device": str(self.device),
            "data": data,
            "truncated_tokens": sum(model.get("harness", {}).get("truncated_tokens", 0) for model in models),
            "cutting_tasks": list(self.tasks.cutting) if self.tasks else [],
            "seconds": round(time.perf_counter() - began, 2),
            "version": importlib.metadata.version("megalodon-lm"),
            "models": models,
            "comparisons": comparisons,
        }
        return Evaluation(document, [*self._samples(found)] if self.options.log_samples else [])

    def _samples(self, found: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        for subject, own in zip(self.subjects, found, strict=True):
            if "recall" in own:
                yield from ({"model": subject.name, **answer._asdict()} for answer in own["recall"].answers)
            if "qa" in own:
                yield from ({"model": subject.name, **written._asdict()} for written in own["qa"].written)
            for task, rows in own["harness"].samples().items() if "harness" in own else ():
                yield from ({"model": subject.name, "task": task, **row} for row in rows)

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

        assert self.corpus is not None
        meter = Meter(live, f"{subject.name}: scored", self.corpus.size)
        return score(subject.writer.model, self.corpus, subject.tokens, self.how, meter.at)

    def _context(self, subject: Subject, live: console.Progress) -> "Use":
        from megalodon.evaluation.context import cost, measure

        asked, lengths, choice = self.options.windows, (0, *self.lengths), self.choices[subject.name]
        if choice.possible < asked:
            console.note(f"the text holds {choice.possible:,} such windows, fewer than --windows {asked:,}")
        chunk = subject.writer.model.config.chunk_size
        if chunk <= lengths[-1] and any(length % chunk for length in lengths):
            console.note(
                f"not all --lengths are multiples of the chunk of {subject.name}, {chunk:,} tokens: windows then begin "
                "at other places of a chunk, and differences hold that too"
            )
        meter = Meter(live, f"{subject.name}: {len(choice.windows)} windows", cost(choice, lengths))
        model, told = subject.writer.model, lambda count: meter.at(count, count)
        return measure(model, choice, subject.tokens, lengths, self.how, self.rows, told)

    def _recall(self, subject: Subject, live: console.Progress) -> "Recall":
        from megalodon.evaluation.answers import ask

        assert self.plan is not None
        meter = Meter(live, f"{subject.name}: recall", self.plan.cost())
        return ask(subject.writer.model, subject.tokens, self.plan, self.how, lambda count: meter.at(count, count))

    def _qa(self, subject: Subject, live: console.Progress) -> "Results":
        from megalodon.evaluation.questions import answered, pattern

        assert self.questions is not None
        meter = Meter(live, f"{subject.name}: questions", len(self.questions.items), "answers")
        return answered(
            subject.writer,
            self.questions,
            taken=None if self.options.extract is None else pattern(self.options.extract),
            max_new_tokens=self.options.max_new_tokens,
            stop=self.options.stop,
            batch_size=self.rows,
            norm_stats=self.how.norm_stats,
            raw=self.options.raw,
            told=lambda count: meter.at(count, count),
        )

    def _harness(self, subject: Subject, live: console.Progress) -> "HarnessResults":
        from megalodon.evaluation.harness import run
        from megalodon.evaluation.harness_model import HarnessModel

        assert self.tasks is not None
        meters = dict[str, Meter]()

        def told(what: str, done: int, total: int) -> None:
            meters.setdefault(what, Meter(live, f"{subject.name}: {what}", total, "requests")).at(done, done)

        options = self.options
        model = HarnessModel(subject.writer, subject.tokens, self.how, self.rows, told)
        return run(model, self.tasks, options.limit, log_samples=options.log_samples, chat=options.apply_chat_template)


def suite_of(given: Suite | None, *, tasks: str | None, qa: Path | None) -> Suite:
    """Which suite is meant. Raises: InputError for options of different ones."""
    implied = list[tuple[Suite, str]]()
    implied += [("harness", "--tasks")] if tasks is not None else []
    implied += [("qa", "--qa")] if qa is not None else []
    for suite, option in implied:
        if given not in (None, suite) or len(implied) > 1:
            raise InputError(
                f"{option} means --suite {suite}, and something else is asked for too; expected one of them"
            )
    if given in ("harness", "qa") and not implied:
        raise InputError(f"--suite {given}: expected {'--tasks NAME,…' if given == 'harness' else '--qa FILE'} too")
    return implied[0][0] if implied else given or "quick"


def read(options: Options) -> Request:
    """Check everything and load the models. Raises: InputError and its kin, before anything is measured."""
    from megalodon.evaluation.context import choose
    from megalodon.evaluation.scoring import How
    from megalodon.profiling import numbers
    from megalodon.training.host import keep_freed_memory
    from megalodon.training.plan import device_named

    device, batch, parts = device_named(options.device), options.batch_size, PARTS[options.suite]
    _check_use(options)
    rows = ROWS[device.type] if batch == "auto" else _count(batch, "--batch-size")
    lengths = tuple(sorted(numbers.counts(LENGTHS if options.lengths is None else options.lengths, "--lengths")))
    target = _count(options.target, "--target", 2)
    bf16 = options.dtype == "bf16" or (options.dtype == "auto" and device.type == "cuda")
    names = [*(list[str | None](options.models) or [None]), *options.compare]
    directories = [checkpoints.model_directory(name) for name in names]
    folder = destination(directories[0], options.output_path)
    if options.log_samples and folder is None:
        raise InputError(f"--log-samples: {directories[0]} is in no run; expected --output-path DIR too")
    recall = _recall_tasks(options.recall) if "recall" in parts else ()
    questions = _questions(options) if "qa" in parts else None
    tasks = _tasks(options, directories[0]) if "harness" in parts else None
    corpus = None if options.data is None else text_of(options.data, concatenate=options.concatenate)
    if device.type == "cpu":
        keep_freed_memory()
    subjects = load(directories, device)
    if corpus is None and (ON_TEXT & {*parts} or ("needle" in recall and subjects[0].store)):
        try:
            corpus = validation(subjects, concatenate=options.concatenate)
        except InputError as error:
            if ON_TEXT & {*parts}:
                raise
            console.note(f"needle is hidden in made-up sentences: {error}")
    choices = {}
    if "context" in parts:
        assert corpus is not None
        choices = {s.name: choose(corpus, s.tokens, lengths[-1], target, options.windows) for s in subjects}
    plan = _plan(options, subjects, corpus, recall, lengths) if recall else None
    how = How(options.norm_stats, bf16, PIECES[device.type])
    return Request(
        options, subjects, corpus, how, device, lengths, target, rows, folder, choices, plan, questions, tasks
    )


def _check_use(options: Options) -> None:
    """Raises: InputError for an option that the suite would not heed."""
    for name, parts in USED_BY.items():
        if getattr(options, name) and not parts & {*PARTS[options.suite]}:
            suites = " or ".join(suite for suite, own in PARTS.items() if parts & {*own})
            raise InputError(
                f"--{name.replace('_', '-')} does nothing in --suite {options.suite}; expected --suite {suites}, or "
                "leave it out"
            )


def _count(text: str, option: str, least: int = 1) -> int:
    from megalodon.profiling import numbers

    found = numbers.counts(text, option, least)
    if len(found) > 1:
        raise InputError(f"{option} {text}: expected one number")
    return found[0]


def _recall_tasks(given: str | None) -> tuple[str, ...]:
    from megalodon.evaluation.recall import TASKS

    names = tuple(TASKS) if given is None else tuple(dict.fromkeys(given.split(",")))
    for name in names:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, 1)
            raise InputError(
                f"--recall: no task `{name}`; " + (f"did you mean {near[0]}?" if near else f"tasks: {', '.join(TASKS)}")
            )
    return names


def _plan(
    options: Options,
    subjects: Sequence[Subject],
    corpus: "Corpus | None",
    tasks: tuple[str, ...],
    lengths: tuple[int, ...],
) -> "Plan":
    """What recall asks; a sample of each kind is made, so that a length too short is refused before anything runs."""
    import torch

    from megalodon.evaluation.answers import Plan
    from megalodon.evaluation.recall import haystack
    from megalodon.training.memory import available_memory

    available, needed = available_memory(torch.device("cpu")), lengths[-1] * PROMPT_BYTES
    if available is not None and needed > available:
        raise InputError(
            f"--lengths {lengths[-1]:,}: a prompt takes {needed / 2**30:,.0f} GiB of memory, and "
            f"{available / 2**30:,.1f} GiB are free; expected shorter ones"
        )
    text = haystack(corpus, subjects[0].tokens) if "needle" in tasks else []
    plan = Plan(tasks, lengths, options.limit or RECALL_SAMPLES, options.seed, text)
    for task, length, depth in plan.cells():
        if length == lengths[0]:
            for subject in subjects:
                plan.sample(subject.tokens, task, length, depth, 0)
    return plan


def _questions(options: Options) -> "Questions":
    from megalodon.evaluation.questions import pattern, read

    assert options.qa is not None
    fields = options.fields.split(",")
    if len(fields) != 2 or not all(fields):
        raise InputError(f"--fields {options.fields}: expected two names, such as question,answer")
    if options.extract is not None:
        pattern(options.extract)
    if "" in options.stop:
        raise InputError("--stop: a stop string is empty; expected at least 1 character")
    return read(options.qa, fields, options.limit)


def _tasks(options: Options, directory: Path) -> "Tasks":
    """Find and load the tasks of the harness, whose data may come from the Hub."""
    from megalodon.model.extras import check_installed

    check_installed("lm_eval", "lm-eval tasks need", "eval")
    from megalodon.evaluation.harness import Index
    from megalodon.profiling import numbers

    assert options.tasks is not None
    if options.include_path is not None and not options.include_path.is_dir():
        raise InputError(f"--include-path {options.include_path}: is no folder; expected one with YAML files of tasks")
    # RULER and its kin make their text by length, with a tokenizer that transformers reads: an exported model's.
    metadata: dict[str, Any] = {"tokenizer": str(directory)}
    if options.lengths is not None:
        metadata["max_seq_lengths"] = list(numbers.counts(options.lengths, "--lengths"))
    names = [name for name in options.tasks.split(",") if name]
    if not names:
        raise InputError("--tasks is empty; expected names such as hellaswag,arc_easy, or YAML files")
    index, offline = Index(names, options.include_path, metadata), console.settings().offline
    if (remote := index.remote()) and not offline:
        console.note(f"lm-eval may fetch from the Hugging Face Hub: {', '.join(remote)}")
    tasks = index.load(options.num_fewshot, options.seed, offline=offline)
    for name in tasks.cutting:
        console.warning(f"task {name} drops or cuts long examples by itself, before the model sees them")
    return tasks


class Meter:
    """Progress of one part of an evaluation, as a live line with speed and time left."""

    def __init__(self, live: console.Progress, title: str, total: int, unit: str = "tokens") -> None:
        self._live, self._title, self._total, self._unit = live, title, total, unit
        self._began = self._told = time.perf_counter()

    def at(self, done: int, count: int) -> None:
        """So much of the total is done, after so many tokens or whatever the unit is."""
        now = time.perf_counter()
        passed, keep = max(now - self._began, 1e-9), now - self._told >= REPORT_SECONDS
        self._told = now if keep else self._told
        share = min(1.0, done / max(1, self._total))
        left = duration(passed * (1 - share) / max(share, 1e-9))
        rate = f"{count / passed:,.0f} tok/s" if self._unit == "tokens" else f"{count / passed:,.1f}/s"
        text = f"{self._title}: {count:,} {self._unit}, {rate}, {share:.0%}, {left} left"
        self._live.update(text, share=share, keep=keep)
