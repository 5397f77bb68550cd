"""Examples of many lengths in windows of one: planned once, first-fit, so that no position is looked up at random.

    packing = Packing(first_fit(store.lengths(), seq_len), store.lengths(), seq_len)
    loader = PackedLoader(store, packing, "doc", seed)        # the interface of Loader (loader.py)

A window holds whole examples, one after the other, then padding. With isolate `doc` every example starts from an empty
state, so that packed is the same as separate; its label is the next token of the same example, or none.
Not here: from conversations to examples (examples.py), the order of windows (order.py).
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalodon.data.loader import IGNORED, Batch, Isolate, check_share, checked_state
from megalodon.data.order import ORDER_VERSION, permute
from megalodon.data.shards import Store
from megalodon.errors import CheckFailed, DataError

Int64s = NDArray[np.int64]
ORDER_NAME = "examples"
"""What the permutation of windows is drawn for; see order.py."""


def first_fit(lengths: Int64s, seq_len: int) -> Int64s:
    """Return the window of each example: the first that still has room for it, in the order given.

    A million examples take about two seconds. lengths: (N,) int64, each in [1, seq_len]. Returns: (N,) int64; windows
    are numbered without a gap. Raises: DataError for a length that no window holds.
    """
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= seq_len:
        raise DataError(f"packing: examples of {lengths.min():,} to {lengths.max():,} tokens in windows of {seq_len:,}")
    # All windows but one are more than half full, so this many are enough. A tree of the most room below each node
    # finds the first window in as many steps as it is high.
    leaves = 1 << max(0, min(len(lengths), 2 * int(lengths.sum()) // seq_len + 2) - 1).bit_length()
    room, found = [seq_len] * (2 * leaves), np.empty(len(lengths), dtype=np.int64)
    for number, length in enumerate(lengths.tolist()):
        node = 1
        while node < leaves:
            node *= 2
            node += room[node] < length
        found[number] = node - leaves
        room[node] -= length
        while node > 1:
            node //= 2
            most = max(room[2 * node], room[2 * node + 1])
            if room[node] == most:
                break
            room[node] = most
    return found


class Packing:
    """Which examples share a window.

    Args:
        window_of: (N,) the window of each example, without a gap from 0 on.
        lengths:   (N,) tokens of each.
        seq_len:   tokens of a window.
    Raises:
        DataError: a window is empty or holds more than it has room for.
    """

    def __init__(self, window_of: Int64s, lengths: Int64s, seq_len: int) -> None:
        self.window_of, self.lengths, self.seq_len = window_of, lengths, seq_len
        self.num_windows = int(window_of.max()) + 1 if len(window_of) else 0
        if len(window_of) != len(lengths) or (len(window_of) and int(window_of.min()) < 0):
            raise DataError(f"packing: places {len(window_of):,} examples, expected {len(lengths):,}")
        filled = np.bincount(window_of, weights=lengths, minlength=self.num_windows)
        if len(filled) and not 0 < filled.min() <= filled.max() <= seq_len:
            raise DataError(f"packing: windows of {filled.min():,.0f} to {filled.max():,.0f} tokens, room {seq_len:,}")
        self.begins = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self._order = np.argsort(window_of, kind="stable")
        self._bounds = np.searchsorted(window_of[self._order], np.arange(self.num_windows + 1))

    def examples(self, window: int) -> Int64s:
        """Return the numbers of the examples in a window, in their order."""
        return self._order[self._bounds[window] : self._bounds[window + 1]]

    @property
    def sha256(self) -> str:
        """Of the plan: two plans with this in common are one."""
        plan = self.window_of.astype("<i8").tobytes() + self.lengths.astype("<i8").tobytes()
        return hashlib.sha256(f"{self.seq_len}|".encode() + plan).hexdigest()


def read_windows(store: Store, packing: Packing, windows: Sequence[int], isolate: Isolate) -> Batch:
    """Return windows of packed examples: (K, seq_len); behind the examples stands id 0, which has no target.

    Raises: DataError naming the place of an id outside the vocabulary.
    """
    shape = len(windows), packing.seq_len
    tokens, starts = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.bool_)
    trained = np.zeros(shape, dtype=np.bool_)
    begins = packing.begins
    for row, window in enumerate(windows):
        column = 0
        for example in packing.examples(window).tolist():
            begin, end = int(begins[example]), int(begins[example + 1])
            place = slice(column, column + end - begin)
            tokens[row, place], trained[row, place] = store.tokens(begin, end), store.mask(begin, end)
            if int(tokens[row, place].max()) >= store.vocab_size:
                raise store.bad_token(begin + int(tokens[row, place].argmax()))
            starts[row, column], trained[row, column] = isolate == "doc", False  # no token of its own comes before it
            column = place.stop
    targets = np.full(shape, IGNORED, dtype=np.int64)
    targets[:, :-1] = np.where(trained[:, 1:], tokens[:, 1:], IGNORED)
    return Batch(tokens, targets, starts)


def trained_labels(store: Store) -> int:
    """Return how many labels of a store of examples count in the loss; the mask of a first token is never set."""
    if not store.masked:
        return store.num_tokens - store.num_documents
    size = 1 << 24
    blocks = range(0, store.num_tokens, size)
    return sum(int(store.mask(start, min(store.num_tokens, start + size)).sum()) for start in blocks)


class PackedLoader:
    """Training batches of packed examples: `batch(first, count)` depends on nothing but the constructor's arguments.

    Raises: DataError for a store without a window.
    """

    def __init__(self, store: Store, packing: Packing, isolate: Isolate, seed: int) -> None:
        self.store, self.packing, self.isolate, self.seed = store, packing, isolate, seed
        self.seq_len = packing.seq_len
        if not packing.num_windows:
            raise DataError(f"{store.path}: holds no example to train on")

    @property
    def num_samples(self) -> int:
        """Samples of an epoch: the windows."""
        return self.packing.num_windows

    def batch(self, first_sample: int, count: int, rank: int = 0, ranks: int = 1) -> Batch:
        """Return samples [first_sample, first_sample + count) of the run, or a rank's share: see `Loader.batch`."""
        check_share(first_sample, count, rank, ranks)
        samples = np.arange(first_sample + rank, first_sample + count, ranks, dtype=np.int64)
        epoch, place = np.divmod(samples, self.num_samples)
        windows = np.empty_like(place)
        for turn in np.unique(epoch):
            rows = epoch == turn
            windows[rows] = permute(place[rows], self.num_samples, self.seed, ORDER_NAME, int(turn))
        return read_windows(self.store, self.packing, windows.tolist(), self.isolate)

    def state(self, samples_consumed: int, skipped_ranges: Sequence[Sequence[int]] = ()) -> dict[str, Any]:
        """Return what a checkpoint keeps of the data; see `Loader.state`. The packing is part of it."""
        epoch, sample = divmod(samples_consumed, self.num_samples)
        return {
            "version": ORDER_VERSION,
            "fingerprint": self.store.fingerprint,
            "tokenizer": str(self.store.manifest.get("tokenizer", {}).get("sha256")),
            "seq_len": self.seq_len,
            "isolate": self.isolate,
            "seed": self.seed,
            "packing": self.packing.sha256,
            "samples_consumed": samples_consumed,
            "skipped_ranges": [list(ends) for ends in skipped_ranges],
            "progress": {ORDER_NAME: {"epoch": epoch, "sample": sample, "of": self.num_samples}},
        }

    def check(self, state: Mapping[str, Any]) -> tuple[int, list[list[int]]]:
        """Return (samples consumed, skipped ranges) of a run that is to go on, as `Loader.check`. Raises: DataError."""
        return checked_state(self.state, state)

    def ledger_lines(self) -> list[str]:
        """Return where the labels of an epoch go. Raises: CheckFailed if they do not add up."""
        store, labels = self.store, self.num_samples * self.seq_len
        trained, padding = trained_labels(store), labels - store.num_tokens
        masked = store.num_tokens - store.num_documents - trained
        if min(masked, padding) < 0 or trained != (told := store.manifest.get("trained_labels", trained)):
            told = store.manifest.get("trained_labels")
            raise CheckFailed(
                f"labels: {store.path} has {trained:,} trained ones of {store.num_tokens:,} tokens in "
                f"{store.num_documents:,} examples and {labels:,} places; its manifest says {told:,} trained"
            )
        return [
            f"windows    {self.num_samples:,} x {self.seq_len:,} hold {store.num_documents:,} examples, "
            f"{store.num_tokens / labels:.1%} of their places",
            f"labels     an epoch {labels:,} = trained {trained:,} + first-of-document {store.num_documents:,} "
            f"+ masked {masked:,} + padding {padding:,}",
        ]


def packed_validation(
    store: Store, packing: Packing, isolate: Isolate, batch_rows: int, max_tokens: int | None = None
) -> Iterator[Batch]:
    """Yield windows of a validation part in order, always the same ones, until they hold `max_tokens` tokens."""
    windows = packing.num_windows
    if max_tokens is not None:
        windows = min(windows, max(1, max_tokens // packing.seq_len))
    for first in range(0, windows, batch_rows):
        yield read_windows(store, packing, range(first, min(windows, first + batch_rows)), isolate)
