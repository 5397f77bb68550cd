"""From a recipe's data section to a store: complete and accounted for, or not there at all."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megalodon.data.encode import is_valid
from megalodon.data.ingest import CorpusConfig
from megalodon.data.prepare import Ledger, Progress, open_prepared, prepare_store, verify_prepared
from megalodon.data.tokenizer import TokenizerConfig, train_sentencepiece
from megalodon.errors import CheckFailed, DataError, EnvironmentFault

BYTES = TokenizerConfig(kind="bytes", reserve=3)
LINES = [f"line {n} says {'🙂' if n % 7 == 0 else 'ok'}" for n in range(300)]


def corpus(folder: Path, **changes: Any) -> CorpusConfig:
    source = {"name": "lines", "path": str(folder / "text.txt"), "document": "line", **changes.pop("source", {})}
    return CorpusConfig.model_validate({"sources": (source,), "valid": {"fraction": 0.1}, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "texts"
    place.mkdir()
    (place / "text.txt").write_text("\n".join([*LINES, "", "  ", LINES[5], LINES[0]]) + "\n")
    return place


@pytest.mark.parametrize("dedup", ["none", "exact"])
def test_every_document_and_token_is_accounted_for(folder: Path, tmp_path: Path, dedup: str) -> None:
    reports: list[Progress] = []
    prepared = prepare_store(corpus(folder, dedup=dedup), BYTES, tmp_path / "d", reports.append)
    copies = 2 if dedup == "exact" else 0
    kept = [line for line in [*LINES, LINES[5], LINES[0]][: 302 - copies]]
    sizes = sum(len(line.encode()) for line in kept)
    twice = sum(len(line.encode()) for line in (LINES[5], LINES[0])) if copies else 0
    assert prepared.ledger == Ledger(
        **{"read": 304, "kept": len(kept), "empty": 2, "duplicate": copies, "rejected": 0, "split": 0},
        **{"tokens": sizes + 2 * len(kept), "train": prepared.train.num_tokens, "valid": prepared.valid.num_tokens},
        **{"bytes": sizes, "bytes_empty": 2, "bytes_duplicate": twice, "bytes_rejected": 0},
        bytes_read=sizes + 2 + twice,
    )
    assert prepared.train.text_bytes + prepared.valid.text_bytes == sizes
    assert not prepared.up_to_date
    assert reports[-1].documents == 304
    decoded = []
    for store in (prepared.train, prepared.valid):
        tokens = store.tokens(0, store.num_tokens)
        for part in np.split(tokens, store.starts()[1:]):
            assert (part[0], part[-1]) == (prepared.tokenizer.bos_id, prepared.tokenizer.eos_id)
            decoded.append(prepared.tokenizer.decode(part.tolist()))
            assert is_valid(decoded[-1], 0.1) == (store is prepared.valid)
    assert sorted(decoded) == sorted(kept)
    verify_prepared(tmp_path / "d")


def test_bos_and_eos_are_the_recipes_choice(folder: Path, tmp_path: Path) -> None:
    prepared = prepare_store(corpus(folder, bos=False, eos=False), BYTES, tmp_path / "d")
    assert prepared.ledger.tokens == prepared.ledger.bytes
    assert not prepared.tokenizer.special_ids & set(prepared.train.tokens(0, prepared.train.num_tokens).tolist())


def test_the_same_text_gives_the_same_bytes_anywhere(folder: Path, tmp_path: Path) -> None:
    config = TokenizerConfig(vocab_size=300)
    first = prepare_store(corpus(folder), config, tmp_path / "one")
    moved = folder.rename(tmp_path / "moved texts")
    second = prepare_store(corpus(moved), config, tmp_path / "deep" / "er" / "two")
    assert first.train.fingerprint == second.train.fingerprint
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 7
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "deep/er/two" / file).read_bytes()


def test_a_store_that_fits_is_reused_and_any_other_is_refused(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "d"
    built = prepare_store(corpus(folder), BYTES, target)
    again = prepare_store(corpus(folder), BYTES, target)
    assert again.up_to_date and again.train.fingerprint == built.train.fingerprint and again.ledger == built.ledger
    for data, tokenizer, message in (
        (corpus(folder, bos=False), BYTES, "bos is true there and false here"),
        (corpus(folder, valid={"fraction": 0.2}), BYTES, r"valid\.fraction is 0\.1 there and 0\.2 here"),
        (
            corpus(folder, source={"document": "file"}),
            BYTES,
            r'sources\.lines\.document is "line" there and "file" here',
        ),
        (corpus(folder), TokenizerConfig(kind="bytes", reserve=4), r"tokenizer\.reserve is 3 there and 4 here"),
        (corpus(folder), TokenizerConfig(), r'tokenizer\.kind is "bytes" there'),
    ):
        with pytest.raises(DataError, match=message) as caught:
            prepare_store(data, tokenizer, target)
        assert "another directory" in str(caught.value.hint)
    (folder / "text.txt").write_text("other text\n")
    with pytest.raises(DataError, match=r"the text of source lines is \(.* bytes, .*\) there and \(11 bytes"):
        prepare_store(corpus(folder), BYTES, target)
    (folder / "text.txt").unlink()
    moved = prepare_store(corpus(folder), BYTES, target)
    assert moved.up_to_date and "was not compared" in moved.notes[0]


def test_validation_text_of_its_own(folder: Path, tmp_path: Path) -> None:
    (folder / "valid.txt").write_text(LINES[0] + "\n" + "held out\n")
    data = corpus(folder, valid={"path": str(folder / "valid.txt"), "document": "line"}, dedup="exact")
    prepared = prepare_store(data, BYTES, tmp_path / "d")
    tokens = prepared.valid.tokens(0, prepared.valid.num_tokens).tolist()
    assert prepared.tokenizer.decode(tokens) == LINES[0] + "held out"
    assert prepared.ledger.duplicate == 3, "training text that is also validation text is dropped"
    with pytest.raises(DataError, match="the same file is listed twice"):
        prepare_store(corpus(folder, valid={"path": str(folder / "text.txt")}), BYTES, tmp_path / "e")


def test_rejects_are_counted_and_kept(folder: Path, tmp_path: Path) -> None:
    (folder / "text.txt").write_bytes((folder / "text.txt").read_bytes() + b"bad \xff\nbad \xfe\n")
    prepared = prepare_store(corpus(folder, on_error="skip:2"), BYTES, tmp_path / "d")
    assert (prepared.ledger.read, prepared.ledger.rejected) == (306, 2)
    lines = [json.loads(line) for line in (tmp_path / "d" / "rejects.jsonl").read_text().splitlines()]
    assert [line["place"].rpartition(":")[2] for line in lines] == ["305", "306"]


def test_a_rejected_file_is_named_whatever_its_name(folder: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.txt")
    (folder / name).write_bytes(b"\xff")
    prepare_store(corpus(folder, source={"path": str(folder)}, on_error="skip:1"), BYTES, tmp_path / "d")
    reject = json.loads((tmp_path / "d" / "rejects.jsonl").read_text(encoding="utf-8"))
    assert reject["place"] == f"{folder / name}:1"


def test_all_of_a_store_is_on_the_disk_before_it_has_its_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "text.txt").write_bytes((folder / "text.txt").read_bytes() + b"bad \xff\n")
    synced: set[int] = set()
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    prepare_store(corpus(folder, on_error="skip:1"), BYTES, tmp_path / "d")
    written = [tmp_path, tmp_path / "d", *(tmp_path / "d").rglob("*")]
    assert {"rejects.jsonl", "byte_tokenizer.json", "manifest.json", "valid"} <= {path.name for path in written}
    assert [path.name for path in written if path.stat().st_ino not in synced] == []


def test_a_tokenizer_is_trained_on_the_commit_that_is_tokenized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def load(*_: object, **options: object) -> list[dict[str, str]]:
        asked.append(options["revision"])
        return [{"text": line} for line in LINES]

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("megalodon.data.prepare.hub_revision", lambda *_: "abc")
    data = CorpusConfig.model_validate({"sources": ({"name": "web", "hf": "org/name"},)})
    prepare_store(data, TokenizerConfig(vocab_size=300), tmp_path / "d")
    assert asked == ["abc", "abc"]


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A Hub that holds one tokenizer, org/name, of commit abc; returns what was asked of it."""
    model = train_sentencepiece(LINES, 300)
    asked: list[str] = []

    def info(_: object, name: str, revision: str | None) -> SimpleNamespace:
        asked.append(f"{name} {revision}")
        return SimpleNamespace(sha=revision or "abc")

    def download(name: str, file: str, revision: str) -> str:
        asked.append(f"{name} {file} {revision}")
        model.save(tmp_path)
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", info)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return asked


