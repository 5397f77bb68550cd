"""Files of examples -> a store of token examples with what of them is trained on, packed into windows.

    data/NAME-3f2a91c0/        the training part: manifest.json, shards with masks, windows.npy (packing.py)
    data/NAME-3f2a91c0/valid/  the validation part, same layout

The name of a store ends in a hash of everything it was made of: files, tokenizer, template, lengths, policies. The same
request finds its store again, another one makes another. Every example, token and label is accounted for in the ledger.
Not here: the lines of a file (conversations.py), conversations as ids (chat.py), batches (packing.py).
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megalodon.data.chat import ChatFormat, Encoded, TrainOn
from megalodon.data.conversations import Example, Fields, example_files, read_examples
from megalodon.data.encode import is_valid
from megalodon.data.packing import Packing, first_fit, trained_labels
from megalodon.data.places import written_aside
from megalodon.data.shards import MANIFEST, ShardWriter, Store, TokenDocument, canonical, file_sha256, open_store
from megalodon.data.tokenizer import Tokenizer
from megalodon.errors import CheckFailed, DataError

OverLength = Literal["error", "drop", "truncate-start", "truncate-end", "split"]
PackingKind = Literal["first-fit", "none"]
VALID, WINDOWS = "valid", "windows.npy"
VERSION = 1
"""Of how examples become tokens and windows; part of the name of a store."""


class ExampleSource(NamedTuple):
    """Files of examples of one layout."""

    name: str
    path: Path
    layout: str = "auto"


class Request(NamedTuple):
    """What a store of examples is to hold."""

    name: str
    sources: tuple[ExampleSource, ...]
    valid_path: Path | None
    """Files of their own for validation; None takes a part of the sources."""
    fraction: float
    """The part of the examples that is kept for validation, by their hash."""
    fields: Fields
    train_on: TrainOn
    seq_len: int
    over_length: OverLength
    packing: PackingKind


class ExamplesLedger(NamedTuple):
    """Where every example and every token went; both sums hold, or `check` raises."""

    policy: str
    read: int
    train: int
    valid: int
    too_long: int
    nothing: int
    """Examples of which no token is trained on; they are left out."""
    pieces: int
    """What examples that were split add to their number."""
    shortened: int
    """Examples that were truncated."""
    tokens: int
    tokens_train: int
    tokens_valid: int
    tokens_too_long: int
    tokens_nothing: int
    tokens_cut: int

    def check(self) -> None:
        """Raises: CheckFailed if examples or tokens are lost on the way."""
        kept = self.train + self.valid + self.too_long + self.nothing
        if self.read + self.pieces != kept:
            raise CheckFailed(
                f"examples read {self.read:,} + split {self.pieces:,}, but trained, valid, too long and nothing to "
                f"train on sum to {kept:,}"
            )
        parts = (self.tokens_train, self.tokens_valid, self.tokens_too_long, self.tokens_nothing, self.tokens_cut)
        if self.tokens != sum(parts):
            raise CheckFailed(f"tokens encoded {self.tokens:,}, but kept and dropped ones sum to {sum(parts):,}")

    def lines(self) -> list[str]:
        """Return the ledger as the command prints it."""
        split = f" + split {self.pieces:,}" if self.pieces else ""
        cut = f"    {self.shortened:,} of those kept were shortened ({self.policy})" if self.shortened else ""
        return [
            f"examples   read {self.read:,}{split} = trained {self.train:,} + valid {self.valid:,} "
            f"+ too long {self.too_long:,} ({self.policy}) + nothing to train on {self.nothing:,}{cut}",
            f"tokens     encoded {self.tokens:,} = train {self.tokens_train:,} + valid {self.tokens_valid:,} "
            f"+ too long {self.tokens_too_long:,} + nothing to train on {self.tokens_nothing:,} "
            f"+ cut {self.tokens_cut:,}",
        ]


class PreparedExamples(NamedTuple):
    """Stores of examples that are ready to train on. Field names as in `Prepared` (prepare.py)."""

    train: Store
    valid: Store
    train_packing: Packing
    valid_packing: Packing
    tokenizer: Tokenizer
    ledger: ExamplesLedger
    formats: Mapping[str, int]
    """Layout -> examples of it."""
    up_to_date: bool
    notes: tuple[str, ...]


def prepare_examples(
    request: Request,
    tokenizer: Tokenizer,
    chat: ChatFormat,
    *,
    bos: bool,
    parent: Path = Path("data"),
    make: bool = True,
    report: Callable[[int], None] = lambda examples: None,
) -> PreparedExamples:
    """Build the store of a request below `parent`, or open the one that is there.

    Conversations become ids by `chat`; a text is one document, between BOS (where `bos`) and EOS, all of it trained on.
    One process encodes about a million tokens in a second; nothing is held in memory but the lengths.

    Raises:
        DataError: with file and line: a file that cannot be read, an example that is too long (over_length: error), no
            example to train on, an end of turn that is never trained, no validation example.
        CheckFailed: the ledger does not add up.
    """
    files = {source.name: example_files(source.path) for source in request.sources}
    valid_files = example_files(request.valid_path) if request.valid_path else []
    _refuse_twice([*(f for found in files.values() for f in found), *valid_files])
    asked = _asked(request, files, valid_files, tokenizer, chat, bos)
    directory = parent / f"{request.name}-{hashlib.sha256(canonical(asked)).hexdigest()[:8]}"
    there = (directory / MANIFEST).exists()
    if not there and not make:
        raise DataError(f"{directory} holds no examples, and --no-prepare forbids to make them")
    if not there:
        with written_aside(directory) as aside:
            _Builder(request, tokenizer, chat, bos, aside, asked, report).build(files, valid_files)
    return _opened(directory, tokenizer, there)


def _asked(
    request: Request,
    files: Mapping[str, Sequence[Path]],
    valid_files: Sequence[Path],
    tokenizer: Tokenizer,
    chat: ChatFormat,
    bos: bool,
) -> dict[str, Any]:
    """Everything that the bytes of a store depend on, free of paths."""
    hashes = {name: [file_sha256(path) for path in found] for name, found in files.items()}
    return {
        "version": VERSION,
        "sources": [
            {"name": source.name, "format": source.layout, "sha256": hashes[source.name]} for source in request.sources
        ],
        "valid": [file_sha256(path) for path in valid_files] if request.valid_path else request.fraction,
        "fields": json.loads(json.dumps(request.fields)),
        "template": {"sha256": chat.template.sha256, "markers": dict(chat.markers)},
        "tokenizer": tokenizer.sha256,
        "bos": bos,
        "train_on": request.train_on,
        "seq_len": request.seq_len,
        "over_length": request.over_length,
        "packing": request.packing,
    }


def _refuse_twice(files: Sequence[Path]) -> None:
    seen: dict[Path, Path] = {}
    for path in files:
        if (other := seen.setdefault(path.resolve(), path)) is not path:
            raise DataError(f"{path} is given twice, also as {other}; an example would count double, remove one")


def encode_example(
    example: Example, chat: ChatFormat, tokenizer: Tokenizer, train_on: TrainOn, *, bos: bool
) -> Encoded:
    """Return the ids of an example and which are trained on. Raises: DataError with its place."""
    try:
        if example.messages is not None:
            return chat.encode(example.messages, trained=train_on)
        ids = [*([tokenizer.bos_id] if bos else []), *tokenizer.encode(str(example.text)), tokenizer.eos_id]
    except DataError as error:
        raise DataError(f"{example.place}: {error}") from None
    return Encoded(ids, [True] * len(ids))


class _Part:
    """A part of a store while it is written."""

    def __init__(self, directory: Path, vocab_size: int) -> None:
        self.directory = directory
        self.writer = ShardWriter(directory, vocab_size)
        self.lengths: list[int] = []
        self.tokens = self.trained = 0

    def add(self, source: str, ids: NDArray[np.int64], mask: NDArray[np.bool_], text_bytes: int) -> None:
        """Take an example."""
        self.writer.add(TokenDocument(source, ids, text_bytes, mask))
        self.lengths.append(len(ids))
        self.tokens, self.trained = self.tokens + len(ids), self.trained + int(mask.sum())

    def finish(self, request: Request, about: Mapping[str, Any]) -> str:
        """Plan the windows and write the manifest; returns the fingerprint."""
        lengths = np.array(self.lengths, dtype=np.int64)
        first = request.packing == "first-fit"
        windows = first_fit(lengths, request.seq_len) if first else np.arange(len(lengths), dtype=np.int64)
        packing = Packing(windows, lengths, request.seq_len)
        np.save(self.directory / WINDOWS, windows.astype("<i8"), allow_pickle=False)
        plan = {"kind": request.packing, "seq_len": request.seq_len, "windows": packing.num_windows}
        own = {"packing": {**plan, "sha256": packing.sha256}, "trained_labels": self.trained}
        return self.writer.finish({**about, **own})


class _Builder:
    """What a store takes in, and what becomes of each example."""

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        chat: ChatFormat,
        bos: bool,
        directory: Path,
        asked: Mapping[str, Any],
        report: Callable[[int], None],
    ) -> None:
        self.request, self.tokenizer, self.chat, self.bos = request, tokenizer, chat, bos
        self.asked, self.report = asked, report
        vocab_size = tokenizer.vocab_size + chat.new_rows
        self.train, self.valid = _Part(directory, vocab_size), _Part(directory / VALID, vocab_size)
        self.counts = dict.fromkeys(ExamplesLedger._fields[1:], 0)
        self.formats: dict[str, int] = {}
        self.conversations = self.stops = 0
        """Conversations trained on, and those of them whose end of turn is."""
        self.first = ""
        """Place of the first example."""

    def build(self, files: Mapping[str, Sequence[Path]], valid_files: Sequence[Path]) -> None:
        """Read, encode and write all examples, then both manifests."""
        request = self.request
        try:
            for source in request.sources:
                for example in read_examples(files[source.name], source.layout, request.fields):
                    self._take(example, source.name, own_valid=request.valid_path is not None)
            for example in read_examples(valid_files, "auto", request.fields):
                self._take(example, VALID, into=self.valid)
        finally:
            self.train.writer.close()
            self.valid.writer.close()
        self._refuse()
        ledger = self._ledger()
        ledger.check()
        about = {
            "tokenizer": {"kind": self.tokenizer.kind, "sha256": self.tokenizer.sha256},
            "template": {"name": self.chat.template.name, "sha256": self.chat.template.sha256},
            "request": self.asked,
            "ledger": ledger._asdict(),
            "formats": self.formats,
        }
        fingerprint = self.valid.finish(request, {**about, "part": "valid"})
        self.train.finish(request, {**about, "part": "train", "valid_fingerprint": fingerprint})

    def _take(self, example: Example, source: str, *, own_valid: bool = False, into: "_Part | None" = None) -> None:
        counts, request = self.counts, self.request
        self.first = self.first or example.place
        self.formats[example.format] = self.formats.get(example.format, 0) + 1
        counts["read"] += 1
        if counts["read"] % 1000 == 0:
            self.report(counts["read"])
        encoded = encode_example(example, self.chat, self.tokenizer, request.train_on, bos=self.bos)
        counts["tokens"] += len(encoded.ids)
        text = canonical(example.messages if example.messages is not None else example.text)
        said = [m["content"] for m in example.messages] if example.messages is not None else [str(example.text)]
        size = sum(len(part.encode()) for part in said)
        held_out = not own_valid and is_valid(text, request.fraction)
        part = into or (self.valid if held_out else self.train)
        pieces = list(self._fitted(encoded, example))
        counts["pieces"] += max(0, len(pieces) - 1)
        for number, (ids, mask) in enumerate(pieces):
            if not mask.any():
                counts["nothing"] += 1
                counts["tokens_nothing"] += len(ids)
                continue
            if example.messages is not None and part is self.train:
                self.conversations += 1
                self.stops += any(bool(mask[ids == stop].any()) for stop in self.chat.stop_ids)
            part.add(source, ids, mask, 0 if number else size)

    def _fitted(self, encoded: Encoded, example: Example) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
        """Yield what of an example goes into windows: itself, a part of it, its pieces, or nothing."""
        ids, trained = np.array(encoded.ids, dtype=np.int64), np.array(encoded.trained, dtype=np.bool_)
        limit, policy, extra = self.request.seq_len, self.request.over_length, len(encoded.ids) - self.request.seq_len
        if extra > 0 and (policy == "error" or (policy == "split" and example.text is None)):
            raise _too_long(example, len(ids), self.request)
        if extra > 0 and policy == "drop":
            self.counts["too_long"] += 1
            self.counts["tokens_too_long"] += len(ids)
            return
        if extra > 0 and policy.startswith("truncate"):
            self.counts["shortened"] += 1
            self.counts["tokens_cut"] += extra
            kept = np.arange(limit)
            if policy == "truncate-start":
                begins = int(self.bos)  # BOS stays: the model has met no document that began without it
                kept = np.concatenate([kept[:begins], np.arange(len(ids) - limit + begins, len(ids))])
            ids, trained = ids[kept], trained[kept]
        for start in range(0, len(ids), limit):
            piece, mask = ids[start : start + limit], trained[start : start + limit].copy()
            mask[0] = False  # what would predict it stands in no window, or in another's
            yield piece, mask

    def _refuse(self) -> None:
        """Raises: DataError for a set that would train nothing, or a model that never stops."""
        counts, request = self.counts, self.request
        if not counts["read"]:
            raise DataError(f"data.sources: {', '.join(str(s.path) for s in request.sources)} hold no example")
        if not self.train.lengths:
            raise DataError(
                f"{self.first}: neither this example nor any of the {counts['read']:,} leaves a token to train on: "
                f"{counts['nothing']:,} have none (data.train_on {request.train_on}), {counts['too_long']:,} are too "
                f"long, {len(self.valid.lengths):,} fell to validation"
            )
        if self.conversations and not self.stops:
            names = {token: name for name, token in self.chat.markers.items()} | {self.tokenizer.eos_id: "EOS"}
            stop = ", ".join(names.get(token, str(token)) for token in sorted(self.chat.stop_ids))
            raise DataError(
                f"{self.first}: the end of turn, {stop}, is trained neither here nor in any of "
                f"{self.conversations:,} conversations; the model would never stop: "
                f"data.over_length {request.over_length} or the template cuts it off"
            )
        if not self.valid.lengths:
            raise DataError(
                f"no example is left for validation: none of {counts['read']:,} fell into the fraction "
                f"{request.fraction:g}; raise data.valid.fraction, or give data.valid.path"
            )

    def _ledger(self) -> ExamplesLedger:
        own = {"train": len(self.train.lengths), "valid": len(self.valid.lengths)}
        own |= {"tokens_train": self.train.tokens, "tokens_valid": self.valid.tokens}
        return ExamplesLedger(policy=self.request.over_length, **{**self.counts, **own})


def _too_long(example: Example, tokens: int, request: Request) -> DataError:
    fits = f"{tokens:,} tokens, but a window holds data.seq_len {request.seq_len:,}"
    if request.over_length == "split":
        return DataError(
            f"{example.place}: {fits}, and split is for text only; choose data.over_length drop, truncate-start or "
            "truncate-end, or raise data.seq_len"
        )
    return DataError(
        f"{example.place}: {fits}; raise it, or choose data.over_length drop, truncate-start, truncate-end or, for "
        "text, split"
    )


def _opened(directory: Path, tokenizer: Tokenizer, up_to_date: bool) -> PreparedExamples:
    train, valid = open_store(directory), open_store(directory / VALID)
    manifest = train.manifest
    if valid.fingerprint != (told := manifest.get("valid_fingerprint")):
        raise DataError(
            f"{directory / VALID}: its fingerprint is {valid.fingerprint[:16]}, the manifest of {directory} says "
            f"{str(told)[:16]}; remove the directory, it is made again"
        )
    packings = [_packing(store) for store in (train, valid)]
    try:
        ledger = ExamplesLedger(**manifest["ledger"])
        formats = {str(name): int(count) for name, count in manifest["formats"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{directory / MANIFEST}: no ledger of examples ({error}); remove the directory") from None
    ledger.check()
    for store in (train, valid):
        if (found := trained_labels(store)) != (told := store.manifest.get("trained_labels")):
            raise CheckFailed(f"{store.path}: {found:,} labels are trained on, its manifest says {told:,}")
    return PreparedExamples(train, valid, packings[0], packings[1], tokenizer, ledger, formats, up_to_date, ())


def _packing(store: Store) -> Packing:
    """Read the plan of a store. Raises: DataError if it is not the one that the manifest names."""
    path, about = store.path / WINDOWS, store.manifest.get("packing")
    try:
        windows = np.load(path, allow_pickle=False)
        assert isinstance(about, dict)
        seq_len, expected = int(about["seq_len"]), str(about["sha256"])
        packing = Packing(np.asarray(windows, dtype=np.int64).reshape(-1), store.lengths(), seq_len)
    except (OSError, ValueError, EOFError, KeyError, TypeError, AssertionError, DataError) as error:
        raise DataError(f"{path}: no packing of this store ({error}); remove the directory, it is made again") from None
    if packing.sha256 != expected:
        raise DataError(
            f"{path}: its sha256 is {packing.sha256[:16]}, the manifest says {expected[:16]}; it was changed, remove "
            "the directory, it is made again"
        )
    return packing
