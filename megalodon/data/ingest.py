"""Text on disk, on the Hub or built in -> documents, one at a time; the only user of `datasets`.

    resolve(source)    -> Inputs: the files of a source with their formats, checked, sorted by a path-free key
    documents(inputs)  -> Iterator[Document]; what cannot be read goes to `Rejects`, which fails above its limit
    sample_texts(...)  -> Iterator[str]: text for training a tokenizer, drawn evenly from the sources

Not here: tokens (megalodon/data/tokenizer.py), what is kept, dropped and written (megalodon/data/shards.py),
the built-in sources' contents (megalodon/data/builtin.py).
"""

import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, Strict, model_validator

from megalodon.config import Config, Count, Impossible, Share
from megalodon.data.builtin import generated_texts, stdlib_files
from megalodon.errors import DataError, EnvironmentFault

Format = Literal["text", "jsonl", "parquet", "csv", "arrow"]
SUFFIXES: Mapping[str, Format] = {
    ".txt": "text",
    ".py": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".csv": "csv",
    ".arrow": "arrow",
}
_BOM = b"\xef\xbb\xbf"


def _usable_path(value: object) -> object:
    """Refuse what `Path` would take for the current directory, and what the system takes for no name at all."""
    if isinstance(value, str) and (not value or "\0" in value):
        raise ValueError("the path is empty" if not value else "the path holds a NUL character")
    return value


def _known_policy(value: object) -> object:
    if isinstance(value, str) and not re.fullmatch(_ON_ERROR, value):
        raise ValueError(f"`{value}` is not `fail` or `skip:N`, such as skip:100")
    return value


_Path = Annotated[Path, Strict(False), BeforeValidator(_usable_path)]
_ON_ERROR = r"^(fail|skip:[0-9]{1,18})$"


class _Reading(Config):
    """How the files of a path are read."""

    format: Literal["auto", "text", "jsonl", "parquet", "csv", "arrow"] = "auto"
    """What the files are; `auto` goes by their suffixes."""
    document: Literal["file", "line", "blank-line"] = "file"
    """What a document is in text: a whole file, a line, or what stands between blank lines."""
    field: Annotated[str, Field(min_length=1)] = "text"
    """The column that holds the text (not for plain text)."""


class SourceConfig(_Reading):
    """One source of text; exactly one of path, hf, builtin (python-stdlib takes a path besides)."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    """Its name in overrides, ledgers and the token store."""
    path: _Path | None = None
    """A file, a folder or a glob."""
    hf: Annotated[str, Field(min_length=1)] | None = None
    """A dataset on the Hugging Face Hub, ORG/NAME; only its data files are read, never code."""
    builtin: Literal["python-stdlib", "generated"] | None = None
    """Text that needs no download: Python's own library, or seeded sentences for tests."""
    subset: str | None = None
    """The configuration of a Hub dataset."""
    split: str = "train"
    """The split of a Hub dataset."""
    revision: str | None = None
    """The commit of a Hub dataset; null takes the newest and records it."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Its part of the training tokens; null on all sources mixes them by size."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        given = [key for key in ("path", "hf", "builtin") if getattr(self, key) is not None]
        if len(given) > 1 and not (given == ["path", "builtin"] and self.builtin == "python-stdlib"):
            raise Impossible((given[1], f"source `{self.name}` has {' and '.join(given)}; give one of them"))
        if self.hf is None and (stray := {"subset", "split", "revision"} & self.model_fields_set):
            key = min(stray)
            if getattr(self, key) != type(self).model_fields[key].default:
                raise Impossible((key, f"source `{self.name}` is not a Hub dataset (hf), so `{key}` has no meaning"))
        return self


class ValidConfig(_Reading):
    """The text that is kept for validation."""

    fraction: Annotated[Share, Field(ge=0, lt=1)] = 0.005
    """Part of the documents, chosen by the hash of their text, so a document never changes sides."""
    path: _Path | None = None
    """Files of their own instead; then every document of the sources is trained on."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.path is not None and "fraction" in self.model_fields_set:
            raise Impossible(("fraction", "give one of fraction and path, not both"))
        return self


