"""Every token of held-out documents scored once: loss, bits per byte, bits per word, loss by position.

    bits per byte = sum of losses / ln 2 / bytes of text the scored tokens stand for

Each document is read from the empty state to its end, whatever its length: the state goes from piece to piece, and
short documents share a pass without seeing each other. The first token of a document is read, never scored; the
end-of-text token costs bits and has no bytes. A word is what stands between ASCII white space.
Sums are kept by block: 4 KiB of text of one document. Blocks lie in the text, not in the tokens, so they pair models
with different tokenizers. Standard errors draw documents, or blocks where there are few documents.
Not here: which documents (corpus.py), evaluation while training (perplexity.py), what context is worth (context.py).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from megalodon.data.tokenizer import Tokenizer
from megalodon.errors import CheckFailed, DataError, NumericalError
from megalodon.evaluation import bootstrap
from megalodon.evaluation.bootstrap import Interval
from megalodon.evaluation.corpus import Corpus, Document, Int64s, Tokens
from megalodon.evaluation.reading import Reader
from megalodon.inference.norm_window import NormStats
from megalodon.inference.session import PIECE, evaluating
from megalodon.model.architectures import LanguageModel

BLOCK_BYTES = 4096
MANY_DOCUMENTS = 30
"""From so many documents on, the bootstrap draws documents; of fewer, blocks."""
MOST_UNITS = 10_000
"""Of the bootstrap, whose time grows with them."""
_SPACES = b" \t\n\r\v\f"
Floats = NDArray[np.float64]

Told = Callable[[int, int], None]
"""Told now and then: bytes of text and tokens scored so far."""


class How(NamedTuple):
    """How a model reads."""

    norm_stats: NormStats = "cumulative"
    bf16: bool = False
    piece: int = PIECE
    """Tokens of one pass."""


class Vocabulary:
    """What the ids of a tokenizer stand for, as arrays over all ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        texts = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        spaces = [[byte in _SPACES for byte in text] for text in texts]
        self.size = tokenizer.vocab_size
        self.bytes: Int64s = np.array([len(text) for text in texts])
        self.put_before = int(self.bytes[tokenizer.encode_array("a")].sum()) - 1
        """Bytes that the tokenizer puts before a text: 1 where it begins each with a space."""
        self.begins_word = np.array([bool(s) and not s[0] for s in spaces])
        self.ends_word = np.array([not s or s[-1] for s in spaces])
        """Whether a word may begin behind it; special ids stand between words."""
        self.words_inside = np.array([sum(a and not b for a, b in pairwise(s)) for s in spaces])

    def words(self, before: Int64s, targets: Int64s) -> Int64s:
        """How many words begin in each of the targets, given the ids before them."""
        begun = self.begins_word[targets] & self.ends_word[before]
        found: Int64s = self.words_inside[targets] + begun
        return found


class Block(NamedTuple):
    """Sums over the scored tokens of one block."""

    nats: float = 0.0
    bytes: int = 0
    tokens: int = 0
    words: int = 0


