"""What `megalodon generate` shows while it reads, writes and answers files. Not here: its options, the work itself."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from megalodon.errors import EnvironmentFault, InputError, MegalodonError
from megalodon_cli import console

if TYPE_CHECKING:
    from megalodon.inference.batch_files import Defaults
    from megalodon.inference.conversation import Conversation
    from megalodon.inference.norm_window import NormStats
    from megalodon.inference.session import Answering, Writer
    from megalodon.inference.text_file import TextFile
    from megalodon_cli.chat_screen import Files

REPORT_SECONDS = 10.0
"""Between two lines of progress where there is no terminal."""


class SessionFiles(NamedTuple):
    """Where a session comes from and where it goes."""

    state: Path | None
    save_state: Path | None
    kv: bool
    rebuild: bool

    def check(self) -> None:
        """Raises: InputError before anything is loaded, for options that do not fit or a place that cannot be used."""
        if self.kv and self.save_state is None:
            raise InputError("--kv goes with --save-state FILE: it keeps keys and values in that file")
        if self.rebuild and self.state is None:
            raise InputError("--rebuild goes with --state FILE: it reads the transcript of that session again")
        if self.state is not None and not self.state.is_file():
            raise InputError(f"{self.state}: no such file; expected a session that --save-state or /save wrote")
        if self.save_state is not None and (self.save_state.is_dir() or not self.save_state.parent.is_dir()):
            raise InputError(f"{self.save_state}: expected a file in a folder that is there")
        if self.save_state is not None:
            from megalodon.inference.session_file import check_target

            check_target(self.save_state)
            if not os.access(self.save_state.parent, os.W_OK):
                raise EnvironmentFault(f"{self.save_state}: the folder {self.save_state.parent} cannot be written to")


class Progress:
    """The progress of one file that is read: tokens a second, share, time left."""

    def __init__(self, name: object, size: int, given_up: Callable[[], bool]) -> None:
        self.name, self.size, self.given_up = name, size, given_up
        self.tokens = 0
        self._screen = console.Progress()
        self._began = self._told = time.perf_counter()

    def __enter__(self) -> Self:
        self._screen.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._screen.__exit__(*error)

    def __call__(self, size: int, tokens: int) -> None:
        """Bytes and tokens so far. Raises: KeyboardInterrupt once it was given up."""
        if self.given_up():
            raise KeyboardInterrupt
        self.tokens, now = tokens, time.perf_counter()
        passed, share = max(now - self._began, 1e-9), size / self.size
        keep = now - self._told >= REPORT_SECONDS
        self._told = now if keep else self._told
        left = duration(passed * (1 - share) / max(share, 1e-9))
        shown = f"{self.name}: {tokens:,} tokens, {tokens / passed:,.0f} tok/s, {share:.0%}, {left} left"
        self._screen.update(shown, share=share, keep=keep)

    def summary(self) -> str:
        """What it was, once it is done."""
        passed = max(time.perf_counter() - self._began, 1e-9)
        return f"read {self.name}: {self.tokens:,} tokens in {duration(passed)}, {self.tokens / passed:,.0f} tok/s"


def open_conversation(
    writer: "Writer",
    files: SessionFiles,
    norm_stats: "NormStats | None",
    system: str | None,
    *,
    raw: bool,
    piece: int | None = None,
) -> "Conversation":
    """Begin, go on with a saved session, or read its transcript again; `piece`: tokens of a pass, if not the usual.

    Raises: InputError.
    """
    from megalodon.inference.conversation import Conversation
    from megalodon.inference.session import PIECE, Session

    if files.state is None:
        session = Session(writer.model, piece=piece or PIECE, norm_stats=norm_stats or "cumulative")
        return Conversation(writer, session, system, raw=raw)
    talk = _rebuilt(writer, files.state, norm_stats, raw) if files.rebuild else load(writer, files.state, raw=raw)
    talk.session.piece = piece or talk.session.piece
    if norm_stats not in (None, talk.session.norm_stats):
        raise InputError(
            f"{files.state} was read with --norm-stats {talk.session.norm_stats}; leave the option out, "
            "or --rebuild reads its transcript again"
        )
    if system is not None:
        if talk.messages:
            raise InputError(f"{files.state} holds turns already, so its system text cannot change; leave --system out")
        talk.system = system
    return talk


def load(writer: "Writer", path: Path, *, raw: bool = False) -> "Conversation":
    """Go on with a saved session. Raises: CheckpointError."""
    from megalodon.inference.conversation import Conversation

    talk = Conversation.load(writer, path, raw=raw)
    console.info(f"{path}: {talk.session.position:,} tokens, {talk.turns} answers")
    return talk


def save(talk: "Conversation", path: Path, *, kv: bool = False) -> str:
    """Save a session; returns what to say of it."""
    talk.save(path, kv=kv)
    return f"saved {path}: {_size(path.stat().st_size)}, {talk.session.position:,} tokens, {talk.turns} answers"


def chat_files(raw: bool) -> "Files":
    """What the screen of a chat does with files."""
    from megalodon.inference.text_file import open_text
    from megalodon_cli.chat_screen import Files

    def loaded(talk: "Conversation", path: Path) -> "tuple[Conversation, str]":
        found = load(talk.writer, path, raw=raw)
        return found, f"branch {found.current}"

    return Files(lambda talk, path, given_up: read_text(talk, open_text(path), given_up), save, loaded)


def _rebuilt(writer: "Writer", path: Path, norm_stats: "NormStats | None", raw: bool) -> "Conversation":
    from megalodon.inference.conversation import Conversation, Reading
    from megalodon.inference.session_file import load_history
    from megalodon.inference.text_file import open_text

    def read(talk: Conversation, entry: Reading) -> None:
        file = open_text(Path(entry.name))
        if file.sha256 != entry.sha256:
            was = f"the session read {entry.sha256[:8]}"
            raise InputError(f"{file.path} has sha256 {file.sha256[:8]}, {was}; put that file back")
        console.info(read_text(talk, file))

    history = load_history(path)
    console.info(f"{path}: reading its transcript again")
    return Conversation.rebuild(writer, history._replace(norm_stats=norm_stats or history.norm_stats), read, raw=raw)


def read_text(talk: "Conversation", file: "TextFile", given_up: Callable[[], bool] = lambda: False) -> str:
    """Read a text file of any size with progress; returns what to say of it.

    `given_up` is asked now and then. Raises: KeyboardInterrupt once it says so; the conversation is where it was then.
    """
    from megalodon.inference.conversation import Reading
    from megalodon.inference.text_file import token_ids

    with Progress(file.path, file.size, given_up) as progress:
        ids = token_ids(file, talk.writer.tokenizer, progress)
        talk.read(ids, lambda: Reading(str(file.path), file.sha256, progress.tokens))
        return progress.summary()


class Written(NamedTuple):
    """What is to be told of answers besides their text."""

    details: dict[str, Any]
    """For the document."""
    footer: str


class Shown:
    """An answer that is shown as it is written; the command iterates, so that its walk to the kernels stays short."""

    def __init__(self) -> None:
        self._moments, self._pieces = [time.perf_counter()], list[str]()

    def show(self, piece: str) -> None:
        """Stream a piece to stdout."""
        self._moments.append(time.perf_counter())
        self._pieces.append(piece)
        console.write(piece)

    def written(self, talk: "Conversation") -> Written:
        """End the line; returns what to say of the answer, which is the conversation's last."""
        answer, text, moments = talk.answer, "".join(self._pieces), self._moments
        assert answer is not None
        if not text.endswith("\n"):
            console.write("\n")
        count, first = answer.new_tokens, moments[1] - moments[0]
        speed = (count - 1) / max(moments[count] - moments[1], 1e-9) if count > 1 else count / max(first, 1e-9)
        details = {
            "text": text,
            "finish_reason": answer.finish,
            "prompt_tokens": answer.read_tokens,
            "new_tokens": count,
            "tokens_per_second": round(speed, 2),
            "first_token_seconds": round(first, 4),
        }
        return Written(details, f"{count:,} tokens, {speed:.1f} tok/s, first token {first:.2f} s")


