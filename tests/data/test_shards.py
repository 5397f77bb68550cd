"""The token store: exact bytes, a fingerprint free of place and time, and no damage that goes unnoticed."""

import contextlib
import fcntl
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megalodon.data.shards import Store, TokenDocument, open_store, write_store
from megalodon.errors import CheckFailed, DataError

LENGTHS = [3, 1, 7, 2, 11, 5]


def some_documents(vocab_size: int = 300) -> Iterator[TokenDocument]:
    draw = np.random.default_rng(0)
    for number, length in enumerate(LENGTHS):
        source = "web" if number < 4 else "books"
        yield TokenDocument(source, draw.integers(0, vocab_size, length), 10 + number)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return write_store(tmp_path / "store", some_documents(), 300, shard_tokens=8)


def stream() -> np.ndarray:
    return np.concatenate([document.ids for document in some_documents()])


def test_the_files_are_as_specified(store: Store) -> None:
    raw = (store.path / "manifest.json").read_bytes()
    manifest = json.loads(raw)
    assert raw == json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert store.fingerprint == hashlib.sha256(raw).hexdigest()
    assert manifest["dtype"] == "uint16"
    assert [(s["name"], s["source"], s["tokens"], s["documents"]) for s in manifest["shards"]] == [
        ("00000", "web", 11, 3),
        ("00001", "web", 2, 1),
        ("00002", "books", 11, 1),
        ("00003", "books", 5, 1),
    ]
    first = manifest["shards"][0]
    content = (store.path / "00000.bin").read_bytes()
    assert content == stream()[:11].astype("<u2").tobytes()
    assert first["files"][0] == {"name": "00000.bin", "bytes": 22, "sha256": hashlib.sha256(content).hexdigest()}
    index = np.load(store.path / "00000.idx")
    assert (index.dtype, index.tolist()) == (np.int64, [0, 3, 4, 11])
    assert first["max_id"] == stream()[:11].max()
    assert first["text_bytes"] == 10 + 11 + 12


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_ids_up_to_the_last_survive(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    ids = np.array([0, vocab_size - 1, 5])
    store = write_store(tmp_path / "s", [TokenDocument("a", ids, 3)], vocab_size)
    assert store.manifest["dtype"] == dtype
    assert store.tokens(0, 3).tolist() == ids.tolist()
    assert store.max_id == vocab_size - 1


@pytest.mark.parametrize("ids", [[70_000], [-1, 2], [300], []])
def test_ids_outside_the_vocabulary_never_reach_the_cast(tmp_path: Path, ids: list[int]) -> None:
    documents = [*some_documents(), TokenDocument("a", np.array(ids, dtype=np.int64), 1)]
    with pytest.raises(DataError, match="do not fit a vocabulary of 300"):
        write_store(tmp_path / "s", documents, 300)
    assert list(tmp_path.iterdir()) == [], "nothing half-written may stay"


def test_reading_crosses_shards(store: Store) -> None:
    whole = stream()
    begins = np.cumsum([0, *LENGTHS[:-1]])
    assert (store.num_tokens, store.num_documents, store.sources) == (29, 6, ("web", "books"))
    for start in range(30):
        for stop in range(start, 30):
            assert np.array_equal(store.tokens(start, stop), whole[start:stop])
            assert np.array_equal(store.starts(start, stop), begins[(begins >= start) & (begins < stop)])
    assert store.lengths().tolist() == LENGTHS
    with pytest.raises(ValueError, match="outside a store of 29"):
        store.tokens(3, 30)


def test_the_first_documents_have_begin_and_end(store: Store) -> None:
    ends = np.cumsum(LENGTHS).tolist()
    whole = list(zip([0, *ends[:-1]], ends, strict=True))
    for count in range(9):
        assert list(store.documents(count)) == whole[:count]


def test_both_readers_read_the_same(store: Store) -> None:
    other = open_store(store.path, reader="pread")
    for start in range(30):
        for stop in range(start, 30):
            assert np.array_equal(other.tokens(start, stop), store.tokens(start, stop))
            assert np.array_equal(other.starts(start, stop), store.starts(start, stop))
    assert other.lengths().tolist() == LENGTHS
    other.verify()


@pytest.mark.parametrize("length", [1, 2, 5, 12, 29])
def test_windows_over_several_shards_are_read_at_once(store: Store, length: int) -> None:
    whole, begins = stream(), np.arange(29 - length + 1)[::-1].copy()
    out = np.full((len(begins) + 2, length), 7777, dtype=np.uint16)
    store.fill(out, np.arange(len(begins)) + 1, begins)
    assert np.array_equal(out[1:-1], np.stack([whole[begin : begin + length] for begin in begins]))
    assert (out[[0, -1]] == 7777).all(), "other rows are left alone"
    marked = np.zeros((len(begins), length), dtype=bool)
    marked[store.starts_in(begins, length)] = True
    documents = set(np.cumsum([0, *LENGTHS[:-1]]).tolist())
    assert marked.tolist() == [[begin + n in documents for n in range(length)] for begin in begins.tolist()]
    with pytest.raises(ValueError, match="reach outside a store of 29"):
        store.fill(out, np.zeros(1, dtype=np.int64), np.array([30 - length]))


@pytest.mark.parametrize("size", [0, 1, 10, 21])
def test_a_file_cut_after_it_was_opened_is_an_error_that_names_it(store: Store, size: int) -> None:
    other = open_store(store.path, reader="pread")
    os.truncate(store.path / "00000.bin", size)
    message = rf"00000\.bin: ends at {size} bytes, 22 were there when it was opened; it was cut meanwhile"
    with pytest.raises(DataError, match=message):
        other.tokens(0, 11)
    assert np.array_equal(other.tokens(11, 29), stream()[11:])


def test_one_source_is_a_stream_of_its_own(store: Store) -> None:
    books = store.source("books")
    assert np.array_equal(books.tokens(0, 16), stream()[13:])
    assert books.starts().tolist() == [0, 11]
    assert books.text_bytes == 14 + 15
    with pytest.raises(DataError, match="no tokens of source `code`; its sources: web, books"):
        store.source("code")


def test_the_fingerprint_knows_no_place(tmp_path: Path, store: Store) -> None:
    other = write_store(tmp_path / "a b" / "elsewhere", some_documents(), 300, shard_tokens=8)
    assert other.fingerprint == store.fingerprint
    assert str(tmp_path) not in (store.path / "manifest.json").read_text()
    changed = write_store(tmp_path / "c", list(some_documents())[:-1], 300, shard_tokens=8)
    assert changed.fingerprint != store.fingerprint


def rewrite_manifest(store: Store, **changes: object) -> None:
    path = store.path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite_index(path: Path, starts: list[int]) -> None:
    with path.open("wb") as stream:
        np.save(stream, np.array(starts))


def damage(store: Store, kind: str) -> None:
    binary, index = store.path / "00000.bin", store.path / "00000.idx"
    shards = json.loads((store.path / "manifest.json").read_text())["shards"]
    if kind == "short":
        binary.write_bytes(binary.read_bytes()[:-2])
    elif kind == "missing":
        index.unlink()
    elif kind == "order":
        rewrite_index(index, [0, 4, 4, 11])
    elif kind == "end":
        rewrite_index(index, [0, 3, 4, 10])
    elif kind == "no npy":
        index.write_bytes(b"x" * index.stat().st_size)
    elif kind == "max_id":
        shards[0]["max_id"] = 300
        rewrite_manifest(store, shards=shards)
    elif kind == "count":
        rewrite_manifest(store, tokens=28)
    elif kind == "no json":
        (store.path / "manifest.json").write_text("{")
    elif kind == "format":
        rewrite_manifest(store, format="other")
    elif kind == "version":
        rewrite_manifest(store, version=2)
    elif kind == "version true":
        rewrite_manifest(store, version=True)
    elif kind == "version 1.0":
        rewrite_manifest(store, version=1.0)
    elif kind == "dtype":
        rewrite_manifest(store, dtype="uint32")
    elif kind == "header":
        index.write_bytes(b"\x93NUMPY\x01\x00v\x00{(" + b" " * (index.stat().st_size - 12))
    elif kind == "nested":
        (store.path / "manifest.json").write_text("[" * 100_000)
    elif kind == "no hash":
        del shards[2]["files"][1]["sha256"]
        rewrite_manifest(store, shards=shards)
    elif kind == "negative":
        shards[1]["text_bytes"] = -1
        rewrite_manifest(store, shards=shards)
    elif kind == "outside":
        shards[0]["files"][0]["name"] = "../00000.bin"
        rewrite_manifest(store, shards=shards)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("short", r"00000\.bin: shard 00000: the size is 20 bytes, expected 22"),
        ("missing", r"00000\.idx: shard 00000: the file is missing"),
        ("order", "shard 00000: the order of document starts"),
        ("end", "shard 00000: first and last start is 0, 10, expected 0, 11"),
        ("no npy", r"00000\.idx: shard 00000: not a .npy file"),
        ("max_id", "shard 00000: max_id is 300"),
        ("count", "tokens is 28, but its shards sum to 29"),
        ("no json", "not JSON"),
        ("format", "not a token store"),
        ("version", "version is 2, this program reads 1"),
        ("version true", "version is true, expected a count"),
        ("version 1.0", r"version is 1\.0, expected a count"),
        ("dtype", "dtype is uint32, expected uint16"),
        ("header", r"00000\.idx: shard 00000: not a .npy file"),
        ("nested", "not JSON"),
        ("no hash", r"shards\.2\.files\.1\.sha256 is missing, expected text"),
        ("negative", r"shards\.1\.text_bytes is -1, expected a count"),
        ("outside", r"shards\.0 names .*'\.\./00000\.bin'"),
    ],
)
def test_damage_is_found_at_open(store: Store, kind: str, message: str) -> None:
    damage(store, kind)
    with pytest.raises(DataError, match=message):
        open_store(store.path)