class CorpusConfig(Config):
    """What goes into a token store."""

    sources: tuple[SourceConfig, ...] = ()
    """Where the text comes from."""
    valid: ValidConfig = ValidConfig()
    """What is kept for validation."""
    bos: bool = True
    """Begin every document with BOS."""
    eos: bool = True
    """End every document with EOS."""
    dedup: Literal["none", "exact"] = "none"
    """Drop documents whose text came before."""
    on_error: Annotated[str, Field(pattern=_ON_ERROR), BeforeValidator(_known_policy)] = "fail"
    """`fail` at the first document that cannot be read, or `skip:N`: tolerate at most N."""

    @model_validator(mode="after")
    def _sources_agree(self) -> Self:
        names = [source.name for source in self.sources]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise Impossible((f"sources.{number}.name", f"`{name}` is given twice; names must differ"))
        weighted = [source.name for source in self.sources if source.weight is not None]
        if weighted and len(weighted) < len(names):
            missing = next(name for name in names if name not in weighted)
            raise Impossible(("sources", f"`{weighted[0]}` has a weight and `{missing}` has none; give all or none"))
        return self

    def weights(self) -> dict[str, float] | None:
        """Return the weight of each source by name; None if the sources are mixed by size."""
        given = {source.name: source.weight for source in self.sources if source.weight is not None}
        return given or None

    def max_rejects(self) -> int:
        """Return how many documents may be rejected: 0 for `fail`."""
        return 0 if self.on_error == "fail" else int(self.on_error.removeprefix("skip:"))


class DataConfig(CorpusConfig):
    """What a model is trained on, and in which windows."""

    dir: _Path | None = None
    """The token store; built if missing, reused if it fits."""
    seq_len: Annotated[Count, Field(ge=1)]
    """Tokens of a window."""
    isolate: Literal["doc", "none"]
    """`doc`: CEMA, norms and attention restart at each document; `none`: the paper."""


class Document(NamedTuple):
    """One document: its text, the name of its source, and where it stood."""

    text: str
    source: str
    key: str


class InputFile(NamedTuple):
    """One file of a source; `key` is its path inside the source, the same on every machine."""

    path: Path
    key: str
    format: Format
    size: int


class Inputs(NamedTuple):
    """A source whose files are known to exist."""

    config: SourceConfig
    files: tuple[InputFile, ...]
    ignored: int
    """Other files in its folders, which no format claims."""

    def describe(self) -> str:
        """Return what was found, in one line."""
        if self.config.hf or self.config.builtin == "generated":
            return f"{self.config.name}: {self.config.hf or 'generated text'}"
        kinds = sorted({file.format for file in self.files})
        how = {kind: f"document: {self.config.document}" if kind == "text" else self.config.field for kind in kinds}
        formats = ", ".join(f"{kind} ({how[kind]})" for kind in kinds)
        size = sum(file.size for file in self.files)
        rest = f"; {self.ignored:,} other files ignored" if self.ignored else ""
        count = f"{len(self.files):,} file{'s' if len(self.files) != 1 else ''}"
        return f"{self.config.name}: {count}, {formats}, {size:,} bytes{rest}"


class Rejects:
    """Counts what cannot be read, up to a limit. Raises: DataError at the first one above it."""

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.records: list[dict[str, str]] = []

    def add(self, place: str, reason: str) -> None:
        """Record one rejected document. Raises: DataError if there are now more than the limit."""
        self.records.append({"place": place, "reason": reason})
        if len(self.records) > self.limit:
            count = f" (number {len(self.records):,} of at most {self.limit:,})" if self.limit else ""
            raise DataError(
                f"{place}: {reason}{count}",
                hint="`data.on_error: skip:100` (--on-error skip:100) would tolerate 100 such documents",
            )


# ------------------------------------------------------------------------------------------------ finding


