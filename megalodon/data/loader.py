"""Windows and batches from a token store: everything a pure function of a global sample number.

Sample k of an epoch is the tokens [kT, kT+T+1) of the stream: inputs are the first T, targets the last T. The order is
megalodon/data/order.py; the whole position of a run is `samples_consumed`, the number of its next sample.
Not here: how many samples a step takes (megalodon/training/loop.py), where the tokens lie (megalodon/data/shards.py).
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megalodon.data.order import ORDER_VERSION, mixture, permute
from megalodon.data.shards import Store
from megalodon.data.tokenizer import Tokenizer
from megalodon.errors import CheckFailed, DataError

IGNORED = -100
"""The target that no loss is taken of."""
EVERYTHING = "*"
"""The name of all sources as one stream; no source can be called so."""
_BLOCK = 256
"""Samples whose places are worked out at once."""

Int64s = NDArray[np.int64]
Isolate = Literal["doc", "none"]


class Batch(NamedTuple):
    """Some rows of L tokens with what comes after each."""

    tokens: Int64s
    """(B, L) token ids."""
    targets: Int64s
    """(B, L) the next token; IGNORED where no loss is taken."""
    starts: NDArray[np.bool_]
    """(B, L) where a document begins; all False with isolate `none`."""

    def cut(self, length: int) -> "Batch":
        """The same tokens in rows of `length`, which divides L: (B L / length, length)."""
        tokens, targets, starts = self
        return Batch(tokens.reshape(-1, length), targets.reshape(-1, length), starts.reshape(-1, length))


class WindowLedger(NamedTuple):
    """Where the tokens and labels of one stream go in an epoch."""

    name: str
    tokens: int
    windows: int
    seq_len: int
    tail: int
    """Tokens after the last window; never trained on."""
    first_of_document: int
    """Labels that are ignored, as the first token of the next document."""

    def lines(self) -> list[str]:
        """Return the ledger as training prints it. Raises: CheckFailed if it does not add up."""
        labels = self.windows * self.seq_len
        if self.tokens != labels + 1 + self.tail or not 0 <= self.tail < self.seq_len:
            raise CheckFailed(
                f"windows: {self.name} has {self.tokens:,} tokens, but {self.windows:,} x {self.seq_len:,} + 1 + tail "
                f"{self.tail:,} is {labels + 1 + self.tail:,}"
            )
        return [
            f"windows    {self.name} {self.tokens:,} = {self.windows:,} x {self.seq_len:,} + 1 + tail {self.tail:,}",
            f"labels     an epoch {labels:,} = trained {labels - self.first_of_document:,} "
            f"+ first-of-document {self.first_of_document:,}",
        ]


def _read(streams: list[Store], source: Int64s, begins: Int64s, length: int, isolate: Isolate) -> Batch:
    """Return the windows of `length` inputs from `begins` on, each of the stream `source` says: (K, length).

    Raises: DataError naming the place of an id outside the vocabulary, before a device could read past its embedding.
    """
    # Tokens stay in the narrow type of the store until two passes over all of them make inputs and targets.
    whole = np.empty((len(begins), length + 1), dtype=streams[0].dtype)
    starts = np.zeros((len(begins), length), dtype=np.bool_)
    ignored = []
    for i, stream in enumerate(streams):
        rows = np.flatnonzero(source == i)
        stream.fill(whole, rows, begins[rows])
        if isolate == "doc":
            window, column = stream.starts_in(begins[rows], length + 1)
            row = rows[window]
            starts[row[column < length], column[column < length]] = True
            ignored.append((row[column > 0], column[column > 0] - 1))
    if whole.size and int(whole.max()) >= (size := streams[0].vocab_size):
        row, column = np.argwhere(whole >= size)[0]
        raise streams[source[row]].bad_token(int(begins[row] + column))
    targets = whole[:, 1:].astype(np.int64)
    for row, column in ignored:
        targets[row, column] = IGNORED
    return Batch(whole[:, :-1].astype(np.int64), targets, starts)


class Samples(Protocol):
    """What training reads: `Loader`, or `PackedLoader` (packing.py)."""

    store: Store
    seq_len: int

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""

    def batch(self, first_sample: int, count: int, rank: int = 0, ranks: int = 1) -> Batch:
        """Return samples [first_sample, first_sample + count) of the run."""

    def state(self, samples_consumed: int, skipped_ranges: Sequence[Sequence[int]] = ()) -> dict[str, Any]:
        """Return what a checkpoint keeps of the data."""

    def check(self, state: Mapping[str, Any]) -> tuple[int, list[list[int]]]:
        """Return (samples consumed, skipped ranges) of a run that is to go on. Raises: DataError."""

    def ledger_lines(self) -> list[str]:
        """Return where tokens and labels go in an epoch. Raises: CheckFailed if they do not add up."""


class Loader:
    """Training batches: `batch(first, count)` depends on nothing but its arguments and the constructor's.

    weights: the part of each source in the mixture; None takes the store as one stream.
    Raises: DataError for a stream shorter than one window, unknown sources, or weights that cannot be met.
    """

    def __init__(
        self,
        store: Store,
        seq_len: int,
        isolate: Isolate,
        seed: int,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.store, self.seq_len, self.isolate, self.seed = store, seq_len, isolate, seed
        self._names = list(weights) if weights else [EVERYTHING]
        self._streams = [store.source(name) for name in weights] if weights else [store]
        self._mixture = mixture(self._names, list(weights.values()) if weights else [1.0])
        self._block = functools.lru_cache(maxsize=8)(self._located)
        self._windows = [(stream.num_tokens - 1) // seq_len for stream in self._streams]
        for name, stream, windows in zip(self._names, self._streams, self._windows, strict=True):
            if windows < 1:
                what = "holds" if name == EVERYTHING else f"source {name}: holds"
                raise DataError(
                    f"{store.path}: {what} {stream.num_tokens:,} tokens, but one window of data.seq_len {seq_len:,} "
                    f"needs {seq_len + 1:,}; give more text or a smaller seq_len"
                )

    @property
    def num_samples(self) -> int:
        """Samples of an epoch: the windows of all its sources together."""
        return sum(self._windows)

    def batch(self, first_sample: int, count: int, rank: int = 0, ranks: int = 1) -> Batch:
        """Return samples [first_sample, first_sample + count) of the run: (count, seq_len).

        rank, ranks: of several data-parallel ranks, each takes every `ranks`-th sample, its own first: (count / ranks,
        seq_len). Raises: DataError if the ranks do not divide `count`.
        """
        check_share(first_sample, count, rank, ranks)
        blocks = [self._block(block) for block in range(first_sample // _BLOCK, -(-(first_sample + count) // _BLOCK))]
        mine = slice(first_sample % _BLOCK + rank, first_sample % _BLOCK + count, ranks)
        source, window = (np.concatenate(part)[mine] for part in zip(*blocks, strict=True))
        return _read(self._streams, source, window * self.seq_len, self.seq_len, self.isolate)

    def locate(self, samples: Int64s) -> tuple[Int64s, Int64s]:
        """Return (source, window) of each sample: which stream it comes from and which of its windows it is.

        samples: (K,) int64 global numbers. Returns: two (K,) int64.
        """
        source, number = self._mixture.locate(samples)
        window = np.empty_like(number)
        for i, (name, windows) in enumerate(zip(self._names, self._windows, strict=True)):
            epoch, place = np.divmod(number, windows)
            for turn in np.unique(epoch[source == i]):
                rows = (source == i) & (epoch == turn)
                window[rows] = permute(place[rows], windows, self.seed, name, int(turn))
        return source, window

    def _located(self, block: int) -> tuple[Int64s, Int64s]:
        """`locate` for a block of samples: that costs little more than for a few of them."""
        return self.locate(np.arange(block * _BLOCK, (block + 1) * _BLOCK, dtype=np.int64))

    def state(self, samples_consumed: int, skipped_ranges: Sequence[Sequence[int]] = ()) -> dict[str, Any]:
        """Return what a checkpoint keeps of the data: JSON, free of world size, paths and batch size.

        samples_consumed: the global number of the next sample. skipped_ranges: the samples [start, stop) below it that
        the run jumped over. `progress` is for people: where each source stands; it follows from the rest.
        """
        return {
            "version": ORDER_VERSION,
            "fingerprint": self.store.fingerprint,
            "tokenizer": str(self.store.manifest.get("tokenizer", {}).get("sha256")),
            "seq_len": self.seq_len,
            "isolate": self.isolate,
            "seed": self.seed,
            "mixture": dict(zip(self._names, self._mixture.slots, strict=True)),
            "samples_consumed": samples_consumed,
            "skipped_ranges": [list(ends) for ends in skipped_ranges],
            "progress": self.progress(samples_consumed),
        }

    def progress(self, samples_consumed: int) -> dict[str, dict[str, int]]:
        """Return for each source the epoch it is in, the samples of it that are behind, and how many it has."""
        found = {}
        for name, windows, own in zip(self._names, self._windows, self._mixture.counts(samples_consumed), strict=True):
            epoch, sample = divmod(own, windows)
            found[name] = {"epoch": epoch, "sample": sample, "of": windows}
        return found

    def check(self, state: Mapping[str, Any]) -> tuple[int, list[list[int]]]:
        """Return (samples consumed, skipped ranges) of a run that is to go on.

        Raises: DataError naming everything that differs, or ranges that are not in order below the samples consumed.
        """
        return checked_state(self.state, state)

    def ledgers(self) -> list[WindowLedger]:
        """Return the window ledger of each stream."""
        found = []
        for name, stream, windows in zip(self._names, self._streams, self._windows, strict=True):
            labels = windows * self.seq_len
            first = len(stream.starts(1, labels + 1)) if self.isolate == "doc" else 0
            shown = "train" if name == EVERYTHING else name
            found.append(
                WindowLedger(shown, stream.num_tokens, windows, self.seq_len, stream.num_tokens - labels - 1, first)
            )
        return found

    def ledger_lines(self) -> list[str]:
        """Return the window ledgers as training prints them. Raises: CheckFailed if one does not add up."""
        return [line for ledger in self.ledgers() for line in ledger.lines()]


def check_share(first_sample: int, count: int, rank: int, ranks: int) -> None:
    """Raises: ValueError for samples or a rank out of range; DataError if the ranks do not divide `count`."""
    if first_sample < 0 or count < 1 or not 0 <= rank < ranks:
        raise ValueError(f"samples [{first_sample}, +{count}) of rank {rank} of {ranks}: out of range")
    if count % ranks:
        raise DataError(f"a batch of {count:,} sequences cannot be shared by {ranks} ranks: expected a multiple")


def checked_state(
    state_of: Callable[[int, list[list[int]]], Mapping[str, Any]], state: Mapping[str, Any]
) -> tuple[int, list[list[int]]]:
    """Compare the data state of a checkpoint with the one that a loader would write there; see `Loader.check`.

    state_of: `state` of the loader. Raises: DataError naming everything that differs.
    """
    consumed = state.get("samples_consumed")
    if type(consumed) is not int or consumed < 0:
        raise DataError(f"data state: samples_consumed is {consumed!r}, expected a number of samples")
    skipped = _checked_ranges(state.get("skipped_ranges"), consumed)
    mine = state_of(consumed, skipped)
    differing = [
        f"{key} was {state.get(key)!r} and is now {mine.get(key)!r}"
        for key in sorted((mine.keys() | state.keys()) - {"progress"})
        if state.get(key) != mine.get(key)
    ]
    if differing:
        raise DataError(
            f"the run cannot go on with other data: {'; '.join(differing)}",
            hint="start a new run, or give back the data and settings it began with",
        )
    return consumed, skipped


def _checked_ranges(ranges: Any, consumed: int) -> list[list[int]]:
    """Return ranges as a checkpoint keeps them. Raises: DataError unless they are in order and end by `consumed`."""
    behind = 0
    for ends in ranges if isinstance(ranges, list) else [ranges]:
        whole = isinstance(ends, list) and len(ends) == 2 and all(type(end) is int for end in ends)
        if not whole or not behind <= ends[0] < ends[1] <= consumed:
            raise DataError(
                f"data state: skipped_ranges is {ranges!r}, expected [[start, stop], …] in order, "
                f"within the {consumed:,} samples consumed"
            )
        behind = ends[1]
    return [list(ends) for ends in ranges]


def validation_batches(
    store: Store, seq_len: int, isolate: Isolate, batch_rows: int, max_tokens: int | None = None
) -> Iterator[Batch]:
    """Yield the store's tokens in order, always the same ones: full windows, then the rest as one shorter row.

    max_tokens: the number of targets at most; None takes all. Raises: DataError if the store has no target at all.
    """
    targets = store.num_tokens - 1 if max_tokens is None else min(store.num_tokens - 1, max_tokens)
    if targets < 1:
        raise DataError(
            f"{store.path}: holds {store.num_tokens:,} tokens, too few to validate on; "
            "raise data.valid.fraction or give data.valid.path"
        )
    windows, rest = divmod(targets, seq_len)
    for first in range(0, windows, batch_rows):
        begins = np.arange(first, min(windows, first + batch_rows)) * seq_len
        yield _read([store], np.zeros_like(begins), begins, seq_len, isolate)
    if rest:
        yield _read([store], np.zeros(1, dtype=np.int64), np.array([windows * seq_len]), rest, isolate)


def token_bytes_table(tokenizer: Tokenizer) -> Int64s:
    """Return (vocab_size,) how many bytes of text each id stands for; 0 for special ids."""
    return np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)], dtype=np.int64)
