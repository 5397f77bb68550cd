"""Our tokenizers as files of the `tokenizers` library, tokenizer.json and tokenizer_config.json: same text, same ids.

A SentencePiece model becomes a BPE or unigram model over characters, with the spaces as they are: U+2581, which
SentencePiece writes for a space, is then an unknown character like any other and is spelled in bytes, as ours does.
The byte tokenizer becomes a BPE model without merges. Special ids get names that no ordinary text holds; where a text
holds one all the same, transformers reads it as that id (`split_special_tokens=True` reads it as text, as ours does).
Not here: templates of conversations (huggingface.py), our own tokenizers (megalodon/data/tokenizer.py).
"""

import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from megalodon.data.tokenizer import SPACE, Tokenizer
from megalodon.errors import DataError

Json = dict[str, Any]
Parts = tuple[Json, Json | None, Json | None, Json]
"""The model, what normalises a text, what splits it, what decodes."""

BOS, EOS, UNKNOWN, PAD = "<|bos|>", "<|eos|>", "<|unk|>", "<|pad|>"
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
"""Kinds of pieces in a SentencePiece model; 4 is defined by the user, 5 is unused."""
_UNIGRAM, _BPE = 1, 2
_UNLIMITED = 10**30
"""What transformers writes for a model without a longest text."""


class SpecialIds(NamedTuple):
    """The ids that mean something to transformers."""

    bos: int
    eos: int
    unknown: int
    pad: int


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """Return them. What pads a batch is never the end of a text: tuning would then unlearn to stop."""
    if tokenizer.kind == "bytes":
        return SpecialIds(tokenizer.bos_id, tokenizer.eos_id, 0, 3)
    pieces = _SentencePiece.read(tokenizer)
    unknown = pieces.kinds.index(_UNKNOWN)
    pads = [number for number, kind in enumerate(pieces.kinds) if kind == _CONTROL and pieces.names[number] == "<pad>"]
    return SpecialIds(tokenizer.bos_id, tokenizer.eos_id, unknown, pads[0] if pads else unknown)


def breaks_ties(tokenizer: Tokenizer) -> bool:
    """Whether a text that can be cut in two equally likely ways may be cut in the other: so with a unigram model.

    SentencePiece adds likelihoods in float32, the library in float64: in runs of one piece the rounding decides.
    """
    return tokenizer.kind != "bytes" and _SentencePiece.read(tokenizer).model_type == _UNIGRAM


def fast_tokenizer(tokenizer: Tokenizer, markers: Mapping[str, int] | None, bos: bool) -> tuple[Json, Json]:
    """Return tokenizer.json and tokenizer_config.json.

    Args:
        tokenizer: of a model.
        markers:   of its chat template: name -> id, reserved or above the vocabulary; None: it has no template.
        bos:       whether texts begin with BOS.
    Raises:
        DataError: it cannot be expressed there; the message says why.
    """
    names = _special_names(tokenizer, markers or {})
    express = _bytes if tokenizer.kind == "bytes" else _pieces
    model, normalizer, splitter, decoder = express(tokenizer, names)
    if normalizer is not None and markers is not None:
        # In a conversation the space belongs to its very beginning, not to what stands behind each special id. (Before
        # a text that itself begins with a space the library puts none then.)
        normalizer, splitter = (
            None,
            {"type": "Metaspace", "replacement": " ", "prepend_scheme": "first", "split": False},
        )
    added = [
        {"id": token, "content": name, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for token, name in sorted(names.items())
    ]
    whole: Json = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": splitter,
        "post_processor": _begin_with(names[tokenizer.bos_id], tokenizer.bos_id) if bos else None,
        "decoder": decoder,
        "model": model,
    }
    ids = special_ids(tokenizer)
    about: Json = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[ids.bos],
        "eos_token": names[ids.eos],
        "unk_token": names[ids.unknown],
        "pad_token": names[ids.pad],
        "add_bos_token": bos,
        "add_eos_token": False,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": _UNLIMITED,
    }
    return whole, about


def _special_names(tokenizer: Tokenizer, markers: Mapping[str, int]) -> dict[int, str]:
    """The name of every id that no text encodes to. Those above the vocabulary are numbered without a gap."""
    ids = special_ids(tokenizer)
    named = {ids.pad: PAD, ids.unknown: UNKNOWN, ids.bos: BOS, ids.eos: EOS}
    size = max([tokenizer.vocab_size, *(token + 1 for token in markers.values())])
    special = sorted(tokenizer.special_ids | set(range(tokenizer.vocab_size, size)))
    names = {token: named.get(token, f"<|reserved_{number}|>") for number, token in enumerate(special)}
    names |= {token: name for name, token in markers.items()}
    if len(set(names.values())) < len(names):
        twice = sorted(name for name in set(names.values()) if list(names.values()).count(name) > 1)
        raise DataError(
            f"the chat template's {', '.join(twice)} is what an export calls another id; give the marker another name"
        )
    return names


def _begin_with(name: str, token: int) -> Json:
    """What puts BOS before a text."""
    begin = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": which, "type_id": number}} for number, which in enumerate("AB"))
    special = {name: {"id": name, "ids": [token], "tokens": [name]}}
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, begin, second],
        "special_tokens": special,
    }


