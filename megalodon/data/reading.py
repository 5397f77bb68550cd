"""Parts of files -> documents, in bounded memory: text, JSON lines and tables, plain or compressed.

    reader = PartReader(file, part, config, whole)
    for item in reader: ...        Text, Long (a file that is streamed) or Reject, in the order of the file
    reader.lines                   how many lines (rows of a table) begin in the part, once it is read

A part of a file owns the documents that begin in it, so any cut into parts gives the same documents. Line numbers count
from the beginning of the part. Not here: how files are cut (megalodon/data/tasks.py), what becomes of a document
(megalodon/data/encode.py), the Hub (megalodon/data/hub.py).
"""

import codecs
import contextlib
import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, NamedTuple

from megalodon.data.ingest import InputFile, Reading, open_file
from megalodon.errors import DataError

MAX_RECORD = 1 << 24
"""Bytes of the longest line, paragraph or table cell that is read; longer ones are rejected. A file has no cap."""
CHUNK = 1 << 20
"""Bytes of a streamed file that are held at a time."""
_BOM = b"\xef\xbb\xbf"
_BATCH_ROWS = 128
_SURROGATES = "holds half a surrogate pair (\\ud800 to \\udfff), which UTF-8 cannot hold"


class Part(NamedTuple):
    """A part of one file of a source: [start, stop) in bytes, or in row groups of parquet; stop -1 is the end."""

    file: int
    start: int = 0
    stop: int = -1


class Text(NamedTuple):
    """A document that is held: its text and the UTF-8 of it."""

    text: str
    raw: bytes


class Long(NamedTuple):
    """A document that is a whole file too large to hold; each call of `chunks` reads it anew."""

    name: str
    chunks: Callable[[], Iterator[bytes]]
    first: int
    """Offset of its first byte in the file: 3 after a byte order mark."""


class Reject(NamedTuple):
    """A document that cannot be read: the line of the part, a column as `:4` or nothing, why, and its bytes."""

    line: int
    at: str
    reason: str
    size: int


Item = Text | Long | Reject


class _Line(NamedTuple):
    """One line without its end: its bytes, None instead of too many, their number, and where they begin."""

    raw: bytes | None
    size: int
    offset: int
    begin: int
    """Where the line begins: before a byte order mark."""


def checked(text: str, line: int) -> Text | Reject:
    """Return a text with its UTF-8, or the reject of one that UTF-8 cannot hold."""
    try:
        return Text(text, text.encode())
    except UnicodeEncodeError:
        return Reject(line, "", _SURROGATES, len(text.encode(errors="surrogatepass")))


