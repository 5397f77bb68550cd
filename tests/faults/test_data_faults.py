"""Items 26 to 36 of the fault list: damaged stores and awkward text, through `tokenize` and `pretrain`.

Not here: SIGKILL at random moments (test_campaigns.py), the functions beneath (tests/data).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from breakable import command, errors, pretrain, tree

from megalodon.data.tokenizer import load_tokenizer

STORE = Path("store")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, and no time spent on measuring the machine."""
    monkeypatch.setattr("megalodon.training.metrics.matmul_peak", lambda *_: 1e9)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """The token store of the recipe `debug`."""
    assert command("tokenize", "debug", "-o", str(STORE)).exit_code == 0
    return STORE


def refused(said: str, code: int = 2) -> None:
    """Both `pretrain` and `tokenize --verify` say this of the store, and nothing is begun."""
    for done, expected in (
        (pretrain(f"data.dir={STORE}"), code),
        (command("tokenize", "--verify", str(STORE)), 6),
    ):
        assert done.exit_code == expected, done.output
        (error,) = errors(done)
        assert said in error
    assert not Path("runs").exists()


def tokenized(*words: str, document: str = "line") -> Any:
    return command("tokenize", "--document", document, "--tokenizer", "bytes", "-o", "out", *words)


def ledger(folder: str = "out") -> dict[str, int]:
    found: dict[str, int] = json.loads(Path(folder, "manifest.json").read_text())["ledger"]
    return found


def test_27_document_starts_that_fall_are_refused_at_open(store: Path) -> None:
    starts = np.load(store / "00000.idx").copy()
    starts[3] = starts[2]
    with (store / "00000.idx").open("wb") as file:
        np.save(file, starts)
    refused("00000")


def test_27_document_starts_that_end_elsewhere_are_refused_at_open(store: Path) -> None:
    starts = np.load(store / "00000.idx").copy()
    starts[-1] -= 1
    with (store / "00000.idx").open("wb") as file:
        np.save(file, starts)
    refused("00000")


@pytest.mark.parametrize("change", [-1, 1, -10_000])
def test_28_a_shard_of_another_length_is_refused_at_open(store: Path, change: int) -> None:
    path = store / "00000.bin"
    size = path.stat().st_size
    os.truncate(path, size + change)
    refused(f"{size + change:,}")


def test_28_a_shard_that_is_missing_is_named(store: Path) -> None:
    (store / "00000.bin").unlink()
    refused("00000.bin")


def test_29_a_shard_replaced_after_the_manifest_fails_the_check_with_both_hashes(store: Path) -> None:
    content = bytearray((store / "00000.bin").read_bytes())
    content[0] ^= 1
    (store / "00000.bin").write_bytes(content)
    done = command("tokenize", "--verify", str(store))
    assert done.exit_code == 6
    (error,) = errors(done)
    expected = {
        entry["name"]: entry["sha256"]
        for entry in json.loads((store / "manifest.json").read_text())["shards"][0]["files"]
    }
    assert "sha256" in error and expected["00000.bin"][:12] in error


def test_29_a_shard_of_another_store_fails_the_check(store: Path) -> None:
    assert command("tokenize", "debug", "-o", "other", "data.bos=false").exit_code == 0
    shutil.copyfile("other/manifest.json", store / "manifest.json")
    assert command("tokenize", "--verify", str(store)).exit_code == 6


def test_30_empty_documents_are_counted() -> None:
    Path("text.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in ["a", "", " \n\t", "b", "\u3000"] * 5)
    )
    done = tokenized("--input", "text.jsonl", "--valid", "0", document="file")
    assert done.exit_code == 0, done.output
    found = ledger()
    assert (found["read"], found["kept"], found["empty"]) == (25, 10, 15)


def test_30_bad_lines_are_counted_up_to_the_limit_with_their_places_and_then_fail() -> None:
    good = [json.dumps({"text": f"line {n}"}) for n in range(40)]
    bad = ["{", "[1]", "null", '{"body": 1}', '{"text": 5}', '{"text": null}', "not json", '{"text": "\\ud800"}']
    lines = [line for pair in zip(good, bad + [""] * 32, strict=True) for line in pair if line]
    Path("text.jsonl").write_text("\n".join(lines) + "\n")
    done = tokenized("--input", "text.jsonl", "--valid", "0", "--on-error", f"skip:{len(bad)}", document="file")
    assert done.exit_code == 0, done.output
    found = ledger()
    assert (found["read"], found["kept"], found["rejected"]) == (48, 40, len(bad))
    places = [json.loads(line) for line in Path("out/rejects.jsonl").read_text().splitlines()]
    assert len(places) == len(bad) and all("text.jsonl:" in str(entry) for entry in places)
    shutil.rmtree("out")
    failed = tokenized("--input", "text.jsonl", "--on-error", f"skip:{len(bad) - 1}", document="file")
    assert failed.exit_code == 2 and not Path("out").exists()
    (error,) = errors(failed)
    assert "text.jsonl:16" in error and f"number {len(bad)} of at most {len(bad) - 1}" in error


