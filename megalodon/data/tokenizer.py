"""Text <-> token ids: SentencePiece and plain bytes behind one interface, both without loss.

`decode(encode(text)) == text` for every text: newlines, tabs, runs of spaces, emoji, control characters. Ids stand for
bytes (`token_bytes`), so that a stream of ids can be cut anywhere and bits per byte can be counted exactly.
Not here: BOS and EOS around a document (megalodon/data/shards.py), whole characters from a stream of ids
(megalodon/inference/stream.py), chat markers (their ids are kept free here: `reserve`).
"""

import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from megalodon.config import Bytes, Config, Count
from megalodon.errors import DataError

Int32s = NDArray[np.int32]

ON_HUB = "hf:"
SENTENCEPIECE_FILE = "tokenizer.model"
BYTES_FILE = "byte_tokenizer.json"
SPACE = "\u2581"
"""SentencePiece writes a space as this character; where it stands in the text itself it is spelled in bytes."""
_BLOCK = 1 << 13
"""Characters encoded in one call, so few that the processor's cache holds them; a block ends at a newline, which no
piece crosses."""
_FEW = 2000
"""Characters of a text whose ids are faster to take as a list."""
_SENTENCE = 4096
"""Characters of one training sentence; longer lines are cut, since the trainer would drop them without a word."""
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
"""ModelProto{normalizer_spec{add_dummy_prefix: false}}: appended to a serialized model it overrides this one value."""
_RESERVED = "<|reserved_"
"""How the pieces that are kept for chat markers begin."""
_PROBE = "a  b\t\n\u00c0\u2460\ufb01\U0001f642\r x  "


class TokenizerConfig(Config):
    """How text becomes token ids."""

    kind: Literal["sentencepiece", "bytes"] = "sentencepiece"
    """`sentencepiece`, or `bytes`: one id for each byte of UTF-8."""
    path: str | None = None
    """A SentencePiece FILE.model, or hf:ORG/NAME[@REVISION]; null trains one on `data.sources`."""
    vocab_size: Annotated[Count, Field(gt=0, le=1 << 20)] = 32000
    """Ids of a tokenizer that is trained, special and reserved ones included."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """The SentencePiece algorithm of a tokenizer that is trained."""
    sample: Annotated[Bytes, Field(gt=0)] = 100_000_000
    """Bytes of text it is trained on, drawn evenly from the sources."""
    reserve: Annotated[int, Field(ge=0, le=1024)] = 16
    """Ids kept for chat markers, counted inside `vocab_size`."""
    pad_to: Annotated[int, Field(ge=1)] = 64
    """Embedding rows are rounded up to a multiple of this."""


class Tokenizer(Protocol):
    """What every tokenizer offers; `vocab_size` counts real ids, without padded embedding rows."""

    kind: str
    vocab_size: int
    bos_id: int
    eos_id: int
    spans_lines: bool
    """Whether an id may stand for text on both sides of a newline, so that text cut there may give other ids."""
    special_ids: frozenset[int]
    reserved_ids: tuple[int, ...]
    """Special ids without a meaning, which chat markers may take."""
    sha256: str

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without BOS and EOS. Raises: DataError for text that UTF-8 cannot hold."""
        ...

    def encode_array(self, text: str, begins: bool = True) -> Int32s:
        """Return the ids of a text that UTF-8 can hold as an array; `begins` is False inside a document."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; special ids are silent, bytes that are not UTF-8 become U+FFFD. Raises: DataError."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes one id stands for; empty for special ids. Raises: DataError for an id out of range."""
        ...

    def serialized(self) -> bytes:
        """Return what `save` writes."""
        ...

    def save(self, directory: Path) -> None:
        """Write the tokenizer's files into an existing directory."""
        ...


class _Base:
    """What both tokenizers share: a table of the bytes of each id."""

    kind: str
    _table: list[bytes]

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes one id stands for; empty for special ids. Raises: DataError for an id out of range."""
        if not 0 <= token < len(self._table):
            raise DataError(f"token id {token} is not in the tokenizer: expected 0 to {len(self._table) - 1:,}")
        return self._table[token]

    def _decode(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.token_bytes(token) for token in ids)


class ByteTokenizer(_Base):
    """One id for each byte of UTF-8: 0 unknown, 1 BOS, 2 EOS, 3 padding, the reserved ids, then the 256 bytes."""

    kind = "bytes"
    bos_id, eos_id, spans_lines = 1, 2, False

    def __init__(self, reserve: int = 16) -> None:
        self.reserve = reserve
        self._first = 4 + reserve
        self._table = [b""] * self._first + [bytes([value]) for value in range(256)]
        self.vocab_size = len(self._table)
        self.special_ids, self.reserved_ids = frozenset(range(self._first)), tuple(range(4, self._first))
        self._definition = json.dumps({"kind": "bytes", "reserve": reserve, "version": 1}, sort_keys=True) + "\n"
        self.sha256 = hashlib.sha256(self._definition.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without BOS and EOS. Raises: DataError for text that UTF-8 cannot hold."""
        return [self._first + value for value in _utf8(text)]

    def encode_array(self, text: str, begins: bool = True) -> Int32s:
        """Return the ids of a text that UTF-8 can hold as an array."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) + np.int32(self._first)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; special ids are silent, bytes that are not UTF-8 become U+FFFD. Raises: DataError."""
        return self._decode(ids).decode("utf-8", errors="replace")

    def serialized(self) -> bytes:
        """Return what `save` writes."""
        return self._definition.encode()

    def save(self, directory: Path) -> None:
        """Write `byte_tokenizer.json` into an existing directory."""
        (directory / BYTES_FILE).write_bytes(self.serialized())


