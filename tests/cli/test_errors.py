"""What the shell makes of mistakes and failures: one line, a hint, the right exit code; and the shared options."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from megalodon.errors import CheckFailed, Stopped
from megalodon_cli import console
from megalodon_cli.app import Shell, app, everywhere, spelled


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def failing(error: Exception, *arguments: str) -> Result:
    """Run a command `fail` that raises."""
    shell = typer.Typer(cls=Shell)
    shell.callback()(everywhere)

    @shell.command()
    def fail() -> None:
        raise error

    return CliRunner().invoke(shell, ["fail", *arguments])


@pytest.mark.parametrize(
    "line, message",
    [
        ("pretrian debug", "error: pretrian: no such command; did you mean pretrain?"),
        ("recipes chek", "error: chek: no such command; did you mean check?"),
        ("zzz", "error: zzz: no such command; commands: tokenize, "),
        ("recipes ls --jsno", "error: --jsno: no such option; did you mean --json?"),
        ("pretrain debug --max-step 3", "error: --max-step: no such option; did you mean --max-steps?"),
        ("recipes show", "error: missing argument `RECIPE"),
        ("recipes ls --color pink", "error: invalid value for `--color`"),
        ("-q --json pretrain debug", "error: --json: pretrain prints a document only with --dry-run"),
        ("recipes show debug --optim.lr", "error: command line: --optim.lr: expected a value, such as --optim.lr 1e-3"),
        ("pretrain -c", "error: command line: -c: expected a value, such as -c my.yaml"),
        ("pretrain -c debugg", "error: no recipe debugg; did you mean debug?"),
    ],
)
def test_mistakes_on_the_command_line_end_with_2_and_the_nearest_name(line, message):
    result = run(*line.split())
    assert result.exit_code == 2
    assert result.stderr.startswith(message), result.stderr


def test_an_error_with_an_exit_code_becomes_one_line_and_that_code():
    result = failing(CheckFailed("sums differ: 3 and 4", "tokenize again"))
    assert result.exit_code == 6
    assert result.stderr == "error: sums differ: 3 and 4\nhint: tokenize again\n"
    stopped = failing(Stopped("stopping after step 4: saved; the same command continues"))
    assert (stopped.exit_code, stopped.stderr[:19]) == (75, "stopping after step")


def test_an_unexpected_error_is_a_bug_with_a_report_that_holds_no_data(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = failing(KeyError("wz"), "--debug")
    assert result.exit_code == 1
    assert "error: internal: KeyError: 'wz' in cli/test_errors.py:" in result.stderr
    assert "this is a bug" in result.stderr and "Traceback" in result.stderr
    [report] = tmp_path.glob("megalodon-crash-*.txt")
    text = report.read_text()
    assert str(report) in result.stderr
    assert text.startswith("megalodon fail\npython 3.") and "torch 2." in text and "Traceback" in text
    assert "Traceback" not in failing(KeyError("wz")).stderr


def test_a_full_disk_is_the_environments_fault():
    result = failing(OSError(28, "No space left on device", "runs/x"))
    assert (result.exit_code, result.stderr) == (3, "error: runs/x: no space left on device\n")


@pytest.mark.parametrize("number", [errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES])
def test_a_path_that_cannot_be_is_your_input(number):
    result = failing(OSError(number, os.strerror(number), "runs/x"))
    assert (result.exit_code, result.stderr) == (2, f"error: runs/x: {os.strerror(number).lower()}\n")


def test_an_error_of_the_system_without_a_path_stays_a_bug(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert "internal: FileNotFoundError" in failing(OSError(errno.ENOENT, "No such file or directory")).stderr


def test_a_name_that_is_too_long_is_said_in_one_line():
    for line in (["runs", "show", "x" * 300], ["recipes", "check", f"./{'x' * 300}.yaml"]):
        result = run(*line)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ") and result.stderr.endswith(": file name too long\n")
        assert result.stderr.count("\n") == 1


def test_a_log_file_that_cannot_be_written_is_refused(tmp_path):
    for path, why in ((tmp_path / "no" / "x", "no such file or directory"), (tmp_path, "is a directory")):
        result = run("--log-file", str(path), "runs", "show", "nope")
        assert (result.exit_code, result.stderr) == (2, f"error: --log-file {path}: cannot be written: {why}\n")


def test_a_log_file_that_goes_away_is_a_warning(tmp_path, capsys):
    console.configure(console.Settings(log_file=tmp_path / "gone" / "log.txt"))
    console.info("step 1")
    console.info("step 2")
    shown = capsys.readouterr().err.splitlines()
    assert shown[0].startswith(f"warning: {tmp_path}/gone/log.txt: no such file") and shown[1:] == ["step 1", "step 2"]


def test_ctrl_c_ends_with_130():
    assert failing(KeyboardInterrupt()).exit_code == 130  # type: ignore[arg-type]


def test_a_failure_is_a_document_too():
    for line in (["--json", "recipes", "show", "qickstart"], ["recipes", "show", "qickstart", "--json"]):
        result = run(*line)
        shown = json.loads(result.stdout)
        assert (shown["ok"], shown["exit_code"], shown["error"]["kind"]) == (False, 2, "RecipeError")
        assert "did you mean quickstart?" in shown["error"]["message"]
    placed = json.loads(run("recipes", "check", "debug", "optim.lrr=1", "--json").stdout.splitlines()[-1])
    assert placed["error"]["file"] == "command line: optim.lrr=1"


def test_a_closed_pipe_ends_quietly():
    read, write = os.pipe()
    os.close(read)
    for arguments in (["--help"], ["--version"]):
        done = subprocess.run([sys.executable, "-m", "megalodon_cli", *arguments], stdout=write, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (0, b"")
    os.close(write)


def test_underscores_hyphens_and_dotted_options_are_the_same():
    result = run("recipes", "schema", "--log_file", os.devnull, "seed")
    assert (result.exit_code, result.stderr[:18]) == (2, "error: no key seed")
    assert spelled(["pretrain", "200m", "--optim.lr", "1e-3", "--train.seed=2", "-o", "x", "--", "--a.b"]) == (
        ["pretrain", "200m", "optim.lr=1e-3", "train.seed=2", "-o", "x", "--", "--a.b"]
    )
    assert spelled(["generate", "-p", "--a.b"]) == ["generate", "-p", "--a.b"]
    assert spelled(["pretrain", "-c", "a.yaml", "--config", "b", "--config=c"]) == ["pretrain", "a.yaml", "b", "c"]


def test_quiet_hides_notes_and_the_log_file_keeps_messages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "note: no runs here" in run("runs", "ls").stderr
    assert run("-q", "runs", "ls").stderr == ""
    log = Path("log.txt")
    run("runs", "ls", "--log-file", str(log))
    run("--log-file", str(log), "runs", "show", "x")
    assert log.read_text().splitlines()[0].startswith("note: no runs here")
    assert log.read_text().splitlines()[1].startswith("error: runs/x is not a run")


def test_colour_is_given_when_asked_and_left_out_otherwise(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" not in run("recipes", "ls").output
    assert "\x1b[" in run("recipes", "ls", "--color", "always").stdout
    assert "\x1b[" not in run("--color", "never", "recipes", "ls").output
    assert "NO_COLOR" not in os.environ


def test_help_is_everywhere_and_shows_the_exit_codes():
    top = run("-h").stdout
    assert all(
        text in top for text in ("Data", "Model", "Run", "Everywhere", "Exit codes", "75", "same command continues")
    )
    for command in ("tokenize", "pretrain", "generate", "profile", "doctor", "recipes show", "recipes cp", "runs show"):
        text = run(*command.split(), "-h").stdout
        assert "--quiet" in text, command
        assert len([line for line in text.splitlines() if " megalodon " in line and "Usage" not in line]) >= 3, command
    assert run().stdout == top
    assert run("recipes").exit_code == 0
    assert run("--version").stdout.startswith("megalodon 0.")


def test_a_warning_appears_once_and_its_count_at_the_end(capsys):
    console.configure(console.Settings())
    for _ in range(3):
        console.warning("text was cut")
    console.finish()
    assert capsys.readouterr().err == "warning: text was cut\nwarning: text was cut (3 times)\n"


def test_a_stream_without_unicode_gets_ascii(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    console.configure(console.Settings())
    console.result(f"{console.mark('ok')} 3 × 4 – naïve")
    assert raw.getvalue() == b"ok 3 x 4 - na\\xefve\n"


def test_amounts_are_short():
    amounts = [console.amount(number) for number in (7, 1000, 220_627_968, 10**10, 2 * 10**12)]
    assert amounts == ["7", "1k", "220.6M", "10B", "2T"]
    assert console.amount(2.5e9, " ", "G") == "2.5 G"


def test_progress_is_plain_lines_when_not_on_a_terminal(capsys):
    console.configure(console.Settings())
    with console.Progress() as progress:
        progress.update("step 1")
        progress.line("saved step 1")
        progress.update("step 2")
    assert capsys.readouterr().err == "step 1\nsaved step 1\nstep 2\n"
