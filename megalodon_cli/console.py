"""The one module that prints: results to stdout, everything else to stderr.

    from megalodon_cli import console

    console.result("text")                  a line of the result, on stdout
    console.write("par"), console.write("t")    pieces of a result, flushed at once (streamed text)
    console.table([["name", "loss"], …])    aligned columns on stdout; the first row is the header
    console.document("evaluate", {…})       with --json: the one document `megalodon/evaluate/1`, on stdout
    console.stream({…})                     with --json: one JSON line of a stream
    console.wants_json()                    whether --json was given; then print only the document
    console.info("text")                    a plain line on stderr (progress, timing); hidden by -q
    console.note("text")                    `note: text` on stderr; hidden by -q
    console.detail("text")                  a plain line on stderr, only with -v
    console.warning("text")                 `warning: text` on stderr, once; the number of repetitions comes last
    console.error("…"), console.hint("…")   `error: …`, `hint: …`: commands raise instead, app.py calls these
    with console.Progress() as progress:    a live display on a terminal, a plain line per call elsewhere
        progress.update("step 1/240 …")     also with a bar: lines=("step 1/240", "loss 3.41"), share=0.004
        progress.line("saved step 120")     a line of its own that stays
    console.amount(220627968)               "220.6M"

`result`, `write` and `table` print nothing under --json. Streams that cannot encode a character get ASCII; NO_COLOR and
TERM=dumb are obeyed. Not here: what a message says.
"""

import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TextIO

Color = Literal["auto", "always", "never"]
Mark = Literal["ok", "bad", "skipped"]


@dataclass
class Settings:
    """What the options of the whole command line ask of the output."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    debug: bool = False
    offline: bool = False
    """Nothing is fetched, whatever is named."""
    color: Color = "auto"
    log_file: Path | None = None
    warnings: Counter[str] = field(default_factory=Counter)
    """Every warning so far and how often it came."""
    variables: dict[str, str] = field(default_factory=dict)
    """Options whose value came from the environment, with the variable of each."""
    run: tuple[Path, str] | None = None
    """The run directory this command works on and its recipe, for the report of an unexpected error."""


_settings = Settings()


def configure(settings: Settings) -> None:
    """Take over the settings of this command; called by app.py before a command runs."""
    global _settings
    _settings = settings


def settings() -> Settings:
    """Return the settings of this command."""
    return _settings


def wants_json() -> bool:
    """Return whether the result is to be one JSON document."""
    return _settings.json


_ASCII = {
    "✓": "ok",
    "✗": "x",
    "–": "-",
    "·": "-",
    "…": "...",
    "×": "x",
    "±": "+-",
    "→": "->",
    "█": "#",
    "─": "-",
    "│": "|",
}
_ASCII |= {"•": "*", "└": "+", "┤": "|", "≤": "<=", "≥": ">=", **dict(zip("▁▂▃▄▅▆▇", "..::||#", strict=True))}
BAR = 16
"""Width of the bar of the live display, in characters."""
REDRAW_SECONDS = 0.1
"""The live display is redrawn no more often."""


def _encodable(text: str, stream: TextIO) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        plain = "".join(_ASCII.get(c, c) if ord(c) > 127 else c for c in text)
        return plain.encode(encoding, "backslashreplace").decode(encoding)
    return text


def _emit(stream: TextIO, text: str, end: str = "\n") -> None:
    print(_encodable(text, stream), end=end, file=stream, flush=True)


def _colored(stream: TextIO) -> bool:
    if _settings.color != "auto":
        return _settings.color == "always"
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def _paint(text: str, code: str, stream: TextIO) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if _colored(stream) else text


def _message(text: str, label: str = "", code: str = "") -> None:
    """A line on stderr, and the same without colour in the log file."""
    _log(f"{label}: {text}" if label else text)
    shown = f"{_paint(label + ':', code, sys.stderr)} {text}" if label else text
    if not (_live and _live[-1].above(shown)):
        _emit(sys.stderr, shown)


def _log(plain: str) -> None:
    """Append a line to the log file, if one was asked for."""
    if _settings.log_file:
        path, _settings.log_file = _settings.log_file, None
        try:
            with path.open("a", encoding="utf-8", errors="backslashreplace") as log:
                log.write(plain + "\n")
            _settings.log_file = path
        except OSError as error:  # the work goes on without its log
            warning(f"{path}: {(error.strerror or str(error)).lower()}; messages are no longer kept there")


def result(text: str = "") -> None:
    """Print a line of the result."""
    if not _settings.json:
        _emit(sys.stdout, text)


def write(text: str) -> None:
    """Print a piece of the result without a line's end, at once."""
    if not _settings.json:
        _emit(sys.stdout, text, end="")


def info(text: str) -> None:
    """Print a plain line beside the result; `-q` hides it."""
    if not _settings.quiet:
        _message(text)


def note(text: str) -> None:
    """Print something worth knowing; `-q` hides it."""
    if not _settings.quiet:
        _message(text, "note", "36")


def detail(text: str) -> None:
    """Print a plain line that only `-v` shows."""
    if _settings.verbose:
        _message(text)


def warning(text: str) -> None:
    """Print a warning once; `finish` says how often it came."""
    _settings.warnings[text] += 1
    if _settings.warnings[text] == 1:
        _message(text, "warning", "33;1")


def error(text: str, excerpt: str = "") -> None:
    """Print an error and the source line it stands in."""
    _message(printable(" ".join(text.splitlines())), "error", "31;1")
    if excerpt:
        _message(excerpt)


