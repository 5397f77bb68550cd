"""Files of examples: every layout, your own column names, and each fault with its file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from megalodon.data.conversations import Fields, example_files, read_examples
from megalodon.data.reading import MAX_RECORD
from megalodon.errors import DataError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief."}


def written(path: Path, *records: Any) -> list[Path]:
    """A file of JSON lines; texts stand in it as they are."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return example_files(path)


@pytest.mark.parametrize(
    ("layout", "record", "fields", "turns"),
    [
        (
            "messages",
            {"messages": [SYSTEM, {**USER, "name": "x"}, {**ANSWER, "weight": 1}], "id": 7},
            {},
            [SYSTEM, USER, ANSWER],
        ),
        ("messages", {"chat": [{"who": "bot", "content": "Hello"}]}, None, None),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            {},
            [USER, ANSWER],
        ),
        ("sharegpt", {"system": "Be brief.", "conversations": [{"from": "user", "value": "Hi"}]}, {}, [SYSTEM, USER]),
        ("alpaca", {"instruction": "Hi", "output": "Hello"}, {}, [USER, ANSWER]),
        (
            "alpaca",
            {"instruction": "Hi", "input": "x", "output": "Hello"},
            {},
            [{**USER, "content": "Hi\n\nx"}, ANSWER],
        ),
        ("alpaca", {"instruction": "Hi", "runs": [{"out": "Hello"}]}, {"output": "runs.0.out"}, [USER, ANSWER]),
        ("prompt-completion", {"prompt": "Hi", "completion": "Hello"}, {}, [USER, ANSWER]),
        ("prompt-completion", {"prompt": [SYSTEM, USER], "completion": [ANSWER]}, {}, [SYSTEM, USER, ANSWER]),
        (
            "prompt-completion",
            {"question": "Hi", "answer": "Hello"},
            {"prompt": "question", "completion": "answer"},
            [USER, ANSWER],
        ),
        (
            "prompt-completion",
            {"a.b": "Hi", "answer": "Hello"},
            {"prompt": "a.b", "completion": "answer"},
            [USER, ANSWER],
        ),
    ],
)
def test_layouts_are_found(tmp_path: Path, layout: str, record: Any, fields: Fields | None, turns: Any) -> None:
    files = written(tmp_path / "x.jsonl", "", record)
    if turns is None:
        names: Fields = {"messages": "chat", "role": "who", "roles": {"bot": "user"}}
        turns, fields = [{"role": "user", "content": "Hello"}], names
    for asked in ("auto", layout):
        (example,) = read_examples(files, asked, fields)
        assert example == (tuple(turns), None, f"{files[0]}:2", layout)


def test_texts(tmp_path: Path) -> None:
    (example,) = read_examples(written(tmp_path / "x.jsonl", {"text": " a\n"}))
    assert (example.messages, example.text, example.format) == (None, " a\n", "text")


def test_folders_arrays_and_byte_order_marks(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(json.dumps([{"text": "2"}, {"text": "3"}], indent=1))
    (tmp_path / "c.json").write_text('{"text": "4"}\n{"text": "5"}')
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "1"}\r\n')
    (tmp_path / "readme.md").write_text("no examples")
    examples = list(read_examples(example_files(tmp_path)))
    assert [example.text for example in examples] == ["1", "2", "3", "4", "5"]
    assert examples[2].place == f"{tmp_path / 'b.json'}: example 2"


@pytest.mark.parametrize(
    ("records", "said"),
    [
        (['{"text": "a"}', "{"], r"x.jsonl:2: not JSON"),
        (["[1]"], r"x.jsonl:1: expected an object such as"),
        (
            [{"text": "a"}, {"prompt": "a", "completion": "b"}],
            r'x.jsonl:2: has \["prompt", "completion"\], but no text; .*x.jsonl:1 says format text',
        ),
        ([{"foo": "a"}], r"x.jsonl:1: has \[\"foo\"\], which fits no format.*messages \(messages\).*data.fields"),
        ([{}], "has no fields"),
        ([{"messages": []}], "x.jsonl:1: has no turns"),
        ([{"messages": "Hi"}], 'x.jsonl:1: messages is "Hi", expected a list of turns'),
        (
            [{"messages": [{"role": "bot", "content": "a"}]}],
            r'turn 1 has role "bot"; known: system, user, assistant; map it with data.fields.roles=\{bot: assistant\}',
        ),
        ([{"messages": [{"role": None, "content": "a"}]}], "turn 1 has role null"),
        ([{"messages": [{"role": "user", "content": ["a"]}]}], r'turn 1 has content \["a"\]; expected text'),
        ([{"messages": [USER, {**ANSWER, "weight": 0}]}], r"turn 2 has weight 0, which is not honoured here"),
        (
            [{"messages": [USER, {**ANSWER, "tool_calls": [{}]}]}],
            r"turn 2 has tool_calls \[{}\], which is not honoured",
        ),
        ([{"messages": [USER, USER]}], "turn 2 has role user, expected assistant"),
        ([{"messages": [ANSWER]}], "turn 1 has role assistant, expected system or user"),
        ([{"messages": [USER, SYSTEM]}], "turn 2 has role system, expected assistant"),
        ([{"messages": [SYSTEM, SYSTEM]}], "turn 2 has role system, expected user"),
        ([{"messages": [USER, {"role": "assistant", "content": " \n"}]}], r"turn 2 \(assistant\) is empty"),
        ([{"prompt": 7, "completion": "b"}], "prompt is 7, expected text"),
        ([{"text": ""}], "text is empty"),
        (['{"text": "' + "a" * MAX_RECORD + '"}'], "x.jsonl:1: longer than 16 MiB"),
        (["[" * 100_000], "x.jsonl:1: not JSON"),
    ],
)
def test_faults_say_where(tmp_path: Path, records: list[Any], said: str) -> None:
    files = written(tmp_path / "x.jsonl", *records)
    with pytest.raises(DataError, match=said) as caught:
        list(read_examples(files))
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"x.jsonl:2: byte 10 is not UTF-8"):
        list(read_examples(example_files(tmp_path / "x.jsonl")))


@pytest.mark.parametrize(
    ("fields", "layout", "said"),
    [
        ({"question": "a"}, "auto", "data.fields.question: unknown; known for format auto: messages, role"),
        ({"prompt": "a"}, "text", "data.fields.prompt: unknown; known for format text: text"),
        ({"roles": "bot"}, "auto", 'data.fields.roles is "bot"; expected {your role: known role}'),
        ({"prompt": {"a": "b"}}, "auto", "expected the name of your column"),
        ({"roles": {"bot": "robot"}}, "auto", "data.fields.roles names robot; known: system, user, assistant"),
    ],
)
def test_fields_are_checked(tmp_path: Path, fields: Fields, layout: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        list(read_examples(written(tmp_path / "x.jsonl", {"text": "a"}), layout, fields))


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a")
    for path, said in (
        (tmp_path / "no", "no such file"),
        (tmp_path / "x.csv", "ending in .jsonl"),
        (tmp_path, "holds no file"),
    ):
        with pytest.raises(DataError, match=said):
            example_files(path)
