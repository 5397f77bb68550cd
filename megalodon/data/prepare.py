"""From the data section of a recipe to a token store: built if missing, reused if it fits, refused otherwise.

    DIR/            the training part: manifest.json, shards; rejects.jsonl if anything was rejected
    DIR/valid/      the validation part, same layout
    DIR/tokenizer/  a copy of the tokenizer

Nothing is dropped in silence: every document and token is accounted for in the ledger, which the manifest keeps.
Not here: the files themselves (megalodon/data/shards.py), reading text (megalodon/data/ingest.py).
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megalodon.data.ingest import (
    CorpusConfig,
    Document,
    Inputs,
    Rejects,
    SourceConfig,
    check_distinct,
    content,
    documents,
    hub_revision,
    resolve,
    sample_texts,
)
from megalodon.data.shards import MANIFEST, ShardWriter, Store, TokenDocument, check_shape, open_store, written_aside
from megalodon.data.tokenizer import (
    ByteTokenizer,
    Tokenizer,
    TokenizerConfig,
    check_path,
    load_tokenizer,
    train_sentencepiece,
)
from megalodon.errors import CheckFailed, DataError, EnvironmentFault

VALID, TOKENIZER, REJECTS = "valid", "tokenizer", "rejects.jsonl"
_VALID_SOURCE = "valid"
_REPORT_BYTES = 1 << 20


class Progress(NamedTuple):
    """How far the work is; reported about once a megabyte."""

    stage: str
    """`tokenizer` while one is trained, then `tokens`."""
    documents: int
    bytes: int
    total_bytes: int | None
    """Bytes of all sources; None if a source does not know its size."""
    tokens: int


Report = Callable[[Progress], None]


class Ledger(NamedTuple):
    """Where every document and every token went; both sums hold, or `check` raises."""

    read: int
    kept: int
    empty: int
    """Documents without text: nothing at all, or white space only."""
    duplicate: int
    rejected: int
    tokens: int
    train: int
    valid: int
    bytes: int
    """Bytes of the text of the documents that were kept."""

    def check(self) -> None:
        """Raises: CheckFailed if documents or tokens are lost between reading and writing."""
        if self.read != (whole := self.kept + self.empty + self.duplicate + self.rejected):
            raise CheckFailed(f"documents read {self.read:,}, but kept, empty, duplicate and rejected sum to {whole:,}")
        if self.tokens != self.train + self.valid:
            raise CheckFailed(f"tokens kept {self.tokens:,}, but train and valid sum to {self.train + self.valid:,}")

    def lines(self) -> list[str]:
        """Return the ledger as the command prints it."""
        ratio = f", {self.bytes / self.tokens:.2f} bytes/token" if self.tokens else ""
        return [
            f"documents  read {self.read:,} = kept {self.kept:,} + empty {self.empty:,} "
            f"+ duplicate {self.duplicate:,} + rejected {self.rejected:,}",
            f"tokens     kept {self.tokens:,} = train {self.train:,} + valid {self.valid:,}"
            f"    from {self.bytes:,} bytes{ratio}",
        ]


class Prepared(NamedTuple):
    """A token store that is ready to train on."""

    train: Store
    valid: Store
    tokenizer: Tokenizer
    ledger: Ledger
    up_to_date: bool
    """It was there already and fits."""
    notes: tuple[str, ...]
    """What the user should know: what was found, what could not be compared."""


_ABOUT = {
    "tokenizer": {"kind": str, "sha256": str},
    "bos": bool,
    "eos": bool,
    "sources": [{"name": str, "bytes": int, "sha256": str}],
    "request": {"sources": dict},
    "ledger": dict.fromkeys(Ledger._fields, int),
    "valid_fingerprint": str,
}
"""What the manifest of a training part holds besides its shards, as `check_shape` reads it."""


def open_prepared(directory: Path) -> Prepared:
    """Open a store with its validation part and tokenizer. Raises: DataError if parts are missing or do not match."""
    train, valid = open_store(directory), open_store(directory / VALID)
    check_shape(directory / MANIFEST, train.manifest, _ABOUT)
    named, asked = [entry["name"] for entry in train.manifest["sources"]], train.manifest["request"]["sources"]
    if named != sorted(asked):
        raise DataError(
            f"{directory / MANIFEST}: sources are {', '.join(named) or 'none'}, and request.sources are "
            f"{', '.join(sorted(asked)) or 'none'}; tokenize again"
        )
    tokenizer = load_tokenizer(directory / TOKENIZER)
    expected = train.manifest["tokenizer"]["sha256"]
    if tokenizer.sha256 != expected:
        raise DataError(
            f"{directory / TOKENIZER}: its sha256 is {tokenizer.sha256[:16]}, the store was made with "
            f"{expected[:16]}; tokenize again"
        )
    if valid.fingerprint != (told := train.manifest["valid_fingerprint"]):
        raise DataError(
            f"{directory / VALID}: its fingerprint is {valid.fingerprint[:16]}, the manifest of {directory} says "
            f"{told[:16]}; tokenize again"
        )
    ledger = Ledger(**{key: train.manifest["ledger"][key] for key in Ledger._fields})
    return Prepared(train, valid, tokenizer, ledger, True, ())


def verify_prepared(directory: Path) -> Prepared:
    """Check sizes, hashes, ids, parts and ledger. Raises: CheckFailed; DataError if there is no store at all."""
    if not (directory / MANIFEST).is_file():
        raise DataError(f"{directory}: not a token store ({MANIFEST} is missing)")
    try:
        prepared = open_prepared(directory)
    except DataError as error:
        raise CheckFailed(str(error)) from None
    prepared.train.verify()
    prepared.valid.verify()
    prepared.ledger.check()
    for name, store, told in (
        ("train", prepared.train, prepared.ledger.train),
        ("valid", prepared.valid, prepared.ledger.valid),
    ):
        if store.num_tokens != told:
            raise CheckFailed(f"{store.path}: holds {store.num_tokens:,} tokens, the ledger says {name} {told:,}")
    return prepared


def prepare_store(
    data: CorpusConfig,
    tokenizer: TokenizerConfig,
    directory: Path,
    progress: Report | None = None,
    offline: bool = False,
) -> Prepared:
    """Build the token store of a recipe in `directory`, or open the one that is there.

    Raises: DataError for text, tokenizer or a store that does not fit, naming what differs; EnvironmentFault for a
    missing library, network or disk space; CheckFailed if the ledger does not add up. On any error nothing appears.
    """
    if not data.sources:
        raise DataError("data.sources is empty; expected at least one source with path, hf or builtin")
    configs = [*data.sources, *_valid_source(data)]
    model_file = check_path(tokenizer)
    if (directory / MANIFEST).exists():
        return _reuse(data, configs, tokenizer, model_file, directory)
    sources = [resolve(config) for config in configs]
    check_distinct(sources)
    with written_aside(directory) as aside:
        _build(data, sources, tokenizer, model_file, aside, progress or (lambda _: None), offline)
    found = tuple(inputs.describe() for inputs in sources)
    return open_prepared(directory)._replace(up_to_date=False, notes=found)


def _valid_source(data: CorpusConfig) -> list[SourceConfig]:
    valid = data.valid
    if valid.path is None:
        return []
    if any(source.name == _VALID_SOURCE for source in data.sources):
        raise DataError(f"data.sources: `{_VALID_SOURCE}` is the name of data.valid.path; rename the source")
    reading = valid.model_dump(include={"format", "document", "field"})
    return [SourceConfig.model_validate({"name": _VALID_SOURCE, "path": valid.path, **reading})]


# ------------------------------------------------------------------------------------------------ reusing


def _request(data: CorpusConfig, configs: Sequence[SourceConfig], tokenizer: TokenizerConfig) -> dict[str, Any]:
    """What a recipe asks of a store, free of paths: two recipes with the same request and text give the same bytes."""
    asked: dict[str, Any] = {"kind": tokenizer.kind}
    if tokenizer.kind == "bytes":
        asked["reserve"] = tokenizer.reserve
    elif tokenizer.path is None:
        keys = ("vocab_size", "model_type", "sample", "reserve")
        asked["trained"] = {key: getattr(tokenizer, key) for key in keys}
    valid: dict[str, Any] = {"fraction": data.valid.fraction} if data.valid.path is None else {"source": _VALID_SOURCE}
    sources = {}
    for config in configs:
        kind = "hf" if config.hf else config.builtin or "files"
        entry = {"kind": kind, "format": config.format, "document": config.document, "field": config.field}
        if config.hf:
            entry |= {"hf": config.hf, "subset": str(config.subset), "split": config.split}
        sources[config.name] = entry
    return {
        "tokenizer": asked,
        "bos": data.bos,
        "eos": data.eos,
        "dedup": data.dedup,
        "valid": valid,
        "sources": sources,
    }


def _differences(stored: Any, asked: Any, key: str) -> Iterator[str]:
    if isinstance(stored, dict) and isinstance(asked, dict):
        for name in sorted(stored.keys() | asked.keys()):
            yield from _differences(stored.get(name), asked.get(name), f"{key}.{name}".lstrip("."))
    elif stored != asked:
        yield f"{key} is {json.dumps(stored)} there and {json.dumps(asked)} here"


def _reuse(
    data: CorpusConfig,
    configs: Sequence[SourceConfig],
    tokenizer: TokenizerConfig,
    model_file: Path | None,
    directory: Path,
) -> Prepared:
    prepared = open_prepared(directory)
    manifest = prepared.train.manifest
    found = list(_differences(manifest.get("request"), _request(data, configs, tokenizer), ""))
    if model_file and (sha := load_tokenizer(model_file).sha256) != prepared.tokenizer.sha256:
        found.append(f"the tokenizer's sha256 is {prepared.tokenizer.sha256[:16]} there and {sha[:16]} here")
    notes = []
    stored = {entry["name"]: entry for entry in manifest["sources"]}
    for config in configs if not found else ():
        try:
            own = content(resolve(config))
        except (DataError, EnvironmentFault) as error:
            # A store may be moved to a machine that lacks the text: its settings are compared, its text cannot be.
            notes.append(f"the text of source {config.name} was not compared with the store: {error}")
            continue
        entry = stored[config.name]
        if own and own != (entry["bytes"], entry["sha256"]):
            there, here = f"{entry['bytes']:,} bytes, {entry['sha256'][:16]}", f"{own[0]:,} bytes, {own[1][:16]}"
            found.append(f"the text of source {config.name} is ({there}) there and ({here}) here")
        if config.hf and config.revision not in (None, entry.get("revision")):
            there = entry.get("revision")
            found.append(f"the revision of {config.name} is {there} there and {config.revision} here")
    if found:
        raise DataError(
            f"{directory} holds a store that does not fit: {'; '.join(found)}",
            hint="choose another directory (data.dir=DIR, -o DIR), or remove this one to build it again",
        )
    return prepared._replace(notes=tuple(notes))


# ------------------------------------------------------------------------------------------------ building


def is_valid(text: str, fraction: float) -> bool:
    """Return whether a document is kept for validation: a matter of its text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") < fraction * 2**64