class PartReader:
    """Iterates over the documents of one part; `whole` is the size in bytes up to which a file is held as one text."""

    def __init__(self, file: InputFile, part: Part, config: Reading, whole: int = CHUNK) -> None:
        self.lines = 0
        self._file, self._part, self._config, self._whole = file, part, config, whole

    def __iter__(self) -> Iterator[Item]:
        kind, document = self._file.format, self._config.document
        if kind not in ("text", "jsonl"):
            yield from self._table()
        elif kind == "text" and document == "file":
            self.lines = 1
            yield from self._whole_file()
        else:
            with _readable(self._file), _open(self._file) as stream:
                of_jsonl = self._json_lines if kind == "jsonl" else self._text_lines
                yield from self._paragraphs(stream) if kind == "text" and document == "blank-line" else of_jsonl(stream)

    def _whole_file(self) -> Iterator[Item]:
        with _readable(self._file), _open(self._file) as stream:
            raw = stream.read(self._whole + len(_BOM) + 1)
        first = len(_BOM) if raw.startswith(_BOM) else 0
        if len(raw) > self._whole + len(_BOM):
            yield Long(str(self._file.path), lambda: _chunks(self._file, first), first)
        else:
            yield _decoded(raw[first:], 1, first)

    def _text_lines(self, stream: IO[bytes]) -> Iterator[Item]:
        for number, line in self._own_lines(stream):
            yield _too_long(number, line.size) if line.raw is None else _decoded(line.raw, number, line.offset)

    def _json_lines(self, stream: IO[bytes]) -> Iterator[Item]:
        for number, line in self._own_lines(stream):
            if line.raw is None:
                yield _too_long(number, line.size)
                continue
            text, column, reason = _json_text(line.raw, self._config.field)
            yield Reject(number, f":{column}", reason, line.size) if reason else checked(text, number)

    def _own_lines(self, stream: IO[bytes]) -> Iterator[tuple[int, _Line]]:
        """Yield the lines that begin in the part, numbered from 1."""
        offset = _next_line(stream, self._part.start)
        for number, line in enumerate(_lines(stream, offset, self._part.stop), 1):
            self.lines = number
            yield number, line

    def _paragraphs(self, stream: IO[bytes]) -> Iterator[Item]:
        """Yield what stands between blank lines, line ends inside kept as newlines; the last may end after the part."""
        stop = self._part.stop
        offset = _next_line(stream, self._part.start)
        inside = offset > 0 and not _blank_before(stream, offset)  # in a paragraph of the part before
        held: list[bytes] = []
        first, start, size, long = 1, 0, 0, False
        for number, line in enumerate(_lines(stream, offset, -1), 1):
            owned = stop < 0 or line.begin < stop
            self.lines += owned
            if line.raw is not None and not line.raw.strip():
                if held or long:
                    yield _too_long(first, size) if long else _decoded(b"\n".join(held), first, start)
                held, long, inside = [], False, False
            elif not inside:
                if not held and not long:
                    if not owned:
                        return
                    first, start, size = number, line.offset, -1
                size += line.size + 1
                long = long or line.raw is None or size > MAX_RECORD
                held = [] if long else _append(held, line.raw or b"")
            if not owned and not held and not long:
                return
        if held or long:
            yield _too_long(first, size) if long else _decoded(b"\n".join(held), first, start)

    def _table(self) -> Iterator[Item]:
        field = self._config.field
        with _readable(self._file):
            for values in _columns(self._file, self._part, field):
                for value in values:
                    self.lines += 1
                    item: Item
                    if isinstance(value, _Missing):
                        item = Reject(self.lines, "", str(value), 0)
                    elif isinstance(value, UnicodeDecodeError):
                        reason = f"field `{field}` is not UTF-8 (byte 0x{value.object[value.start]:02x})"
                        item = Reject(self.lines, "", reason, len(value.object))
                    elif not isinstance(value, str):
                        item = Reject(self.lines, "", f"field `{field}` is {type(value).__name__}, expected text", 0)
                    else:
                        item = checked(value, self.lines)
                    too_long = isinstance(item, Text) and len(item.raw) > MAX_RECORD
                    yield _too_long(self.lines, len(item.raw)) if too_long and isinstance(item, Text) else item


def _append(held: list[bytes], raw: bytes) -> list[bytes]:
    held.append(raw)
    return held


def place(file: InputFile, line: int, at: str) -> str:
    """Return where a document stands, as messages name it."""
    return f"{file.path}:{line}{at}" if file.format in ("text", "jsonl") else f"{file.path}: row {line}"


def _too_long(line: int, size: int) -> Reject:
    return Reject(
        line, "", f"is too long ({size:,} bytes, at most {MAX_RECORD:,}); only whole files may be longer", size
    )


# ------------------------------------------------------------------------------------------------ text


def _decoded(raw: bytes, line: int, offset: int) -> Text | Reject:
    try:
        return Text(raw.decode("utf-8"), raw)
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        return Reject(line, "", _not_utf8(raw[error.start], offset + error.start), len(raw))


def _not_utf8(byte: int, offset: int) -> str:
    return f"not UTF-8 (byte 0x{byte:02x} at offset {offset:,}); convert the file to UTF-8"


class Scan(NamedTuple):
    """What one pass over a long document finds."""

    size: int
    digest: bytes
    """blake2b of its bytes, as `digest_of` gives it for a text that is held."""
    short: bytes
    """The same in 8 bytes, which decide whether it is kept for validation."""
    blank: bool


def digest_of(raw: bytes) -> bytes:
    """Return the 16 bytes that stand for a text when copies are sought."""
    return hashlib.blake2b(raw, digest_size=16).digest()


def scan(document: Long) -> Scan | Reject:
    """Read a long document once: its size and digest, or where it is not UTF-8."""
    decoder, digest = codecs.getincrementaldecoder("utf-8")(), hashlib.blake2b(digest_size=16)
    short = hashlib.blake2b(digest_size=8)
    size, line, blank = 0, 1, True
    broken: Reject | None = None
    for chunk in _with_end(document.chunks()):
        if broken is None:
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
                blank = blank and (not text or text.isspace())
                line += text.count("\n")
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                offset = document.first + size - pending + error.start
                broken = Reject(line, "", _not_utf8(error.object[error.start], offset), 0)
        digest.update(chunk)
        short.update(chunk)
        size += len(chunk)
    return broken._replace(size=size) if broken else Scan(size, digest.digest(), short.digest(), blank)


