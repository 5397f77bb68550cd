"""Streamed text: whole characters for every cut of the bytes, stop strings never half shown."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon.data.tokenizer import ByteTokenizer, train_sentencepiece
from megalodon.errors import InputError
from megalodon.inference.stream import Stops, TokenStream


class Pieces:
    """A tokenizer whose ids are given pieces of bytes."""

    kind, vocab_size, bos_id, eos_id, special_ids, sha256 = "pieces", 0, -1, -2, frozenset(), ""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    def token_bytes(self, token: int) -> bytes:
        return self.pieces[token]


def shown(pieces: list[bytes], stop: tuple[str, ...] = ()) -> list[str]:
    stream = TokenStream(Pieces(*pieces), stop)
    return [*(stream.push(i) for i in range(len(pieces))), stream.flush()]


def splits(content: bytes, cuts: int):
    for places in itertools.combinations(range(1, len(content)), cuts):
        yield [content[a:b] for a, b in itertools.pairwise((0, *places, len(content)))]


def test_every_split_of_multibyte_text_gives_whole_characters():
    text = "aé€🙂z"
    for cuts in (0, 1, 2, 3, len(text.encode()) - 1):
        for pieces in splits(text.encode(), cuts):
            parts = shown(pieces)
            assert "".join(parts) == text
            assert "�" not in "".join(parts)


def test_text_comes_as_soon_as_a_character_is_whole():
    euro = "€".encode()
    assert shown([euro[:1], euro[1:2], euro[2:], b"x"]) == ["", "", "€", "x", ""]


def test_broken_bytes_become_replacements_only_when_nothing_can_complete_them():
    euro = "€".encode()
    assert shown([euro[:2], b"a"]) == ["", "�a", ""]
    assert shown([b"\xff", b"b"]) == ["�", "b", ""]
    assert shown([b"a", euro[:2]]) == ["a", "", "�"]


def test_whatever_the_split_broken_bytes_read_like_a_whole_decode():
    content = b"a\xe2\x82b\xf0\x9f\x99\x82\xc3"
    for pieces in splits(content, 3):
        assert "".join(shown(pieces)) == content.decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one STOP two", ("STOP",), "one "),
        ("one STO two", ("STOP",), "one STO two"),
        ("aabaac", ("aac",), "aab"),
        ("aaaab", ("aab",), "aa"),
        ("x€🙂y", ("€🙂",), "x"),
        ("abc", ("abc", "b"), "a"),
        ("abc", ("abc", "xbc"), ""),
        ("ab", ("b", "ab"), ""),
        ("end ST", ("STOP",), "end ST"),
        ("", ("x",), ""),
    ],
)
def test_stop_strings_end_the_text_alike_for_every_split(text, stop, expected):
    content = text.encode()
    for cuts in {0, 1, 2, len(content) - 1} & set(range(max(1, len(content)))):
        for pieces in splits(content, cuts):
            parts = shown(pieces, stop)
            assert "".join(parts) == expected
            # Never half shown: what is on the screen is at every moment a beginning of the final text.
            assert all(expected.startswith("".join(parts[:n])) for n in range(len(parts) + 1))


def test_nothing_comes_after_a_stop():
    stream = TokenStream(Pieces(b"a|b", b"c|"), ("|",))
    assert (stream.push(0), stream.stopped) == ("a", True)
    assert (stream.push(1), stream.flush()) == ("", "")


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InputError, match="stop string is empty"):
        TokenStream(ByteTokenizer(), ["x", ""])


def test_real_tokenizers_stream_what_they_decode():
    text = "def f():\n\treturn  'é€🙂'  # alas\n"
    for tokenizer in (ByteTokenizer(), train_sentencepiece([text * 30], vocab_size=310, reserve=2)):
        ids = tokenizer.encode(text)
        stream = TokenStream(tokenizer)
        assert "".join(map(stream.push, [tokenizer.bos_id, *ids, tokenizer.eos_id])) + stream.flush() == text


def stopped_at(text: str, stop: tuple[str, ...]) -> tuple[int, int] | None:
    """End and beginning of the stop string that is complete first, the longest of several: the plain search."""
    found = [(text.find(string) + len(string), text.find(string)) for string in stop if string in text]
    return min(found, default=None)


@settings(max_examples=400)
@given(
    st.text("ab", max_size=24),
    st.lists(st.text("ab", min_size=1, max_size=6), max_size=8),
    st.lists(st.integers(1, 4), min_size=24, max_size=24),
)
def test_many_stop_strings_end_a_text_as_a_plain_search_finds_them(text, stop, lengths):
    rest, pieces = text, []
    while rest:
        pieces.append(rest[: lengths[len(pieces)]].encode())
        rest = rest[lengths[len(pieces) - 1] :]
    found = stopped_at(text, tuple(stop))
    parts = shown(pieces, tuple(stop))
    assert "".join(parts) == (text if found is None else text[: found[1]])
    # Nothing is held back that can no longer be the beginning of a stop string.
    sofar, out = "", ""
    for piece, part in zip(pieces, parts, strict=False):
        sofar, out = sofar + piece.decode(), out + part
        if stopped_at(sofar, tuple(stop)):
            break
        longest = max((n for s in stop for n in range(1, len(s)) if sofar.endswith(s[:n])), default=0)
        assert out == sofar[: len(sofar) - longest]


def test_ten_thousand_stop_strings_cost_no_more_than_one():
    """Steps of the automaton are counted, not time: one a character."""

    class Counted(Stops):
        steps = 0

        def follow(self, node: int, character: str) -> int:
            Counted.steps += 1
            return super().follow(node, character)

    stops = Counted(f"{number:05d}!" for number in range(10_000))
    Counted.steps = 0
    stream = TokenStream(Pieces(b"01234567890" * 100), stops)
    assert len(stream.push(0)) == 1099  # its last 0 may begin one
    assert Counted.steps == 1100