def _bpe(vocab: dict[str, int], merges: list[list[str]], byte_fallback: bool) -> Json:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": byte_fallback,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    }


def _bytes(tokenizer: Tokenizer, names: Mapping[int, str]) -> Parts:
    """The byte tokenizer: its ids end with the 256 bytes, each written as the character the library has for it."""
    size = tokenizer.vocab_size
    vocab = {name: token for token, name in names.items() if token < size}
    vocab |= {character: size - 256 + value for value, character in enumerate(_byte_characters())}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return _bpe(vocab, [], byte_fallback=False), None, level, level


def _byte_characters() -> list[str]:
    """The character that stands for each byte: itself if it can be seen, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = (value for value in range(256) if value not in visible)
    other = {value: 0x100 + number for number, value in enumerate(rest)}
    return [chr(other.get(value, value)) for value in range(256)]


class _SentencePiece(NamedTuple):
    """What a SentencePiece model says of its pieces."""

    names: list[str]
    scores: list[float]
    kinds: list[int]
    model_type: int
    dummy_prefix: bool
    normalization: bytes
    suffix: bool
    """Whether a space belongs to the word before it."""

    @classmethod
    def read(cls, tokenizer: Tokenizer) -> "_SentencePiece":
        names, scores, kinds = [], [], []
        model_type, dummy_prefix, normalization, suffix = _UNIGRAM, True, b"", False
        for field, content in _fields(tokenizer.serialized()):
            inside = dict(_fields(content)) if isinstance(content, bytes) and field in (1, 2, 3) else {}
            if field == 1:
                names.append(inside[1].decode())
                scores.append(struct.unpack("<f", inside.get(2, bytes(4)))[0])
                kinds.append(inside.get(3, _NORMAL))
            elif field == 2:
                model_type, suffix = inside.get(3, model_type), bool(inside.get(24, suffix))
            elif field == 3:
                dummy_prefix, normalization = bool(inside.get(3, dummy_prefix)), inside.get(2, normalization)
        return cls(names, scores, kinds, model_type, dummy_prefix, normalization, suffix)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message in order: number and value, an int, or the bytes of all that is longer."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}[key & 7] if key & 7 in (1, 5) else varint()
        yield key >> 3, message[place : place + size]
        place += size


def _pieces(tokenizer: Tokenizer, names: Mapping[int, str]) -> Parts:
    """A SentencePiece model: spaces as they are, unknown characters in bytes."""
    pieces = _SentencePiece.read(tokenizer)
    problems = {
        "pieces that are defined by the user or unused": not {*pieces.kinds} <= {_NORMAL, _UNKNOWN, _CONTROL, _BYTE},
        "a model that is neither BPE nor unigram": pieces.model_type not in (_UNIGRAM, _BPE),
        "rules that change text": bool(pieces.normalization),
        "spaces that belong to the word before them": pieces.suffix,
    }
    if found := [problem for problem, there in problems.items() if there]:
        raise DataError(f"tokenizer.model has {', '.join(found)}, which a fast tokenizer cannot express exactly")
    normal = {t: pieces.names[t].replace(SPACE, " ") for t, kind in enumerate(pieces.kinds) if kind == _NORMAL}
    spelled = {t: f"<0x{int(pieces.names[t][3:5], 16):02X}>" for t, kind in enumerate(pieces.kinds) if kind == _BYTE}
    words = {**normal, **spelled, **{t: name for t, name in names.items() if t < len(pieces.names)}}
    vocab = {words[token]: token for token in range(len(pieces.names))}
    if len(vocab) < len(words):
        raise DataError("tokenizer.model has two pieces of one name, which a fast tokenizer cannot express")
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if pieces.dummy_prefix else []
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}, *strip]}
    prefix = {"type": "Prepend", "prepend": " "} if pieces.dummy_prefix else None
    if pieces.model_type == _BPE:
        return _bpe(vocab, _merges(normal, pieces.scores), byte_fallback=True), prefix, None, decoder
    worst = min(pieces.scores[token] for token in normal)  # what is no word must not be the cheapest way through a text
    scores = [[word, pieces.scores[token] if token in normal else worst] for word, token in vocab.items()]
    unigram = {"type": "Unigram", "unk_id": pieces.kinds.index(_UNKNOWN), "vocab": scores, "byte_fallback": True}
    # A text may spell `<0x41>`, which the library takes for the byte's piece: it is cut behind the `<`.
    pattern = {"Regex": "<(?=0x[0-9A-F]{2}>)"}
    cut = {"type": "Split", "pattern": pattern, "behavior": "MergedWithPrevious", "invert": False}
    return unigram, prefix, cut, decoder


def _merges(normal: Mapping[int, str], scores: list[float]) -> list[list[str]]:
    """Every pair of pieces that makes a piece, the pieces of the highest score first."""
    known = {word: token for token, word in normal.items()}
    merges = []
    for _, word in sorted(normal.items(), key=lambda item: (-scores[item[0]], item[0])):
        pairs = [(word[:i], word[i:]) for i in range(1, len(word))]
        fits = [pair for pair in pairs if pair[0] in known and pair[1] in known]
        merges += [list(pair) for pair in sorted(fits, key=lambda pair: (known[pair[0]], known[pair[1]]))]
    return merges