def test_a_tokenizer_of_the_hub_is_fetched_once_and_its_commit_recorded(
    folder: Path, tmp_path: Path, hub: list[str]
) -> None:
    config = TokenizerConfig(path="hf:org/name")
    prepared = prepare_store(corpus(folder), config, tmp_path / "d")
    assert hub == ["org/name None", "org/name tokenizer.model abc"]
    assert prepared.train.manifest["tokenizer"]["revision"] == "abc"
    assert prepared.train.manifest["request"]["tokenizer"] == {"kind": "sentencepiece", "hf": "org/name"}
    again = prepare_store(corpus(folder), config, tmp_path / "d", offline=True)
    assert again.up_to_date and len(hub) == 2, "a store that is there needs no network"
    for name in ("org/name@other", "org/other"):
        with pytest.raises(DataError, match=rf'tokenizer\.hf is "org/name" there and "{name}" here'):
            prepare_store(corpus(folder), TokenizerConfig(path=f"hf:{name}"), tmp_path / "d")
    prepare_store(corpus(folder), TokenizerConfig(path="hf:org/name@v1"), tmp_path / "e")
    assert hub[2:] == ["org/name v1", "org/name tokenizer.model v1"]


def test_a_hub_that_may_not_be_asked_or_has_no_tokenizer_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TokenizerConfig(path="hf:org/name")
    with pytest.raises(EnvironmentFault, match="hf:org/name needs the network, and --offline forbids it"):
        prepare_store(corpus(folder), config, tmp_path / "d", offline=True)

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    with pytest.raises(EnvironmentFault, match=r"cannot be read from the Hub \(no route to host\)"):
        prepare_store(corpus(folder), config, tmp_path / "d")
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


