"""Files of examples -> conversations or texts, each with its place; every usual layout, checked line by line.

    for example in read_examples(example_files(path), "auto", {"prompt": "question", "completion": "answer"}): ...

    messages            {"messages": [{"role": "user", "content": "…"}, …]}
    sharegpt            {"conversations": [{"from": "human", "value": "…"}, …]}
    alpaca              {"instruction": "…", "input": "…", "output": "…"}; input and system may be missing
    prompt-completion   {"prompt": "…", "completion": "…"}; both may be lists of messages
    text                {"text": "…"}

Not here: what becomes of a conversation (chat.py), how examples share a window (packing.py).
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megalodon.data.chat import Message
from megalodon.data.reading import MAX_RECORD
from megalodon.errors import DataError

ROLES = ("system", "user", "assistant")
_SHAREGPT = {"human": "user", "gpt": "assistant"}
_ENDINGS = (".jsonl", ".ndjson", ".json")
_BOM = b"\xef\xbb\xbf"
_UNREAD = ("weight", "loss", "train", "tool_calls", "tool_call_id", "function_call")
"""Keys of a turn that others take for a part of the conversation, or for whether it is trained on."""
_MAX_ARRAY = 1 << 30
"""Bytes of a .json file, whose one list is held whole."""

Fields = Mapping[str, str | Mapping[str, str]]
"""Name of a field -> your column, dots go inside; `roles` -> {your role: known role}."""


class Example(NamedTuple):
    """One example: a conversation, or a plain text."""

    messages: tuple[Message, ...] | None
    text: str | None
    place: str
    """File and line, as in an error message."""
    format: str


def example_files(path: Path) -> list[Path]:
    """Return the files of examples that a path stands for: itself, or those of a folder, sorted. Raises: DataError."""
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in _ENDINGS and file.is_file())
        if not found:
            raise DataError(f"{path}: holds no file ending in {', '.join(_ENDINGS)}; expected examples as JSON lines")
        return found
    if not path.exists():
        raise DataError(f"{path}: no such file; expected examples as JSON lines")
    if path.suffix not in _ENDINGS:
        raise DataError(f"{path}: expected a file ending in {', '.join(_ENDINGS)}, one example a line")
    return [path]


def read_examples(files: Iterable[Path], layout: str = "auto", fields: Fields | None = None) -> Iterator[Example]:
    """Yield the examples of files, in order; all have one layout.

    Args:
        files:  as `example_files` returns them.
        layout: one of messages, sharegpt, alpaca, prompt-completion, text; auto takes that of the first example.
        fields: your column names.
    Raises:
        DataError: with file and line: not JSON, another layout, a missing field, an unknown role, turns out of order.
    """
    names = fields or {}
    _check_fields(names, layout)
    first = "the recipe"
    for place, record in _records(files):
        if layout == "auto":
            layout, first = _detected(record, names, place), place
        if any(_missing(record, names, name) for name in _NEEDED[layout]):
            raise _other_layout(record, names, place, layout, first)
        yield _READERS[layout](_Reader(record, names, place))


# --------------------------------------------------------------------------------------------- lines of files


def _records(files: Iterable[Path]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for path in files:
        try:
            yield from _array(path) if path.suffix == ".json" else _lines(path)
        except OSError as error:
            raise DataError(f"{path}: {(error.strerror or str(error)).lower()}; expected examples") from None


def _lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open("rb") as stream:
        number = 0
        while raw := stream.readline(MAX_RECORD + 1):
            number += 1
            if len(raw) > MAX_RECORD:
                raise DataError(f"{path}:{number}: longer than {MAX_RECORD >> 20} MiB; expected one example a line")
            raw = raw.removeprefix(_BOM) if number == 1 else raw
            if raw.strip():
                yield f"{path}:{number}", _object(f"{path}:{number}", _json(f"{path}:{number}", raw))


def _array(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A .json file: a list of examples; or lines, as many a .json file has them."""
    with path.open("rb") as stream:
        start = stream.read(64).removeprefix(_BOM).lstrip()[:1]
    if start != b"[":
        yield from _lines(path)
        return
    if (size := path.stat().st_size) > _MAX_ARRAY:
        raise DataError(f"{path}: {size:,} bytes in one list, which is held whole; write it as JSON lines (.jsonl)")
    for number, record in enumerate(_json(str(path), path.read_bytes().removeprefix(_BOM)), 1):
        yield f"{path}: example {number}", _object(f"{path}: example {number}", record)


