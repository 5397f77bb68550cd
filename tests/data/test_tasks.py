"""Cutting input into tasks: any cut gives the documents of the whole, in order, in bounded memory."""

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon.data import reading
from megalodon.data.encode import PIECE, is_valid, pieces
from megalodon.data.ingest import Inputs, SourceConfig, resolve
from megalodon.data.reading import Long, Part, PartReader, Reject, Text, scan
from megalodon.data.tasks import Rejects, Spool, Task, TaskReader, cut, documents, task_bytes
from megalodon.errors import DataError

ODD = st.sampled_from([b"", b" ", b"a", b"bc d", b"\t", b"\xc3\xa9", b"\xff", b"\r", b"\xef\xbb\xbf", b"\0", b"x" * 40])
LINES = st.lists(ODD, max_size=12).map(b"\n".join)


def source(path: Path, **options: Any) -> Inputs:
    return resolve(SourceConfig.model_validate({"name": "s", "path": str(path), **options}))


def read(inputs: Inputs, bounds: list[int]) -> tuple[list[Any], int]:
    """The documents of the first file cut at `bounds`, with the line numbers of rejects from its beginning."""
    found: list[Any] = []
    lines = 0
    for low, high in itertools.pairwise(bounds):
        reader = PartReader(inputs.files[0], Part(0, low, high), inputs.config)
        for item in reader:
            found.append(item._replace(line=item.line + lines) if isinstance(item, Reject) else item)
        lines += reader.lines
    return found, lines