def hint(text: str) -> None:
    """Print what helps against the error above."""
    _message(text, "hint", "36")


def finish() -> None:
    """Say how often the repeated warnings came; called by app.py when a command ends."""
    for text, count in _settings.warnings.items():
        if count > 1:
            _message(f"{text} ({count} times)", "warning", "33;1")
    _settings.warnings.clear()


def document(kind: str, result: Any) -> None:
    """Print the JSON document of a command, if --json was given."""
    if _settings.json:
        warnings = [{"text": text, "count": count} for text, count in _settings.warnings.items()]
        shown = {"schema": f"megalodon/{kind}/1", "ok": True, "result": result, "warnings": warnings}
        _emit(sys.stdout, json.dumps(shown, ensure_ascii=False))


def stream(row: Any) -> None:
    """Print one value of a stream as a JSON line, if --json was given."""
    if _settings.json:
        _emit(sys.stdout, json.dumps(row, ensure_ascii=False))


def failure(problem: Mapping[str, Any], exit_code: int) -> None:
    """Print the JSON document of a failure, if --json was given."""
    if _settings.json:
        _emit(sys.stdout, json.dumps({"ok": False, "error": problem, "exit_code": exit_code}, ensure_ascii=False))


def mark(kind: Mark) -> str:
    """Return ✓, ✗ or –, coloured on a terminal."""
    sign, code = {"ok": ("✓", "32"), "bad": ("✗", "31;1"), "skipped": ("–", "2")}[kind]
    return _paint(sign, code, sys.stdout)


def printable(text: str) -> str:
    """Return a text that data or a model wrote without what would steer a terminal; newlines and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def marked(text: str, stream: TextIO | None = None) -> str:
    """Return a piece of a text that stands out: in colour, or in [[ ]] where there is none.

    Args:
        stream: where it will be shown; None = stdout.
    """
    stream = stream or sys.stdout
    if not _colored(stream):
        return f"[[{text}]]"
    return "\n".join(_paint(line, "32", stream) if line else "" for line in text.split("\n"))


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Print aligned columns; the first row is the header, columns numbered in `right` are aligned to the right."""
    if _settings.json or not rows:
        return
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for number, row in enumerate(rows):
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        line = "  ".join(cells).rstrip()
        _emit(sys.stdout, line if number else _paint(line, "1", sys.stdout))


def amount(number: float, space: str = "", giga: str = "B") -> str:
    """Return 220627968 as `220.6M`; `giga` is what 10**9 is called: B of tokens, G of bytes and operations."""
    for unit, size in (("T", 1e12), (giga, 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}".removesuffix(".0") + space + unit
    return f"{number:.0f}{space}"


def width() -> int:
    """Return the width of the terminal, in characters; 100 where there is none."""
    return shutil.get_terminal_size((100, 24)).columns


_live: list["Progress"] = []


class Progress:
    """A live display on a terminal, redrawn by `update`; a plain line per call elsewhere; nothing with `-q`."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._display: Any = None
        """A rich.live.Live once there is something to show."""
        self._drawn = 0.0

    def update(self, text: str, lines: Sequence[str] = (), share: float | None = None, *, keep: bool = True) -> None:
        """Show where the work stands.

        Args:
            text:  the plain line, for what is no terminal and for the log file.
            lines: what a terminal shows instead; the first stands beside the bar.
            share: 0 … 1, draws a bar.
            keep:  False only redraws the terminal.
        """
        if _settings.quiet:
            return
        if not self._terminal:
            if keep:
                _message(text)
            return
        if keep:
            _log(text)
        self._show(_live_lines([_encodable(line, sys.stderr) for line in lines or (text,)], share))

    def _show(self, shown: Any) -> None:
        if self._display is None:
            from rich.live import Live

            self._display = Live(shown, console=_rich(), auto_refresh=False)
            self._display.start(refresh=True)
            self._drawn = time.monotonic()
            return
        due = time.monotonic() - self._drawn >= REDRAW_SECONDS
        self._drawn = time.monotonic() if due else self._drawn
        self._display.update(shown, refresh=due)

    def line(self, text: str) -> None:
        """Print a line that stays, above the live display."""
        if not _settings.quiet:
            _message(text)

    def above(self, text: str) -> bool:
        """Print a line of a message above the live display; False if nothing is displayed."""
        if self._display is None:
            return False
        from rich.text import Text

        self._display.console.print(Text.from_ansi(_encodable(text, sys.stderr)), soft_wrap=True)
        return True

    def __enter__(self) -> Self:
        _live.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is not None:  # the last state stays on the screen
            self._display.refresh()
            self._display.stop()
            self._display = None
        _live.remove(self)


def _rich() -> Any:
    """Return rich's console on stderr, under our rules for colour."""
    from rich.console import Console

    return Console(file=sys.stderr, force_terminal=True, no_color=not _colored(sys.stderr), highlight=False)


def _live_lines(lines: Sequence[str], share: float | None) -> Any:
    """Return what the live display draws: a bar with the first line beside it, the others below, none folded."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    shown: list[Any] = [Text(line, no_wrap=True, overflow="ellipsis") for line in lines]
    if share is not None:
        row = Table.grid(padding=(0, 1))
        row.add_row(ProgressBar(total=1.0, completed=share, width=BAR), shown[0])
        shown[0] = row
    return Group(*shown)