def _json(place: str, raw: bytes) -> Any:
    try:
        return json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: byte {error.start:,} is not UTF-8; convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error}); expected one example a line") from None


def _object(place: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{place}: expected an object such as {{"messages": […]}}, got {_shown(value)}')
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


# --------------------------------------------------------------------------------------------- layouts


class _Reader(NamedTuple):
    """One record, whose fields are taken by their names here."""

    record: Mapping[str, Any]
    fields: Fields
    place: str

    def text(self, name: str, default: str | None = None) -> str:
        """A field that holds text. Raises: DataError."""
        value = _value(self.record, self.fields, name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise DataError(f"{self.place}: {_column(self.fields, name)} is {_shown(value)}, expected text")
        return value

    def turns(self, name: str, role: str = "role", content: str = "content") -> list[Message]:
        """A field that holds messages, under their names of role and content. Raises: DataError."""
        value = _value(self.record, self.fields, name)
        if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
            raise DataError(f"{self.place}: {_column(self.fields, name)} is {_shown(value)}, expected a list of turns")
        roles = self.fields.get("roles", {})
        known = {**_SHAREGPT, **(roles if isinstance(roles, dict) else {})}
        found: list[Message] = []
        for number, turn in enumerate(value, 1):
            given, text = turn.get(_column(self.fields, role)), turn.get(_column(self.fields, content))
            speaker = known.get(given, given) if isinstance(given, str) else given
            if speaker not in ROLES:
                example = f"data.fields.roles={{{given}: assistant}}" if isinstance(given, str) else "data.fields"
                raise DataError(
                    f"{self.place}: turn {number} has {role} {_shown(given)}; known: {', '.join(ROLES)}; "
                    f"map it with {example}"
                )
            if not isinstance(text, str):
                raise DataError(f"{self.place}: turn {number} has {content} {_shown(text)}; expected text")
            if unread := [key for key in _UNREAD if turn.get(key) not in (None, [], 1, True)]:
                shown = _shown(turn[unread[0]])
                raise DataError(
                    f"{self.place}: turn {number} has {unread[0]} {shown}, which is not honoured here; "
                    "expected role and content alone; take it out or leave the conversation out"
                )
            found.append({"role": str(speaker), "content": text})
        return found

    def conversation(self, messages: Iterable[Message], layout: str) -> Example:
        """A conversation whose turns are in order. Raises: DataError."""
        turns = tuple(messages)
        check_turns(turns, self.place)
        return Example(turns, None, self.place, layout)


def check_turns(messages: Iterable[Message], place: str) -> None:
    """Raises: DataError unless a system turn comes first if at all, then user and assistant in turn, none empty."""
    expected: tuple[str, ...] = ("system", "user")
    number = 0
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role not in expected:
            raise DataError(f"{place}: turn {number} has role {role}, expected {' or '.join(expected)}")
        if not message["content"].strip():
            raise DataError(f"{place}: turn {number} ({role}) is empty; expected text")
        expected = ("assistant",) if role == "user" else ("user",)
    if not number:
        raise DataError(f"{place}: has no turns; expected at least a user's")


def _messages(given: _Reader) -> Example:
    return given.conversation(given.turns("messages"), "messages")


def _sharegpt(given: _Reader) -> Example:
    system = given.text("system", "").strip()
    first: list[Message] = [{"role": "system", "content": system}] if system else []
    return given.conversation([*first, *given.turns("conversations", "from", "value")], "sharegpt")


def _alpaca(given: _Reader) -> Example:
    system, more = given.text("system", "").strip(), given.text("input", "").strip()
    first: list[Message] = [{"role": "system", "content": system}] if system else []
    asked = given.text("instruction") + (f"\n\n{more}" if more else "")
    first += [{"role": "user", "content": asked}, {"role": "assistant", "content": given.text("output")}]
    return given.conversation(first, "alpaca")


def _prompt_completion(given: _Reader) -> Example:
    turns: list[Message] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(_value(given.record, given.fields, name), list):
            turns += given.turns(name)
        else:
            turns.append({"role": role, "content": given.text(name)})
    return given.conversation(turns, "prompt-completion")


def _text(given: _Reader) -> Example:
    text = given.text("text")
    if not text:
        raise DataError(f"{given.place}: {_column(given.fields, 'text')} is empty; expected text")
    return Example(None, text, given.place, "text")


_READERS: dict[str, Callable[[_Reader], Example]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "text": _text,
}
_NEEDED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}
_NAMES = {
    "messages": ("messages", "role", "content", "roles"),
    "sharegpt": ("conversations", "from", "value", "system", "roles"),
    "alpaca": ("instruction", "input", "output", "system"),
    "prompt-completion": ("prompt", "completion", "role", "content", "roles"),
    "text": ("text",),
}
LAYOUTS = tuple(_READERS)


def _check_fields(fields: Fields, layout: str) -> None:
    known = _NAMES.get(layout) or tuple(dict.fromkeys(name for names in _NAMES.values() for name in names))
    for name, column in fields.items():
        if name not in known:
            raise DataError(f"data.fields.{name}: unknown; known for format {layout}: {', '.join(known)}")
        if isinstance(column, str) == (name == "roles"):
            expected = "{your role: known role}" if name == "roles" else "the name of your column"
            raise DataError(f"data.fields.{name} is {_shown(column)}; expected {expected}")
        if isinstance(column, Mapping) and (bad := [role for role in column.values() if role not in ROLES]):
            raise DataError(f"data.fields.roles names {bad[0]}; known: {', '.join(ROLES)}")


def _column(fields: Fields, name: str) -> str:
    column = fields.get(name, name)
    return column if isinstance(column, str) else name


def _value(record: Mapping[str, Any], fields: Fields, name: str) -> Any:
    """The value of a field; of `a.0.b` the b of the first entry of a. None if it is not there."""
    column = _column(fields, name)
    if column in record:
        return record[column]
    value: Any = record
    for key in column.split("."):
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value


def _missing(record: Mapping[str, Any], fields: Fields, name: str) -> bool:
    return _value(record, fields, name) is None


def _detected(record: Mapping[str, Any], fields: Fields, place: str) -> str:
    """The layout whose fields a record has; of several the first. Raises: DataError if there is none."""
    for layout, needed in _NEEDED.items():
        if not any(_missing(record, fields, name) for name in needed):
            return layout
    raise DataError(
        f"{place}: has {_keys(record)}, which fits no format; expected {_expected()}; "
        "name your columns in data.fields, such as {prompt: question, completion: answer}"
    )


def _other_layout(record: Mapping[str, Any], fields: Fields, place: str, layout: str, first: str) -> DataError:
    absent = [_column(fields, name) for name in _NEEDED[layout] if _missing(record, fields, name)]
    return DataError(
        f"{place}: has {_keys(record)}, but no {' and no '.join(absent)}; {first} says format {layout}; "
        "expected one format in all files of a source"
    )


def _keys(record: Mapping[str, Any]) -> str:
    return _shown(list(record)) if record else "no fields"


def _expected() -> str:
    return ", ".join(f"{'+'.join(needed)} ({layout})" for layout, needed in _NEEDED.items())
