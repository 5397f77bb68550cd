"""Building a store with workers and interruptions: the same bytes always, or a named error and nothing half-done."""

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalodon.data import build, copies, encode, reading, tasks, workers
from megalodon.data.ingest import CorpusConfig
from megalodon.data.journal import Workspace, work_path, workspace
from megalodon.data.prepare import Prepared, Progress, prepare_store, verify_prepared
from megalodon.data.tokenizer import TokenizerConfig
from megalodon.errors import DataError, EnvironmentFault, InputError

BYTES = TokenizerConfig(kind="bytes", reserve=3)
TRAINED = TokenizerConfig(vocab_size=310)


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of 3 kB instead of 4 MB; workers are told their tasks, so that it holds for them too."""
    monkeypatch.setattr(tasks, "_SMALLEST_TASK", 3000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """About ten tasks: JSON lines with rejects, copies, empty ones; lines of text; small files."""
    place = tmp_path / "texts"
    place.mkdir()
    rows = [json.dumps({"text": f"row {n % 150} of the corpus, été"}) for n in range(200)]
    rows[20], rows[110] = "{", '{"body": 1}'
    rows[70] = '{"text": " "}'
    (place / "a.jsonl").write_text("\n".join(rows) + "\n")
    (place / "b.txt").write_text("".join(f"line {n} says {'🙂' if n % 7 == 0 else 'ok'}\n" for n in range(400)))
    return place


def corpus(folder: Path, **changes: Any) -> CorpusConfig:
    source = {"name": "all", "path": str(folder), "document": "line"}
    given = {"sources": (source,), "valid": {"fraction": 0.1}, "on_error": "skip:9", "dedup": "exact", **changes}
    return CorpusConfig.model_validate(given)


def content(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def make(folder: Path, directory: Path, *arguments: Any, data: CorpusConfig | None = None, **options: Any) -> Prepared:
    tokenizer = options.pop("tokenizer", BYTES)
    return prepare_store(data or corpus(folder), tokenizer, directory, *arguments, **{"workers": 1, **options})


def test_the_store_depends_neither_on_workers_nor_on_memory(folder: Path, tmp_path: Path) -> None:
    first = make(folder, tmp_path / "one")
    assert first.ledger.rejected == 2 and first.ledger.empty == 1 and first.ledger.duplicate == 49
    assert len(first.train.manifest["shards"]) > 5
    verify_prepared(tmp_path / "one")
    expected = content(tmp_path / "one")
    for count, mem in ((2, 500_000_000), (3, 3_000_000_000)):
        make(folder, tmp_path / str(count), workers=count, mem=mem)
        assert content(tmp_path / str(count)) == expected
    places = [json.loads(line)["place"] for line in expected["rejects.jsonl"].splitlines()]
    assert places == [f"{folder / 'a.jsonl'}:21:2", f"{folder / 'a.jsonl'}:111:1"]


def killed(at: int, work: Callable[[], object]) -> bool:
    """Run `work` in a forked process that dies without a word at the `at`-th step that reaches the disk."""
    child = os.fork()
    if child == 0:
        steps = iter(range(1, 10**9))

        def counted(step: Callable[..., Any]) -> Callable[..., Any]:
            def stepped(*arguments: Any, **options: Any) -> Any:
                if next(steps) == at:
                    os._exit(9)
                return step(*arguments, **options)

            return stepped

        code = 1
        with contextlib.suppress(BaseException):
            os.fsync, os.replace = counted(os.fsync), counted(os.replace)
            work()
            code = 0
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.parametrize(
    ("dedup", "stride"), [("exact", 23), *(pytest.param(d, 1, marks=pytest.mark.slow) for d in ("none", "exact"))]
)
def test_killed_at_any_step_the_same_call_ends_with_the_same_bytes(
    folder: Path, tmp_path: Path, dedup: str, stride: int
) -> None:
    data = corpus(folder, dedup=dedup)

    def work() -> None:
        make(folder, tmp_path / "d", data=data, tokenizer=TRAINED)

    expected = content(make(folder, tmp_path / "whole", data=data, tokenizer=TRAINED).train.path)
    at = 1
    while killed(at := at + stride, work):
        if at % 3 == 0:  # a second death on the way, soon after
            killed(3, work)
        if not (tmp_path / "d" / "manifest.json").exists():
            assert not (tmp_path / "d").exists(), "nothing half-written has the store's name"
        killed(10**9, work)
        assert content(tmp_path / "d") == expected, at
        assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "texts", "whole"]
        (tmp_path / "d").rename(tmp_path / "old")
        shutil.rmtree(tmp_path / "old")
    assert at > 50


def test_every_death_leaves_progress_until_it_is_done(folder: Path, tmp_path: Path) -> None:
    expected = content(make(folder, tmp_path / "whole").train.path)
    deaths = 0
    while killed(25, lambda: make(folder, tmp_path / "d")):
        deaths += 1
        assert deaths < 40
    assert deaths > 1
    assert content(tmp_path / "d") == expected


def interrupted_after(count: int) -> Callable[[Progress], None]:
    """A progress callback that stops the work when so many reports have come."""
    seen = iter(range(1, 10**9))

    def stop(_: Progress) -> None:
        if next(seen) == count:
            raise KeyboardInterrupt

    return stop


def test_finished_tasks_are_kept_for_the_same_request_and_no_other(folder: Path, tmp_path: Path) -> None:
    def interrupted() -> Path:
        with pytest.raises(KeyboardInterrupt):
            make(folder, tmp_path / "d", interrupted_after(4))
        assert not (tmp_path / "d").exists()
        return work_path(tmp_path / "d")

    work = interrupted()
    lines = (work / "journal.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    (work / "journal.jsonl").write_bytes(b"".join(lines) + lines[0][:40])  # a torn line
    (work / "store" / ".tmp-1-00009.bin").touch()
    (work / "raw" / "00001.bin").write_bytes(b"damaged")
    told: list[str] = []
    built = make(folder, tmp_path / "d", tell=told.append)
    assert any("2 finished tasks are kept" in note for note in built.notes)
    assert told[0].startswith("all: 2 files") and "1 worker, at most" in told[1]
    assert content(tmp_path / "d") == content(make(folder, tmp_path / "whole").train.path)
    (tmp_path / "d").rename(tmp_path / "kept")
    interrupted()
    other = make(folder, tmp_path / "d", data=corpus(folder, bos=False))
    assert any("is thrown away" in note for note in other.notes)
    (tmp_path / "d").rename(tmp_path / "other")
    interrupted()
    (folder / "b.txt").write_text("other text\n" * 300)
    changed = make(folder, tmp_path / "d")
    assert any("is thrown away" in note for note in changed.notes)
    verify_prepared(tmp_path / "d")


def test_too_many_rejects_keep_the_work_for_a_higher_limit(folder: Path, tmp_path: Path) -> None:
    data = corpus(folder, on_error="skip:1")
    for count in (1, 2):
        with pytest.raises(DataError, match=r"a\.jsonl:111:1: field `text` is missing.*\(number 2 of at most 1\)"):
            make(folder, tmp_path / "d", data=data, workers=count)
        assert work_path(tmp_path / "d").is_dir() and not (tmp_path / "d").exists()
    assert "finished tasks are kept" in make(folder, tmp_path / "d").notes[0]
    assert content(tmp_path / "d") == content(make(folder, tmp_path / "whole").train.path)


def test_a_killed_worker_is_an_error_that_names_its_task(folder: Path, tmp_path: Path) -> None:
    def kill(_: Progress) -> None:
        for process in multiprocessing.active_children():
            assert process.pid
            os.kill(process.pid, signal.SIGKILL)

    with pytest.raises(EnvironmentFault, match=r"a worker was killed by signal 9 at task \d{5} \(.*bytes .* to ") as e:
        make(folder, tmp_path / "d", kill, workers=2)
    assert "the same command continues" in str(e.value.hint)
    assert not (tmp_path / "d").exists() and not multiprocessing.active_children()
    make(folder, tmp_path / "d")
    assert content(tmp_path / "d") == content(make(folder, tmp_path / "whole").train.path)


def test_a_worker_killed_in_the_middle_of_a_message_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = multiprocessing.Pipe()
    os.write(theirs.fileno(), struct.pack("!i", 1000) + b"the first bytes of a thousand")
    theirs.close()
    process = SimpleNamespace(join=lambda: None, exitcode=-signal.SIGKILL)
    worker: Any = SimpleNamespace(connection=ours, process=process, task=SimpleNamespace(source=0))
    setup: Any = SimpleNamespace(sources=["books"])
    monkeypatch.setattr(workers, "describe", lambda task, source: f"task 7 ({source})")
    with (
        ours,
        pytest.raises(EnvironmentFault, match=r"a worker was killed by signal 9 at task 7 \(books\); nothing of"),
    ):
        workers._receive(worker, setup)


def test_workers_end_with_their_parent(folder: Path, tmp_path: Path) -> None:
    pids = multiprocessing.get_context("fork").SimpleQueue()

    def die(_: Progress) -> None:
        pids.put([process.pid for process in multiprocessing.active_children()])
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            make(folder, tmp_path / "d", die, workers=2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    make(folder, tmp_path / "d")
    found = pids.get()
    assert len(found) == 2
    pids.close()
    for pid in found:
        with contextlib.suppress(ProcessLookupError):  # it is gone already
            assert multiprocessing.connection.wait([os.pidfd_open(pid)], 30), "a worker lives on without its parent"
    assert content(tmp_path / "d") == content(make(folder, tmp_path / "whole").train.path)


def test_two_builders_of_one_store_refuse_each_other(folder: Path, tmp_path: Path) -> None:
    with workspace(tmp_path / "d", {}), pytest.raises(DataError, match=rf"d is being built .*\(pid {os.getpid()}\)"):
        make(folder, tmp_path / "d")
    assert make(folder, tmp_path / "d").ledger.kept
    assert not work_path(tmp_path / "d").exists()


def test_a_workspace_left_right_after_the_commit_is_removed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "remove", lambda _: None)
        make(folder, tmp_path / "d")
    assert work_path(tmp_path / "d").is_dir()
    assert make(folder, tmp_path / "d").up_to_date
    assert not work_path(tmp_path / "d").exists()


def test_too_little_memory_is_refused_with_both_numbers() -> None:
    with pytest.raises(InputError, match=r"--mem is 400 MB, and 2 workers need 480 MB; .*\(-j 1\)"):
        workers.plan(2, 400_000_000)
    assert workers.plan(2, 500_000_000).workers == 2
    for count in (1, 2, 5):
        for mem in (10**9, 2 * 10**9, 10**11):
            if count < 5 or mem > 10**9:
                assert workers.plan(count, mem).bound <= mem
    with pytest.raises(InputError, match=r"--mem is 200 MB, and 1 worker needs 290 MB; give more memory"):
        workers.plan(None, 200_000_000)
    assert workers.plan(None, 300_000_000).workers == 1
    with pytest.raises(InputError, match=r"--mem is 500 MB, and a tokenizer trained on 100 MB of text needs 800 MB"):
        workers.plan(2, 500_000_000, sample=100_000_000)


def test_long_documents_are_one_document_however_they_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "PIECE", 50)
    monkeypatch.setattr(reading, "CHUNK", 64)
    place = tmp_path / "texts"
    place.mkdir()
    (place / "a.txt").write_text("été " * 100 + "\n" + "x" * 90 + "\n" + "🙂" * 40)
    (place / "b.txt").write_text("y" * 101)
    (place / "c.txt").write_bytes("\ufeff".encode() + b"words and " * 30 + b"\xff")
    data = CorpusConfig.model_validate({"sources": ({"name": "s", "path": str(place)},), "on_error": "skip:1"})
    stores = []
    for whole in (1, 10**6):
        monkeypatch.setattr(workers, "plan", lambda *_, whole=whole: workers.Budget(1, whole, 0))
        monkeypatch.setattr("megalodon.data.prepare.plan", workers.plan)
        built = make(place, tmp_path / str(whole), data=data)
        stores.append(content(tmp_path / str(whole)))
        assert (built.ledger.kept, built.ledger.split, built.ledger.rejected) == (2, 1, 1)
        tokens = built.train.tokens(0, built.train.num_tokens).tolist()
        assert built.tokenizer.decode(tokens) == (place / "a.txt").read_text() + "y" * 101
    assert stores[0] == stores[1]
    assert json.loads(stores[0]["rejects.jsonl"])["reason"].startswith("not UTF-8 (byte 0xff at offset 303)")


@pytest.mark.parametrize("dedup", ["none", "exact"])
def test_a_hub_dataset_continues_after_the_pieces_that_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dedup: str
) -> None:
    rows = [{"text": f"row {n % 70}"} if n != 33 else {"body": "x"} for n in range(100)]
    read: list[int] = []

    def load(*_: object, **__: object) -> Iterator[dict[str, str]]:
        read.append(0)
        for row in rows:
            read[-1] += 1
            yield row

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("megalodon.data.prepare.hub_revision", lambda *_: "abc")
    monkeypatch.setattr(build, "LARGEST_TASK", 100)
    data = corpus(tmp_path, sources=({"name": "web", "hf": "org/name"},), dedup=dedup)
    whole = make(tmp_path, tmp_path / "whole", data=data)
    assert (whole.ledger.read, whole.ledger.rejected) == (100, 1)
    assert json.loads((tmp_path / "whole" / "rejects.jsonl").read_text())["place"] == "hf:org/name: row 34"
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, tmp_path / "d", interrupted_after(3), data=data)
    work = work_path(tmp_path / "d")
    assert len((work / "journal.jsonl").read_text().splitlines()) == 2
    make(tmp_path, tmp_path / "d", data=data)
    assert content(tmp_path / "d") == content(tmp_path / "whole")
    assert sum(1 for _ in tmp_path.iterdir()) == 2


def test_nothing_of_a_request_that_cannot_be_met_stays(folder: Path, tmp_path: Path) -> None:
    (folder / "c.txt.gz").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"c\.txt\.gz: not a readable gz file"):
        make(folder, tmp_path / "d", workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


@given(st.lists(st.integers(0, 5), max_size=40))
def test_the_first_of_equal_documents_stays(values: list[int]) -> None:
    digests = np.array([[value % 2, value] for value in values], dtype=np.uint64).reshape(-1, 2)
    assert copies.is_copy(digests).tolist() == [value in values[:n] for n, value in enumerate(values)]