ODD = {
    "NUL": "a\x00b\n",
    "BOM": "\ufeffa line\n",
    "CRLF": "one\r\ntwo\r\n",
    "CR": "one\rtwo\r",
    "astral": "𝔐𝔢𝔤𝔞 🦈\n",
    "combining": "e\u0301\u0301\u0301\n",
    "right to left": "\u202eabc\u202c\n",
    "no end": "no line end",
    "separators": "a\u2028b\u2029c\x85d\x0be\x0cf\n",
}


@pytest.mark.parametrize("name", ODD)
def test_30_odd_text_comes_back_as_it_was(name: str) -> None:
    text = ODD[name] + "and the rest"
    Path("text.txt").write_bytes(text.encode())
    done = tokenized("--input", "text.txt", "--valid", "0", "--no-bos", "--no-eos", document="file")
    assert done.exit_code == 0, done.output
    tokenizer = load_tokenizer(Path("out/tokenizer"))
    raw = b"".join(tokenizer.token_bytes(int(token)) for token in np.fromfile("out/00000.bin", dtype=np.uint16))
    assert raw == text.removeprefix("\ufeff").encode()


def test_32_the_same_file_by_two_names_is_refused() -> None:
    Path("text.txt").write_text("some text\n")
    Path("link.txt").symlink_to("text.txt")
    for words in (("text.txt", "./text.txt"), ("text.txt", "link.txt"), ("text.txt", "*.txt"), (".", "te*.txt")):
        done = tokenized(*(word for name in words for word in ("--input", name)))
        assert done.exit_code == 2, (words, done.output)
        (error,) = errors(done)
        assert "listed twice" in error
    assert not Path("out").exists()


def test_36_a_store_shorter_than_a_window_is_refused_with_both_lengths() -> None:
    Path("text.txt").write_text("".join(f"a short line {n}\n" for n in range(20)))
    assert tokenized("--input", "text.txt", "--valid", "20%").exit_code == 0
    short = ledger()["train"]
    source = "{name: text, path: text.txt, document: line}"
    data = f"{{dir: out, seq_len: 5000, sources: [{source}], valid: {{fraction: 0.2}}}}"
    recipe = f"base: debug\nname: short\ndata: {data}\ntrain: {{batch_tokens: 5000}}\n"
    Path("short.yaml").write_text(recipe)
    before = tree(Path("out"))
    done = command("pretrain", "./short.yaml")
    assert done.exit_code == 2, done.output
    (error,) = errors(done)
    assert f"{short:,} tokens" in error and "5,000" in error
    assert tree(Path("out")) == before and not Path("runs").exists()


def test_35_the_number_of_workers_changes_no_byte() -> None:
    Path("text").mkdir()
    for number in range(5):
        Path(f"text/{number}.txt").write_text("".join(f"line {n} of file {number}\n" for n in range(50 * number + 1)))
    for workers in ("1", "3"):
        words = ("--input", "text", "--document", "line", "--valid", "10%", "--tokenizer", "bytes")
        done = command("tokenize", *words, "-j", workers, "-o", f"out-{workers}")
        assert done.exit_code == 0, done.output
    assert tree(Path("out-1")) == tree(Path("out-3"))


@pytest.mark.slow
def test_30_34_a_long_line_takes_no_memory_of_its_length() -> None:
    """A document of one line of 1.2 GB, with a bound of 500 MB on all processes together."""

    with Path("long.txt").open("wb") as file:
        for _ in range(1200):
            file.write(b"a long line of words " * 47_662)
    size = Path("long.txt").stat().st_size
    words = ["--input", "long.txt", "--tokenizer", "bytes", "-o", "out", "--valid", "0", "-j", "1", "--mem", "500MB"]
    # A process counts the memory of the one that started it, too, so a small one stands between it and these tests.
    between = "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:])\n"
    between += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    line = [sys.executable, "-c", between, sys.executable, "-m", "megalodon_cli", "tokenize", *words]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) * 1024 < 500e6
    assert ledger()["bytes"] == size and ledger()["kept"] == 1


@pytest.mark.parametrize("value", [276, 65_535])
def test_26_an_id_outside_the_vocabulary_never_reaches_the_model(store: Path, value: int) -> None:
    ids = np.fromfile(store / "00000.bin", dtype=np.uint16)
    vocabulary = json.loads((store / "manifest.json").read_text())["vocab_size"]
    assert value >= vocabulary
    ids[:] = value  # wherever training looks first
    ids.tofile(store / "00000.bin")
    done = pretrain(f"data.dir={store}")
    assert done.exit_code == 2, done.output
    (error,) = errors(done)
    assert str(value) in error.replace(",", "") and "00000" in error
    checked = command("tokenize", "--verify", str(store))
    assert checked.exit_code == 6 and len(errors(checked)) == 1
