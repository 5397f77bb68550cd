"""Files of prompts -> files of answers: JSON lines in, the same lines with their answers out, in order.

    in     {"prompt": "…"} or {"messages": […]}; also id, seed, max_new_tokens, temperature, stop
    out    the same and text, finish_reason, prompt_tokens, new_tokens, seed; or finish_reason "error" and error

A line that cannot be used gets its error and the rest goes on. A line without an id gets its number. What was written
by a run that was broken off is continued: a line cut short is removed, lines whose id stands there are left out.
Not here: the writing (batch.py), the screen (megalodon_cli).
"""

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from megalodon.data.conversations import ROLES, check_turns
from megalodon.data.reading import MAX_RECORD
from megalodon.errors import DataError, EnvironmentFault, InputError
from megalodon.inference.batch import Request, write_together
from megalodon.inference.norm_window import NormStats
from megalodon.inference.sampling import SamplingConfig
from megalodon.inference.session import Session, Writer, prompt_tokens
from megalodon.inference.stream import Stops

_BOM = b"\xef\xbb\xbf"


class Defaults(NamedTuple):
    """What holds for lines that do not say otherwise."""

    max_new_tokens: int
    sampling: SamplingConfig
    """The seed of line n is this one's plus n - 1."""
    stop: tuple[str, ...]
    system: str | None
    raw: bool
    norm_stats: NormStats


class Done(NamedTuple):
    """How far a file of prompts is."""

    answered: int
    failed: int
    """Lines that could not be used."""
    skipped: int
    """Lines that were finished before."""
    tokens: int
    """New ones."""


class _Line(NamedTuple):
    """One line: what it says, and either what is to be written or why nothing can be."""

    record: dict[str, Any]
    request: Request | None
    error: str


