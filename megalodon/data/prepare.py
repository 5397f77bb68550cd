"""From the data section of a recipe to a token store: built if missing, reused if it fits, refused otherwise.

    DIR/            the training part: manifest.json, shards; rejects.jsonl if anything was rejected
    DIR/valid/      the validation part, same layout
    DIR/tokenizer/  a copy of the tokenizer

Nothing is dropped in silence: every document and token is accounted for in the ledger, which the manifest keeps.
Not here: the files themselves (megalodon/data/shards.py), reading text (megalodon/data/ingest.py).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megalodon.data.build import Built, Hub, build
from megalodon.data.encode import PIECE, Setup
from megalodon.data.hub import fetch_tokenizer, hub_revision
from megalodon.data.ingest import CorpusConfig, Inputs, SourceConfig, check_distinct, content, resolve
from megalodon.data.journal import Workspace, entry, remove_leftovers, workspace
from megalodon.data.places import sync
from megalodon.data.reading import MAX_RECORD
from megalodon.data.sampling import most, sample_texts
from megalodon.data.shards import MANIFEST, Store, check_shape, open_store, write_manifest
from megalodon.data.tasks import LARGEST_TASK, total_bytes
from megalodon.data.tokenizer import (
    ON_HUB,
    ByteTokenizer,
    Tokenizer,
    TokenizerConfig,
    check_path,
    load_tokenizer,
    train_sentencepiece,
)
from megalodon.data.workers import DEFAULT_MEM, Budget, plan
from megalodon.errors import CheckFailed, DataError, EnvironmentFault

VALID, TOKENIZER = "valid", "tokenizer"
_VALID_SOURCE = "valid"


class Progress(NamedTuple):
    """How far the work is; reported about once a megabyte."""

    stage: str
    """`tokenizer` while one is trained, then `tokens`."""
    documents: int
    bytes: int
    """Bytes of input."""
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
    split: int = 0
    """Documents among those kept that were cut, for their length, where an id might have spanned the cut."""
    bytes_read: int = 0
    """Bytes of the text of all documents."""
    bytes_empty: int = 0
    bytes_duplicate: int = 0
    bytes_rejected: int = 0

    def check(self) -> None:
        """Raises: CheckFailed if documents or tokens are lost between reading and writing."""
        if self.read != (whole := self.kept + self.empty + self.duplicate + self.rejected):
            raise CheckFailed(f"documents read {self.read:,}, but kept, empty, duplicate and rejected sum to {whole:,}")
        dropped = self.bytes_empty + self.bytes_duplicate + self.bytes_rejected
        if self.bytes_read != (whole := self.bytes + dropped):
            raise CheckFailed(f"bytes read {self.bytes_read:,}, but kept and dropped ones sum to {whole:,}")
        if self.split > self.kept:
            raise CheckFailed(f"documents split {self.split:,}, but kept {self.kept:,}")
        if self.tokens != self.train + self.valid:
            raise CheckFailed(f"tokens kept {self.tokens:,}, but train and valid sum to {self.train + self.valid:,}")

    def lines(self) -> list[str]:
        """Return the ledger as the command prints it."""
        cut = f"    {self.split:,} of those kept were split" if self.split else ""
        ratio = f", {self.bytes / self.tokens:.2f} bytes/token" if self.tokens else ""
        return [
            f"documents  read {self.read:,} = kept {self.kept:,} + empty {self.empty:,} "
            f"+ duplicate {self.duplicate:,} + rejected {self.rejected:,}{cut}",
            f"bytes      read {self.bytes_read:,} = kept {self.bytes:,} + empty {self.bytes_empty:,} "
            f"+ duplicate {self.bytes_duplicate:,} + rejected {self.bytes_rejected:,}",
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


def held_out(prepared: Prepared, max_tokens: int = 1 << 20) -> list[str]:
    """Return the text of the first documents of the validation part; the last one may be cut, at a character."""
    store, texts = prepared.valid, []
    for begin, end in store.documents(max_tokens):
        if begin >= max_tokens:
            break
        ids = store.tokens(begin, min(end, max_tokens)).tolist()
        texts.append(b"".join(map(prepared.tokenizer.token_bytes, ids)).decode("utf-8", "ignore"))
    return texts


def verify_prepared(directory: Path, threads: int = 1) -> Prepared:
    """Check sizes, hashes, ids, parts and ledger. Raises: CheckFailed; DataError if there is no store at all."""
    if not (directory / MANIFEST).is_file():
        raise DataError(f"{directory}: not a token store ({MANIFEST} is missing)")
    try:
        prepared = open_prepared(directory)
    except DataError as error:
        raise CheckFailed(str(error)) from None
    prepared.train.verify(threads)
    prepared.valid.verify(threads)
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
    workers: int | None = None,
    mem: int = DEFAULT_MEM,
    tell: Callable[[str], None] | None = None,
) -> Prepared:
    """Build the token store of a recipe in `directory`, or open the one that is there.

    workers: processes that encode; None for all cores. mem: bytes that all processes together stay under. The store
    depends on neither, nor on interruptions: the same call continues what a killed one has done. tell: is told what was
    found before the work begins.
    Raises: InputError for too little memory; DataError for text, tokenizer or a store that does not fit, naming what
    differs; EnvironmentFault for a missing library, network or disk space, or a killed worker; CheckFailed if the
    ledger does not add up. On an error nothing appears but what the same call can use, beside `directory`.
    """
    if not data.sources:
        raise DataError("data.sources is empty; expected at least one source with path, hf or builtin")
    configs = [*data.sources, *_valid_source(data)]
    model_file = check_path(tokenizer)
    if (directory / MANIFEST).exists():
        remove_leftovers(directory)
        return _reuse(data, configs, tokenizer, model_file, directory)
    sources = [resolve(config) for config in configs]
    check_distinct(sources)
    fetched = fetch_tokenizer(str(tokenizer.path), offline) if _on_hub(tokenizer) else None
    model_file = fetched.file if fetched else model_file
    trains = tokenizer.kind == "sentencepiece" and model_file is None
    sample = most(sources, tokenizer.sample) if trains else 0
    budget = plan(workers, mem, any(config.hf is not None for config in configs), sample)
    revisions = {config.name: hub_revision(config, offline) for config in configs if config.hf is not None}
    known = {inputs.config.name: content(inputs, budget.workers) for inputs in sources}
    request = {
        "request": _request(data, configs, tokenizer),
        "content": known,
        "revisions": revisions,
        "tokenizer": load_tokenizer(model_file).sha256 if model_file else None,
        "cut": [LARGEST_TASK, MAX_RECORD, PIECE],
    }
    tell = tell or (lambda _: None)
    for line in (*(inputs.describe() for inputs in sources), budget.describe()):
        tell(line)
    with workspace(directory, request) as work:
        notes = (work.note,) if work.note else ()
        revision = fetched.revision if fetched else None
        job = _Job(data, sources, tokenizer, model_file, revision, budget, Hub(revisions, offline), known)
        _build(job, work, progress or (lambda _: None))
        work.commit()
    return open_prepared(directory)._replace(up_to_date=False, notes=notes)


def _valid_source(data: CorpusConfig) -> list[SourceConfig]:
    valid = data.valid
    if valid.path is None:
        return []
    if any(source.name == _VALID_SOURCE for source in data.sources):
        raise DataError(f"data.sources: `{_VALID_SOURCE}` is the name of data.valid.path; rename the source")
    reading = valid.model_dump(include={"format", "document", "field"})
    return [SourceConfig.model_validate({"name": _VALID_SOURCE, "path": valid.path, **reading})]


# ------------------------------------------------------------------------------------------------ reusing


def _on_hub(tokenizer: TokenizerConfig) -> bool:
    return tokenizer.path is not None and tokenizer.path.startswith(ON_HUB)


def _request(data: CorpusConfig, configs: Sequence[SourceConfig], tokenizer: TokenizerConfig) -> dict[str, Any]:
    """What a recipe asks of a store, free of paths: two recipes with the same request and text give the same bytes."""
    asked: dict[str, Any] = {"kind": tokenizer.kind}
    if tokenizer.kind == "bytes":
        asked["reserve"] = tokenizer.reserve
    elif _on_hub(tokenizer):
        asked["hf"] = str(tokenizer.path).removeprefix(ON_HUB)
    elif tokenizer.path is None:
        keys = ("vocab_size", "model_type", "sample", "reserve")
        asked["trained"] = {key: getattr(tokenizer, key) for key in keys}
    valid: dict[str, Any] = {"fraction": data.valid.share} if data.valid.path is None else {"source": _VALID_SOURCE}
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


class _Job(NamedTuple):
    """What is built, and how."""

    data: CorpusConfig
    sources: Sequence[Inputs]
    tokenizer: TokenizerConfig
    model_file: Path | None
    model_revision: str | None
    """The commit of a tokenizer that came from the Hub."""
    budget: Budget
    hub: Hub
    content: Mapping[str, tuple[int, str] | None]


def _tokenizer(job: _Job, work: Workspace, report: Report) -> Tokenizer:
    """Return the tokenizer of the store, given, trained now or before; it is saved in the store."""
    folder = work.store / TOKENIZER
    if work.done(TOKENIZER):
        return load_tokenizer(folder)
    config, trained = job.tokenizer, False
    if config.kind == "bytes":
        tokenizer: Tokenizer = ByteTokenizer(config.reserve)
    elif job.model_file is not None:
        tokenizer = load_tokenizer(job.model_file)
    else:
        tokenizer, trained = _train(job, report), True
    folder.mkdir(exist_ok=True)
    tokenizer.save(folder)
    for path in (*folder.iterdir(), folder):
        sync(path)
    if trained:
        files = [entry(path, f"store/{TOKENIZER}/{path.name}") for path in folder.iterdir()]
        work.add(TOKENIZER, tokenizer.sha256, files)
    return tokenizer


def _train(job: _Job, report: Report) -> Tokenizer:
    config, data = job.tokenizer, job.data
    report(Progress("tokenizer", 0, 0, most(job.sources, config.sample), 0))
    fraction = data.valid.share
    trained_on = [inputs for inputs in job.sources if inputs.config.name != _VALID_SOURCE or data.valid.path is None]
    texts = sample_texts(trained_on, config.sample, fraction, job.hub.offline, job.hub.revisions)
    return train_sentencepiece(texts, config.vocab_size, config.reserve, config.model_type)


def _build(job: _Job, work: Workspace, report: Report) -> None:
    tokenizer = _tokenizer(job, work, report)
    data, total = job.data, total_bytes(job.sources)
    own_valid = data.valid.path is not None
    # Validation text of its own goes first, so that dedup removes its copies from the training text.
    order = sorted(job.sources, key=lambda inputs: not (own_valid and inputs.config.name == _VALID_SOURCE))
    shards = work.path / "raw" if data.dedup == "exact" else work.store
    setup = Setup(
        sources=tuple(order),
        work=work.path,
        tokenizer=work.store / TOKENIZER,
        parts=(shards, shards / VALID),
        bos=data.bos,
        eos=data.eos,
        fraction=0.0 if own_valid else data.valid.share,
        valid_source=_VALID_SOURCE if own_valid else "",
        limit=data.max_rejects(),
        dedup=data.dedup == "exact",
        whole=job.budget.whole,
    )

    def told(documents: int, size: int, tokens: int) -> None:
        report(Progress("tokens", documents, size, total, tokens))

    built = build(work, setup, job.budget, job.hub, tokenizer.vocab_size, told)
    ledger = _ledger(built)
    report(Progress("tokens", ledger.read, total or ledger.bytes_read, total, ledger.tokens))
    _finish(job, built, ledger, tokenizer, work)


def _ledger(built: Built) -> Ledger:
    counts, (train, valid) = built.counts, [sum(shard["tokens"] for shard in part) for part in built.shards]
    names = ("kept", "empty", "duplicate", "rejected", "bytes", "split")
    sizes = ("bytes_empty", "bytes_duplicate", "bytes_rejected")
    own = {name: counts.get(name, 0) for name in (*names, *sizes, "read", "bytes_read")}
    return Ledger(tokens=train + valid, train=train, valid=valid, **own)


def _finish(job: _Job, built: Built, ledger: Ledger, tokenizer: Tokenizer, work: Workspace) -> None:
    """Check the ledger, refuse empty parts, write both manifests."""
    ledger.check()
    _refuse_empty(job.data, ledger)
    entries = []
    for inputs in job.sources:
        name = inputs.config.name
        size, sha = job.content[name] or built.hub[name]
        revision = {"revision": job.hub.revisions[name]} if name in job.hub.revisions else {}
        entries.append({"name": name, "bytes": size, "sha256": sha, **revision})
    origin = {"revision": job.model_revision} if job.model_revision else {}
    about: Mapping[str, Any] = {
        "tokenizer": {"kind": tokenizer.kind, "sha256": tokenizer.sha256, **origin},
        "bos": job.data.bos,
        "eos": job.data.eos,
        "sources": sorted(entries, key=lambda entry: str(entry["name"])),
        "request": _request(job.data, [inputs.config for inputs in job.sources], job.tokenizer),
        "ledger": ledger._asdict(),
    }
    train, valid = built.shards
    fingerprint = write_manifest(work.store / VALID, valid, tokenizer.vocab_size, {**about, "part": "valid"})
    of_train = {**about, "part": "train", "valid_fingerprint": fingerprint}
    write_manifest(work.store, train, tokenizer.vocab_size, of_train)


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
    if not ledger.valid and explicit and (data.valid.path is not None or data.valid.share > 0):
        raise DataError(
            f"no text is left for validation: {counts}; none of {ledger.kept:,} documents fell into the fraction "
            f"{data.valid.share:g}; raise data.valid.fraction (--valid), or give data.valid.path"
        )
