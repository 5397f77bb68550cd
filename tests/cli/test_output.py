"""--quiet, --verbose and --log-file where people use them: tokenize, pretrain and runs."""

from pathlib import Path

import pytest
from small_runs import pretrain
from typer.testing import CliRunner, Result

from megalodon_cli.app import app


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("output"))
    shared = tmp_path_factory.getbasetemp() / "pretrain-data"
    shared.mkdir(exist_ok=True)
    Path("data").symlink_to(shared)
    monkeypatch.setattr("megalodon.training.metrics.matmul_peak", lambda *_: 1e9)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_quiet_leaves_the_result_and_nothing_else() -> None:
    Path("text.txt").write_text("a few words\n" * 50)
    line = ["tokenize", "--input", "text.txt", "--tokenizer", "bytes", "--valid", "0.0", "-o", "store"]
    done = run(*line, "-q")
    assert (done.exit_code, done.stderr) == (0, "") and "documents  read 1 = kept 1" in done.stdout
    done = pretrain("--stop-at-step", "1", "--quiet")
    assert (done.exit_code, done.stderr) == (0, "") and "step 1 was asked for" in done.stdout
    done = run("-q", "runs", "show", "debug")
    assert (done.exit_code, done.stderr) == (0, "") and done.stdout


def test_quiet_hides_no_error_and_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALODON_ZZZZZ", "1")
    for line in (["tokenize", "nope"], ["pretrain", "nope"], ["runs", "show", "nope"]):
        done = run("-q", *line)
        assert done.exit_code == 2
        assert [text.partition(":")[0] for text in done.stderr.splitlines()][:2] == ["warning", "error"]


def test_verbose_says_more() -> None:
    text = Path("text.txt")
    text.write_text("\n\n".join(f"document {number} of a few words" for number in range(300)))
    line = ["--stop-at-step", "1", "data.sources=[{name: own, path: text.txt, document: blank-line}]"]
    assert pretrain(*line, "data.dir=store", "-o", "a").exit_code == 0
    text.unlink()  # the store is used as it is, which only -v finds worth a line
    said = "the text of source own was not compared with the store"
    usual, more = (pretrain(*line, "data.dir=store", "-o", name, *v) for name, v in (("b", ()), ("c", ("-v",))))
    assert (usual.exit_code, more.exit_code) == (0, 0)
    assert said not in usual.stderr and said in more.stderr


def test_the_log_file_keeps_what_was_said_and_grows() -> None:
    Path("text.txt").write_text("a few words\n" * 50)
    log = ["--log-file", "log.txt"]
    run("tokenize", "--input", "text.txt", "--tokenizer", "bytes", "--valid", "0.0", "-o", "store", *log)
    first = Path("log.txt").read_text()
    done = pretrain("--stop-at-step", "1", *log)
    run("runs", "show", "nope", *log)
    text = Path("log.txt").read_text()
    assert text.startswith(first) and "\x1b[" not in text
    assert "step 1/6" in text and text.splitlines()[-1].startswith(("error: runs/nope", "hint: "))
    said = [line for line in done.stderr.splitlines() if line]
    assert [line for line in said if line not in text] == []
