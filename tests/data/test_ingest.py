"""Reading text: every format, exact text, and each kind of bad input named by file, line and reason."""

import gzip
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pydantic
import pytest
from huggingface_hub.errors import HfHubHTTPError

from megalodon.data.builtin import generated_texts
from megalodon.data.hub import hub_revision
from megalodon.data.ingest import CorpusConfig, SourceConfig, ValidConfig, check_distinct, content, resolve
from megalodon.data.sampling import most, sample_texts
from megalodon.data.tasks import Rejects, documents
from megalodon.errors import DataError, EnvironmentFault


def texts(path: Path | str, rejects: Rejects | None = None, **options: object) -> list[str]:
    source = SourceConfig.model_validate({"name": "s", "path": str(path), **options})
    return [document.text for document in documents(resolve(source), rejects)]


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("file", ["one\r\n\n \ntwo\nthree 🙂\n\n\n"]),
        ("line", ["one", "", " ", "two", "three 🙂", "", ""]),
        ("blank-line", ["one", "two\nthree 🙂"]),
    ],
)
def test_what_a_document_is(tmp_path: Path, document: str, expected: list[str]) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "one\r\n\n \ntwo\nthree 🙂\n\n\n".encode())
    assert texts(tmp_path / "a.txt", document=document) == expected