def write_answers(
    writer: Writer,
    source: Path,
    target: Path,
    defaults: Defaults,
    *,
    batch_size: int,
    go_on: bool,
    told: Callable[[dict[str, Any], Done], None] = lambda record, done: None,
) -> Done:
    """Answer a file of prompts; of what is done only the ids stay in memory.

    Args:
        source:     JSON lines.
        target:     gets a line for each; must not exist unless `go_on`.
        batch_size: lines that are answered together.
        go_on:      lines whose id stands in the target are left out.
        told:       after each line that was written: the line, and how far the file is.
    Raises:
        InputError: a file cannot be read or written, or the target is there, or what it holds are no answers.
        EnvironmentFault: the disk is full; what was written is continued with `go_on`.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; expected at least 1")
    try:
        if target.exists() and source.samefile(target):
            raise InputError(f"{target} is both --input and --output; expected another file for the answers")
        finished = _finished(target) if go_on else set[str]()
        with source.open("rb") as stream, target.open("ab" if go_on else "xb") as out:
            reader = _Lines(writer, source, defaults, finished)
            lines, done = reader.read(iter(lambda: stream.readline(MAX_RECORD + 2), b"")), Done(0, 0, 0, 0)
            while group := list(islice(lines, batch_size)):
                done = done._replace(skipped=reader.skipped)
                for record in _answered(writer, group, defaults):
                    out.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
                    failed = record["finish_reason"] == "error"
                    done = done._replace(
                        answered=done.answered + (not failed),
                        failed=done.failed + failed,
                        tokens=done.tokens + record.get("new_tokens", 0),
                    )
                    told(record, done)
                out.flush()
            os.fsync(out.fileno())
            return done._replace(skipped=reader.skipped, failed=done.failed + reader.failed_before)
    except FileExistsError:
        raise InputError(f"{target} is there already; --continue goes on with it, or choose another --output") from None
    except BrokenPipeError:  # whoever follows on stdout has enough
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EnvironmentFault(f"{target}: {str(error.strerror).lower()}; free some, then --continue") from error
        raise InputError(f"{error.filename or target}: {(error.strerror or str(error)).lower()}") from None


def _answered(writer: Writer, group: list[_Line], defaults: Defaults) -> Iterator[dict[str, Any]]:
    """Write the answers of some lines together; the records in their order."""
    requests = [line.request for line in group if line.request]
    sessions = (Session(writer.model, norm_stats=defaults.norm_stats) for _ in requests)
    ends = {writer.tokenizer.eos_id, *(writer.chat.stop_ids if writer.chat and not defaults.raw else ())}
    answers = iter(write_together(writer, sessions, requests, ends))
    for line in group:
        if line.request is None:
            yield line.record | {"finish_reason": "error", "error": line.error}
            continue
        written, request = next(answers), line.request
        yield line.record | {
            "text": written.text,
            "finish_reason": written.finish_reason,
            "prompt_tokens": len(request.ids),
            "new_tokens": written.new_tokens,
            "seed": request.sampling.seed,
        }


def _finished(target: Path) -> set[str]:
    """The ids that stand in a file of answers, after removing a last line that was cut short.

    Raises: InputError if a line is no answer; then the file stays as it is.
    """
    found: set[str] = set()
    if not target.exists():
        return found
    if not target.is_file():
        raise InputError(f"{target}: is no regular file; expected the --output of an earlier run")
    good = 0
    with target.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n") and _cut_short(raw):
                break
            try:
                record = json.loads(raw)
                found.add(_key(record["id"], record["finish_reason"] == "error"))
            except (ValueError, KeyError, TypeError, RecursionError):
                raise InputError(
                    f"{target}:{number}: is no answer of ours; expected the --output of an earlier run"
                ) from None
            good += len(raw)
    if good < target.stat().st_size:
        os.truncate(target, good)
    return found


def _cut_short(raw: bytes) -> bool:
    """Whether a last line without its end is one of ours, all of which begin with their id."""
    begin = b'{"id": '
    if not (raw.startswith(begin) or begin.startswith(raw)):
        return False
    try:
        return "finish_reason" in json.loads(raw)
    except (ValueError, RecursionError):
        return True


def _key(identity: object, failed: bool = False) -> str:
    return ("!" if failed else "") + json.dumps(identity, sort_keys=True)


class _Lines:
    """Lines of a file -> what is to be written."""

    def __init__(self, writer: Writer, path: Path, defaults: Defaults, finished: set[str]) -> None:
        self.writer, self.path, self.defaults, self.finished = writer, path, defaults, finished
        self.stops = Stops(defaults.stop)
        self.skipped = self.failed_before = 0
        self._seen: set[str] = set()

    def read(self, lines: Iterator[bytes]) -> Iterator[_Line]:
        """Yield what each line says; empty ones and finished ones are left out."""
        number = 0
        for raw in lines:
            number += 1
            size, ended = len(raw), raw.endswith(b"\n")
            while not ended and (more := next(lines, b"")):
                size, ended, raw = size + len(more), more.endswith(b"\n"), b""
            line = raw.removeprefix(_BOM) if number == 1 else raw
            if line and not line.strip():
                continue
            found = self._line(number, line, size)
            key = _key(found.record["id"])
            if key in self.finished or _key(found.record["id"], True) in self.finished:
                self.skipped += 1
                self.failed_before += key not in self.finished
                continue
            if key in self._seen and found.request:
                found = found._replace(request=None, error=f"{self.path}:{number}: id {key} came before")
            self._seen.add(key)
            yield found

    def _line(self, number: int, raw: bytes, size: int) -> _Line:
        record: dict[str, Any] = {}
        place = f"{self.path}:{number}"
        try:
            if size > MAX_RECORD:
                raise DataError(f"{place}: longer than {MAX_RECORD >> 20} MiB; expected one prompt a line")
            record = _object(place, raw)
            return _Line({"id": number} | record, self._request(place, number, record), "")
        except (InputError, UnicodeEncodeError) as error:
            return _Line({"id": number} | record, None, str(error))

    def _request(self, place: str, number: int, record: Mapping[str, Any]) -> Request:
        """What a line asks for. Raises: InputError with file and line."""
        given = self.defaults
        limit = _number(place, record, "max_new_tokens", given.max_new_tokens, whole=True)
        if limit < 1:
            raise DataError(f"{place}: max_new_tokens is {limit}; expected at least 1")
        seed = _number(place, record, "seed", given.sampling.seed + number - 1, whole=True)
        temperature = _number(place, record, "temperature", given.sampling.temperature)
        try:
            temperature = float(temperature)
        except OverflowError:
            raise DataError(f"{place}: temperature is a number of {len(str(temperature))} digits") from None
        stop = record.get("stop")
        stop = [stop] if isinstance(stop, str) else stop
        if stop is not None and not (isinstance(stop, list) and all(isinstance(text, str) for text in stop)):
            raise DataError(f"{place}: stop is {_shown(stop)}; expected text or a list of texts")
        try:
            sampling = replace(given.sampling, seed=int(seed), temperature=temperature)
            stops = self.stops if stop is None else Stops(stop)
            return Request(self._ids(place, record), int(limit), sampling, stops)
        except InputError as error:
            text = str(error)
            raise DataError(text if text.startswith(place) else f"{place}: {text}") from None

    def _ids(self, place: str, record: Mapping[str, Any]) -> list[int]:
        writer, chat = self.writer, None if self.defaults.raw else self.writer.chat
        prompt, messages = record.get("prompt"), record.get("messages")
        if (prompt is None) == (messages is None):
            raise DataError(f"{place}: expected either `prompt` or `messages`, got {_shown(list(record))}")
        if messages is None:
            if not isinstance(prompt, str):
                raise DataError(f"{place}: prompt is {_shown(prompt)}; expected text")
            if chat is None:
                return prompt_tokens(writer.tokenizer, prompt, bos=writer.bos)
            messages = [{"role": "user", "content": prompt}]
        if chat is None:
            raise DataError(f"{place}: messages need a chat template, and this model has none in use; give `prompt`")
        turns = _turns(place, messages)
        if self.defaults.system is not None and turns and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": self.defaults.system}, *turns]
        check_turns(turns, place)
        if turns[-1]["role"] != "user":
            raise DataError(f"{place}: the last turn is the {turns[-1]['role']}'s; expected the user's, to be answered")
        return chat.encode(turns, answer=True).ids


def _turns(place: str, messages: object) -> list[dict[str, str]]:
    if not isinstance(messages, list):
        raise DataError(f"{place}: messages is {_shown(messages)}; expected a list of turns")
    for number, turn in enumerate(messages, 1):
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            raise DataError(f"{place}: turn {number} is {_shown(turn)}; expected role ({', '.join(ROLES)}) and content")
    return messages


def _object(place: str, raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: byte {error.start:,} is not UTF-8; convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error}); expected one prompt a line") from None
    if not isinstance(value, dict):
        raise DataError(f'{place}: expected an object such as {{"prompt": "…"}}, got {_shown(value)}')
    return value


def _number(place: str, record: Mapping[str, Any], name: str, default: float, *, whole: bool = False) -> float:
    value = record.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise DataError(f"{place}: {name} is {_shown(value)}; expected a {'whole ' if whole else ''}number")
    return value


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
