"""`megalodon tokenize` in process: what it writes, prints and refuses."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from megalodon_cli.app import app


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with one text of 300 lines."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(f"line {n} of the text\n" for n in range(300)))
    return tmp_path


def run(*arguments: str, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(app, ["tokenize", *arguments], input=stdin)


PLAIN = ("--input", "text.txt", "--document", "line", "--tokenizer", "bytes", "-o", "out")


def test_text_to_tokens_and_then_up_to_date(work: Path) -> None:
    first = run(*PLAIN, "--valid", "10%")
    assert first.exit_code == 0, first.stderr
    assert "documents  read 300 = kept 300 + empty 0 + duplicate 0 + rejected 0" in first.stdout
    assert "text: 1 file, text (document: line)" in first.stderr
    assert sorted(os.listdir("out")) == ["00000.bin", "00000.idx", "manifest.json", "tokenizer", "valid"]
    again = run(*PLAIN, "--valid", "10%")
    assert again.exit_code == 0
    assert "note: out is up to date (" in again.stderr
    assert again.stdout.splitlines()[:2] == first.stdout.splitlines()[:2]


def test_training_a_tokenizer_and_using_it_again(work: Path) -> None:
    trained = run("--input", "text.txt", "--document", "line", "--train", "--vocab-size", "310", "-o", "a")
    assert trained.exit_code == 0, trained.stderr
    assert "vocabulary 310" in trained.stdout
    used = run("--input", "text.txt", "--document", "line", "--tokenizer", "a/tokenizer/tokenizer.model", "-o", "b")
    assert used.exit_code == 0, used.stderr
    assert Path("a/00000.bin").read_bytes() == Path("b/00000.bin").read_bytes()


def test_a_trained_tokenizer_is_compared_on_text_that_was_held_out(work: Path) -> None:
    common = ("--input", "text.txt", "--document", "line", "--valid", "30%")
    assert run(*common, "--tokenizer", "bytes", "-o", "plain").exit_code == 0
    trained = ("--train", "--vocab-size", "310")
    result = run(*common, *trained, "-o", "a", "--compare", "plain", "--compare", "bytes")
    assert result.exit_code == 0, result.stderr
    found = re.search(
        r"held out   ([0-9,]+) bytes, bytes/token: this ([0-9.]+), bytes 1.00, plain 1.00$", result.stdout, re.M
    )
    assert found and float(found[2]) > 1.2
    valid = json.loads(Path("a/valid/manifest.json").read_text())
    assert int(found[1].replace(",", "")) == valid["text_bytes"]
    again = run(*common, *trained, "-o", "a", "--compare", "a/tokenizer/tokenizer.model", "--compare", "a")
    assert f"this {found[2]}, bytes 1.00, a/tokenizer/tokenizer.model {found[2]}, a {found[2]}" in again.stdout
    wrong = run(*common, *trained, "-o", "b", "--compare", "nowhere")
    assert wrong.exit_code == 2 and "nowhere: no such file" in wrong.stderr and not Path("b").exists()


def test_looks_answer_in_json(work: Path) -> None:
    assert run(*PLAIN).exit_code == 0
    for look, key in (("--stats", "lengths"), ("--verify", "fingerprint"), ("--inspect=2", "documents")):
        shown = CliRunner().invoke(app, ["--json", "tokenize", look, "out"])
        document = json.loads(shown.stdout)
        assert (document["schema"], document["ok"]) == ("megalodon/tokenize/1", True)
        assert key in document["result"]
    rows = document["result"]["documents"]
    assert [row["trained"][0] for row in rows] == [False, False]
    assert all(all(row["trained"][1:]) and len(row["trained"]) == len(row["ids"]) for row in rows)


def test_stdin_is_an_input(work: Path) -> None:
    result = run("--input", "-", "--tokenizer", "bytes", "--no-bos", "--no-eos", "-o", "out", stdin="héllo\n".encode())
    assert result.exit_code == 0, result.stderr
    assert "tokens     kept 7 = train 7 + valid 0" in result.stdout


def test_a_recipe_with_changes(work: Path) -> None:
    result = run("debug", "data.dir=here", "--valid", "0.2", "--no-bos")
    assert result.exit_code == 0, result.stderr
    manifest = json.loads(Path("here/manifest.json").read_text())
    assert (manifest["bos"], manifest["request"]["valid"]["fraction"]) == (False, 0.2)
    assert "documents  read 512 = kept 512" in result.stdout


def test_looking_at_a_store(work: Path) -> None:
    assert run(*PLAIN).exit_code == 0
    stats = run("--stats", "out")
    assert stats.exit_code == 0
    assert "documents  read 300" in stats.stdout
    assert "16 to 31" in stats.stdout
    shown = run("--inspect", "2", "out")
    assert shown.stdout.splitlines()[0].startswith("document at 0, 20 tokens: <bos>|[[l|i|n|e| |0|")
    assert shown.stdout.splitlines()[1].endswith("|<eos>]]")
    assert len(shown.stdout.splitlines()) == 2
    assert run("--verify", "out").exit_code == 0
    raw = bytearray(Path("out/00000.bin").read_bytes())
    raw[0] ^= 3
    Path("out/00000.bin").write_bytes(raw)
    broken = run("--verify", "out")
    assert broken.exit_code == 6
    assert "shard 00000: sha256 is" in broken.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "nothing to do"),
        (("--input", "none.txt", "--tokenizer", "bytes", "-o", "out"), 2, "none.txt does not exist"),
        (("--input", "text.txt", "--tokenizer", "bytes"), 2, "give -o DIR"),
        (("--input", "text.txt", "-o", "out"), 2, "give --tokenizer bytes, FILE.model or hf:ORG/NAME, or --train"),
        (("--input", "text.txt", "--train", "--tokenizer", "bytes", "-o", "out"), 2, "both --tokenizer and --train"),
        (("--input", "text.txt", "--tokenizer", "text.txt", "-o", "out"), 2, "is not a SentencePiece model"),
        (("--input", "text.txt", "--tokenizer", "hf:a", "-o", "out"), 2, "expected hf:ORG/NAME"),
        (("--offline", "--input", "text.txt", "--tokenizer", "hf:a/b", "-o", "out"), 3, "--offline forbids it"),
        ((*PLAIN, "--input", "./text.txt"), 2, "listed twice"),
        ((*PLAIN, "--vocab-size", "500"), 2, "add --train or drop them"),
        ((*PLAIN, "--valid", "much"), 2, "expected a share"),
        ((*PLAIN, "--valid", "150%"), 2, "--valid"),
        ((*PLAIN, "--on-error", "maybe"), 2, "--on-error: `maybe` is not `fail` or `skip:N`"),
        ((*PLAIN, "--field", ""), 2, "--field: ``: string should have at least 1 character"),
        (("--input", "", "--tokenizer", "bytes", "-o", "out"), 2, "--input is empty"),
        (("--input", "hf:", "--tokenizer", "bytes", "-o", "out"), 2, "--input: ``"),
        (("--input", "text.txt", "--tokenizer", "bytes", "-o", ""), 2, "-o is empty"),
        (("--input", "text.txt", "--tokenizer", "", "-o", "out"), 2, "--tokenizer is empty"),
        (("--input", "text.txt", "--train", "--vocab-size", "9" * 20, "-o", "out"), 2, "--vocab-size: `9999"),
        (("--input", "text.txt", "--train", "--vocab-size", "0", "-o", "out"), 2, "--vocab-size: `0`"),
        (("debug", "--vocab-size", "0"), 2, "belongs to --input"),
        (("", "-o", "out"), 2, "the recipe or DIR is empty"),
        ((*PLAIN, "--field", "body"), 2, "plain text has no fields"),
        (("debug", *PLAIN), 2, "expected one of them"),
        (("debug", "--tokenizer", "bytes"), 2, "belongs to --input"),
        (("debgu",), 2, "debug"),
        (("debug", "data.sed=1"), 2, "unknown key"),
        (("finetune-lora",), 2, "expected one of kind pretrain"),
        (("quickstart", "data.sources.stdlib.path=nowhere"), 2, "nowhere is not a folder"),
        (("--verify", "nowhere"), 2, "not a token store"),
        (("--stats", "--verify", "out"), 2, "looks at one token store, and `--verify` is of no use there"),
        (("--stats", "out", "--tokenizer", "bytes", "-o", "x"), 2, "and `--tokenizer` is of no use there"),
        (("--verify", "out", "--no-bos"), 2, "and `--no-bos` is of no use there"),
        (("--inspect", "3"), 2, "none is given; expected `megalodon tokenize --inspect 3 DIR`"),
        (("--inspect", "0", "out"), 2, "--inspect"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    work: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == code, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(os.listdir()) == ["text.txt"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("arguments", [PLAIN, ("debug", "-o", "out")])
def test_a_signal_removes_what_is_half_written(
    work: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int, arguments: tuple[str, ...]
) -> None:
    seen: list[str] = []

    def interrupted(*_: object) -> None:
        seen.extend(path.name for path in work.glob(".work-*"))
        os.kill(os.getpid(), number)

    monkeypatch.setattr("megalodon.data.encode._Job._take", interrupted)
    before = signal.getsignal(number)
    assert run(*arguments).exit_code == code
    assert seen == [".work-out"]
    assert sorted(os.listdir()) == ["text.txt"]
    assert signal.getsignal(number) == before


def test_a_damaged_manifest_fails_the_check(work: Path) -> None:
    assert run(*PLAIN).exit_code == 0
    path = Path("out/manifest.json")
    manifest = json.loads(path.read_text())
    manifest["ledger"]["read"] = "x"
    path.write_text(json.dumps(manifest))
    for flag, code in (("--verify", 6), ("--stats", 2)):
        result = run(flag, "out")
        assert result.exit_code == code
        assert 'error: out/manifest.json: ledger.read is "x", expected a count; tokenize again' in result.stderr


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\nb\xffd\n", "a.txt:2: not UTF-8 (byte 0xff at offset 6)"),
        ("a.txt", b"\n\n", "the sources hold no text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl:2:10: not JSON"),
        ("a.jsonl", b'{"body": "a"}\n', "a.jsonl:1:1: field `text` is missing; the fields are body"),
    ],
)
def test_bad_text_is_placed(work: Path, name: str, content: bytes, message: str) -> None:
    (work / name).write_bytes(content)
    result = run("--input", name, "--tokenizer", "bytes", "-o", "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert sorted(os.listdir()) == [name, "text.txt"]


def test_a_missing_library_is_the_environments_fault(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(work)})
    result = run("quickstart")
    assert result.exit_code == 3
    assert "data.sources.stdlib.path=DIR" in result.stderr
    assert sorted(os.listdir()) == ["text.txt"]