def resolve(source: SourceConfig) -> Inputs:
    """Find the files of a source. Raises: DataError for what is missing, EnvironmentFault for no Python library."""
    where = f"data.sources.{source.name}"
    ignored = 0
    if source.hf is not None or source.builtin == "generated":
        return Inputs(source, (), 0)
    if source.builtin == "python-stdlib":
        found = [(path, key, "text") for path, key in stdlib_files(source.path, f"{where}.path")]
    elif source.path is None:
        raise DataError(f"{where}.path is required: a file, a folder or a glob (or give hf or builtin)")
    else:
        found, ignored = _find(source, where)
    files = [InputFile(path, key, kind, path.stat().st_size) for path, key, kind in found]  # type: ignore[arg-type]
    kinds = {file.format for file in files}
    if "text" not in kinds and source.document != "file":
        raise DataError(f"{where}.document is `{source.document}`, but no file is plain text: {', '.join(kinds)}")
    if kinds == {"text"} and source.field != "text":
        raise DataError(f"{where}.field is `{source.field}`, but plain text has no fields; set format, or remove field")
    return Inputs(source, tuple(sorted(files, key=lambda file: file.key)), ignored)


def _find(source: SourceConfig, where: str) -> tuple[list[tuple[Path, str, str]], int]:
    assert source.path is not None
    text, explicit = str(source.path), None if source.format == "auto" else source.format
    if source.path.is_file():
        return [(source.path, source.path.name, explicit or _by_suffix(source.path, where))], 0
    if source.path.is_dir():
        everything = [path for path in source.path.rglob("*") if path.is_file() and not _hidden(path, source.path)]
        kinds = {path: SUFFIXES.get(path.suffix.lower()) for path in everything}
        chosen = [path for path in everything if kinds[path] and explicit in (None, kinds[path])]
        if not chosen:
            wanted = ", ".join(s for s, kind in SUFFIXES.items() if explicit in (None, kind))
            raise DataError(f"{where}.path: {text} holds no {wanted} files ({len(everything):,} others)")
        return [(p, p.relative_to(source.path).as_posix(), str(kinds[p])) for p in chosen], len(everything) - len(
            chosen
        )
    if not glob.has_magic(text):
        raise DataError(f"{where}.path: {text} does not exist; expected a file, a folder or a glob")
    matches = [Path(match) for match in glob.glob(text, recursive=True)]
    paths = [path for path in matches if path.is_file()]
    if not paths:
        raise DataError(f"{where}.path: {text} matches no file")
    base = Path(*[part for part, _ in zip(source.path.parts, _plain_parts(source.path), strict=False)])
    return [(p, p.relative_to(base).as_posix(), explicit or _by_suffix(p, where)) for p in paths], 0


def _plain_parts(path: Path) -> Iterator[str]:
    for part in path.parts:
        if glob.has_magic(part):
            return
        yield part


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _by_suffix(path: Path, where: str) -> str:
    if kind := SUFFIXES.get(path.suffix.lower()):
        return kind
    known = ", ".join(SUFFIXES)
    raise DataError(f"{path}: unknown suffix `{path.suffix}`; expected {known}, or set {where}.format (--format)")


def check_distinct(sources: Sequence[Inputs]) -> None:
    """Refuse a file that is listed twice, in whatever spelling. Raises: DataError naming both places."""
    seen: dict[str, str] = {}
    for inputs in sources:
        for file in inputs.files:
            place = f"{inputs.config.name}: {file.path}"
            if (first := seen.setdefault(os.path.realpath(file.path), place)) is not place:
                raise DataError(f"the same file is listed twice: {first} and {place}; remove one of them")


def content(inputs: Inputs) -> tuple[int, str] | None:
    """Return bytes and sha256 of a source's files by their keys; None for a Hub dataset."""
    if inputs.config.hf is not None:
        return None
    total, digest = 0, hashlib.sha256()
    if inputs.config.builtin == "generated":
        for text in generated_texts():
            total += len(text.encode())
            digest.update(text.encode() + b"\0")
    for file in inputs.files:
        with _open(file.path) as stream:
            own = hashlib.file_digest(stream, "sha256").hexdigest()
        total += file.size
        digest.update(f"{file.key}\0{file.size}\0{own}\n".encode("utf-8", "surrogateescape"))  # any file name
    return total, digest.hexdigest()