def _tokenizer(
    data: CorpusConfig,
    sources: Sequence[Inputs],
    config: TokenizerConfig,
    model_file: Path | None,
    report: Report,
    offline: bool,
    revisions: Mapping[str, str],
) -> Tokenizer:
    if config.kind == "bytes":
        return ByteTokenizer(config.reserve)
    if model_file is not None:
        return load_tokenizer(model_file)
    report(Progress("tokenizer", 0, 0, min(config.sample, _total_bytes(sources) or config.sample), 0))
    fraction = data.valid.fraction if data.valid.path is None else 0.0
    trained_on = [inputs for inputs in sources if inputs.config.name != _VALID_SOURCE or data.valid.path is None]
    texts = sample_texts(
        trained_on, config.sample, lambda text: not is_valid(text, fraction), data.max_rejects(), offline, revisions
    )
    return train_sentencepiece(texts, config.vocab_size, config.reserve, config.model_type)


def _total_bytes(sources: Sequence[Inputs]) -> int | None:
    if any(not inputs.files for inputs in sources):
        return None
    return sum(file.size for inputs in sources for file in inputs.files)


class _Builder:
    """Sends each document to the training or the validation part and counts all of them."""

    def __init__(self, data: CorpusConfig, tokenizer: Tokenizer, aside: Path) -> None:
        self.data, self.tokenizer = data, tokenizer
        self.train = ShardWriter(aside, tokenizer.vocab_size)
        self.valid = ShardWriter(aside / VALID, tokenizer.vocab_size)
        self.read = self.kept = self.empty = self.duplicate = self.tokens = self.bytes = 0
        self._seen: set[bytes] = set()

    def add(self, document: Document) -> None:
        self.read += 1
        if not document.text or document.text.isspace():
            self.empty += 1
            return
        raw = document.text.encode()
        if self.data.dedup == "exact":
            digest = hashlib.blake2b(raw, digest_size=16).digest()
            if digest in self._seen:
                self.duplicate += 1
                return
            self._seen.add(digest)
        bos, eos = [self.tokenizer.bos_id] * self.data.bos, [self.tokenizer.eos_id] * self.data.eos
        ids = np.array([*bos, *self.tokenizer.encode(document.text), *eos], dtype=np.int64)
        if self.data.valid.path is not None:
            to_valid = document.source == _VALID_SOURCE
        else:
            to_valid = is_valid(document.text, self.data.valid.fraction)
        (self.valid if to_valid else self.train).add(TokenDocument(document.source, ids, len(raw)))
        self.kept += 1
        self.tokens += len(ids)
        self.bytes += len(raw)


