"""Windows: each token at its place, documents kept apart, a position that is a pure function of the sample number."""

import json
from pathlib import Path

import numpy as np
import pytest

from megalodon.data.loader import IGNORED, Batch, Loader, WindowLedger, token_bytes_table, validation_batches
from megalodon.data.prefetch import Prefetch
from megalodon.data.shards import Store, TokenDocument, open_store, write_store
from megalodon.data.tokenizer import ByteTokenizer
from megalodon.errors import CheckFailed, DataError

LENGTHS = [13, 1, 1, 29, 7, 37, 16, 5, 22]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """131 tokens, each its own position, in nine documents of two sources over several shards."""
    begins = np.cumsum([0, *LENGTHS])
    documents = [
        TokenDocument("a" if i < 5 else "b", np.arange(begins[i], begins[i + 1]), 1) for i in range(len(LENGTHS))
    ]
    return write_store(tmp_path / "s", documents, 131, {"tokenizer": {"sha256": "abc"}}, shard_tokens=20)


def begins_of(lengths: list[int]) -> set[int]:
    return set(np.cumsum([0, *lengths[:-1]]).tolist())


@pytest.mark.parametrize("seq_len", [1, 3, 10, 13, 37, 130])
@pytest.mark.parametrize("isolate", ["doc", "none"])
def test_an_epoch_is_every_window_once(store: Store, seq_len: int, isolate: str) -> None:
    loader = Loader(store, seq_len, isolate, seed=1)  # type: ignore[arg-type]
    assert loader.num_samples == 130 // seq_len
    batch = loader.batch(0, loader.num_samples)
    assert batch.tokens.shape == batch.targets.shape == batch.starts.shape == (loader.num_samples, seq_len)
    assert sorted(batch.tokens.ravel().tolist()) == list(range(loader.num_samples * seq_len))
    documents = begins_of(LENGTHS) if isolate == "doc" else set()
    expected = np.where(np.isin(batch.tokens + 1, list(documents)), IGNORED, batch.tokens + 1)
    assert np.array_equal(batch.targets, expected)
    assert np.array_equal(batch.starts, np.isin(batch.tokens, list(documents)))


def test_a_batch_is_a_pure_function_of_its_place(store: Store) -> None:
    whole = Loader(store, 7, "doc", seed=4).batch(0, 50)
    for first, count in ((0, 1), (17, 5), (18, 19), (49, 1)):
        part = Loader(store, 7, "doc", seed=4).batch(first, count)
        for mine, all_ in zip(part, whole, strict=True):
            assert np.array_equal(mine, all_[first : first + count])
    assert not np.array_equal(whole.tokens, Loader(store, 7, "doc", seed=5).batch(0, 50).tokens)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("weights", [None, {"a": 3.0, "b": 1.0}])