class Scores(NamedTuple):
    """How well a model predicts some documents."""

    blocks: dict[tuple[int, int], Block]
    """(number of the document, number of the block in it) -> sums."""
    by_position: dict[int, tuple[float, int]]
    """Upper end of a bucket of positions -> (sum of nats, tokens): 1, 2, 3 to 4, 5 to 8 … A position is a number of
    tokens read before."""
    documents: int
    read: int
    """Tokens of all documents: scored ones, and the first of each document."""

    @property
    def nats(self) -> float:
        """Sum of the losses."""
        return math.fsum(block.nats for block in self.blocks.values())

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return sum(block.tokens for block in self.blocks.values())

    @property
    def bytes(self) -> int:
        """Bytes of text they stand for."""
        return sum(block.bytes for block in self.blocks.values())

    @property
    def words(self) -> int:
        """Words that begin in them."""
        return sum(block.words for block in self.blocks.values())

    @property
    def drawn(self) -> str:
        """What the bootstrap draws."""
        return "documents" if self.documents >= MANY_DOCUMENTS else f"blocks of {BLOCK_BYTES:,} bytes"

    @property
    def joined(self) -> int:
        """Neighbouring documents or blocks that are drawn together, where there are very many."""
        if self.documents >= MANY_DOCUMENTS:
            return -(-self.documents // MOST_UNITS)
        return 1 + self.bytes // (BLOCK_BYTES * MOST_UNITS)

    def units(self, joined: int | None = None) -> dict[Any, Block]:
        """Sums of what the bootstrap draws."""
        size, many = joined or self.joined, self.documents >= MANY_DOCUMENTS
        keys: Iterable[Any] = (d // size if many else (d, block // size) for d, block in self.blocks)
        found: dict[Any, Block] = {}
        for key, block in zip(keys, self.blocks.values(), strict=True):
            found[key] = _plus(found.get(key, Block()), block)
        return found

    def loss(self) -> Interval:
        """Nats a token."""
        columns = _columns(self.units().values())
        return bootstrap.ratio(columns[0], columns[2])

    def bits_per_byte(self) -> Interval | None:
        """None if the tokens stand for no text."""
        return self._bits(1) if self.bytes else None

    def bits_per_word(self) -> Interval | None:
        """None if no word begins in the tokens."""
        return self._bits(3) if self.words else None

    def _bits(self, over: int) -> Interval:
        columns = _columns(self.units().values())
        return bootstrap.ratio(columns[0] / math.log(2), columns[over])

    def document(self) -> dict[str, Any]:
        """As JSON."""
        loss, bits, per_word = self.loss(), self.bits_per_byte(), self.bits_per_word()
        word_nats = self.nats / self.words if self.words else None
        return {
            "loss": loss.document(),
            "perplexity": _exp(loss.value),
            "bits_per_byte": bits.document() if bits else None,
            "bits_per_word": per_word.document() if per_word else None,
            "word_perplexity": _exp(word_nats) if word_nats is not None else None,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "words": self.words,
            "documents": self.documents,
            "tokens_read": self.read,
            "drawn": self.drawn,
            "units": len(self.units()),
            "by_position": {str(e): {"loss": s / n, "tokens": n} for e, (s, n) in self.by_position.items()},
        }


def _exp(nats: float) -> float | None:
    return math.exp(nats) if nats < 700 else None


def _plus(a: Block, b: Block) -> Block:
    return Block(a.nats + b.nats, a.bytes + b.bytes, a.tokens + b.tokens, a.words + b.words)


def _columns(blocks: Iterable[Block]) -> list[Floats]:
    """Arrays (U,): nats, bytes, tokens, words."""
    return list(np.array(list(blocks), dtype=np.float64).T)


class _Part(NamedTuple):
    """Tokens to read, each with the one to predict: arrays (n,)."""

    inputs: Int64s
    targets: Int64s
    sizes: Int64s
    """Bytes of the document's text that the target stands for."""
    starts: NDArray[np.bool_]
    documents: Int64s
    offsets: Int64s
    """Bytes of the document's text before the target."""
    positions: Int64s
    """Tokens of the document before the target."""


def score(
    model: LanguageModel, corpus: Corpus, tokens: Tokens, how: How, told: Told = lambda size, count: None
) -> Scores:
    """Score all documents of a corpus.

    Raises:
        DataError: there is nothing to score.
        NumericalError: a loss is not finite.
        CheckFailed: tokens read are not tokens scored and first tokens: a fault of this program.
    """
    scoring = _Scoring(model, tokens, how, told)
    with torch.inference_mode(), evaluating(model):
        if how.norm_stats == "window":  # statistics are renewed at other places in each document: one by one
            for number, document in enumerate(corpus.documents(tokens)):
                scoring.read(scoring.parts(number, document))
        else:
            numbered = enumerate(corpus.documents(tokens))
            scoring.read(part for number, document in numbered for part in scoring.parts(number, document))
    return scoring.scores(corpus)


class _Scoring:
    """A model that reads, and the sums so far."""

    def __init__(self, model: LanguageModel, tokens: Tokens, how: How, told: Told) -> None:
        self.model, self.how, self.told = model, how, told
        self.vocabulary, self.bos, self.around = Vocabulary(tokens.tokenizer), tokens.bos, tokens.bos + tokens.eos
        self.documents = self.tokens_read = self.bytes = self.tokens = 0
        self.blocks: dict[tuple[int, int], Block] = {}
        self.positions: dict[int, tuple[float, int]] = {}

    def parts(self, number: int, document: Document) -> Iterator[_Part]:
        """A document as inputs and targets: its last id is no input, its first no target."""
        last, read, end = np.empty(0, dtype=np.int64), 0, 0
        self.documents += 1
        for piece in document.pieces():
            ids, sizes = np.concatenate([last, piece]), self.vocabulary.bytes[piece]
            places = read + np.arange(len(piece))
            sizes = sizes - np.where(places == int(self.bos), self.vocabulary.put_before, 0)
            ends = end + np.cumsum(sizes)
            # What stands for no text, such as the end of it, belongs to the text before.
            offsets = np.maximum(ends - np.maximum(sizes, 1), 0)
            own = slice(int(not read), None)  # all but the first of the document
            numbers = np.full(len(ids[1:]), number)
            yield _Part(ids[:-1], ids[1:], sizes[own], places[own] == 1, numbers, offsets[own], places[own])
            last, read, end = ids[-1:], read + len(piece), int(ends[-1]) if len(ends) else end
        self.tokens_read += read

    def read(self, parts: Iterable[_Part]) -> None:
        """Score a row of documents, one after the other."""
        how, model = self.how, self.model
        reader = Reader(model, 1, how.norm_stats, how.piece, bf16=how.bf16)
        for part in _cut(parts, max(reader.span, how.piece // reader.span * reader.span)):
            starts = torch.from_numpy(part.starts)[None] if how.norm_stats == "cumulative" else None
            targets, losses = torch.from_numpy(part.targets)[None], []
            for start, hidden in reader.read(torch.from_numpy(part.inputs)[None], starts):
                own = targets[:, start : start + hidden.shape[1]]
                losses.append(reader.losses(hidden, own, self.vocabulary.size))
            self._add(part, torch.cat(losses, 1)[0].double().cpu().numpy())
            self.told(self.bytes, self.tokens)

    def _add(self, part: _Part, losses: Floats) -> None:
        if not np.isfinite(losses).all():
            raise NumericalError("a loss is not finite; the weights are damaged, or their products too large")
        words = self.vocabulary.words(part.inputs, part.targets)
        places = np.stack([part.documents, part.offsets // BLOCK_BYTES], 1)
        keys, which = np.unique(places, axis=0, return_inverse=True)
        columns = [np.bincount(which.ravel(), x) for x in (losses, part.sizes, np.ones(len(losses)), words)]
        for (document, block), nats, *counts in zip(keys.tolist(), *columns, strict=True):
            own = Block(float(nats), *map(int, counts))
            self.blocks[document, block] = _plus(self.blocks.get((document, block), Block()), own)
        buckets = np.frexp(part.positions - 1)[1]
        sums, tokens = np.bincount(buckets, losses), np.bincount(buckets)
        for bucket in np.flatnonzero(tokens).tolist():
            nats, count = self.positions.get(1 << bucket, (0.0, 0))
            self.positions[1 << bucket] = (nats + float(sums[bucket]), count + int(tokens[bucket]))
        self.bytes += int(part.sizes.sum())
        self.tokens += len(losses)

    def scores(self, corpus: Corpus) -> Scores:
        """What was found. Raises: DataError for nothing to score, CheckFailed if tokens are missing."""
        text = self.tokens_read - self.around * self.documents
        if text < 2 or not self.tokens:
            place = f"in {self.documents} documents" if text > 1 else "of text"
            raise DataError(
                f"{corpus.name} holds {text} token{'s' * (text != 1)} {place}; expected at least 2 of a document: "
                "there is nothing to score"
            )
        if self.tokens + self.documents != self.tokens_read:
            raise CheckFailed(
                f"{corpus.name}: {self.tokens_read:,} tokens read, but {self.tokens:,} scored and {self.documents:,} "
                "first of a document"
            )
        return Scores(self.blocks, dict(sorted(self.positions.items())), self.documents, self.tokens_read)


def _cut(parts: Iterable[_Part], length: int) -> Iterator[_Part]:
    """The same tokens in parts of a length; the last may be shorter."""
    held: list[_Part] = []
    for part in parts:
        held.append(part)
        if sum(len(p.inputs) for p in held) < length:
            continue
        whole = _joined(held)
        full = len(whole.inputs) // length * length
        for start in range(0, full, length):
            yield _sliced(whole, start, start + length)
        held = [_sliced(whole, full, len(whole.inputs))]
    if any(len(p.inputs) for p in held):
        yield _joined(held)


def _sliced(part: _Part, start: int, stop: int) -> _Part:
    return _Part._make(x[start:stop] for x in part)


def _joined(parts: list[_Part]) -> _Part:
    return _Part._make(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