def _build(
    data: CorpusConfig,
    sources: Sequence[Inputs],
    config: TokenizerConfig,
    model_file: Path | None,
    aside: Path,
    report: Report,
    offline: bool,
) -> None:
    revisions = {i.config.name: hub_revision(i.config, offline) for i in sources if i.config.hf is not None}
    tokenizer = _tokenizer(data, sources, config, model_file, report, offline, revisions)
    (aside / TOKENIZER).mkdir()
    tokenizer.save(aside / TOKENIZER)
    rejects, builder, entries = Rejects(data.max_rejects()), _Builder(data, tokenizer, aside), []
    total, reported, seen_bytes = _total_bytes(sources), 0, 0
    # Validation text of its own goes first, so that dedup removes its copies from the training text.
    order = sorted(sources, key=lambda inputs: inputs.config.name != _VALID_SOURCE or data.valid.path is None)
    try:
        for inputs in order:
            digest, own_bytes = hashlib.sha256(), 0
            for document in documents(inputs, rejects, revisions.get(inputs.config.name), offline):
                builder.add(document)
                size = len(document.text.encode())
                seen_bytes += size
                if inputs.config.hf is not None:
                    own_bytes += size
                    digest.update(document.text.encode() + b"\0")
                if seen_bytes - reported >= _REPORT_BYTES:
                    reported = seen_bytes
                    report(Progress("tokens", builder.read, seen_bytes, total, builder.tokens))
            known = content(inputs) or (own_bytes, digest.hexdigest())
            entry: dict[str, Any] = {"name": inputs.config.name, "bytes": known[0], "sha256": known[1]}
            if inputs.config.hf is not None:
                entry["revision"] = revisions[inputs.config.name]
            entries.append(entry)
    finally:
        builder.train.close()
        builder.valid.close()
    report(Progress("tokens", builder.read, seen_bytes, total, builder.tokens))
    _finish(data, [inputs.config for inputs in sources], config, builder, rejects, entries, aside)


