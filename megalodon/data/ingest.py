"""What a recipe says of its text, and the files that are meant: found, checked, hashed.

    resolve(source)    -> Inputs: the files of a source with their formats, checked, sorted by a path-free key
    content(inputs)    -> bytes and sha256 of all of them

Not here: reading documents (megalodon/data/reading.py, megalodon/data/hub.py), cutting files into tasks
(megalodon/data/tasks.py), the built-in sources' contents (megalodon/data/builtin.py).
"""

import glob
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, Strict, model_validator

from megalodon.config import Config, Count, Impossible, Share
from megalodon.data.builtin import generated_texts, stdlib_files
from megalodon.errors import DataError

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
COMPRESSED: Mapping[str, Literal["gz", "zst"]] = {".gz": "gz", ".zst": "zst"}
"""Suffixes of compressed text and JSON lines; the suffix before them tells the format."""


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


class Reading(Config):
    """How the files of a path are read."""

    format: Literal["auto", "text", "jsonl", "parquet", "csv", "arrow"] = "auto"
    """What the files are; `auto` goes by their suffixes."""
    document: Literal["file", "line", "blank-line"] = "file"
    """What a document is in text: a whole file, a line, or what stands between blank lines."""
    field: Annotated[str, Field(min_length=1)] = "text"
    """The column that holds the text (not for plain text)."""


class SourceConfig(Reading):
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


class ValidConfig(Reading):
    """The text that is kept for validation."""

    fraction: Annotated[Share, Field(ge=0, lt=1)] | None = 0.005
    """Part of the documents, chosen by the hash of their text, so a document never changes sides; null with `path`."""
    path: _Path | None = None
    """Files of their own instead; then every document of the sources is trained on."""

    @model_validator(mode="before")
    @classmethod
    def _files_instead(cls, given: Any) -> Any:
        """The default gives way to files, so that a saved recipe does not name both."""
        alone = isinstance(given, dict) and given.get("path") is not None and "fraction" not in given
        return {**given, "fraction": None} if alone else given

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.path is not None and self.fraction is not None:
            raise Impossible(("fraction", "give one of fraction and path, not both"))
        if self.path is None and self.fraction is None:
            raise Impossible(("fraction", "expected a part of the documents, such as 0.005, or path"))
        return self

    @property
    def share(self) -> float:
        """Part of the documents of the sources that is held out."""
        return self.fraction or 0.0


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
    """Drop documents whose text came before; the first stays. It takes about 70 bytes of memory for each document."""
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
    reader: Literal["mmap", "pread"] = "mmap"
    """How the store is read; pread for network disks, where a file cut while it is mapped would kill the process."""


class InputFile(NamedTuple):
    """One file of a source; `key` is its path inside the source, the same on every machine."""

    path: Path
    key: str
    format: Format
    size: int
    compression: Literal["", "gz", "zst"] = ""
    modified: int = 0
    """When it was last written, in ns: a file that changes while it is read is refused."""


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
        kinds = sorted({(file.format, file.compression) for file in self.files})
        text = f"document: {self.config.document}"
        named = ((f"{kind}.{packed}" if packed else kind, kind) for kind, packed in kinds)
        formats = ", ".join(f"{name} ({text if kind == 'text' else self.config.field})" for name, kind in named)
        size = sum(file.size for file in self.files)
        rest = f"; {self.ignored:,} other files ignored" if self.ignored else ""
        count = f"{len(self.files):,} file{'s' if len(self.files) != 1 else ''}"
        return f"{self.config.name}: {count}, {formats}, {size:,} bytes{rest}"


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
    files = [_input_file(path, key, kind) for path, key, kind in found]
    kinds = {file.format for file in files}
    if "text" not in kinds and source.document != "file":
        raise DataError(f"{where}.document is `{source.document}`, but no file is plain text: {', '.join(kinds)}")
    if kinds == {"text"} and source.field != "text":
        raise DataError(f"{where}.field is `{source.field}`, but plain text has no fields; set format, or remove field")
    return Inputs(source, tuple(sorted(files, key=lambda file: file.key)), ignored)


def _input_file(path: Path, key: str, kind: str) -> InputFile:
    stat, packed = path.stat(), COMPRESSED.get(path.suffix.lower(), "")
    if packed and kind not in ("text", "jsonl"):
        raise DataError(f"{path}: a compressed {kind} file is not read; expected text or jsonl in {path.suffix}")
    return InputFile(path, key, kind, stat.st_size, packed, stat.st_mtime_ns)  # type: ignore[arg-type]


def format_of(path: Path) -> Format | None:
    """Return the format that the suffixes of a name tell, looking through .gz and .zst; None for an unknown one."""
    inner = Path(path.stem) if path.suffix.lower() in COMPRESSED else path
    return SUFFIXES.get(inner.suffix.lower())


def _find(source: SourceConfig, where: str) -> tuple[list[tuple[Path, str, str]], int]:
    assert source.path is not None
    text, explicit = str(source.path), None if source.format == "auto" else source.format
    if source.path.is_file():
        return [(source.path, source.path.name, explicit or _by_suffix(source.path, where))], 0
    if source.path.is_dir():
        everything = [path for path in source.path.rglob("*") if path.is_file() and not _hidden(path, source.path)]
        kinds = {path: format_of(path) for path in everything}
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
    if kind := format_of(path):
        return kind
    known = ", ".join((*SUFFIXES, *(f"*{suffix}" for suffix in COMPRESSED)))
    raise DataError(f"{path}: unknown suffix `{path.suffix}`; expected {known}, or set {where}.format (--format)")


def check_distinct(sources: Sequence[Inputs]) -> None:
    """Refuse a file that is listed twice, in whatever spelling. Raises: DataError naming both places."""
    seen: dict[str, str] = {}
    for inputs in sources:
        for file in inputs.files:
            place = f"{inputs.config.name}: {file.path}"
            if (first := seen.setdefault(os.path.realpath(file.path), place)) is not place:
                raise DataError(f"the same file is listed twice: {first} and {place}; remove one of them")


def content(inputs: Inputs, threads: int = 1) -> tuple[int, str] | None:
    """Return bytes and sha256 of a source's files by their keys, hashed in threads; None for a Hub dataset."""
    if inputs.config.hf is not None:
        return None
    total, digest = 0, hashlib.sha256()
    if inputs.config.builtin == "generated":
        for text in generated_texts():
            total += len(text.encode())
            digest.update(text.encode() + b"\0")
    with ThreadPoolExecutor(threads) as pool:
        for file, own in zip(inputs.files, pool.map(_file_hash, inputs.files), strict=True):
            total += file.size
            digest.update(f"{file.key}\0{file.size}\0{own}\n".encode("utf-8", "surrogateescape"))  # any file name
    return total, digest.hexdigest()


def _file_hash(file: InputFile) -> str:
    with open_file(file.path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_file(path: Path) -> BufferedReader:
    """Open a file of text. Raises: DataError naming it and the reason."""
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({(error.strerror or str(error)).lower()})") from None
