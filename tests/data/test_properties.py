"""Laws of the data order and the store for all inputs: order, mixture, batches, and damage that is never unnoticed."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megalodon.data.loader import Loader
from megalodon.data.order import SLOTS, mixture, permute
from megalodon.data.shards import Store, TokenDocument, canonical, open_store, write_store
from megalodon.errors import CheckFailed, DataError

SEEDS, EPOCHS = st.integers(0, 2**63), st.integers(0, 10**6)
NAMES = st.text(max_size=20)
few = settings(max_examples=25, deadline=None)


@few
@given(n=st.integers(1, 1499), seed=SEEDS, source=NAMES, epoch=EPOCHS)
def test_the_order_is_a_permutation(n: int, seed: int, source: str, epoch: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed, source, epoch)), np.arange(n))


@settings(max_examples=8, deadline=None)
@given(n=st.integers(100_000, 200_000), seed=SEEDS, source=NAMES, epoch=EPOCHS)
def test_a_large_order_spreads_well_and_the_next_epoch_is_another(n: int, seed: int, source: str, epoch: int) -> None:
    order = permute(np.arange(n), n, seed, source, epoch)
    assert np.array_equal(np.sort(order), np.arange(n))
    assert abs(np.abs(order - np.arange(n)).mean() / (n / 3) - 1) < 0.01
    assert (order == permute(np.arange(n), n, seed, source, epoch + 1)).sum() < 20


weights = st.lists(st.floats(1, 100), min_size=1, max_size=9)


@few
@given(weights=weights, first=st.integers(0, 2**50), count=st.integers(1, 2 * SLOTS), data=st.data())
def test_a_mixture_keeps_its_slots_and_counts_each_source(
    weights: list[float], first: int, count: int, data: st.DataObject
) -> None:
    mixed = mixture([str(n) for n in range(len(weights))], weights)
    assert np.bincount(mixed.table, minlength=len(weights)).tolist() == list(mixed.slots)
    assert all(abs(n - SLOTS * w / sum(weights)) < 1 for n, w in zip(mixed.slots, weights, strict=True))
    source, number = mixed.locate(np.arange(first, first + count))
    for i, (before, after) in enumerate(zip(mixed.counts(first), mixed.counts(first + count), strict=True)):
        assert np.array_equal(number[source == i], np.arange(before, after)), "numbers of a source have no gap"
    place = data.draw(st.integers(0, count - 1))
    alone = mixed.locate(np.array([first + place]))
    assert (alone[0][0], alone[1][0]) == (source[place], number[place])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Documents of one to some tokens of two sources in shards of about 300; each token is its own position."""
    lengths = np.random.default_rng(0).integers(1, 30, 60)
    ends = np.cumsum(lengths)
    documents = [
        TokenDocument("a" if i < 25 else "b", np.arange(end - length, end), int(length))
        for i, (length, end) in enumerate(zip(lengths.tolist(), ends.tolist(), strict=True))
    ]
    return write_store(tmp_path_factory.mktemp("data") / "s", documents, int(ends[-1]), shard_tokens=300)


@few
@given(
    n=st.integers(1, 60),
    cuts=st.sets(st.integers(1, 59)),
    first=st.integers(0, 3 * SLOTS),
    seq_len=st.integers(1, 50),
    seed=SEEDS,
    mixed=st.none() | st.fixed_dictionaries({"a": st.floats(0.1, 9), "b": st.floats(0.1, 9)}),
)
def test_any_cut_into_batches_gives_the_same_samples(
    store: Store, n: int, cuts: set[int], first: int, seq_len: int, seed: int, mixed: dict[str, float] | None
) -> None:
    whole = Loader(store, seq_len, "doc", seed, mixed).batch(first, n)
    ends = [0, *sorted(cut for cut in cuts if cut < n), n]
    other = Loader(store, seq_len, "doc", seed, mixed)
    parts = [other.batch(first + a, b - a) for a, b in itertools.pairwise(ends)]
    for mine, all_ in zip(zip(*parts, strict=True), whole, strict=True):
        assert np.array_equal(np.concatenate(mine), all_)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@few
@given(value=json_values)
def test_canonical_json_is_one_text_for_a_value_whatever_its_order(value: Any) -> None:
    def turned(inner: Any) -> Any:
        if isinstance(inner, dict):
            return {key: turned(inner[key]) for key in reversed(inner)}
        return [turned(item) for item in inner] if isinstance(inner, list) else inner

    try:
        text = canonical(value)
    except UnicodeEncodeError:  # half a surrogate pair
        return
    assert canonical(turned(value)) == text
    assert json.loads(text) == value
    assert canonical(json.loads(text)) == text


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict | list):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, item in entries for leaf in leaves(item, (*path, key))]
    return [path]


FREE = {"text_bytes", "source", "vocab_size"}
"""What says how the text was, or how far ids may go: other values make another store, known by its fingerprint."""


@pytest.fixture(scope="module")
def copy(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the store, to be damaged; each test restores what it changed."""
    return Path(shutil.copytree(store.path, tmp_path_factory.mktemp("damaged") / "s"))


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_changed_manifest_is_refused_or_is_another_store(store: Store, copy: Path, data: st.DataObject) -> None:
    manifest = json.loads((store.path / "manifest.json").read_bytes())
    path = data.draw(st.sampled_from(leaves(manifest)))
    holder = manifest
    for key in path[:-1]:
        holder = holder[key]
    before = holder[path[-1]]
    after = data.draw(
        st.sampled_from([None, -1, 0, 1, 1.5, True, "", "x", "../x", [], {}, 2**70, "removed"]) | st.integers(0, 10**6)
    )
    assume(after != before or type(after) is not type(before))
    if after == "removed":
        del holder[path[-1]]
    else:
        holder[path[-1]] = after
    (copy / "manifest.json").write_bytes(canonical(manifest))
    try:
        opened = open_store(copy)
        opened.verify()
    except (DataError, CheckFailed) as error:
        assert str(error).startswith(str(copy)) and "\n" not in str(error)
        return
    assert path[-1] in FREE, f"{path}: {before!r} became {after!r} unnoticed"
    assert opened.fingerprint != store.fingerprint


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_changed_byte_of_any_file_is_found(store: Store, copy: Path, data: st.DataObject) -> None:
    shutil.copy(store.path / "manifest.json", copy)
    name = data.draw(st.sampled_from(sorted(path.name for path in copy.iterdir() if path.name != "manifest.json")))
    whole = (store.path / name).read_bytes()
    raw = bytearray(whole)
    kind = data.draw(st.sampled_from(["flip", "cut", "longer", "replaced"]))
    if kind == "flip":
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        raw = raw[: -data.draw(st.integers(1, len(raw)))]
    else:
        raw = raw + b"\0" if kind == "longer" else raw[::-1]
    (copy / name).write_bytes(raw)
    try:
        with pytest.raises((DataError, CheckFailed)) as caught:
            open_store(copy).verify()
    finally:
        (copy / name).write_bytes(whole)
    assert str(caught.value).startswith(str(copy / name))