def damaged(manifest: dict[str, Any], kind: str) -> None:
    if kind == "ledger":
        manifest["ledger"]["read"] = "x"
    elif kind == "source":
        manifest["sources"] = [{}]
    elif kind == "sources":
        manifest["sources"] = []
    elif kind == "tokenizer":
        manifest["tokenizer"] = {"kind": "bytes"}
    elif kind == "request":
        manifest["request"] = {}
    elif kind == "valid":
        del manifest["valid_fingerprint"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("ledger", r'ledger\.read is "x", expected a count'),
        ("source", r"sources\.0\.name is missing, expected text"),
        ("sources", r"sources are none, and request\.sources are lines"),
        ("tokenizer", r"tokenizer\.sha256 is missing, expected text"),
        ("request", r"request\.sources is missing, expected an object"),
        ("valid", r"valid_fingerprint is missing, expected text"),
    ],
)
def test_a_damaged_manifest_is_named_by_its_key(folder: Path, tmp_path: Path, kind: str, message: str) -> None:
    target = tmp_path / "d"
    prepare_store(corpus(folder), BYTES, target)
    manifest = json.loads((target / "manifest.json").read_text())
    damaged(manifest, kind)
    (target / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=message):
        prepare_store(corpus(folder), BYTES, target)
    with pytest.raises(CheckFailed, match=message):
        verify_prepared(target)