@settings(deadline=None, max_examples=300)
@given(LINES, st.data(), st.sampled_from(["line", "blank-line", "jsonl"]))
def test_any_cut_of_a_file_gives_exactly_its_documents_in_order(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, data: st.DataObject, kind: str
) -> None:
    path = tmp_path_factory.mktemp("cut") / ("a.jsonl" if kind == "jsonl" else "a.txt")
    path.write_bytes(raw)
    inputs = source(path) if kind == "jsonl" else source(path, document=kind)
    cuts = data.draw(st.lists(st.integers(0, len(raw)), max_size=5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "MAX_RECORD", 30)
        whole, lines = read(inputs, [0, -1])
        assert read(inputs, [0, *sorted(cuts), max(len(raw), 1)]) == (whole, lines)
    assert lines == raw.count(b"\n") + (not raw.endswith(b"\n") and raw != b"")


def test_small_files_go_together_and_large_ones_apart(tmp_path: Path) -> None:
    for name, size in (("a", 30), ("b", 40), ("c", 500), ("d", 10), ("e", 20)):
        (tmp_path / f"{name}.txt").write_text("x" * (size - 1) + "\n")
    tasks = list(cut(source(tmp_path, document="line"), 100))
    assert [[part[0] for part in parts] for parts, _ in tasks] == [[0, 1], [2], [2], [2], [2], [2], [3, 4]]
    assert [parts[0][1:] for parts, _ in tasks[1:6]] == [(n, n + 100) for n in range(0, 500, 100)]
    assert sum(size for _, size in tasks) == 600
    assert [len(parts) for parts, _ in cut(source(tmp_path), 100)] == [2, 1, 2], "whole files are not cut"
    assert (task_bytes(0), task_bytes(640_000_000), task_bytes(10**12)) == (4_000_000, 10_000_000, 64_000_000)


def test_every_format_reads_the_same(tmp_path: Path) -> None:
    texts = [f"text {n} {'é🙂' * (n % 3)}\nsecond" for n in range(500)]
    raw = "".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(texts)).encode()
    table = pyarrow.table({"n": list(range(500)), "text": texts})
    (tmp_path / "a.jsonl").write_bytes(raw)
    # Two members one after the other are one file, as gzip and zstd have it.
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(raw[:999]) + gzip.compress(raw[999:]))
    halves = (raw[:999], raw[999:])
    (tmp_path / "c.jsonl.zst").write_bytes(
        b"".join(pyarrow.compress(half, codec="zstd", asbytes=True) for half in halves)
    )
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet", row_group_size=37)
    with pyarrow.OSFile(str(tmp_path / "e.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    for path in sorted(tmp_path.iterdir()):
        for limit in (10**9, 500):
            assert [d.text for d in documents(source(path), limit=limit)] == texts, (path, limit)
    assert sum(1 for _ in cut(source(tmp_path / "d.parquet"), 500)) > 5
    with pytest.raises(DataError, match=r"a\.parquet\.gz: a compressed parquet file is not read"):
        (tmp_path / "a.parquet.gz").touch()
        source(tmp_path / "a.parquet.gz")


def test_damaged_compressed_files_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(b"some text\n" * 1000)
    for name, raw in (
        ("short.txt.gz", whole[:-9]),
        ("junk.txt.gz", b"junk"),
        ("junk.txt.zst", b"junk junk junk"),
        ("bits.txt.gz", whole[:20] + bytes([whole[20] ^ 255]) + whole[21:]),
    ):
        (tmp_path / name).write_bytes(raw)
        for document in ("file", "line"):
            with pytest.raises(DataError, match=rf"{name}: not a readable (gz|zst) file \("):
                list(documents(source(tmp_path / name, document=document)))


def test_text_of_a_table_that_is_not_utf8_is_rejected_by_its_row(tmp_path: Path) -> None:
    raw = pyarrow.array([b"fine", b"caf\xe9", b"fine too"], pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(raw), raw.buffers())
    table = pyarrow.table({"text": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    for path in sorted(tmp_path.iterdir()):
        rejects = Rejects(limit=1)
        assert [document.text for document in documents(source(path), rejects)] == ["fine", "fine too"]
        assert rejects.records == [{"place": f"{path}: row 2", "reason": "field `text` is not UTF-8 (byte 0xe9)"}]
        found = list(PartReader(source(path).files[0], Part(0), source(path).config))
        assert isinstance(found[1], Reject) and found[1].size == 4, "its bytes are accounted for"


def test_a_csv_file_whose_first_line_never_ends_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,"oops\n' + "a line of words, and more\n" * 8000)
    with pytest.raises(DataError, match=r"a\.csv: not a readable csv file \(field larger than field limit"):
        list(documents(source(tmp_path / "a.csv")))


def test_numbers_of_lines_and_rows_count_from_the_beginning_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 70 + "{}\n" + '{"text": "fine"}\n' * 70)
    values = ["fine"] * 70 + [None] + ["fine"] * 70
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "b.parquet", row_group_size=10)
    for name, place in (("a.jsonl", "a.jsonl:71:1"), ("b.parquet", "b.parquet: row 71")):
        rejects = Rejects(limit=1)
        assert len(list(documents(source(tmp_path / name), rejects, limit=200))) == 140
        assert rejects.records[0]["place"] == str(tmp_path / place)


def test_a_record_above_the_cap_is_rejected_with_its_line_and_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_RECORD", 1000)
    monkeypatch.setattr(reading, "CHUNK", 64)
    long = json.dumps({"text": "x" * 5000})
    (tmp_path / "a.jsonl").write_text(f'{{"text": "one"}}\n{long}\r\n{{"text": "two"}}\n{long}')
    rejects = Rejects(limit=2)
    assert [d.text for d in documents(source(tmp_path / "a.jsonl"), rejects)] == ["one", "two"]
    assert [record["place"].rpartition(":")[2] for record in rejects.records] == ["2", "4"]
    assert all(f"too long ({len(long):,} bytes, at most 1,000)" in record["reason"] for record in rejects.records)
    (tmp_path / "b.txt").write_text("a\nb\n\n" + "word\n" * 300 + "\n\nlast\n")
    rejects = Rejects(limit=1)
    kept = documents(source(tmp_path / "b.txt", document="blank-line"), rejects)
    assert [d.text for d in kept] == ["a\nb", "last"]
    assert rejects.records[0]["place"].endswith("b.txt:4")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["ok", "x" * 1001]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"c\.parquet: row 2: is too long \(1,001 bytes"):
        list(documents(source(tmp_path / "c.parquet")))


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=60) | st.text(max_size=30).map(str.encode), st.integers(1, 7))
def test_a_file_that_is_streamed_is_the_file_that_is_held(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, chunk: int
) -> None:
    path = tmp_path_factory.mktemp("long") / "a.txt"
    path.write_bytes(raw)
    inputs = source(path)
    held = next(iter(PartReader(inputs.files[0], Part(0), inputs.config, whole=100)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "CHUNK", chunk)
        item = next(iter(PartReader(inputs.files[0], Part(0), inputs.config, whole=0)))
        if not isinstance(item, Long):
            assert item == held and len(raw) <= 3
            return
        found = scan(item)
        if isinstance(held, Text) and not isinstance(found, Reject):
            assert "".join(reading.decoded_chunks(item)) == held.text
            assert (found.size, found.digest) == (len(held.raw), reading.digest_of(held.raw))
            assert found.blank == (not held.text or held.text.isspace())
            assert (int.from_bytes(found.short, "big") < 0.5 * 2**64) == is_valid(held.text, 0.5)
        else:
            assert found == held


WORDS = st.text(alphabet="ab \n🙂", max_size=60)


@settings(deadline=None, max_examples=300)
@given(WORDS, st.lists(st.integers(0, 60), max_size=5))
def test_where_long_text_is_cut_is_a_matter_of_the_text(text: str, cuts: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megalodon.data.encode.PIECE", 4)
        whole = list(pieces([text]))
        bounds = [0, *sorted(cuts), 60]
        assert list(pieces(text[low:high] for low, high in itertools.pairwise(bounds))) == whole
    assert "".join(piece for piece, _ in whole) == text
    assert all(len(piece) <= 8 for piece, _ in whole)
    after = 0
    for piece, kind in whole:
        after += len(piece)
        if kind == "line":
            assert piece.endswith("\n")
        elif kind == "space":
            assert text[after] == " " and "\n" not in piece[4:] and not piece.endswith(" ")
        elif kind == "hard":
            assert "\n" not in piece[4:]


def test_ordinary_text_is_one_piece() -> None:
    assert list(pieces(["a" * 2 * PIECE])) == [("a" * 2 * PIECE, "")]


def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n" * 10)
    inputs = source(tmp_path / "a.txt", document="line")
    reader = iter(TaskReader(Task(0, 0, (Part(0),), 40), inputs))
    next(reader)
    with (tmp_path / "a.txt").open("a") as stream:
        stream.write("more\n")
    with pytest.raises(DataError, match=r"a\.txt: was changed while it was read"):
        list(reader)


def test_rows_of_the_hub_are_spooled_in_pieces_that_can_be_skipped(tmp_path: Path) -> None:
    rows = [(f"row {n} \ud800" if n == 4 else f"row {n} é", "no text" if n == 7 else "") for n in range(10)]
    spool, found, pieces_of_rows = Spool(iter(rows)), [], []
    while not pieces_of_rows or not pieces_of_rows[-1].last:
        path = tmp_path / str(len(pieces_of_rows))
        pieces_of_rows.append(spool.write(path, 20))
        task = Task(0, 0, (), 0, str(path))
        found += [item for _, item in TaskReader(task, Inputs(SourceConfig(name="s", hf="a/b"), (), 0))]
    assert sum(piece.rows for piece in pieces_of_rows) == len(found) == 10
    assert [n for n, item in enumerate(found) if isinstance(item, Reject)] == [4, 7]
    again = Spool(iter(rows[pieces_of_rows[0].rows :]))
    again.skip(pieces_of_rows[1].rows)
    assert again.write(tmp_path / "again", 20) == pieces_of_rows[2]
