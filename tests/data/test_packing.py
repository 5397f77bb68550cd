"""Packing: which examples share a window, and that it changes nothing but the speed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from factories import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import SEQ_LEN, VOCAB, assert_packed_is_separate, packed, total

from megalodon.data.loader import IGNORED
from megalodon.data.packing import PackedLoader, Packing, first_fit, packed_validation, read_windows, trained_labels
from megalodon.data.shards import Store, TokenDocument, open_store, write_store
from megalodon.errors import CheckFailed, DataError

LENGTHS = (7, 41, 23, 2, 11, 30, 5, 40, 1, 19, 13)


def examples(directory: Path, lengths: tuple[int, ...] = LENGTHS, masked: bool = True) -> Store:
    """Random examples; about half of their tokens are trained on, never the first."""
    draw = np.random.default_rng(3)

    def document(length: int) -> TokenDocument:
        mask = draw.random(length) < 0.5
        mask[0] = False
        ids = draw.integers(0, VOCAB, length)
        return TokenDocument("chats", ids, length, mask if masked else None)

    return write_store(directory, map(document, lengths), VOCAB)


@given(st.lists(st.integers(1, 64), max_size=200))
@settings(deadline=None)
def test_first_fit_takes_the_first_window_with_room(lengths: list[int]) -> None:
    found = first_fit(np.array(lengths, dtype=np.int64), 64)
    room: list[int] = []
    for window, length in zip(found.tolist(), lengths, strict=True):
        expected = next((n for n, left in enumerate(room) if left >= length), len(room))
        assert window == expected
        room += [64] * (expected == len(room))
        room[expected] -= length


def test_every_token_stands_in_exactly_one_window(tmp_path: Path) -> None:
    store = examples(tmp_path / "store")
    packing = packed(store)
    batch = read_windows(store, packing, range(packing.num_windows), "doc")
    seen = [e for w in range(packing.num_windows) for e in packing.examples(w).tolist()]
    assert sorted(seen) == list(range(len(LENGTHS)))
    assert batch.starts.sum() == len(LENGTHS)
    assert int((batch.targets != IGNORED).sum()) == trained_labels(store)
    begins = packing.begins
    for window in range(packing.num_windows):
        column = 0
        for example in packing.examples(window).tolist():
            ids = store.tokens(int(begins[example]), int(begins[example + 1]))
            mask = store.mask(int(begins[example]), int(begins[example + 1]))
            place = slice(column, column + len(ids))
            assert (batch.tokens[window, place] == ids).all()
            expected = np.where(mask[1:], ids[1:], IGNORED)
            assert (batch.targets[window, place] == [*expected, IGNORED]).all()
            column = place.stop
        assert (batch.targets[window, column:] == IGNORED).all()
    assert not read_windows(store, packing, [0], "none").starts.any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_packed_is_separate(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    """In float32 a sum over other batches rounds at each addition: a few units of 2**-24, 6e-8."""
    store = examples(tmp_path / "store", tuple(n for n in LENGTHS if n > 1))
    assert_packed_is_separate(store, tiny_model(dtype), SEQ_LEN, tolerance)


def test_a_state_that_leaks_between_examples_would_be_noticed(tmp_path: Path) -> None:
    store = examples(tmp_path / "store")
    model, packing = tiny_model(), packed(store)
    windows = range(packing.num_windows)
    apart, leaking = (total(model, [read_windows(store, packing, windows, how)])[0] for how in ("doc", "none"))
    assert abs(apart - leaking) > 1e-4


def test_a_batch_is_a_function_of_its_number_alone(tmp_path: Path) -> None:
    store = examples(tmp_path / "store")
    loader = PackedLoader(store, packed(store), "doc", seed=5)
    whole = loader.batch(0, 3 * loader.num_samples)
    parts = [loader.batch(first, 1) for first in range(3 * loader.num_samples)]
    assert (np.concatenate([part.tokens for part in parts]) == whole.tokens).all()
    epochs = whole.tokens.reshape(3, loader.num_samples, SEQ_LEN)
    assert all(sorted(map(tuple, e.tolist())) == sorted(map(tuple, epochs[0].tolist())) for e in epochs)
    assert (epochs[0] != epochs[1]).any()
    shares = [loader.batch(0, 4, rank, 2) for rank in range(2)]
    assert (np.stack([s.tokens for s in shares], 1).reshape(4, -1) == loader.batch(0, 4).tokens).all()


def test_a_run_goes_on_with_its_own_packing_alone(tmp_path: Path) -> None:
    store = examples(tmp_path / "store")
    loader = PackedLoader(store, packed(store), "doc", seed=5)
    assert loader.check(loader.state(8)) == (8, [])
    single = PackedLoader(store, Packing(np.arange(len(LENGTHS)), store.lengths(), SEQ_LEN), "doc", seed=5)
    with pytest.raises(DataError, match=r"packing was '.*' and is now"):
        single.check(loader.state(8))
    with pytest.raises(DataError, match="seq_len was 41 and is now 43"):
        PackedLoader(store, packed(store, 43), "doc", seed=5).check(loader.state(8))


def test_labels_add_up_or_the_run_stops(tmp_path: Path) -> None:
    store = examples(tmp_path / "store")
    loader = PackedLoader(store, packed(store), "doc", seed=5)
    windows, labels = loader.ledger_lines()
    numbers = [int(word.replace(",", "")) for word in labels.split() if word[0].isdigit()]
    assert numbers[0] == sum(numbers[1:]) == loader.num_samples * SEQ_LEN
    assert "11 examples" in windows
    store.manifest = {**store.manifest, "trained_labels": 1}
    with pytest.raises(CheckFailed, match="its manifest says 1 trained"):
        loader.ledger_lines()


def test_validation_reads_the_same_windows_until_it_has_enough(tmp_path: Path) -> None:
    store = examples(tmp_path / "store")
    packing = packed(store)
    whole = np.concatenate([batch.tokens for batch in packed_validation(store, packing, "doc", 2)])
    assert len(whole) == packing.num_windows
    few = np.concatenate([batch.tokens for batch in packed_validation(store, packing, "doc", 2, 3 * SEQ_LEN)])
    assert (few == whole[:3]).all()


def test_what_no_window_holds_is_refused() -> None:
    with pytest.raises(DataError, match="examples of 3 to 50 tokens in windows of 41"):
        first_fit(np.array([3, 50]), 41)
    with pytest.raises(DataError, match="room 41"):
        Packing(np.array([0, 0]), np.array([30, 30]), 41)


def test_a_store_keeps_its_masks_and_one_without_is_as_before(tmp_path: Path) -> None:
    masked, plain = examples(tmp_path / "masked"), examples(tmp_path / "plain", masked=False)
    assert (tmp_path / "masked/00000.mask").stat().st_size == masked.num_tokens
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == ["00000.bin", "00000.idx", "manifest.json"]
    assert masked.masked and not plain.masked
    assert plain.mask(0, plain.num_tokens).all() and trained_labels(plain) == plain.num_tokens - len(LENGTHS)
    pread = open_store(tmp_path / "masked", reader="pread")
    assert (pread.mask(3, 90) == masked.mask(3, 90)).all() and masked.mask(3, 90).any()
    masked.verify()
    raw = bytearray((tmp_path / "masked/00000.mask").read_bytes())
    raw[5] ^= 1
    (tmp_path / "masked/00000.mask").write_bytes(raw)
    with pytest.raises(CheckFailed, match=r"00000\.mask: shard 00000: sha256"):
        open_store(tmp_path / "masked").verify()
    (tmp_path / "masked/00000.mask").write_bytes(raw[:-1])
    with pytest.raises(DataError, match=r"00000\.mask: shard 00000: the size is"):
        open_store(tmp_path / "masked")
