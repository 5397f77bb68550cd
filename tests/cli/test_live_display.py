"""The live display on a terminal of 80 columns, and plain lines everywhere else."""

import os
import re
import sys

import pexpect
import pytest

PROGRAM = """
from megalodon_cli import console
console.configure(console.Settings({settings}))
with console.Progress() as live:
    for step in (1, 2, 3):
        live.update(f"plain {{step}}", (f"step {{step}}/3  " + "x" * 90, f"loss {{step}}"), step / 3, keep=step != 2)
        if step == 2:
            console.warning("careful")
console.info("end")
"""
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def shown(settings: str = "", **environment: str) -> str:
    """What the program writes to a terminal."""
    variables = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "TERM")}
    child = pexpect.spawn(
        sys.executable,
        ["-c", PROGRAM.format(settings=settings)],
        dimensions=(24, 80),
        env={**variables, "TERM": "xterm-256color", **environment},
        encoding="utf-8",
        timeout=60,
    )
    child.expect(pexpect.EOF)
    return str(child.before)


def test_a_terminal_shows_a_bar_that_is_redrawn_and_messages_above_it(tmp_path):
    text = shown(f"log_file=__import__('pathlib').Path({str(tmp_path / 'log')!r})")
    assert "plain" not in text and "━" in text and "\x1b[2K" in text
    plain = ESCAPES.sub("", text).replace("\r\n", "\n")
    lines = [line.rpartition("\r")[2] for line in plain.split("\n")]
    assert max(map(len, lines)) <= 80 and any(line.endswith("…") for line in lines)
    assert lines.index("warning: careful") < len(lines) - 1 and lines[-2] == "end"
    assert lines[-3] == "loss 3" and "step 3/3" in lines[-4]  # the last state stays
    assert (tmp_path / "log").read_text() == "plain 1\nwarning: careful\nplain 3\nend\n"


@pytest.mark.parametrize(("environment", "settings"), [({"NO_COLOR": "1"}, ""), ({}, "color='never'")])
def test_no_color_means_none(environment, settings):
    text = shown(settings, **environment)
    assert "━" in text and not re.search(r"\x1b\[[0-9;]*[39][0-9]*m", text)


def test_a_dumb_terminal_gets_plain_lines():
    assert shown(TERM="dumb").split() == ["plain", "1", "warning:", "careful", "plain", "3", "end"]


def test_quiet_hides_the_display():
    assert "step" not in shown("quiet=True") and "careful" in shown("quiet=True")


def test_a_stream_of_ascii_gets_ascii():
    text = ESCAPES.sub("", shown(PYTHONIOENCODING="ascii", PYTHONUTF8="0"))
    assert text.isascii() and "---" in text
