"""A text file of any size as token ids, in constant memory; checked before the first of them is read.

Not here: what reads them (conversation.py).
"""

import codecs
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from megalodon.data.encode import pieces
from megalodon.data.ingest import open_file
from megalodon.data.reading import CHUNK, Long, decoded_chunks
from megalodon.data.tokenizer import Tokenizer
from megalodon.errors import DataError

_BOM = b"\xef\xbb\xbf"
_TOLD = 1024
"""Tokens after which progress is reported."""

Progress = Callable[[int, int], None]
"""Told now and then: bytes of text and tokens so far."""


class TextFile(NamedTuple):
    """A file that holds text."""

    path: Path
    size: int
    """Bytes of text."""
    sha256: str
    """Of all its bytes."""
    document: Long


def open_text(path: Path) -> TextFile:
    """Check a file. Raises: DataError if it cannot be read, holds no text, or is not UTF-8, with the byte."""
    if path.exists() and not path.is_file():
        kind = "is a directory" if path.is_dir() else "is no file, and text is read twice: once to check it"
        raise DataError(f"{path}: {kind}; expected a file of text")
    decoder, digest, size = codecs.getincrementaldecoder("utf-8")(), hashlib.sha256(), 0
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
                held = len(decoder.getstate()[0])
                size += len(chunk)
                try:
                    decoder.decode(chunk)
                except UnicodeDecodeError as error:
                    raise _not_utf8(path, error, size - len(chunk) - held) from None
        held = len(decoder.getstate()[0])
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error, size - held) from None
        with path.open("rb") as stream:
            first = len(_BOM) if stream.read(len(_BOM)) == _BOM else 0
    except OSError as error:
        raise DataError(f"{path}: {(error.strerror or str(error)).lower()}; expected a file of text") from None
    if size == first:
        raise DataError(f"{path}: is empty; expected text")
    return TextFile(path, size - first, digest.hexdigest(), Long(str(path), lambda: _chunks(path, first), first))


def _not_utf8(path: Path, error: UnicodeDecodeError, before: int) -> DataError:
    byte = error.object[error.start]
    return DataError(f"{path}: byte {before + error.start:,} is 0x{byte:02x}, which is not UTF-8; convert it to UTF-8")


def _chunks(path: Path, first: int) -> Iterator[bytes]:
    with open_file(path) as stream:
        stream.read(first)
        while chunk := stream.read(CHUNK):
            yield chunk


def token_ids(file: TextFile, tokenizer: Tokenizer, progress: Progress = lambda size, tokens: None) -> Iterator[int]:
    """Yield the ids of a text, without BOS and EOS; long ones are cut where `megalodon tokenize` cuts them."""
    size = tokens = 0
    begins = True
    for text, _ in pieces(decoded_chunks(file.document)):
        ids, length = tokenizer.encode_array(text, begins).tolist(), len(text.encode())
        begins = False
        for start in range(0, len(ids), _TOLD):
            yield from ids[start : start + _TOLD]
            tokens += min(_TOLD, len(ids) - start)
            progress(size + length * min(start + _TOLD, len(ids)) // len(ids), tokens)
        size += length
