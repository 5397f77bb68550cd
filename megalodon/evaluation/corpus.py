"""Held-out text as documents of token ids, as training would have cut and marked them, in bounded memory.

    corpus = files(Path("book.txt"))                     text, JSON lines, tables; a folder or a glob too
    corpus = StoreCorpus(open_store(valid), tokenizer)   the validation part of a run
    for document in corpus.documents(Tokens(tokenizer, bos=True, eos=True)): ...

Not here: what is computed from the ids (scoring.py, context.py), how files are read (megalodon/data).
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megalodon.data.encode import pieces
from megalodon.data.ingest import Inputs, SourceConfig, content, format_of, resolve
from megalodon.data.reading import Long, Part, PartReader, Reject, Scan, Text, decoded_chunks, place, scan
from megalodon.data.shards import Store
from megalodon.data.tokenizer import Tokenizer
from megalodon.errors import DataError

Int64s = NDArray[np.int64]
_SLICE = 1 << 16
"""Tokens of a store that are read at a time."""


class Tokens(NamedTuple):
    """How a model's documents become ids."""

    tokenizer: Tokenizer
    bos: bool
    eos: bool


class Document(NamedTuple):
    """One document; each call of `pieces` yields its ids anew, in order, BOS and EOS included."""

    name: str
    pieces: Callable[[], Iterator[Int64s]]

    def ids(self) -> Int64s:
        """All ids at once."""
        return np.concatenate([np.empty(0, dtype=np.int64), *self.pieces()])


class Corpus(Protocol):
    """Documents to evaluate on."""

    name: str
    sha256: str
    """Of the text's files, or of the store's manifest."""
    size: int
    """Bytes of text, as stored."""

    def documents(self, tokens: Tokens) -> Iterator[Document]:
        """Yield all documents that hold text, in a fixed order. Raises: DataError for text that cannot be read."""
        ...


class TextCorpus:
    """Documents from files."""

    def __init__(self, inputs: Inputs, name: str) -> None:
        self.name, self._inputs = name, inputs
        found = content(inputs)
        assert found is not None  # files, not a name on the Hub
        self.size, self.sha256 = found

    def documents(self, tokens: Tokens) -> Iterator[Document]:
        """Yield all documents that hold text. Raises: DataError with file, line and reason."""
        for file in self._inputs.files:
            for number, item in enumerate(PartReader(file, Part(0), self._inputs.config), 1):
                found = scan(item) if isinstance(item, Long) else item
                if isinstance(found, Reject):
                    raise DataError(f"{place(file, found.line, found.at)}: {found.reason}")
                if isinstance(item, Long) and isinstance(found, Scan) and not found.blank:
                    yield Document(str(file.path), _encoder(partial(decoded_chunks, item), tokens))
                elif isinstance(found, Text) and found.text.strip():
                    name = str(file.path) if file.format == "text" else f"{file.path}:{number}"
                    yield Document(name, _encoder(partial(iter, (found.text,)), tokens))


def _encoder(chunks: Callable[[], Iterator[str]], tokens: Tokens) -> Callable[[], Iterator[Int64s]]:
    """The ids of a text as `megalodon tokenize` stores them."""

    def encoded() -> Iterator[Int64s]:
        if tokens.bos:
            yield np.array([tokens.tokenizer.bos_id])
        begins = True
        for text, _ in pieces(chunks()):
            yield tokens.tokenizer.encode_array(text, begins).astype(np.int64)
            begins = False
        if tokens.eos:
            yield np.array([tokens.tokenizer.eos_id])

    return encoded


def files(path: Path) -> TextCorpus:
    """Find the files of `--data`; one whose suffix says nothing is text. Raises: DataError if there are none."""
    plain = path.is_file() and format_of(path) is None
    config = SourceConfig.model_validate({"name": "data", "path": path, "format": "text" if plain else "auto"})
    try:
        inputs = resolve(config)
    except DataError as error:
        raise DataError(str(error).replace("data.sources.data.path: ", "--data: "), error.hint) from None
    return TextCorpus(inputs, str(path))


class StoreCorpus:
    """Documents of a token store; for another tokenizer the text of each is held whole and encoded anew."""

    def __init__(self, store: Store, tokenizer: Tokenizer) -> None:
        self.name, self.sha256, self.size = str(store.path), store.fingerprint, store.text_bytes
        self._store, self._tokenizer = store, tokenizer

    def documents(self, tokens: Tokens) -> Iterator[Document]:
        """Yield all documents; a store whose BOS and EOS are others than the model's is encoded anew too."""
        marks = (self._store.manifest.get("bos"), self._store.manifest.get("eos"))
        same = tokens.tokenizer.sha256 == self._tokenizer.sha256 and marks == (tokens.bos, tokens.eos)
        for number, (begin, end) in enumerate(self._store.documents(self._store.num_documents)):
            stored = self._stored(begin, end)
            name = f"{self.name}: document {number}"
            yield Document(name, stored if same else _encoder(partial(self._text, stored), tokens))

    def _stored(self, begin: int, end: int) -> Callable[[], Iterator[Int64s]]:
        def read() -> Iterator[Int64s]:
            for start in range(begin, end, _SLICE):
                yield self._store.tokens(start, min(end, start + _SLICE))

        return read

    def _text(self, stored: Callable[[], Iterator[Int64s]]) -> Iterator[str]:
        yield self._tokenizer.decode(np.concatenate(list(stored())).tolist())


class Concatenated:
    """All documents of a corpus as one, text behind text: BOS begins it, EOS ends it."""

    def __init__(self, corpus: Corpus) -> None:
        self.name, self.sha256, self.size = f"{corpus.name}, concatenated", corpus.sha256, corpus.size
        self._corpus = corpus

    def documents(self, tokens: Tokens) -> Iterator[Document]:
        """Yield the one document."""
        plain = tokens._replace(bos=False, eos=False)
        around = [np.array([tokens.tokenizer.bos_id])] * tokens.bos, [np.array([tokens.tokenizer.eos_id])] * tokens.eos

        def joined() -> Iterator[Int64s]:
            yield from around[0]
            for document in self._corpus.documents(plain):
                yield from document.pieces()
            yield from around[1]

        yield Document(self.name, joined)
