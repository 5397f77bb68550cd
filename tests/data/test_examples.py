"""From files of examples to a packed store: what is trained on, what is left out, what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import tiny_model
from packed import assert_packed_is_separate

from megalodon.data.chat import ChatFormat, load_template
from megalodon.data.examples import ExamplesLedger, ExampleSource, PreparedExamples, Request, prepare_examples
from megalodon.data.packing import read_windows
from megalodon.data.tokenizer import ByteTokenizer
from megalodon.errors import CheckFailed, DataError

TOKENIZER = ByteTokenizer()
CHAT = ChatFormat(load_template("chatml"), TOKENIZER, bos=True)
GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"


def chat(number: int, words: int = 3) -> dict[str, Any]:
    asked, said = f"What is {number} and one?", f"It is {number + 1}" + ", truly" * words + "."
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(tmp_path: Path, rows: list[dict[str, Any]] | None = None, **changes: Any) -> PreparedExamples:
    path = write(tmp_path / "chats.jsonl", [chat(n, n % 7) for n in range(60)] if rows is None else rows)
    asked = {
        "name": "toy",
        "sources": (ExampleSource("chats", path),),
        "valid_path": None,
        "fraction": 0.2,
        "fields": {},
        "train_on": "assistant",
        "seq_len": 300,
        "over_length": "error",
        "packing": "first-fit",
    }
    return prepare_examples(Request(**(asked | changes)), TOKENIZER, CHAT, bos=True, parent=tmp_path / "data")


def test_only_the_answers_and_what_ends_them_are_trained_on(tmp_path: Path) -> None:
    found = prepared(tmp_path)
    batch = read_windows(found.train, found.train_packing, [0], "doc")
    targets = [token for token in batch.targets[0].tolist() if token >= 0]
    (stop,) = CHAT.stop_ids
    answers = "".join(TOKENIZER.decode([t]) if t != stop else "|" for t in targets)
    said = [chat(n, n % 7)["messages"][1]["content"] for n in range(60)]
    assert answers.endswith("|") and all(answer in said for answer in answers[:-1].split("|"))
    assert len(answers.split("|")) > 2 and batch.starts[0].sum() == len(answers.split("|")) - 1


def test_the_same_request_finds_its_store_again_and_another_makes_another(tmp_path: Path) -> None:
    first, second = prepared(tmp_path), prepared(tmp_path)
    assert (first.up_to_date, second.up_to_date) == (False, True)
    assert first.train.fingerprint == second.train.fingerprint and first.ledger == second.ledger
    others = [prepared(tmp_path, **change) for change in ({"train_on": "all"}, {"packing": "none"}, {"seq_len": 301})]
    assert len({p.train.path for p in (first, *others)}) == 4
    assert others[1].train_packing.num_windows == others[1].train.num_documents
    assert (others[1].train_packing.examples(5) == [5]).all()
    write(tmp_path / "more.jsonl", [chat(1)])
    assert prepared(tmp_path, valid_path=tmp_path / "more.jsonl").ledger.valid == 1


def test_the_store_of_a_plan_that_was_changed_is_refused(tmp_path: Path) -> None:
    found = prepared(tmp_path)
    path = found.train.path / "windows.npy"
    windows = np.load(path)
    np.save(path, windows[::-1].copy())
    with pytest.raises(DataError, match=r"windows\.npy"):
        prepared(tmp_path)
    path.write_bytes(b"no array")
    with pytest.raises(DataError, match=r"windows\.npy: no packing"):
        prepared(tmp_path)


def long_and_short() -> list[dict[str, Any]]:
    return [chat(n, 60 if n % 10 == 3 else 2) for n in range(60)]


@pytest.mark.parametrize("policy", ["drop", "truncate-start", "truncate-end"])
def test_what_is_too_long_is_dropped_or_cut_as_asked_and_counted(tmp_path: Path, policy: str) -> None:
    found = prepared(tmp_path, long_and_short(), over_length=policy)
    ledger = found.ledger
    ledger.check()
    dropped = policy == "drop"
    assert (ledger.read, ledger.too_long, ledger.shortened) == (60, 6 * dropped, 6 * (not dropped))
    assert ledger.train + ledger.valid == 60 - 6 * dropped
    assert max(found.train.lengths()) == 300 or dropped
    text = " ".join(ledger.lines())
    assert f"too long {6 * dropped} ({policy})" in text
    if not dropped:
        at = int(np.argmax(found.train.lengths()))
        begin = int(found.train_packing.begins[at])
        ids = found.train.tokens(begin, begin + 300).tolist()
        assert ids[0] == TOKENIZER.bos_id
        assert (ids[-2] in CHAT.stop_ids) == (policy == "truncate-start")


def test_a_conversation_that_is_too_long_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"chats\.jsonl:4: \d+ tokens, but a window holds data\.seq_len 300; raise it, or"
    ):
        prepared(tmp_path, long_and_short())
    with pytest.raises(DataError, match=r"chats\.jsonl:4: .* and split is for text only"):
        prepared(tmp_path, long_and_short(), over_length="split")
    assert list((tmp_path / "data").iterdir()) == []


def test_texts_may_be_split(tmp_path: Path) -> None:
    rows = [{"text": f"{n} " * 200} for n in range(20)]
    found = prepared(tmp_path, rows, over_length="split")
    ledger = found.ledger
    assert ledger.read == 20 and ledger.pieces == found.train.num_documents + found.valid.num_documents - 20 > 0
    assert ledger.tokens == ledger.tokens_train + ledger.tokens_valid == sum(len(f"{n} ") * 200 + 2 for n in range(20))
    assert found.formats == {"text": 20}
    # A first token is never a target; every other one is, EOS included.
    assert found.train.manifest["trained_labels"] == found.train.num_tokens - found.train.num_documents


def test_an_example_without_anything_to_train_on_is_counted(tmp_path: Path) -> None:
    rows = [*(chat(n) for n in range(40)), {"messages": [{"role": "user", "content": "Hello?"}]}]
    ledger = prepared(tmp_path, rows).ledger
    assert ledger.nothing == 1 and "nothing to train on 1" in ledger.lines()[0]


def test_a_sum_that_does_not_add_up_is_a_failed_check() -> None:
    counts = dict.fromkeys(ExamplesLedger._fields[1:], 0)
    with pytest.raises(CheckFailed, match="examples read 2"):
        ExamplesLedger("drop", **(counts | {"read": 2, "train": 1})).check()
    with pytest.raises(CheckFailed, match="tokens encoded 9"):
        ExamplesLedger("drop", **(counts | {"tokens": 9})).check()


QUESTION = {"messages": [{"role": "user", "content": "Hello?"}]}
SYSTEM = {"messages": [{"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "Hello?"}]}
BOT = {"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}
EMPTY = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([], {}, "hold no example"),
        ([QUESTION] * 9, {}, r"chats\.jsonl:1: neither this example nor any of the 9 leaves a token to train on"),
        ([chat(1), SYSTEM], {}, r"chats\.jsonl:2: turn 1 has role assistant"),
        ([chat(1), BOT], {}, r"chats\.jsonl:2: turn 2 has role \"bot\"; known: system, user, assistant"),
        ([chat(1), EMPTY], {}, r"chats\.jsonl:2: turn 2 \(assistant\) is empty"),
        ([chat(1), {"instruction": "a", "output": "b"}], {}, r"chats\.jsonl:2: has .* but no messages"),
        ([{"words": 1}], {}, r"chats\.jsonl:1: has \[\"words\"\], which fits no format"),
        ([chat(n) for n in range(9)], {"fraction": 0.0}, "no example is left for validation"),
        (
            [chat(n, 60) for n in range(9)],
            {"over_length": "truncate-end", "seq_len": 100, "fraction": 0.3},
            r"chats\.jsonl:1: the end of turn, <\|im_end\|>, is trained neither here nor in any of",
        ),
    ],
)
def test_what_would_train_nothing_or_never_stop_is_refused(
    tmp_path: Path, rows: list[dict[str, Any]], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, rows, **changes)


def test_a_file_given_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", [chat(1)])
    sources = (ExampleSource("a", path), ExampleSource("b", tmp_path / "./chats.jsonl"))
    with pytest.raises(DataError, match="is given twice"):
        prepared(tmp_path, sources=sources)


@pytest.mark.skipif(not GSM8K.exists(), reason="the data of gsm8k are not here")
def test_packed_is_separate_on_real_conversations(tmp_path: Path) -> None:
    """In float32 the sums over all tokens round: torch adds up the gradient of a LayerNorm row by row."""
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()[:14]]
    fields = {"prompt": "question", "completion": "answer"}
    found = prepared(tmp_path, rows, fields=fields, seq_len=1024, over_length="drop")
    assert found.formats == {"prompt-completion": 14}
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        model = tiny_model(dtype, vocab_size=320, chunk_size=64)
        assert_packed_is_separate(found.train, model, 1024, tolerance, num_classes=TOKENIZER.vocab_size)