@pytest.mark.parametrize("threads", [1, 3])
def test_verify_finds_what_sizes_do_not_show(store: Store, threads: int) -> None:
    store.verify(threads)
    path = store.path / "00002.bin"
    raw = bytearray(path.read_bytes())
    raw[4] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckFailed, match=r"00002\.bin: shard 00002: sha256"):
        open_store(store.path).verify(threads)


def test_a_model_with_a_smaller_vocabulary_is_refused(store: Store) -> None:
    assert open_store(store.path, vocab_size=store.max_id + 1).num_tokens == 29
    with pytest.raises(DataError, match=f"holds token id {store.max_id}, but the model's vocabulary has 20 ids"):
        open_store(store.path, vocab_size=20)


def test_what_killed_processes_left_is_removed_and_what_living_ones_write_is_not(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    own, other = f".tmp-{gone.pid}-s", f".tmp-{gone.pid}-another-s"
    locked, living = f".tmp-{2**40}-s", f".tmp-{os.getppid()}-s"  # another host's, and this one's
    for name in (own, other, locked, living):
        (tmp_path / name).mkdir()
        (tmp_path / name / "00000.bin").touch()
    with open_directory(tmp_path / locked) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        write_store(tmp_path / "s", some_documents(), 300)
    assert {path.name for path in tmp_path.iterdir()} == {other, locked, living, "s"}


@contextlib.contextmanager
def open_directory(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def test_two_builds_at_once_end_with_one_store(tmp_path: Path) -> None:
    def documents() -> Iterator[TokenDocument]:
        write_store(tmp_path / "theirs", some_documents(), 300).path.rename(tmp_path / "s")
        yield from some_documents()

    with pytest.raises(DataError, match="s was made by another process meanwhile; the same command opens that one"):
        write_store(tmp_path / "s", documents(), 300)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    assert open_store(tmp_path / "s").num_tokens == 29


def test_the_current_directory_is_no_place_for_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="choose another directory"):
        write_store(Path("."), some_documents(), 300)


def test_a_directory_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="already exists and is not a token store"):
        write_store(tmp_path, some_documents(), 300)
    with pytest.raises(DataError, match="is not a directory"):
        write_store(tmp_path / "notes.txt" / "store", some_documents(), 300)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(DataError, match="not a token store"):
        open_store(tmp_path)
