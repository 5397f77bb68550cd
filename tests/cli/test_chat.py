"""The chat in a real terminal and through a pipe: commands, Ctrl-C, pastes, the end of the input."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
import torch
from factories import endless, tiny_model

from megalodon.checkpoint.tensors import save_model
from megalodon.data.chat import ChatFormat, load_template
from megalodon.data.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer(reserve=2)
SIZES = {"vocab_size": TOKENIZER.vocab_size, "chunk_size": 16}
PROMPT = ">\x08\x1b\\[2C"
"""How the prompt is drawn, once a line may be typed."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model directory with a chat template; its weights are random, and greedily it never ends its turn."""
    directory = tmp_path_factory.mktemp("chat") / "my model"
    chat = ChatFormat(load_template("chatml"), TOKENIZER, bos=True)

    def files(place: Path) -> None:
        TOKENIZER.save(place)
        chat.save(place)

    meta = {"tokenizer_sha256": TOKENIZER.sha256, "bos": True}
    save_model(endless(tiny_model(torch.float32, **SIZES), chat.stop_ids), directory, files, meta)
    return directory


def environment(tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "COLUMNS": "80",
        "LINES": "24",
        "TERM": "xterm",
    } | {
        "PROMPT_TOOLKIT_NO_CPR": "1"  # pexpect is a terminal that does not answer where its cursor is
    }


def command(model: Path, *options: str) -> list[str]:
    return ["-m", "megalodon_cli", "generate", str(model), "--chat", "--seed", "1", *options]


@pytest.fixture
def terminal(model, tmp_path):
    """A function that starts a chat on a terminal and waits for its first prompt."""
    started = []

    def start(*options: str) -> pexpect.spawn:
        child = pexpect.spawn(
            sys.executable,
            command(model, *options),
            env=environment(tmp_path),
            cwd=tmp_path,
            encoding="utf-8",
            codec_errors="replace",
            timeout=60,
            dimensions=(24, 80),
        )
        started.append(child)
        child.expect(PROMPT)
        return child

    yield start
    for child in started:
        child.close(force=True)


def leave(child: pexpect.spawn) -> None:
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_a_conversation(terminal):
    child = terminal("-n", "6")
    child.send("Hello there\r")
    child.expect(r"\d+ tokens.*context [\d,]+")
    child.expect(PROMPT)
    child.send("/status\r")
    child.expect("1 answers")
    child.expect(r"branch\s+main; others: none")
    child.expect(PROMPT)
    child.send("/undo\r")
    child.expect("taken back: 2 entries; 0 answers are left")
    child.send("/udno\r")
    child.expect("error:.*/udno: no such command; did you mean /undo?")
    child.send("/exit\r")
    leave(child)


def test_prompts_do_not_go_where_answers_go(model, tmp_path):
    line = subprocess.list2cmdline([sys.executable, *command(model, "-n", "3")]) + " > said.txt"
    child = pexpect.spawn("sh", ["-c", line], env=environment(tmp_path), cwd=tmp_path, encoding="utf-8", timeout=60)
    child.expect(PROMPT)
    child.send("Hello there\r")
    child.expect("context")
    child.expect(PROMPT)
    child.sendeof()
    leave(child)
    said = (tmp_path / "said.txt").read_text()
    assert "Hello" not in said and "> " not in said
    assert said.strip()


def test_an_empty_prompt_is_no_wish_to_talk(model, tmp_path):
    line = ["-m", "megalodon_cli", "generate", str(model), "-p", ""]
    child = pexpect.spawn(sys.executable, line, env=environment(tmp_path), cwd=tmp_path, encoding="utf-8", timeout=60)
    child.expect("the prompt has zero tokens|the turn is empty")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 2