def test_folders_and_globs_are_read_in_the_order_of_their_keys(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a.txt", "b/1.txt", ".hidden/x.txt", "c.jsonl", "notes.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    assert texts(tmp_path) == ["a.txt", "b/1.txt", "b/2.txt", "c.jsonl"]
    assert texts(tmp_path / "**" / "*.txt") == ["a.txt", "b/1.txt", "b/2.txt"]
    assert texts(tmp_path, format="text") == ["a.txt", "b/1.txt", "b/2.txt"]
    found = resolve(SourceConfig(name="s", path=tmp_path))
    assert [file.key for file in found.files] == ["a.txt", "b/1.txt", "b/2.txt", "c.jsonl"]
    assert "1 other files ignored" in found.describe()


def test_tables_are_read_through_datasets(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["eins", "zwei\n"], "n": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "p [1].parquet")
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "c.csv").write_text('text,n\n"eins",1\n"zwei\n",2\n')
    for name in ("p [1].parquet", "a.arrow", "c.csv"):
        assert texts(tmp_path / name) == ["eins", "zwei\n"], name
    with pytest.raises(DataError, match=r"row 1: field `body` is missing; the fields are text, n"):
        texts(tmp_path / "a.arrow", field="body")
    (tmp_path / "bad.parquet").write_text("junk")
    with pytest.raises(DataError, match=r"bad\.parquet: not a readable parquet file"):
        texts(tmp_path / "bad.parquet")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "open', r"a\.jsonl:2:10: not JSON \(unterminated string"),
        (b'{"text": "x"} {', r"a\.jsonl:2:15: not JSON \(extra data"),
        (b'{"body": "x", "id": 1}', r"a\.jsonl:2:1: field `text` is missing; the fields are body, id"),
        (b'{"text": 5}', r"a\.jsonl:2:1: field `text` is int, expected text"),
        (b"[1]", r"a\.jsonl:2:1: expected an object with `text`, got list"),
        (b'{"text": "\xff"}', r"a\.jsonl:2:11: not UTF-8"),
        (b'{"text": "\\ud800"}', r"a\.jsonl:2: holds half a surrogate pair"),
        (b"[" * 100_000, r"a\.jsonl:2:1: not usable JSON \(nested too deep"),
        (b'{"text": "x", "n": ' + b"1" * 5000 + b"}", r"a\.jsonl:2:1: not usable JSON \(a number has too many digits"),
    ],
)
def test_bad_json_lines_are_named_and_counted(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n' + line + b'\n{"text": "last"}\n')
    with pytest.raises(DataError, match=message) as caught:
        texts(path)
    assert "skip:100" in str(caught.value.hint)
    rejects = Rejects(limit=1)
    assert texts(path, rejects) == ["first", "last"]
    assert len(rejects.records) == 1
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(DataError, match=r"number 2 of at most 1"):
        texts(path, Rejects(limit=1))


def test_invalid_utf8_is_placed_by_line_and_offset(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nth\xe9ee\nfour\n")
    with pytest.raises(DataError, match=r"a\.txt:3: not UTF-8 \(byte 0xe9 at offset 10\)"):
        texts(tmp_path / "a.txt")
    rejects = Rejects(limit=1)
    assert texts(tmp_path / "a.txt", rejects, document="line") == ["one", "two", "four"]
    assert "a.txt:3" in rejects.records[0]["place"]
    assert "offset 10" in rejects.records[0]["reason"]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.pdf").write_text("x")
    for path, message in (
        (tmp_path / "none.txt", "does not exist"),
        (tmp_path / "empty", r"holds no \.txt"),
        (tmp_path / "*.txt", "matches no file"),
        (tmp_path / "x.pdf", r"unknown suffix `\.pdf`"),
    ):
        with pytest.raises(DataError, match=message):
            texts(path)
    with pytest.raises(DataError, match=r"data\.sources\.s\.path is required"):
        resolve(SourceConfig(name="s"))


def test_options_without_meaning_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    with pytest.raises(DataError, match="plain text has no fields"):
        texts(tmp_path / "a.txt", field="body")
    with pytest.raises(DataError, match="no file is plain text"):
        texts(tmp_path / "a.jsonl", document="line")
    for bad in (
        {"path": "a", "hf": "b/c"},
        {"path": "a", "builtin": "generated"},
        {"path": "a", "split": "test"},
        {"path": "a", "weight": 0.0},
        {"path": "a", "format": "zip"},
        {"path": ""},
        {"path": "a\0b"},
        {"hf": ""},
    ):
        with pytest.raises(pydantic.ValidationError):
            SourceConfig.model_validate({"name": "s", **bad})
    for corpus in (
        {"sources": ({"name": "a"}, {"name": "a"})},
        {"sources": ({"name": "a", "weight": 1.0}, {"name": "b"})},
        {"on_error": "skip"},
        {"valid": {"fraction": 0.1, "path": "v"}},
        {"valid": {"fraction": 1.0}},
    ):
        with pytest.raises(pydantic.ValidationError):
            CorpusConfig.model_validate(corpus)
    assert ValidConfig.model_validate({"fraction": "2%"}).fraction == 0.02
    assert CorpusConfig(on_error="skip:12").max_rejects() == 12


def test_the_same_file_twice_is_refused_in_any_spelling(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    sources = [resolve(SourceConfig(name=n, path=p)) for n, p in (("a", tmp_path / "a.txt"), ("b", tmp_path / "*.txt"))]
    check_distinct(sources[:1])
    for some in (sources, sources[1:]):
        with pytest.raises(DataError, match="the same file is listed twice"):
            check_distinct(some)


def test_content_knows_names_inside_the_source_and_not_its_place(tmp_path: Path) -> None:
    found = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("text")
        found.append(content(resolve(SourceConfig(name=folder, path=tmp_path / folder))))
    assert found[0] == found[1]
    (tmp_path / "two" / "a.txt").rename(tmp_path / "two" / "b.txt")
    assert content(resolve(SourceConfig(name="two", path=tmp_path / "two"))) != found[0]


def test_file_names_that_are_not_utf8_are_names_too(tmp_path: Path) -> None:
    for name in (b"caf\xe9.txt", b"caf\xe8.txt"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_text("text")
    inputs = resolve(SourceConfig(name="s", path=tmp_path))
    assert [document.text for document in documents(inputs)] == ["text", "text"]
    whole = content(inputs)
    next(path for path in tmp_path.iterdir()).rename(tmp_path / "cafe.txt")
    assert whole and whole != content(resolve(SourceConfig(name="s", path=tmp_path)))


def test_the_library_of_this_python_is_a_source() -> None:
    inputs = resolve(SourceConfig(name="stdlib", builtin="python-stdlib"))
    keys = [file.key for file in inputs.files]
    assert keys == sorted(keys)
    assert {"argparse.py", "json/decoder.py"} <= set(keys)
    assert not [key for key in keys if "test" in key.split("/") or key.startswith(("encodings/", "_sysconfigdata"))]
    assert 300 < len(keys) < 700
    assert 5e6 < sum(file.size for file in inputs.files) < 15e6


def test_a_library_that_is_not_there_is_the_environments_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
        with pytest.raises(EnvironmentFault, match="not readable") as caught:
            resolve(SourceConfig(name="stdlib", builtin="python-stdlib"))
    with pytest.raises(DataError, match=r"data\.sources\.s\.path: .* holds no \.py files"):
        resolve(SourceConfig(name="s", builtin="python-stdlib", path=tmp_path))
    assert caught.value.hint == "data.sources.stdlib.path=DIR names a folder that holds it"
    (tmp_path / "a.py").write_text("x = 1\n")
    assert [d.text for d in documents(resolve(SourceConfig(name="s", builtin="python-stdlib", path=tmp_path)))]


def test_generated_text_is_the_same_everywhere() -> None:
    found = list(generated_texts())
    assert found == list(generated_texts())
    assert len(set(found)) == len(found) == 512
    assert found[0].startswith("The song of Greta\n\nGreta remembered the ")


def test_the_hub_is_not_asked_offline() -> None:
    source = SourceConfig(name="web", hf="org/name")
    with pytest.raises(EnvironmentFault, match=r"data\.sources\.web: hf:org/name needs the network"):
        next(documents(resolve(source), offline=True))


def test_a_hub_that_cannot_be_reached_is_the_environments_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise HfHubHTTPError.__bases__[0]("name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    monkeypatch.setattr("datasets.load_dataset", unreachable)
    source = SourceConfig(name="web", hf="org/name")
    for read in (lambda: hub_revision(source), lambda: next(documents(resolve(source)))):
        with pytest.raises(
            EnvironmentFault, match=r"cannot be read from the Hub \(name or service not known"
        ) as caught:
            read()
        assert caught.value.hint == "data.sources.web.path=DIR reads local files instead"


def test_rows_of_the_hub_are_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load(*names: object, **options: object) -> list[dict[str, str]]:
        asked.append((*names, options["split"], options["revision"], options["streaming"]))
        return [{"body": "one"}, {"body": "two"}]

    monkeypatch.setattr("datasets.load_dataset", load)
    source = SourceConfig(name="web", hf="org/name", subset="en", split="train", field="body")
    assert [d.text for d in documents(resolve(source), revision="abc")] == ["one", "two"]
    assert asked == [("org/name", "en", "train", "abc", True)]
    assert list(sample_texts([resolve(source)], 100, 0.0, revisions={"web": "abc"})) == ["one", "two"]
    assert asked[1] == asked[0]


def test_a_sample_is_spread_over_the_whole_and_even(tmp_path: Path) -> None:
    sources = []
    for name, count in (("small", 10), ("large", 4000)):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {n:05d}\n" for n in range(count)))
        sources.append(resolve(SourceConfig(name=name, path=tmp_path / f"{name}.txt", document="line")))
    lines = list(sample_texts(sources, 6000, 0.0))
    small = [line for line in lines if line.startswith("small")]
    large = [int(line.split()[1]) for line in lines if line.startswith("large")]
    assert len(small) == 10
    assert 2500 < sum(len(line) + 1 for line in lines if line.startswith("large")) < 3500
    assert large[0] < 50 and large[-1] > 3900


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_tokenizer_is_trained_on_all_of_a_packed_file(tmp_path: Path, name: str) -> None:
    texts = [f"{'early' if n < 10_000 else 'late'} {n} {hash((n,))} {'on ' * 20}" for n in range(20_000)]
    raw = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if name == "a.parquet":
        table = pyarrow.table({"n": list(range(20_000)), "text": texts})
        pyarrow.parquet.write_table(table, tmp_path / name, row_group_size=1000)
    else:
        packed = {"gz": gzip.compress, "zst": lambda raw: pyarrow.compress(raw, codec="zstd", asbytes=True)}
        (tmp_path / name).write_bytes(packed[name.rpartition(".")[2]](raw))
    inputs = resolve(SourceConfig(name="all", path=tmp_path / name))
    assert inputs.files[0].size * 3 < len(raw)
    lines = list(sample_texts([inputs], 100_000, 0.0))
    late = sum(line.startswith("late") for line in lines)
    assert 0.4 * len(lines) < late < 0.6 * len(lines)
    assert 60_000 < sum(len(line) for line in lines) < 110_000
    assert most([inputs], 10**9) >= sum(map(len, texts)), "the memory it takes is worked out from the text"
