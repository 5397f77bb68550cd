"""Questions of a file: read strictly, answered greedily, compared exactly."""

import json
from pathlib import Path

import pytest
import torch
from byte_texts import TOKENIZER, byte_model

from megalodon.errors import DataError, InputError
from megalodon.evaluation.questions import answered, extracted, pattern, read
from megalodon.inference.sampling import SamplingConfig
from megalodon.inference.session import Writer, generate_text


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_answers_are_the_greedy_texts_and_exact_is_a_share(tmp_path):
    writer = Writer(byte_model(torch.float32), TOKENIZER, True)
    asked = [f"{'ab' * n}?" for n in range(1, 6)]
    greedy = SamplingConfig(temperature=0)
    written = [generate_text(writer.model, TOKENIZER, question, 6, greedy) for question in asked]
    rows = [{"q": question, "a": text} for question, text in zip(asked, written, strict=True)]
    rows[1]["a"] = ["no", written[1]]
    rows[2]["a"] = "something else"
    found = answered(
        writer,
        read(write(tmp_path / "q.jsonl", *rows), ("q", "a")),
        taken=None,
        max_new_tokens=6,
        stop=(),
        batch_size=2,
        norm_stats="cumulative",
        raw=False,
    )
    assert [own.text for own in found.written] == written
    assert [own.exact for own in found.written] == [True, True, False, True, True]
    assert found.document()["exact"]["value"] == 0.8
    assert (found.document()["questions"], found.document()["without_answer"]) == (5, 0)


@pytest.mark.parametrize(
    ("text", "regex", "expected"),
    [
        (" 42 \n", None, "42"),
        ("so it is\n#### 42\nQ:", r"####\s*(-?[\d,]+)", "42"),
        ("no number", r"\d+", None),
        ("a 7 b 8", r"\d", "7"),
        ("x=3", r"y=(\d)|x=(\d)", "3"),
    ],
)
def test_a_pattern_takes_the_answer_out_of_a_text(text, regex, expected):
    assert extracted(text, pattern(regex) if regex else None) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, "q.jsonl:1: field `answer` is missing; the fields are question"),
        ({"question": 3, "answer": "b"}, "q.jsonl:1: field `question` is 3; expected text"),
        ({"question": "a", "answer": []}, r"q.jsonl:1: field `answer` is \[\]; expected text"),
        ([1], "q.jsonl:1: expected an object"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "q.jsonl", row))


def test_a_file_without_questions_and_a_pattern_that_is_none(tmp_path):
    with pytest.raises(DataError, match=r"q.jsonl: holds no question"):
        read(write(tmp_path / "q.jsonl"))
    (tmp_path / "x.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"x.jsonl:1: not JSON"):
        read(tmp_path / "x.jsonl")
    with pytest.raises(InputError, match=r"--extract \(: .*expected a regular expression"):
        pattern("(")