def test_ctrl_c_ends_the_answer_only(terminal):
    child = terminal("-n", "100000", "--temperature", "0")
    child.send("Hello\r")
    child.expect("\x1b\\[\\?2004l")  # the line is taken
    child.expect(".{200}")  # more than what ends the line: the answer has begun, and Ctrl-C is its own
    child.sendintr()
    child.expect("tokens, stopped by you")
    child.expect(PROMPT)
    child.send("/set max-new-tokens 3\r")
    child.expect("max-new-tokens 3")
    child.send("And now?\r")
    child.expect("[123] tokens")
    child.expect(PROMPT)
    child.sendintr()
    child.expect("Ctrl-D or /exit leaves")
    child.expect(PROMPT)
    child.sendeof()
    leave(child)


def test_a_paste_of_several_lines_is_one_turn(terminal):
    child = terminal("-n", "2")
    child.send("\x1b[200~first line\nsecond line\n\nlast\x1b[201~")
    child.send("\r")
    child.expect(r"tokens.*context")
    child.expect(PROMPT)
    child.send("/export said.jsonl\r")
    child.expect("one more conversation of 2 messages")
    child.expect(PROMPT)
    child.sendeof()
    leave(child)
    line = json.loads((Path(child.cwd) / "said.jsonl").read_text())
    assert line["messages"][0] == {"role": "user", "content": "first line\nsecond line\n\nlast"}


def test_lines_are_edited_on_a_terminal_of_any_size(terminal):
    child = terminal("-n", "2")
    child.setwinsize(10, 30)
    os.kill(child.pid, signal.SIGWINCH)
    child.send("a line that is longer than the terminal is now wide, by far\x01X\r")  # Ctrl-A: to the beginning
    child.expect("tokens")
    child.expect(PROMPT)
    child.send("\x1b[A\x1b[A")  # up, past nothing: the line before
    child.send("\r")
    child.expect("tokens")
    child.expect(PROMPT)
    child.send("/export said.jsonl\r")
    child.expect("one more")
    child.expect(PROMPT)
    child.sendeof()
    leave(child)
    line = json.loads((Path(child.cwd) / "said.jsonl").read_text())
    turns = [message["content"] for message in line["messages"] if message["role"] == "user"]
    assert turns == ["Xa line that is longer than the terminal is now wide, by far"] * 2


def test_lines_are_kept_for_the_next_time(terminal, tmp_path):
    child = terminal("-n", "1")
    child.send("remember me\r")
    child.expect("tokens")
    child.expect(PROMPT)
    child.sendeof()
    leave(child)
    again = terminal("-n", "1")
    again.send("\x1b[A\r")
    again.expect("remember me")
    again.expect("tokens")
    again.expect(PROMPT)
    again.sendeof()
    leave(again)
    kept = tmp_path / "state" / "megalodon" / "chat_history"
    assert "remember me" in kept.read_text()
    assert kept.stat().st_mode & 0o077 == 0


def piped(model: Path, tmp_path: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command(model, "-n", "3", *options)],
        input=text,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(tmp_path),
        timeout=120,
        check=False,
    )


def test_a_script_can_talk(model, tmp_path):
    (tmp_path / "book.txt").write_text("A long book. " * 50)
    script = [
        "Hello",
        '"""',
        "two",
        'lines"""',
        "/read book.txt",
        "What was it?",
        "/retry",
        "/branch other",
        "More",
        "/checkout main",
        "/history",
        "/system Be brief.",
        "Hi",
        "/checkout main",
        "/export said.jsonl",
        "exit",
        "never read",
    ]
    done = piped(model, tmp_path, "\n".join(script))
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr
    assert "[read book.txt: 650 tokens]" in done.stdout
    assert "user: two\nlines\n" in done.stdout
    assert "now in branch other; /checkout main goes back" in done.stderr
    messages = json.loads((tmp_path / "said.jsonl").read_text())["messages"]
    assert [m["content"] for m in messages if m["role"] == "user"] == ["Hello", "two\nlines", "What was it?"]