def test_nothing_is_left_after_an_error(folder: Path, tmp_path: Path) -> None:
    (folder / "bad.txt").write_bytes(b"\xff")
    (folder / "empty.txt").write_bytes(b"\n \n")
    (folder / "one.txt").write_text("one")
    before = sorted(path.name for path in tmp_path.iterdir())
    cases: list[tuple[CorpusConfig, TokenizerConfig, type[Exception], str]] = [
        (corpus(folder, source={"path": str(folder / "bad.txt")}), BYTES, DataError, "not UTF-8"),
        (corpus(folder, source={"path": str(folder / "empty.txt")}), BYTES, DataError, "the sources hold no text"),
        (corpus(folder, source={"path": str(folder / "one.txt")}), BYTES, DataError, "no text is left for validation"),
        (corpus(folder, valid={"fraction": 1 - 1e-12}), BYTES, DataError, "no text is left to train on"),
        (corpus(folder), TokenizerConfig(vocab_size=200), DataError, "leaves no room"),
        (corpus(folder), TokenizerConfig(path=str(folder / "one.txt")), DataError, "is not a SentencePiece model"),
        (corpus(folder, source={"path": None, "hf": "a/b", "document": "file"}), BYTES, EnvironmentFault, "offline"),
        (CorpusConfig(), BYTES, DataError, "data.sources is empty"),
    ]
    for data, tokenizer, kind, message in cases:
        with pytest.raises(kind, match=message):
            prepare_store(data, tokenizer, tmp_path / "d", offline=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == before, message


def test_an_interrupt_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    def interrupt(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_store(corpus(folder), BYTES, tmp_path / "d", interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


def test_parts_that_do_not_belong_together_are_refused(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "d"
    prepare_store(corpus(folder), BYTES, target)
    other = prepare_store(corpus(folder, bos=False), BYTES, tmp_path / "other")
    (target / "valid").rename(tmp_path / "kept")
    (other.train.path / "valid").rename(target / "valid")
    with pytest.raises(DataError, match="its fingerprint is"):
        open_prepared(target)
    with pytest.raises(CheckFailed, match="its fingerprint is"):
        verify_prepared(target)
    (target / "tokenizer" / "byte_tokenizer.json").write_text('{"kind": "bytes", "reserve": 9, "version": 1}\n')
    with pytest.raises(DataError, match="the store was made with"):
        open_prepared(target)


def test_a_ledger_that_does_not_add_up_is_a_failed_check() -> None:
    good = Ledger(10, 6, 2, 1, 1, 50, 40, 10, 99, 1, 110, 3, 4, 4)
    good.check()
    assert good.lines() == [
        "documents  read 10 = kept 6 + empty 2 + duplicate 1 + rejected 1    1 of those kept were split",
        "bytes      read 110 = kept 99 + empty 3 + duplicate 4 + rejected 4",
        "tokens     kept 50 = train 40 + valid 10    from 99 bytes, 1.98 bytes/token",
    ]
    changed = {name: value + 1 for name, value in good._asdict().items()} | {"split": 7}
    for bad in (good._replace(**{name: value}) for name, value in changed.items()):
        with pytest.raises(CheckFailed):
            bad.check()


def test_two_sources_stay_apart(folder: Path, tmp_path: Path) -> None:
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": f"json {n}"}) + "\n" for n in range(50)))
    lines = {"name": "lines", "path": str(folder / "text.txt"), "document": "line", "weight": 0.7}
    rows = {"name": "rows", "path": str(folder / "b.jsonl"), "weight": 0.3}
    data = CorpusConfig.model_validate({"sources": (lines, rows), "valid": {"fraction": 0.2}})
    prepared = prepare_store(data, BYTES, tmp_path / "d")
    assert prepared.train.sources == ("lines", "rows")
    store = prepared.train.source("rows")
    assert "line" not in prepared.tokenizer.decode(store.tokens(0, store.num_tokens).tolist())
    assert data.weights() == {"lines": 0.7, "rows": 0.3}