# ------------------------------------------------------------------------------------------------ reading


def documents(
    inputs: Inputs, rejects: Rejects | None = None, revision: str | None = None, offline: bool = False
) -> Iterator[Document]:
    """Yield the documents of a source in a fixed order, empty ones included.

    revision: the commit of a Hub dataset. Raises: DataError above the limit of `rejects` (at the first without one),
    EnvironmentFault if the Hub is asked for and cannot be reached.
    """
    rejects = rejects if rejects is not None else Rejects()
    name = inputs.config.name
    if inputs.config.builtin == "generated":
        pairs: Iterator[tuple[str, str]] = (
            (text, f"generated:{number}") for number, text in enumerate(generated_texts())
        )
    elif inputs.config.hf is not None:
        pairs = _from_hub(inputs.config, revision, rejects, offline)
    else:
        pairs = (pair for file in inputs.files for pair in _from_file(file, inputs.config, rejects))
    for text, key in pairs:
        if _has_surrogates(text):
            rejects.add(key, "holds half a surrogate pair (\\ud800 to \\udfff), which UTF-8 cannot hold")
        else:
            yield Document(text, name, key)


def _has_surrogates(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _from_file(file: InputFile, config: _Reading, rejects: Rejects) -> Iterator[tuple[str, str]]:
    if file.format == "text":
        pieces = {"file": _whole_file, "line": _lines, "blank-line": _paragraphs}[config.document](file.path)
        for raw, line, offset in pieces:
            try:
                yield raw.decode("utf-8"), f"{file.path}:{line}"
            except UnicodeDecodeError as error:
                line += raw.count(b"\n", 0, error.start)
                at = f"byte 0x{raw[error.start]:02x} at offset {offset + error.start:,}"
                rejects.add(f"{file.path}:{line}", f"not UTF-8 ({at}); convert the file to UTF-8")
    elif file.format == "jsonl":
        for raw, line, _ in _lines(file.path):
            text, column, reason = _json_text(raw, config.field)
            if reason:
                rejects.add(f"{file.path}:{line}:{column}", reason)
            else:
                yield text, f"{file.path}:{line}"
    else:
        yield from _from_table(file, config.field, rejects)


def _open(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({(error.strerror or str(error)).lower()})") from None


def _whole_file(path: Path) -> Iterator[tuple[bytes, int, int]]:
    with _open(path) as stream:
        raw = stream.read()
    yield raw.removeprefix(_BOM), 1, len(_BOM) if raw.startswith(_BOM) else 0


def _lines(path: Path) -> Iterator[tuple[bytes, int, int]]:
    """Yield each line without its end, with its number and byte offset."""
    offset = 0
    with _open(path) as stream:
        for number, raw in enumerate(stream, 1):
            start = offset
            offset += len(raw)
            if number == 1 and raw.startswith(_BOM):
                start, raw = len(_BOM), raw[len(_BOM) :]
            yield raw.removesuffix(b"\n").removesuffix(b"\r"), number, start


def _paragraphs(path: Path) -> Iterator[tuple[bytes, int, int]]:
    """Yield what stands between blank lines, line ends inside kept as newlines."""
    held: list[bytes] = []
    first, start = 1, 0
    for raw, number, offset in _lines(path):
        if raw.strip():
            first, start = (first, start) if held else (number, offset)
            held.append(raw)
        elif held:
            yield b"\n".join(held), first, start
            held = []
    if held:
        yield b"\n".join(held), first, start


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
    text, reason = _text_of(values, field)
    return text, 1, reason


def _text_of(values: Mapping[str, Any], field: str) -> tuple[str, str]:
    if field not in values:
        return "", f"field `{field}` is missing; the fields are {', '.join(map(str, values)) or 'none'}"
    if not isinstance(values[field], str):
        return "", f"field `{field}` is {type(values[field]).__name__}, expected text"
    return values[field], ""


# ------------------------------------------------------------------------------------------------ datasets


def _from_rows(
    rows: Iterator[Mapping[str, Any]], place: str, field: str, rejects: Rejects
) -> Iterator[tuple[str, str]]:
    for number, values in enumerate(rows, 1):
        text, reason = _text_of(values, field)
        if reason:
            rejects.add(f"{place}: row {number}", reason)
        else:
            yield text, f"{place}: row {number}"


def _from_table(file: InputFile, field: str, rejects: Rejects) -> Iterator[tuple[str, str]]:
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        rows = datasets.load_dataset(
            file.format, data_files=[glob.escape(str(file.path.absolute()))], split="train", streaming=True
        )
        yield from _from_rows(iter(rows), str(file.path), field, rejects)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{file.path}: not a readable {file.format} file ({reason})") from None


def hub_revision(config: SourceConfig, offline: bool = False) -> str:
    """Return the commit a Hub dataset is read at. Raises: EnvironmentFault (no network), DataError (no dataset)."""
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    _refuse_offline(config, offline)
    try:
        info = huggingface_hub.HfApi().dataset_info(str(config.hf), revision=config.revision)
    except RepositoryNotFoundError:
        raise DataError(
            f"data.sources.{config.name}.hf: no dataset `{config.hf}` on the Hub (or it is private)"
        ) from None
    except RevisionNotFoundError:
        raise DataError(f"data.sources.{config.name}.revision: `{config.hf}` has no `{config.revision}`") from None
    except _hub_errors() as error:
        raise _no_hub(config, error) from None
    return str(info.sha)


def _hub_errors() -> tuple[type[Exception], ...]:
    """What a Hub that cannot be read raises; an HTTP client's own errors are the bases of the Hub's."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, ValueError, datasets.exceptions.DatasetsError, *HfHubHTTPError.__bases__)


def _refuse_offline(config: SourceConfig, offline: bool) -> None:
    if offline:
        raise EnvironmentFault(
            f"data.sources.{config.name}: hf:{config.hf} needs the network, and --offline forbids it"
        )


def _no_hub(config: SourceConfig, error: Exception) -> EnvironmentFault:
    reason = " ".join(str(error).split())[:160]
    return EnvironmentFault(
        f"data.sources.{config.name}: hf:{config.hf} cannot be read from the Hub ({reason})",
        hint=f"data.sources.{config.name}.path=DIR reads local files instead",
    )


def _from_hub(config: SourceConfig, revision: str | None, rejects: Rejects, offline: bool) -> Iterator[tuple[str, str]]:
    import datasets

    _refuse_offline(config, offline)
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        rows = datasets.load_dataset(
            config.hf, config.subset, split=config.split, revision=revision or config.revision, streaming=True
        )
        yield from _from_rows(iter(rows), f"hf:{config.hf}", config.field, rejects)
    except _hub_errors() as error:
        raise _no_hub(config, error) from None


# ------------------------------------------------------------------------------------------------ sampling


def sample_texts(
    sources: Sequence[Inputs],
    budget: int,
    keep: Callable[[str], bool],
    max_rejects: int,
    offline: bool = False,
    revisions: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Yield about `budget` bytes of lines, the same share from each source, spread over the whole of it.

    keep: says whether a document may be looked at (validation text may not). A Hub dataset gives its first part, since
    its size is unknown; it is read at its commit in `revisions`. Raises: as `documents`.
    """
    share = budget / max(1, len(sources))
    rejects = Rejects(max_rejects)
    for inputs in sources:
        size = sum(file.size for file in inputs.files)
        rate = min(1.0, share / size) if size else 1.0
        seen = taken = 0
        for document in documents(inputs, rejects, (revisions or {}).get(inputs.config.name), offline):
            if not keep(document.text):
                continue
            for line in document.text.splitlines(keepends=True):
                seen += len(line.encode())
                if taken < rate * seen:
                    taken += len(line.encode())
                    yield line
            if taken >= share:
                break