def test_the_ranks_together_read_the_batch_of_one_process(
    store: Store, ranks: int, weights: dict[str, float] | None
) -> None:
    alone = Loader(store, 7, "doc", seed=4, weights=weights)

    def of_rank(rank: int, threads: int) -> Prefetch[Batch]:
        own = Loader(store, 7, "doc", seed=4, weights=weights)
        return Prefetch(lambda first: own.batch(first, 12, rank, ranks), 12, ahead=threads, threads=threads)

    for threads in (1, 3):
        ahead = [of_rank(rank, threads) for rank in range(ranks)]
        for first in (4080, 4092, 4104, 0, 12):
            for whole, *parts in zip(alone.batch(first, 12), *(part.get(first) for part in ahead), strict=True):
                assert all(len(part) == 12 // ranks for part in parts)
                assert np.array_equal(np.stack(parts, axis=1).reshape(whole.shape), whole)
        for each in ahead:
            each.close()


def test_an_id_outside_the_vocabulary_never_leaves_the_loader(store: Store) -> None:
    binary = store.path / "00001.bin"
    raw = np.frombuffer(binary.read_bytes(), dtype="<u2").copy()
    raw[3] = 131
    binary.write_bytes(raw.tobytes())
    for reader in ("mmap", "pread"):
        other = open_store(store.path, reader=reader)  # type: ignore[arg-type]
        message = r"00001\.bin: shard 00001: token 3 is 131, expected an id below 131"
        with pytest.raises(DataError, match=message):
            Loader(other, 7, "none", seed=4).batch(0, 18)
        with pytest.raises(DataError, match=message):
            list(validation_batches(other, 7, "doc", 4))


def test_ranks_that_do_not_divide_a_batch_are_refused(store: Store) -> None:
    with pytest.raises(DataError, match="a batch of 14 sequences cannot be shared by 4 ranks"):
        Loader(store, 7, "doc", seed=4).batch(0, 14, 1, 4)
    for rank, ranks in ((4, 4), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="out of range"):
            Loader(store, 7, "doc", seed=4).batch(0, 12, rank, ranks)


def test_epochs_differ_and_each_is_complete(store: Store) -> None:
    loader = Loader(store, 7, "none", seed=0)
    epochs = [loader.batch(n * loader.num_samples, loader.num_samples).tokens for n in range(3)]
    assert not np.array_equal(epochs[0], epochs[1])
    assert all(sorted(epoch[:, 0].tolist()) == list(range(0, 126, 7)) for epoch in epochs)


def test_weights_mix_the_sources(store: Store) -> None:
    loader = Loader(store, 5, "doc", seed=2, weights={"a": 3.0, "b": 1.0})
    batch = loader.batch(0, 400)
    assert (batch.tokens[:, 0] < 51).sum() == 300
    assert loader.num_samples == 50 // 5 + 79 // 5
    assert batch.tokens[batch.tokens[:, 0] >= 51].min() == 51, "the other source has a stream of its own"
    first_epoch = loader.locate(np.arange(400))[1][loader.locate(np.arange(400))[0] == 1][:15]
    assert sorted(first_epoch) == list(range(15))


def test_a_stream_shorter_than_one_window_is_refused(store: Store) -> None:
    with pytest.raises(DataError, match=r"holds 131 tokens, but one window of data\.seq_len 131 needs 132"):
        Loader(store, 131, "doc", seed=0)
    with pytest.raises(DataError, match="source a: holds 51 tokens"):
        Loader(store, 60, "doc", seed=0, weights={"a": 1, "b": 1})
    with pytest.raises(DataError, match="no tokens of source `c`"):
        Loader(store, 5, "doc", seed=0, weights={"a": 1, "c": 1})


def test_state_is_small_and_other_data_is_refused(store: Store, tmp_path: Path) -> None:
    loader = Loader(store, 7, "doc", seed=4)
    state = json.loads(json.dumps(loader.state(123)))
    assert loader.check(state) == (123, [])
    assert str(tmp_path) not in json.dumps(state)
    with pytest.raises(DataError, match=r"seed was 4 and is now 5; seq_len was 7 and is now 9"):
        Loader(store, 9, "doc", seed=5).check(state)
    with pytest.raises(DataError, match="fingerprint was 'x'"):
        loader.check({**state, "fingerprint": "x"})
    with pytest.raises(DataError, match="samples_consumed"):
        loader.check({})


def test_jumps_are_part_of_the_state_and_come_back(store: Store) -> None:
    loader = Loader(store, 7, "doc", seed=4)
    jumps = [[0, 8], [16, 24], [24, 123]]
    assert loader.check(json.loads(json.dumps(loader.state(123, jumps)))) == (123, jumps)
    for bad in (
        None,
        3,
        [[8, 8]],
        [[8, 4]],
        [[0, 8], [7, 9]],
        [[100, 124]],
        [[-1, 3]],
        [[0, 1, 2]],
        [[0, 1.0]],
        ["ab"],
    ):
        with pytest.raises(DataError, match=r"skipped_ranges is .*expected \[\[start, stop\]"):
            loader.check({**loader.state(123), "skipped_ranges": bad})


def test_progress_says_where_each_source_stands(store: Store) -> None:
    loader = Loader(store, 5, "doc", seed=2, weights={"a": 3.0, "b": 1.0})
    for consumed in (0, 1, 7, 400, 4096, 10_000):
        own = loader.locate(np.arange(consumed))[0].tolist()
        expected = {
            name: {"epoch": own.count(i) // windows, "sample": own.count(i) % windows, "of": windows}
            for i, (name, windows) in enumerate({"a": 50 // 5, "b": 79 // 5}.items())
        }
        assert loader.progress(consumed) == loader.state(consumed)["progress"] == expected


def test_the_window_ledger_adds_up(store: Store) -> None:
    loader = Loader(store, 10, "doc", seed=0)
    batch = loader.batch(0, loader.num_samples)
    (ledger,) = loader.ledgers()
    assert ledger.first_of_document == (batch.targets == IGNORED).sum() == 8
    assert loader.ledger_lines() == [
        "windows    train 131 = 13 x 10 + 1 + tail 0",
        "labels     an epoch 130 = trained 122 + first-of-document 8",
    ]
    with pytest.raises(CheckFailed, match="windows"):
        WindowLedger("train", 131, 12, 10, 3, 8).lines()


@pytest.mark.parametrize(
    ("seq_len", "rows", "limit"), [(10, 4, None), (10, 4, 57), (37, 2, None), (500, 3, None), (7, 9, 3)]
)
def test_validation_reads_the_same_tokens_in_order(store: Store, seq_len: int, rows: int, limit: int | None) -> None:
    batches = list(validation_batches(store, seq_len, "none", rows, limit))
    tokens = np.concatenate([batch.tokens.ravel() for batch in batches])
    assert np.array_equal(tokens, np.arange(min(130, limit or 130)))
    assert all(np.array_equal(batch.targets, batch.tokens + 1) and not batch.starts.any() for batch in batches)
    assert all(len(batch.tokens) <= rows for batch in batches)
    isolated = np.concatenate([b.targets.ravel() for b in validation_batches(store, seq_len, "doc", rows, limit)])
    assert set((np.flatnonzero(isolated == IGNORED) + 1).tolist()) == {
        b for b in begins_of(LENGTHS) if 0 < b <= len(tokens)
    }


def test_an_empty_validation_part_is_an_error(tmp_path: Path) -> None:
    empty = write_store(tmp_path / "valid", [], 10)
    with pytest.raises(DataError, match="holds 0 tokens, too few to validate on"):
        next(validation_batches(empty, 5, "doc", 2))


def test_the_bytes_of_targets_can_be_summed() -> None:
    tokenizer = ByteTokenizer(reserve=2)
    table = token_bytes_table(tokenizer)
    ids = [tokenizer.bos_id, *tokenizer.encode("héllo 🙂"), tokenizer.eos_id]
    assert table[ids].sum() == len("héllo 🙂".encode())
    assert table.shape == (262,)
