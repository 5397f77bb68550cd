"""Tokenizers as exported for transformers: every text has the ids that ours gives it, and comes back."""

import io
import json
import random
from functools import cache
from typing import Any

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megalodon.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer, train_sentencepiece
from megalodon.errors import DataError
from megalodon.interop.fast_tokenizer import fast_tokenizer, special_ids

tokenizers = pytest.importorskip("tokenizers", reason="the extra hf is not installed")

LINES = [
    "The quick brown fox, jumps over the lazy dog 0123456789.",
    "    if tokens is None:\n        return [token for token in range(10)]",
    "== -- ==== ---- ######## aaaa aaaaaaaa  aaa ababab abab",
    "\tÄpfel, Œuvre, naïve café; 日本語のテキスト。 🙂🙂",
]
TEXTS = LINES * 30
ODD = st.text(st.sampled_from(" \t\n\r\0▁aAbe=-#<0x41>|é日🙂\ufdd0"), max_size=60)
FROM_TEXTS = st.lists(st.sampled_from([w for line in LINES for w in (*line.split(" "), " ", "  ")]), max_size=40)


def trained(**changes: Any) -> SentencePieceTokenizer:
    """A foreign model, trained as others do."""
    written = io.BytesIO()
    options = {"vocab_size": 480, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    options |= {"remove_extra_whitespaces": False, "minloglevel": 2, "allow_whitespace_only_pieces": True}
    lines = iter([line for text in TEXTS for line in text.split("\n")])
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=written, **(options | changes))
    return SentencePieceTokenizer(written.getvalue())


@cache
def tokenizer(name: str) -> Tokenizer:
    return {
        "bytes": lambda: ByteTokenizer(16),
        "bytes, none reserved": lambda: ByteTokenizer(0),
        "bpe": lambda: train_sentencepiece(TEXTS, 480, 16),
        "bpe, as Llama's": lambda: trained(add_dummy_prefix=True),
        "bpe, other ids": lambda: trained(unk_id=3, bos_id=0, eos_id=1, pad_id=2, add_dummy_prefix=False),
        "unigram": lambda: train_sentencepiece(TEXTS, 360, 16, "unigram"),
    }[name]()


EXACT = ["bytes", "bytes, none reserved", "bpe", "bpe, as Llama's", "bpe, other ids"]


@cache
def fast(name: str, bos: bool = False) -> Any:
    whole, _ = fast_tokenizer(tokenizer(name), None, bos)
    return tokenizers.Tokenizer.from_str(json.dumps(whole))


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=150, deadline=None)
@given(text=st.one_of(st.text(max_size=80), ODD, FROM_TEXTS.map("".join), FROM_TEXTS.map(" ".join)))
@example(text="")
@example(text=" a")
@example(text="▁ ▁a▁")
@example(text="aaaaaaaaaaaaaaaaa    =====\n\n\n  <0x41>\0é")
def test_every_text_has_the_same_ids_and_comes_back(name: str, text: str) -> None:
    ids = tokenizer(name).encode(text)
    assert fast(name).encode(text, add_special_tokens=False).ids == ids
    assert fast(name).decode(ids) == text


@pytest.mark.parametrize("name", EXACT)
def test_a_text_that_spells_a_special_id_can_be_read_as_text(name: str) -> None:
    """What transformers does with `split_special_tokens=True`."""
    theirs = tokenizers.Tokenizer.from_str(fast(name).to_str())
    text = "a<|bos|> <|eos|><|reserved_0|>b<|unk|><s></s>"
    assert tokenizer(name).eos_id in theirs.encode(text, add_special_tokens=False).ids
    theirs.encode_special_tokens = True
    assert theirs.encode(text, add_special_tokens=False).ids == tokenizer(name).encode(text)


@pytest.mark.parametrize("name", EXACT)
def test_long_texts_too(name: str) -> None:
    draw = random.Random(0)
    text = "".join(draw.choice(LINES)[draw.randrange(20) :] + draw.choice(["", "\n", " ", "  "]) for _ in range(400))
    assert len(text) > 1 << 13  # longer than what ours encodes in one call
    assert fast(name).encode(text, add_special_tokens=False).ids == tokenizer(name).encode(text)


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(st.text(max_size=60), ODD, FROM_TEXTS.map("".join)))
@example(text="a<0x41>b<0x4><0x41")
def test_a_unigram_model_cuts_texts_as_well_as_ours(text: str) -> None:
    """Of two ways that are equally likely, up to a rounding of float32, the library may take the other."""
    ours, theirs = tokenizer("unigram"), fast("unigram").encode(text, add_special_tokens=False).ids
    ids = ours.encode(text)
    assert fast("unigram").decode(theirs) == text
    if theirs != ids:
        processor = sentencepiece.SentencePieceProcessor(model_proto=ours.serialized())
        scores = [sum(processor.get_score(token) for token in found) for found in (ids, theirs)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-5)


@pytest.mark.parametrize("name", ["bytes", "bytes, none reserved"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_bytes_that_are_no_text_are_decoded_as_ours(name: str, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer(name).vocab_size - 1), max_size=30))
    assert fast(name).decode(ids) == tokenizer(name).decode(ids)  # special ids are silent


@pytest.mark.parametrize("name", [*EXACT, "unigram"])
def test_special_ids(name: str) -> None:
    ours, ids = tokenizer(name), special_ids(tokenizer(name))
    assert (ids.bos, ids.eos) == (ours.bos_id, ours.eos_id)
    assert {ids.pad, ids.unknown} <= ours.special_ids and ids.pad not in (ids.bos, ids.eos)
    assert fast(name, True).encode("a").ids == [ids.bos, *ours.encode("a")]
    assert fast(name, True).encode("").ids == [ids.bos]
    assert fast(name, True).encode("a", "b").ids == [ids.bos, *ours.encode("a"), ids.bos, *ours.encode("b")]
    assert fast(name).get_vocab_size() == ours.vocab_size
    assert fast(name).decode(sorted(ours.special_ids)) == ""


@pytest.mark.parametrize("name", ["bytes", "bpe", "bpe, as Llama's"])
def test_a_marker_is_one_id_and_what_stands_beside_it_is_as_ours(name: str) -> None:
    ours = tokenizer(name)
    markers = {"<|im_start|>": ours.vocab_size + 3, "<|im_end|>": (*ours.reserved_ids, ours.vocab_size)[0]}
    whole, _ = fast_tokenizer(ours, markers, False)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(whole))
    found = theirs.encode("<|im_start|> The  fox<|im_end|>\n").ids
    inside = SentencePieceTokenizer(ours.serialized()) if name.startswith("bpe") else ours
    text, newline = (inside.encode_array(part, begins=False).tolist() for part in (" The  fox", "\n"))
    assert found == [markers["<|im_start|>"], *text, markers["<|im_end|>"], *newline]
    assert theirs.encode("fox").ids == ours.encode("fox")
    assert theirs.token_to_id("<|im_start|>") == ours.vocab_size + 3


def test_what_cannot_be_expressed_is_refused() -> None:
    with pytest.raises(DataError, match="defined by the user or unused"):
        fast_tokenizer(trained(user_defined_symbols=["<sep>"]), None, False)
    with pytest.raises(DataError, match=r"<\|eos\|> is what an export calls another id"):
        fast_tokenizer(ByteTokenizer(4), {"<|eos|>": 5}, False)
    with pytest.raises(DataError, match="spaces that belong to the word before them"):
        fast_tokenizer(trained(treat_whitespace_as_suffix=True, add_dummy_prefix=False), None, False)