def _with_end(chunks: Iterator[bytes]) -> Iterator[bytes]:
    yield from chunks
    yield b""


def decoded_chunks(document: Long) -> Iterator[str]:
    """Yield the text of a long document that `scan` found sound."""
    try:
        yield from codecs.iterdecode(document.chunks(), "utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{document.name}: was changed while it was read; start again when it is complete") from None


def _chunks(file: InputFile, first: int) -> Iterator[bytes]:
    with _readable(file), _open(file) as stream:
        stream.read(first)
        while chunk := stream.read(CHUNK):
            yield chunk


def text_size(file: InputFile, part: Part, field: str) -> int:
    """Return how many bytes a compressed file holds, or about how many of text a part of a parquet file does."""
    if file.format != "parquet":
        return sum(len(chunk) for chunk in _chunks(file, 0))
    import pyarrow.parquet  # type: ignore[import-untyped]

    with _readable(file):
        metadata = pyarrow.parquet.read_metadata(str(file.path))
        groups = range(part.start, metadata.num_row_groups if part.stop < 0 else part.stop)
        columns = [metadata.row_group(group).column(n) for group in groups for n in range(metadata.num_columns)]
        return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == field)


# ------------------------------------------------------------------------------------------------ lines


def _open(file: InputFile) -> IO[bytes]:
    stream = open_file(file.path)
    if not file.compression:
        return stream
    stream.close()  # it can be read: what fails from here on is the compression
    if file.compression == "gz":
        return gzip.open(file.path)  # type: ignore[return-value]
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(file.path), compression="zstd"), CHUNK)


@contextlib.contextmanager
def _readable(file: InputFile) -> Iterator[None]:
    """Turn what a damaged file raises into a DataError that names it."""
    try:
        yield
    except (OSError, EOFError, ValueError, zlib.error, csv.Error) as error:
        if isinstance(error, UnicodeError):
            raise
        reason = " ".join(str(error).split())[:200]
        kind = f"{file.format} file" if not file.compression else f"{file.compression} file"
        raise DataError(f"{file.path}: not a readable {kind} ({reason})") from None


def _lines(stream: IO[bytes], offset: int, stop: int) -> Iterator[_Line]:
    """Yield the lines from `offset` on that begin before `stop` (-1: all of them)."""
    while stop < 0 or offset < stop:
        raw = stream.readline(MAX_RECORD + 2)
        if not raw:
            return
        size, ended = len(raw), raw.endswith(b"\n")
        begin = offset
        offset += size
        if not ended and size == MAX_RECORD + 2:
            raw = raw[-1:]
            while rest := stream.readline(CHUNK):
                raw, offset = (raw + rest)[-2:], offset + len(rest)
                if rest.endswith(b"\n"):
                    break
            yield _Line(None, offset - begin - len(raw) + len(_without_end(raw)), begin, begin)
            continue
        raw = _without_end(raw)
        mark = len(_BOM) if begin == 0 and raw.startswith(_BOM) else 0
        raw = raw[mark:]
        yield _Line(raw if len(raw) <= MAX_RECORD else None, len(raw), begin + mark, begin)


def _without_end(raw: bytes) -> bytes:
    return raw.removesuffix(b"\n").removesuffix(b"\r")


def _next_line(stream: IO[bytes], start: int) -> int:
    """Go to the first line that begins at `start` or later; return its offset."""
    if start == 0:
        return 0
    stream.seek(start - 1)
    offset = start - 1
    while piece := stream.readline(CHUNK):
        offset += len(piece)
        if piece.endswith(b"\n"):
            break
    return offset


def _blank_before(stream: IO[bytes], offset: int) -> bool:
    """Return whether the line that ends at `offset` is blank; the stream stays where it is."""
    end = offset - 1  # its newline
    blank = True
    while end > 0 and blank:
        begin = max(0, end - 256)
        stream.seek(begin)
        piece = stream.read(end - begin)
        if begin == 0:
            piece = piece.removeprefix(_BOM)
        line = piece[piece.rfind(b"\n") + 1 :]
        blank = not line.strip()
        end = 0 if b"\n" in piece else begin
    stream.seek(offset)
    return blank


