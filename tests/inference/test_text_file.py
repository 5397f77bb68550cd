"""Text files: checked as a whole before anything is read, ids of any length in bounded memory, the same as at once."""

import hashlib
import tracemalloc
from pathlib import Path

import pytest

from megalodon.data.tokenizer import ByteTokenizer, train_sentencepiece
from megalodon.errors import DataError
from megalodon.inference.text_file import open_text, token_ids

TEXT = "Ein Käfer, zwei Käfer; 🙂 and so on.\n"


@pytest.fixture
def book(tmp_path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(TEXT * 20_000, encoding="utf-8")  # some 800 kB: several pieces
    return path


def test_the_ids_are_those_of_the_text(book):
    for tokenizer in (ByteTokenizer(), train_sentencepiece([TEXT * 40], 300, 4)):
        told: list[tuple[int, int]] = []
        file = open_text(book)
        ids = list(token_ids(file, tokenizer, lambda size, tokens, told=told: told.append((size, tokens))))
        assert ids == tokenizer.encode(book.read_text(encoding="utf-8"))
        assert file.size == book.stat().st_size
        assert file.sha256 == hashlib.sha256(book.read_bytes()).hexdigest()
        assert told[-1] == (file.size, len(ids))
        assert told == sorted(told)
        assert len(told) >= len(ids) // 1024


def test_memory_stays_flat(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("It was a dark and stormy night. " * 500_000)  # 16 MB in one line
    tracemalloc.start()
    count = sum(1 for _ in token_ids(open_text(path), ByteTokenizer()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 16_000_000
    assert peak < 12_000_000


@pytest.mark.parametrize("before", [0, 3, 1_048_575, 1_048_576, 2_500_001])
def test_what_is_not_utf8_is_named_by_its_byte(tmp_path, before):
    path = tmp_path / "bad.txt"
    for bad in (b"\xff", b"\xe2\x82z", b"\xe2\x82"):
        path.write_bytes(b"x" * before + bad)
        with pytest.raises(DataError, match=rf"bad\.txt: byte {before:,} is 0x{bad[0]:02x}, which is not UTF-8"):
            open_text(path)


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "mark.txt"
    path.write_bytes(b"\xef\xbb\xbfHi")
    file = open_text(path)
    assert list(token_ids(file, ByteTokenizer())) == ByteTokenizer().encode("Hi")
    assert file.size == 2


def test_what_holds_no_text_is_refused(tmp_path):
    for content in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "empty.txt").write_bytes(content)
        with pytest.raises(DataError, match=r"empty\.txt: is empty; expected text"):
            open_text(tmp_path / "empty.txt")
    with pytest.raises(DataError, match=r"nowhere\.txt: no such file"):
        open_text(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match="is a directory; expected a file of text"):
        open_text(tmp_path)
    with pytest.raises(DataError, match="is no file, and text is read twice"):
        open_text(Path("/dev/null"))
