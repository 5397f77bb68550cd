"""Tokenizers keep every text intact, and refuse models that do not."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece

from megalodon.data.tokenizer import (
    ByteTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    TokenizerConfig,
    bytes_per_token,
    check_path,
    load_tokenizer,
    train_sentencepiece,
)
from megalodon.errors import DataError

CORPUS = ["def main():\n    return 12345  # the and of\n" * 20 + f"line {n} of the text, café\n" for n in range(40)]
TEXTS = [
    "",
    " ",
    "a",
    "  two  spaces   three\t\ttabs\n\n\nlines\r\n end  ",
    "\n",
    "emoji 🙂👩‍👩‍👧 and ▁ meta ▁▁ signs",
    "▁",
    "<s></s><unk><|reserved_0|><0x0A>",
    "\0 zero \x7f \ufeff bom \u3000 wide ① ﬁ \U0010ffff",
    "def f(x):\n        return x[1234:5678]\n",
    "的中文" * 11,
]


@pytest.fixture(scope="module")
def trained() -> SentencePieceTokenizer:
    return train_sentencepiece(CORPUS, 340, reserve=5)


@pytest.fixture(params=["sentencepiece", "unigram", "bytes"])
def tokenizer(request: pytest.FixtureRequest, trained: SentencePieceTokenizer) -> Tokenizer:
    if request.param == "unigram":
        return train_sentencepiece(CORPUS, 296, reserve=5, model_type="unigram")
    return trained if request.param == "sentencepiece" else ByteTokenizer(reserve=5)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_is_exact(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes(token) for token in ids) == text.encode()
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert not tokenizer.special_ids & set(ids), "text must never become a special id"


def test_long_text_is_encoded_in_blocks_without_a_seam(trained: SentencePieceTokenizer) -> None:
    text = "".join(f"    line {number} of the text\n" for number in range(9000))
    assert len(text) > 3 << 16
    assert trained.encode(text) == trained._processor.encode(text)


def test_special_ids_come_first(trained: SentencePieceTokenizer) -> None:
    assert (trained.bos_id, trained.eos_id, trained.vocab_size) == (1, 2, 340)
    assert trained.special_ids == frozenset(range(8))
    assert trained.decode([1, *trained.encode("the text"), 2, 3]) == "the text"
    markers = [f"<|reserved_{number}|>" for number in range(5)]
    assert [trained._processor.id_to_piece(token) for token in range(3, 8)] == markers
    assert all(trained._processor.is_control(token) for token in range(3, 8))
    assert not trained.special_ids & set(trained.encode("".join(markers)))
    plain = ByteTokenizer()
    assert (plain.bos_id, plain.eos_id, plain.vocab_size) == (1, 2, 276)
    assert plain.encode("A") == [20 + 65]


def test_bytes_per_token_is_one_for_plain_bytes_and_more_for_a_trained_model(trained: SentencePieceTokenizer) -> None:
    texts = ["line 3 of the text, café\n", "the and of"]
    assert bytes_per_token(ByteTokenizer(), texts) == 1
    size, count = sum(len(text.encode()) for text in texts), sum(len(trained.encode(text)) for text in texts)
    assert bytes_per_token(trained, iter(texts)) == size / count > 1.5
    with pytest.raises(DataError, match="no text to count"):
        bytes_per_token(trained, ["", ""])


def test_training_is_deterministic_and_splits_digits(trained: SentencePieceTokenizer) -> None:
    again = train_sentencepiece(iter(CORPUS), 340, reserve=5)
    assert again.sha256 == trained.sha256
    assert [trained.token_bytes(token) for token in trained.encode("12345")][-5:] == [b"1", b"2", b"3", b"4", b"5"]


def test_saved_and_loaded_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.kind, loaded.sha256, loaded.vocab_size) == (tokenizer.kind, tokenizer.sha256, tokenizer.vocab_size)
    assert loaded.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])


def foreign(**options: object) -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world " * 30] * 3),
        model_writer=written,
        model_type="bpe",
        minloglevel=2,
        **options,
    )
    return written.getvalue()


def test_a_foreign_model_with_a_dummy_prefix_gives_its_own_ids_and_no_loss() -> None:
    model = foreign(
        vocab_size=270, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False
    )
    tokenizer = SentencePieceTokenizer(model)
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert tokenizer.encode("hello  hello\nworld") == original.encode("hello  hello\nworld")
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_models_that_change_text_are_refused() -> None:
    with pytest.raises(DataError, match="no byte fallback"):
        SentencePieceTokenizer(foreign(vocab_size=18), "t.model")
    with pytest.raises(DataError, match=r"t\.model: changes text"):
        SentencePieceTokenizer(foreign(vocab_size=270, byte_fallback=True), "t.model")


@pytest.mark.parametrize("content", [b"", b"no model", bytes(range(256))])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.model").write_bytes(content)
    with pytest.raises(DataError, match=r"t\.model: is not a SentencePiece model"):
        load_tokenizer(tmp_path / "t.model")
    assert capfd.readouterr().err == ""


def test_missing_and_ambiguous_files_are_named(tmp_path: Path, trained: SentencePieceTokenizer) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_tokenizer(tmp_path / "none.model")
    with pytest.raises(DataError, match="holds neither"):
        load_tokenizer(tmp_path)
    trained.save(tmp_path)
    ByteTokenizer().save(tmp_path)
    with pytest.raises(DataError, match="holds both"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    for damaged in ('{"kind": "bytes"}', '{"kind": "bytes", "reserve": 10000000000, "version": 1}', "[" * 100_000):
        (tmp_path / "byte_tokenizer.json").write_text(damaged)
        with pytest.raises(DataError, match=r"byte_tokenizer\.json: (expected|not JSON)"):
            load_tokenizer(tmp_path)


def test_configured_paths_are_checked(tmp_path: Path) -> None:
    assert check_path(TokenizerConfig()) is None
    assert check_path(TokenizerConfig(path="hf:ORG/NAME")) is None is check_path(TokenizerConfig(path="hf:a/b@v1.0"))
    for config, message in (
        (TokenizerConfig(path="hf:NAME"), "expected hf:ORG/NAME or hf:ORG/NAME@REVISION"),
        (TokenizerConfig(path="hf:a/b@"), "expected hf:ORG/NAME or hf:ORG/NAME@REVISION"),
        (TokenizerConfig(path=str(tmp_path / "none.model")), "no such file"),
        (TokenizerConfig(kind="bytes", path="t.model"), "remove one of the two"),
    ):
        with pytest.raises(DataError, match=message):
            check_path(config)


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        ([], 340, "no text to train"),
        (["", "\n\n"], 340, "no text to train"),
        (["ab"], 340, "does not fit the text.*<= "),
        (CORPUS, 100, "leaves no room"),
        (CORPUS, 10**20, "does not fit the text"),
    ],
)
def test_impossible_training_says_why(texts: list[str], size: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        train_sentencepiece(texts, size)


def test_bad_ids_and_surrogates_are_errors(tokenizer: Tokenizer) -> None:
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(DataError, match=f"token id {token}"):
            tokenizer.decode([token])
    with pytest.raises(DataError, match=r"surrogate pair \(U\+D800 at character 2"):
        tokenizer.encode("ab\ud800")


@pytest.mark.parametrize("error", [SystemExit(143), KeyboardInterrupt(), DataError("a.jsonl:3:1: not JSON")], ids=repr)
def test_what_reading_raises_is_not_blamed_on_the_vocabulary(error: BaseException) -> None:
    def texts() -> Iterator[str]:
        yield from ["some text to begin with"] * 40
        raise error

    with pytest.raises(type(error)) as caught:
        train_sentencepiece(texts(), 300)
    assert caught.value is error