def write_samples(talk: "Conversation", text: str | None, how: "Answering", count: int) -> Written:
    """Write several answers to a turn (None: go on), and show them one after the other."""
    began = time.perf_counter()
    samples = talk.samples(text, how, count)
    seconds = max(time.perf_counter() - began, 1e-9)
    for number, sample in enumerate(samples):
        console.info(f"sample {number + 1} of {count}, seed {how.sampling.seed + number}")
        console.write(sample.text if sample.text.endswith("\n") else sample.text + "\n")
    total = sum(sample.new_tokens for sample in samples)
    shown = [{"seed": how.sampling.seed + number, **sample._asdict()} for number, sample in enumerate(samples)]
    details = {"samples": shown, "new_tokens": total, "tokens_per_second": round(total / seconds, 2)}
    return Written(details, f"{total:,} tokens in {count} samples, {total / seconds:.1f} tok/s")


def report(talk: "Conversation", directory: Path, how: "Answering", written: Written | None) -> None:
    """Say what it cost, and print the document."""
    size = talk.session.memory
    place = (
        f"context {talk.session.position:,}, state {_size(size)} ({'constant' if talk.session.constant else 'grows'})"
    )
    console.info(f"{written.footer}, {place}, seed {how.sampling.seed}" if written else place)
    common: dict[str, Any] = {
        "model": str(directory),
        "truncated_tokens": 0,
        "context": talk.session.position,
        "state_bytes": size,
        "norm_stats": talk.session.norm_stats,
    }
    if written:
        common |= {**written.details, "sampling": vars(how.sampling)}
    console.document("generate", common)


def answer_file(
    writer: "Writer", source: Path, target: Path, defaults: "Defaults", *, batch_size: int, go_on: bool
) -> None:
    """Answer a file of prompts. Raises: MegalodonError (exit 1) at the end if a line could not be used."""
    from megalodon.inference.batch_files import Done, write_answers

    began = told = time.perf_counter()
    with console.Progress() as progress:

        def told_of(record: dict[str, Any], done: Done) -> None:
            nonlocal told
            console.stream(record)
            if record["finish_reason"] == "error":
                progress.line(f"{record['error']}")
            now = time.perf_counter()
            keep, passed = now - told >= REPORT_SECONDS, max(now - began, 1e-9)
            told = now if keep else told
            text = f"{done.answered:,} answered, {done.failed:,} failed, {done.tokens / passed:,.1f} tok/s"
            progress.update(text, keep=keep)

        done = write_answers(writer, source, target, defaults, batch_size=batch_size, go_on=go_on, told=told_of)
    seconds = max(time.perf_counter() - began, 1e-9)
    console.info(
        f"{target}: {done.answered:,} answered, {done.skipped:,} done before, {done.failed:,} failed; "
        f"{done.tokens:,} tokens, {done.tokens / seconds:,.1f} tok/s, seed {defaults.sampling.seed}"
    )
    if done.failed:
        raise MegalodonError(f"{done.failed:,} lines of {source} could not be used; their errors stand in {target}")


def duration(seconds: float) -> str:
    """Seconds as 3.2s, 15m or 2.1h."""
    if seconds < 100:
        return f"{seconds:.1f}s"
    return f"{seconds / 60:.0f}m" if seconds < 6000 else f"{seconds / 3600:.1f}h"


def _size(count: int) -> str:
    """Bytes as kB, MB or GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
