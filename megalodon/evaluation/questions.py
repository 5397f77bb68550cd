"""Questions from a file of JSON lines, answered greedily; the share of answers that are exactly the expected ones.

    {"question": "…", "answer": "…"}      or a list of answers, any of which is right; fields may have other names

A pattern takes the answer out of what was written, and out of the expected answer where it is found there too. Both
are compared without white space around them. With a chat template a question is the user's turn, else a text to go on.
Not here: tasks of lm-evaluation-harness (harness.py).
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megalodon.data.ingest import open_file
from megalodon.data.shards import file_sha256
from megalodon.errors import DataError, InputError
from megalodon.evaluation.answers import wilson
from megalodon.evaluation.writing import Prompt, write
from megalodon.inference.norm_window import NormStats
from megalodon.inference.session import Writer, prompt_tokens


class Question(NamedTuple):
    """One line."""

    prompt: str
    answers: tuple[str, ...]
    """Any of them is right; at least one."""


class Questions(NamedTuple):
    """A file."""

    path: Path
    sha256: str
    items: tuple[Question, ...]


class Written(NamedTuple):
    """What became of a question."""

    prompt: str
    answers: tuple[str, ...]
    text: str
    """What the model wrote."""
    extracted: str | None
    """What was taken for its answer; None if the pattern was not found."""
    exact: bool


class Results(NamedTuple):
    """All of them."""

    questions: Questions
    written: list[Written]

    def document(self) -> dict[str, Any]:
        """As JSON."""
        hits = sum(own.exact for own in self.written)
        return {
            "file": str(self.questions.path),
            "sha256": self.questions.sha256,
            "questions": len(self.written),
            "exact": wilson(hits, len(self.written)),
            "without_answer": sum(own.extracted is None for own in self.written),
        }


def read(path: Path, fields: Sequence[str] = ("question", "answer"), limit: int | None = None) -> Questions:
    """Read a file. Raises: DataError with file and line for one that cannot be used, or without any."""
    found = list[Question]()
    with open_file(path) as stream:
        for number, raw in enumerate(stream, 1):
            if limit is not None and len(found) >= limit:
                break
            if raw.strip():
                found.append(_question(raw, f"{path}:{number}", *fields))
    if not found:
        raise DataError(f'{path}: holds no question; expected lines such as {{"{fields[0]}": …, "{fields[1]}": …}}')
    return Questions(path, file_sha256(path), tuple(found))


def _question(raw: bytes, place: str, question: str, answer: str) -> Question:
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected an object with `{question}` and `{answer}`, got {type(row).__name__}")
    if missing := [name for name in (question, answer) if name not in row]:
        here = ", ".join(map(str, row)) or "none"
        raise DataError(f"{place}: field `{missing[0]}` is missing; the fields are {here} (--fields QUESTION,ANSWER)")
    given = row[answer] if isinstance(row[answer], list) else [row[answer]]
    answers = tuple(str(one) for one in given if isinstance(one, str | int | float) and not isinstance(one, bool))
    if not isinstance(row[question], str) or not row[question].strip():
        raise DataError(f"{place}: field `{question}` is {json.dumps(row[question])[:40]}; expected text")
    if len(answers) != len(given) or not answers:
        raise DataError(
            f"{place}: field `{answer}` is {json.dumps(row[answer])[:40]}; expected text, or a list of texts"
        )
    return Question(row[question], answers)


def pattern(text: str) -> re.Pattern[str]:
    """Compile `--extract`. Raises: InputError saying what is wrong with it."""
    try:
        return re.compile(text, re.DOTALL)
    except re.error as error:
        raise InputError(f"--extract {text}: {error}; expected a regular expression") from None


def extracted(text: str, taken: re.Pattern[str] | None) -> str | None:
    """What a pattern takes out of a text: its first group, or all it matches; None if it does not match."""
    if taken is None:
        return text.strip()
    if (match := taken.search(text)) is None:
        return None
    return (next((group for group in match.groups() if group is not None), "") if match.groups() else match[0]).strip()


def answered(
    writer: Writer,
    questions: Questions,
    *,
    taken: re.Pattern[str] | None,
    max_new_tokens: int,
    stop: Sequence[str],
    batch_size: int,
    norm_stats: NormStats,
    raw: bool,
    told: Callable[[int], None] = lambda count: None,
) -> Results:
    """Let a model answer all questions.

    Args:
        taken: takes the answer out of a text; None: all of it.
        raw:   without the model's chat template.
    """
    chat = None if raw else writer.chat

    def ids(question: str) -> list[int]:
        if chat is None:
            return prompt_tokens(writer.tokenizer, question, bos=writer.bos)
        return chat.encode([{"role": "user", "content": question}], answer=True).ids

    prompts = [Prompt(ids(item.prompt), max_new_tokens, tuple(stop)) for item in questions.items]
    texts = write(writer, prompts, batch_size=batch_size, norm_stats=norm_stats, chat=chat is not None, told=told)
    found = []
    for item, text in zip(questions.items, texts, strict=True):
        own = extracted(text, taken)
        expected = {answer.strip() if (e := extracted(answer, taken)) is None else e for answer in item.answers}
        found.append(Written(item.prompt, item.answers, text, own, own in expected))
    return Results(questions, found)