class SentencePieceTokenizer(_Base):
    """A SentencePiece model that keeps every text intact.

    Raises: DataError if the bytes are no such model, or if the model changes text (normalisation, no byte fallback).
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, name: str = "the model") -> None:
        self._model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        original = _processor(model, name)
        # Not by comparing with "a": a small vocabulary may lack that letter and spell it in bytes.
        self._dummy_prefix = "".join(original.encode("a", out_type=str)).startswith(SPACE)
        self._processor = _processor(model + _NO_DUMMY_PREFIX, name)
        self.vocab_size = int(self._processor.get_piece_size())
        self.bos_id, self.eos_id = int(self._processor.bos_id()), int(self._processor.eos_id())
        if self.bos_id < 0 or self.eos_id < 0:
            raise DataError(f"{name}: has no <s> or </s> piece; expected a model with BOS and EOS ids")
        pieces = [str(self._processor.id_to_piece(token)) for token in range(self.vocab_size)]
        silent = [self._processor.is_control(t) or self._processor.is_unknown(t) for t in range(self.vocab_size)]
        self.special_ids = frozenset(token for token, special in enumerate(silent) if special)
        self.reserved_ids = tuple(t for t in sorted(self.special_ids) if pieces[t].startswith(_RESERVED))
        self._bytes_ids: dict[int, int] = {}
        self._table = []
        for token, piece in enumerate(pieces):
            if silent[token]:
                self._table.append(b"")
            elif self._processor.is_byte(token):
                self._bytes_ids[int(piece[3:5], 16)] = token
                self._table.append(bytes([int(piece[3:5], 16)]))
            else:
                self._table.append(piece.replace(SPACE, " ").encode())
        self.spans_lines = any("\n" in piece and len(piece) > 1 for piece in pieces)
        if len(self._bytes_ids) < 256:
            raise DataError(
                f"{name}: has no byte fallback, so it cannot write every text; train with byte_fallback=true"
            )
        if (got := self.decode(self.encode(_PROBE))) != _PROBE:
            raise DataError(f"{name}: changes text ({_PROBE!r} becomes {got!r}); expected identity normalisation")

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without BOS and EOS. Raises: DataError for text that UTF-8 cannot hold."""
        _utf8(text)
        if self._dummy_prefix and text:
            text = " " + text
        ids: list[int] = []
        for number, part in enumerate(text.split(SPACE)):
            if number:
                ids += [self._bytes_ids[value] for value in SPACE.encode()]
            for block in [part] if self.spans_lines else _blocks(part):
                ids += self._processor.encode(block)
        return ids

    def encode_array(self, text: str, begins: bool = True) -> Int32s:
        """Return the ids of a text that UTF-8 can hold as an array; `begins` is False inside a document."""
        if self._dummy_prefix and text and begins:
            text = " " + text
        if len(text) <= _BLOCK and SPACE not in text:
            few = len(text) <= _FEW
            return np.array(self._processor.encode(text), np.int32) if few else self._processor.encode_as_numpy(text)
        spelled = np.array([self._bytes_ids[value] for value in SPACE.encode()], dtype=np.int32)
        ids = [np.empty(0, dtype=np.int32)]
        for number, part in enumerate(text.split(SPACE)):
            if number:
                ids.append(spelled)
            ids += [self._processor.encode_as_numpy(block) for block in ([part] if self.spans_lines else _blocks(part))]
        return np.concatenate(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; special ids are silent, bytes that are not UTF-8 become U+FFFD. Raises: DataError."""
        raw = self._decode(ids)
        if self._dummy_prefix:
            raw = raw.removeprefix(b" ")
        return raw.decode("utf-8", errors="replace")

    def serialized(self) -> bytes:
        """Return what `save` writes: the SentencePiece model."""
        return self._model

    def save(self, directory: Path) -> None:
        """Write `tokenizer.model` into an existing directory."""
        (directory / SENTENCEPIECE_FILE).write_bytes(self._model)


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"text holds half a surrogate pair (U+{ord(text[error.start]):04X} at character {error.start:,}), "
            "which UTF-8 cannot hold; remove it"
        ) from None


def _blocks(text: str) -> Iterator[str]:
    """Cut text after newlines into blocks of at least `_BLOCK` characters: no piece crosses a newline."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + _BLOCK) + 1 or len(text)
        yield text[start:end]
        start = end


def _processor(model: bytes, name: str) -> Any:
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model) if model else None
    except RuntimeError:
        processor = None
    if processor is None:
        raise DataError(f"{name}: is not a SentencePiece model ({len(model):,} bytes); give a FILE.model or train one")
    return processor


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a directory written by `save`, or a SentencePiece FILE.model. Raises: DataError."""
    if path.is_dir():
        found = [path / name for name in (SENTENCEPIECE_FILE, BYTES_FILE) if (path / name).is_file()]
        if len(found) != 1:
            count = "holds both" if found else "holds neither"
            raise DataError(f"{path}: {count} {SENTENCEPIECE_FILE} and {BYTES_FILE}; expected exactly one tokenizer")
        path = found[0]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {(error.strerror or str(error)).lower()}; expected a tokenizer file") from None
    return _byte_tokenizer(path, content) if path.name == BYTES_FILE else SentencePieceTokenizer(content, str(path))


def _byte_tokenizer(path: Path, content: bytes) -> ByteTokenizer:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); write the tokenizer again") from None
    reserve = values.get("reserve") if isinstance(values, dict) else None
    if (
        type(reserve) is not int
        or not 0 <= reserve <= 1024
        or values != {"kind": "bytes", "reserve": reserve, "version": 1}
    ):
        raise DataError(f'{path}: expected {{"kind": "bytes", "reserve": N, "version": 1}}, got {str(values)[:80]}')
    return ByteTokenizer(reserve)


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """Return how many bytes of UTF-8 an id stands for on average: 1 for plain bytes, more for shorter sequences.

    Raises: DataError for texts without a character.
    """
    size = count = 0
    for text in texts:
        size, count = size + len(_utf8(text)), count + len(tokenizer.encode_array(text))
    if not count:
        raise DataError("no text to count the bytes of a token on")
    return size / count


def check_path(config: TokenizerConfig) -> Path | None:
    """Return the file of `tokenizer.path`; None if there is none, and for a name on the Hub (hub.py).

    Raises: DataError for a missing file, a Hub name that is none, or a path with bytes.
    """
    if config.path is None:
        return None
    if config.kind == "bytes":
        raise DataError(f"tokenizer.path is {config.path}, but kind `bytes` has no file; remove one of the two")
    if config.path.startswith(ON_HUB):
        if not re.fullmatch(r"hf:[\w.-]+/[\w.-]+(@[\w.-]+)?", config.path):
            raise DataError(f"tokenizer.path {config.path}: expected hf:ORG/NAME or hf:ORG/NAME@REVISION")
        return None
    if not (path := Path(config.path)).is_file():
        raise DataError(f"tokenizer.path {config.path}: no such file; expected a SentencePiece FILE.model")
    return path


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, reserve: int = 16, model_type: str = "bpe"
) -> SentencePieceTokenizer:
    """Train a lossless SentencePiece model; the same texts give the same bytes.

    Ids: 0 unknown, 1 BOS, 2 EOS, then `reserve` chat markers, 256 bytes, learned pieces; `vocab_size` counts them all.
    Raises: DataError if the texts are empty, too few for `vocab_size`, or hold more characters than it has room for.
    """
    import sentencepiece

    fixed = 3 + reserve + 256
    if vocab_size <= fixed:
        raise DataError(
            f"tokenizer.vocab_size {vocab_size:,} leaves no room for learned pieces: "
            f"3 special + {reserve} reserved + 256 bytes = {fixed}; give at least {fixed + 128}"
        )
    sentences = _sentences(texts)
    first = next(sentences, None)
    if first is None:
        raise DataError("no text to train a tokenizer on: the sources are empty")
    written = io.BytesIO()
    raised: list[BaseException] = []

    def watched() -> Iterator[str]:
        """The sentences; what reading them raises is kept, for SentencePiece makes a RuntimeError of anything."""
        try:
            yield from itertools.chain([first], sentences)
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            raised.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=watched(),
            model_writer=written,
            model_type=model_type,
            vocab_size=vocab_size,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            control_symbols=[f"{_RESERVED}{number}|>" for number in range(reserve)],
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.9995,
            max_sentence_length=4 * _SENTENCE,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:  # ValueError: a size that its 32-bit integers do not hold
        if raised:
            raise raised[0] from None
        reason = " ".join(str(error).split()).rpartition("] ")[2]
        raise DataError(
            f"tokenizer.vocab_size {vocab_size:,} does not fit the text: {reason or error}; "
            "change vocab_size or give more text"
        ) from None
    return SentencePieceTokenizer(written.getvalue())


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _SENTENCE):
                # The trainer knows no U+0000 and takes U+2581 for a space: neither may shape a piece.
                yield line[start : start + _SENTENCE].replace("\0", "").replace(SPACE, "")
