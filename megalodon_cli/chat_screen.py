"""The chat: lines of a person, commands, answers as they are written.

On a terminal lines are edited, with a history and pastes of several lines; elsewhere they are read as they come, so
that a script can talk. Ctrl-C ends an answer and keeps what was said; Ctrl-D leaves.
Not here: what a turn does (megalodon/inference/conversation.py).
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megalodon.errors import InputError, MegalodonError
from megalodon_cli import console, generation

if TYPE_CHECKING:
    from megalodon.inference.conversation import Conversation
    from megalodon.inference.session import Answering

PROMPT = "> "
QUOTES = '"""'
SETTINGS: dict[str, type] = {
    "temperature": float,
    "top-k": int,
    "top-p": float,
    "min-p": float,
    "repetition-penalty": float,
    "seed": int,
    "max-new-tokens": int,
}


class Leave(Exception):
    """The person leaves."""


class Files(NamedTuple):
    """What the screen does with files, by their paths; the command gives it."""

    read: Callable[["Conversation", Path, Callable[[], bool]], str]
    """Reads a file into the conversation; returns what to say of it. Raises: InputError; KeyboardInterrupt."""
    save: Callable[["Conversation", Path], str]
    load: Callable[["Conversation", Path], tuple["Conversation", str]]


class Interrupts:
    """Ctrl-C while an answer is written: the first asks for its end, one more ends it at once."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, a first Ctrl-C only sets `asked`."""
        self.asked = False
        before = signal.signal(signal.SIGINT, self._receive)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def given_up(self) -> bool:
        """Whether a Ctrl-C asks for the end of the answer."""
        return self.asked

    def _receive(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class Chat:
    """A conversation on the screen.

    Args:
        talk:  the conversation.
        how:   how answers are written; /set changes it.
        files: what /read, /save and /load do.
        history: where lines are kept for the next time; None keeps them for this one.
    """

    def __init__(self, talk: "Conversation", how: "Answering", files: Files, history: Path | None = None) -> None:
        self.talk, self.how, self._files = talk, how, files
        self._interrupts, self._saved = Interrupts(), self._said()
        self._lines = _terminal_lines(history) if sys.stdin.isatty() else _plain_lines

    def run(self) -> None:
        """Talk until the person leaves."""
        if sys.stdin.isatty():
            console.info("/help lists the commands; Ctrl-C ends an answer, Ctrl-D leaves")
        while True:
            try:
                text = self._turn()
                if text.strip():
                    self._act(text)
            except (Leave, EOFError):
                return
            except KeyboardInterrupt:
                console.info("Ctrl-D or /exit leaves")
            except MegalodonError as error:
                console.error(str(error))
                if error.hint:
                    console.hint(error.hint)
            except BrokenPipeError:
                raise
            except OSError as error:
                console.error(f"{error.filename or 'disk'}: {(error.strerror or str(error)).lower()}")

    def _turn(self) -> str:
        """One turn of the person: a line, or a block between lines of three quotes. Raises: EOFError at the end."""
        line = self._lines(PROMPT)
        if not line.lstrip().startswith(QUOTES):
            return line
        block = [line.lstrip().removeprefix(QUOTES)]
        while not block[-1].rstrip().endswith(QUOTES) or len("".join(block)) < len(QUOTES):
            block.append(self._lines(". "))
        block[-1] = block[-1].rstrip().removesuffix(QUOTES)
        return "\n".join(block).strip("\n")

    def _act(self, text: str) -> None:
        if text.strip() in ("exit", "quit"):
            raise Leave
        if not text.startswith("/") or "\n" in text:
            self._answer(lambda: self.talk.ask(text, self.how, self._interrupts.given_up))
            return
        name, _, rest = text[1:].strip().partition(" ")
        command = COMMANDS.get(name.replace("_", "-"))
        if command is None:
            from megalodon.config import suggest

            near = suggest(name, COMMANDS)
            raise InputError(f"/{name}: no such command; " + (f"did you mean /{near}?" if near else "see /help"))
        if rest.strip() and not command.takes:
            raise InputError(f"/{name} takes nothing, got `{rest.strip()}`")
        if not rest.strip() and command.takes and not command.takes.startswith("["):
            raise InputError(f"/{name}: expected {command.takes}, got nothing")
        command.run(self, rest.strip())

    def _answer(self, begin: Callable[[], Iterator[str]]) -> None:
        """Show an answer as it is written, then what it cost."""
        shown = generation.Shown()
        with self._interrupts.watched():
            for piece in begin():
                shown.show(piece)
        said = shown.written(self.talk).details
        ended = {"stop": "", "length": ", cut at max-new-tokens", "interrupted": ", stopped by you"}
        console.info(
            f"{said['new_tokens']:,} tokens{ended[said['finish_reason']]}, {said['tokens_per_second']:.1f} tok/s, "
            f"first token {said['first_token_seconds']:.2f} s, context {self.talk.session.position:,}"
        )

    # ------------------------------------------------------------------------------------------- commands

    def _help(self, rest: str) -> None:
        width = max(len(f"/{name} {c.takes}") for name, c in COMMANDS.items())
        for name, command in COMMANDS.items():
            console.result(f"{f'/{name} {command.takes}'.ljust(width)}  {command.help}")
        console.result(f"{QUOTES} begins and ends a turn of several lines; so does a paste")

    def _new(self, rest: str) -> None:
        name = self.talk.new(self.talk.system)
        console.info(f"a new conversation, branch {name}; the others: {self._others()}")

    def _system(self, rest: str) -> None:
        name = self.talk.new(rest)
        console.info(f"a new conversation under this system text, branch {name}; the others: {self._others()}")

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        name = "temperature" if name == "temp" else name.replace("_", "-")
        if name not in SETTINGS:
            raise InputError(f"/set {name}: unknown; known: {', '.join(SETTINGS)}")
        try:
            number = SETTINGS[name](value.strip())
        except ValueError:
            raise InputError(f"/set {name}: expected a number, got `{value.strip()}`") from None
        if name == "max-new-tokens":
            if number < 1:
                raise InputError(f"/set {name}: expected at least 1, got {number}")
            self.how = self.how._replace(max_new_tokens=number)
        else:
            self.how = self.how._replace(sampling=replace(self.how.sampling, **{name.replace("-", "_"): number}))
        console.info(f"{name} {number}")

    def _status(self, rest: str) -> None:
        talk = self.talk
        for name in SETTINGS:
            value = (
                self.how.max_new_tokens
                if name == "max-new-tokens"
                else getattr(self.how.sampling, name.replace("-", "_"))
            )
            console.result(f"{name:<20}{value}")
        console.result(f"{'context':<20}{talk.session.position:,} tokens, {talk.turns} answers")
        how = "(constant)" if talk.session.constant else "(grows)"
        console.result(f"{'state':<20}{console.amount(talk.session.memory, ' ', 'G')}B {how}")
        console.result(f"{'branch':<20}{talk.current}; others: {self._others()}")
        console.result(f"{'system':<20}{talk.system or '-'}")

    def _others(self) -> str:
        return ", ".join(name for name in self.talk.branches if name != self.talk.current) or "none"

    def _history(self, rest: str) -> None:
        from megalodon.inference.conversation import Reading

        for entry in self.talk.entries:
            if isinstance(entry, Reading):
                console.result(f"[read {entry.name}: {entry.tokens:,} tokens]")
            else:
                console.result(f"{entry['role']}: {entry['content']}")

    def _retry(self, rest: str) -> None:
        self._answer(lambda: self.talk.retry(self.how, self._interrupts.given_up))

    def _undo(self, rest: str) -> None:
        if rest and not (rest.isdecimal() and len(rest) < 10):
            raise InputError(f"/undo: expected a number of turns, got `{rest}`")
        undone = self.talk.undo(int(rest or 1))
        console.info(f"taken back: {len(undone)} entries; {self.talk.turns} answers are left")

    def _branch(self, rest: str) -> None:
        before = self.talk.current
        self.talk.branch(rest)
        console.info(f"now in branch {rest}; /checkout {before} goes back")

    def _checkout(self, rest: str) -> None:
        self.talk.checkout(rest)
        console.info(f"now in branch {rest}, {self.talk.turns} answers")

    def _read(self, rest: str) -> None:
        with self._interrupts.watched():
            console.info(self._files.read(self.talk, _path(rest), self._interrupts.given_up))

    def _save(self, rest: str) -> None:
        console.info(self._files.save(self.talk, _path(rest)))
        self._saved = self._said()

    def _load(self, rest: str) -> None:
        if self._said() != self._saved:
            self._saved = self._said()
            raise InputError("/load would drop what was said here; /save FILE first, or /load again to drop it")
        self.talk, said = self._files.load(self.talk, _path(rest))
        self._saved = self._said()
        console.info(said)

    def _said(self) -> tuple[object, ...]:
        """What would be lost with this conversation."""
        return self.talk.entries, tuple(self.talk.branches)

    def _export(self, rest: str) -> None:
        from megalodon.inference.conversation import exported

        if not self.talk.messages:
            raise InputError("/export: nothing was said yet")
        path = _path(rest)
        try:
            with path.open("a+b") as lines:
                begins = not lines.tell() or (lines.seek(-1, os.SEEK_END), lines.read(1))[1] == b"\n"
                lines.write((b"" if begins else b"\n") + exported(self.talk.messages).encode())
        except OSError as error:
            raise InputError(f"{path}: {(error.strerror or str(error)).lower()}") from None
        console.info(f"{path}: one more conversation of {len(self.talk.messages)} messages")

    def _exit(self, rest: str) -> None:
        raise Leave


class Command(NamedTuple):
    """A command of the chat: what it takes ([] may be left out), what it does."""

    takes: str
    help: str
    run: Callable[[Chat, str], None]


COMMANDS: dict[str, Command] = {
    "help": Command("", "this list", Chat._help),
    "new": Command("", "begin a new conversation; this one stays as a branch", Chat._new),
    "system": Command("TEXT", "begin a new conversation under this system text", Chat._system),
    "set": Command("NAME VALUE", f"change {', '.join(SETTINGS)}", Chat._set),
    "status": Command("", "settings, length of the context, branches", Chat._status),
    "history": Command("", "what was said", Chat._history),
    "retry": Command("", "write the last answer again, otherwise", Chat._retry),
    "undo": Command("[N]", "take back the last N turns or files", Chat._undo),
    "branch": Command("NAME", "go on in a new branch; the old one stays here", Chat._branch),
    "checkout": Command("NAME", "go on in another branch", Chat._checkout),
    "read": Command("FILE", "read a text of any length", Chat._read),
    "save": Command("FILE", "write the session to a file", Chat._save),
    "load": Command("FILE", "go on with a session of a file", Chat._load),
    "export": Command("FILE", "append the conversation as a line of messages, ready for finetuning", Chat._export),
    "exit": Command("", "leave; also /quit, exit, Ctrl-D", Chat._exit),
    "quit": Command("", "leave", Chat._exit),
}


def history_file() -> Path | None:
    """Return where the lines of a person are kept: under XDG_STATE_HOME; None if there is no place for them."""
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    path = Path(base) / "megalodon" / "chat_history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return None
    return path


def _path(text: str) -> Path:
    if "\0" in text:
        raise InputError("a file name cannot hold the character 0")
    return Path(text.strip("'\"")).expanduser()


def _plain_lines(prompt: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def _terminal_lines(history: Path | None) -> Callable[[str], str]:
    """Lines edited on the terminal. Several pasted lines are one turn."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.output import create_output

    kept: Any = FileHistory(str(history)) if history else InMemoryHistory()
    words = WordCompleter([f"/{name}" for name in COMMANDS], sentence=True)
    # Where answers go to a file, prompts are drawn on stderr.
    screen = create_output(always_prefer_tty=True)
    session: Any = PromptSession(history=kept, completer=words, complete_while_typing=False, output=screen)
    return lambda prompt: str(session.prompt(prompt))