def test_mistakes_are_one_line_and_the_talk_goes_on(model, tmp_path):
    mistakes = {
        "/nothing": "/nothing: no such command; see /help",
        "/undo": "1 cannot be undone; turns and files that can: 0",
        "/undo two": "/undo: expected a number of turns, got `two`",
        "/undo 0": "0 cannot be undone",
        "/retry": "there is no answer to write again",
        "/new now": "/new takes nothing, got `now`",
        "/branch": "/branch: expected NAME, got nothing",
        "/branch main": "branch main exists",
        "/checkout x": "no branch x; there are: main",
        "/set heat 3": "/set heat: unknown; known: temperature",
        "/set temp hot": "/set temperature: expected a number, got `hot`",
        "/set top-p 7": "top_p is 7.0; expected above 0",
        "/set temperature nan": "temperature is nan; expected 0",
        "/set max-new-tokens 0": "expected at least 1, got 0",
        "/read nothing.txt": "nothing.txt: no such file",
        "/read .": "is a directory",
        "/read bad.txt": "bad.txt: byte 3 is 0xff, which is not UTF-8",
        "/load nothing.mega": "nothing.mega",
        "/save no/where.mega": "no/where.mega",
        "/undo " + "9" * 5000: "/undo: expected a number of turns",
        "/read " + "a" * 300: "file name too long",
        "/load " + "a" * 300: "file name too long",
        "/export said.jsonl": "/export: nothing was said yet",
        "/export": "/export: expected FILE",
        "/read a\0b": "a file name cannot hold the character 0",
        "/save a\0b": "a file name cannot hold the character 0",
        "/save bad.txt": "bad.txt is there and is no session",
    }
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    done = piped(model, tmp_path, "\n".join([*mistakes, "Hello", "/history"]) + "\n")
    assert done.returncode == 0, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(mistakes), done.stderr
    for line, expected in zip(errors, mistakes.values(), strict=True):
        assert expected in line
    assert "user: Hello" in done.stdout


def test_without_input_there_is_nothing_to_do(model, tmp_path):
    def closed(*options: str) -> subprocess.CompletedProcess[str]:
        line = subprocess.list2cmdline([sys.executable, *command(model)[:-3], *options]) + " <&-"
        return subprocess.run(
            ["sh", "-c", line], capture_output=True, text=True, env=environment(tmp_path), timeout=120, check=False
        )

    assert closed("--chat").returncode == 0
    done = closed()
    assert done.returncode == 2, done.stderr
    assert "the turn is empty" in done.stderr


def test_raw_has_no_system_text(model, tmp_path):
    done = piped(model, tmp_path, "/system Be brief.\nHello\n/history\n", "--raw")
    assert "a system text needs a chat template, and --raw uses none" in done.stderr
    assert "system: " not in done.stdout


def test_what_is_not_saved_is_not_dropped_by_a_load(model, tmp_path):
    first = piped(
        model, tmp_path, "Hello\n/save talk.mega\n/load talk.mega\nMore\n/load talk.mega\n/load talk.mega\n/history\n"
    )
    errors = [line for line in first.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: /load would drop what was said here; /save FILE first, or /load again to drop it"]
    assert "user: More" not in first.stdout


def test_conversations_are_exported_one_a_line(model, tmp_path):
    (tmp_path / "said.jsonl").write_text('{"messages": []}')  # no newline at its end
    piped(model, tmp_path, "Hello\n/export said.jsonl\n/export said.jsonl\n")
    lines = (tmp_path / "said.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["messages"]) for line in lines] == [0, 2, 2]


def test_a_session_is_saved_and_goes_on(model, tmp_path):
    first = piped(model, tmp_path, "Hello\nAnd?\n/branch side\nMore\n/save talk.mega\n")
    assert "error" not in first.stderr, first.stderr
    again = piped(model, tmp_path, "/load talk.mega\n/history\n/undo\n/checkout main\n/history\nOn\n")
    assert "error" not in again.stderr, again.stderr
    assert "user: More" in again.stdout
    assert again.stdout.count("user: Hello") == 2