def _json_text(raw: bytes, field: str) -> tuple[str, int, str]:
    """Return (text, column, reason): the text of one JSON line, or where and why there is none."""
    if not raw.strip():
        return "", 1, ""
    try:
        values = json.loads(raw)
    except json.JSONDecodeError as error:
        return "", error.colno, f"not JSON ({error.msg[:1].lower()}{error.msg[1:]})"
    except UnicodeDecodeError as error:
        return "", error.start + 1, f"not UTF-8 (byte 0x{raw[error.start]:02x})"
    except RecursionError:
        return "", 1, "not usable JSON (nested too deep)"
    except ValueError:  # the one thing left that Python refuses to read
        return "", 1, "not usable JSON (a number has too many digits)"
    if not isinstance(values, dict):
        return "", 1, f"expected an object with `{field}`, got {type(values).__name__}"
    text, reason = text_of(values, field)
    return text, 1, reason


def text_of(values: Mapping[str, Any], field: str) -> tuple[str, str]:
    """Return (text, reason): the text in a field of a row, or why there is none."""
    if field not in values:
        return "", _missing(field, list(values))
    if not isinstance(values[field], str):
        return "", f"field `{field}` is {type(values[field]).__name__}, expected text"
    return values[field], ""


# ------------------------------------------------------------------------------------------------ tables


class _Missing(str):
    """Stands for a value of a column that a table does not have, and says so."""


def _missing(field: str, names: list[str]) -> str:
    return f"field `{field}` is missing; the fields are {', '.join(map(str, names)) or 'none'}"


def _columns(file: InputFile, part: Part, field: str) -> Iterator[list[Any]]:
    """Yield the values of one column in batches; see `_listed` for text that is not UTF-8."""
    if file.format == "parquet":
        yield from _parquet(file, part, field)
    elif file.format == "csv":
        yield from _csv(file, field)
    else:
        import pyarrow.ipc  # type: ignore[import-untyped]

        with open_file(file.path) as stream:
            is_file = stream.read(6) == b"ARROW1"
        with pyarrow.OSFile(str(file.path)) as source:
            batches = _arrow_file(source) if is_file else iter(pyarrow.ipc.open_stream(source))
            for batch in batches:
                yield from _values(batch, field)


def _arrow_file(source: Any) -> Iterator[Any]:
    import pyarrow.ipc

    reader = pyarrow.ipc.open_file(source)
    return (reader.get_batch(number) for number in range(reader.num_record_batches))


def _values(batch: Any, field: str) -> Iterator[list[Any]]:
    names = batch.schema.names
    for start in range(0, batch.num_rows, _BATCH_ROWS):
        rows = min(_BATCH_ROWS, batch.num_rows - start)
        if field not in names:
            yield [_Missing(_missing(field, names))] * rows
        else:
            yield _listed(batch.column(names.index(field)).slice(start, rows))


def _listed(column: Any) -> list[Any]:
    """Return the values of a column; in place of text that is not UTF-8 the error that says where."""
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def _parquet(file: InputFile, part: Part, field: str) -> Iterator[list[Any]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(str(file.path), buffer_size=CHUNK, pre_buffer=False) as table:
        groups = range(part.start, table.num_row_groups if part.stop < 0 else part.stop)
        if field not in table.schema_arrow.names:
            for group in groups:
                yield [_Missing(_missing(field, table.schema_arrow.names))] * table.metadata.row_group(group).num_rows
            return
        for batch in table.iter_batches(_BATCH_ROWS, row_groups=list(groups), columns=[field], use_threads=False):
            yield _listed(batch.column(0))


def _csv(file: InputFile, field: str) -> Iterator[list[Any]]:
    import pyarrow.csv  # type: ignore[import-untyped]

    with file.path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        names = next(csv.reader(stream), [])
    own = [field] if field in names else []
    batches = pyarrow.csv.open_csv(
        str(file.path),
        pyarrow.csv.ReadOptions(use_threads=False, block_size=2 * MAX_RECORD),
        pyarrow.csv.ParseOptions(newlines_in_values=True),
        # Only the text is converted, and to text: what stands in other columns, and numbers in this one, is no matter.
        pyarrow.csv.ConvertOptions(include_columns=own, column_types=dict.fromkeys(own, pyarrow.string())),
    )
    for batch in batches:
        if own:
            yield from _values(batch, field)
        else:
            yield [_Missing(_missing(field, names))] * batch.num_rows