def _finish(
    data: CorpusConfig,
    configs: Sequence[SourceConfig],
    config: TokenizerConfig,
    builder: _Builder,
    rejects: Rejects,
    entries: list[dict[str, Any]],
    aside: Path,
) -> None:
    """Check the ledger, refuse empty parts, write both manifests."""
    rejected = len(rejects.records)
    ledger = Ledger(
        read=builder.read + rejected,
        kept=builder.kept,
        empty=builder.empty,
        duplicate=builder.duplicate,
        rejected=rejected,
        tokens=builder.tokens,
        train=builder.train.tokens,
        valid=builder.valid.tokens,
        bytes=builder.bytes,
    )
    ledger.check()
    _refuse_empty(data, ledger)
    if rejects.records:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in rejects.records)
        # A file name that is not UTF-8 becomes \udcXX, which JSON reads back as the same name.
        (aside / REJECTS).write_text(lines, encoding="utf-8", errors="backslashreplace", newline="\n")
    tokenizer = builder.tokenizer
    about: Mapping[str, Any] = {
        "tokenizer": {"kind": tokenizer.kind, "sha256": tokenizer.sha256},
        "bos": data.bos,
        "eos": data.eos,
        "sources": sorted(entries, key=lambda entry: str(entry["name"])),
        "request": _request(data, configs, config),
        "ledger": ledger._asdict(),
    }
    fingerprint = builder.valid.finish({**about, "part": "valid"})
    builder.train.finish({**about, "part": "train", "valid_fingerprint": fingerprint})


def _refuse_empty(data: CorpusConfig, ledger: Ledger) -> None:
    counts = (
        f"{ledger.read:,} documents read, {ledger.empty:,} empty, {ledger.duplicate:,} duplicate, "
        f"{ledger.rejected:,} rejected"
    )
    if not ledger.kept:
        raise DataError(f"the sources hold no text: {counts}; give text to train on")
    if not ledger.train:
        raise DataError(
            f"no text is left to train on: {counts}, and all {ledger.kept:,} fell to validation; "
            "lower data.valid.fraction (--valid) or give more text"
        )
    explicit = data.valid.path is not None or "fraction" in data.valid.model_fields_set
    if not ledger.valid and explicit and (data.valid.path is not None or data.valid.fraction > 0):
        raise DataError(
            f"no text is left for validation: {counts}; none of {ledger.kept:,} documents fell into the fraction "
            f"{data.valid.fraction:g}; raise data.valid.fraction (--valid), or give data.valid.path"
        )
