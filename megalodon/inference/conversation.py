"""A conversation with a model: turns, files it reads, undo, branches; all in constant memory.

    talk = Conversation(writer, Session(writer.model))
    for text in talk.ask("Hello", Answering(SamplingConfig(), 256)): ...
    talk.undo(1);  talk.branch("other");  talk.checkout("main")

Every turn keeps the place before it, which shares its large part with its neighbours (session.py), so that going back
reads less than a chunk however long the conversation is. Not here: the screen (megalodon_cli/chat_screen.py), the file
of a session (session_file.py), how turns become ids (megalodon/data/chat.py).
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from megalodon.data.chat import Message
from megalodon.errors import CheckpointError, InputError
from megalodon.inference.batch import Request, Written, write_together
from megalodon.inference.sampling import allowed_ids
from megalodon.inference.session import ZERO_TOKENS, Answering, Finish, Session, Snapshot, Writer, Writing
from megalodon.inference.session_file import Contents, History, Mark, load_session, save_session
from megalodon.inference.stream import Stops
from megalodon.model.architectures import as_megalodon

KEPT = 32
"""Places before turns that are kept; further back nothing can be undone."""


class Reading(NamedTuple):
    """A file that was read between two turns: what the transcript keeps of it."""

    name: str
    sha256: str
    tokens: int


Entry = Message | Reading


class Answer(NamedTuple):
    """How the last answer went."""

    finish: Finish
    new_tokens: int
    read_tokens: int


@dataclass(frozen=True)
class _Place:
    """Somewhere in a conversation: what was said, and where the session stands."""

    entries: tuple[Entry, ...]
    snapshot: Snapshot
    earlier: tuple["_Place", ...] = field(default=(), repr=False)
    """The places before the last turns, the oldest first, without earlier ones of their own."""


class Conversation:
    """Turns with one model.

    Args:
        writer:  the model; without a chat template its answers continue the text as it stands.
        session: of its model; what it has read already comes before the first turn.
        system:  the first turn, if any. Raises: InputError for a model without a chat template.
        entries: what the session has read already.
        raw:     use no chat template.
    """

    def __init__(
        self,
        writer: Writer,
        session: Session,
        system: str | None = None,
        entries: Sequence[Entry] = (),
        *,
        raw: bool = False,
    ) -> None:
        self.writer, self.session = writer, session
        self._chat = None if raw else writer.chat
        self._allowed = allowed_ids(writer.tokenizer, writer.model.config.num_outputs, [self.end])
        self._ends = {self.end, writer.tokenizer.eos_id}
        self.entries: tuple[Entry, ...] = tuple(entries)
        self._earlier: tuple[_Place, ...] = ()
        self.current = "main"
        """Name of the branch that grows."""
        self._branches: dict[str, _Place] = {}
        self._blank = Session(session.model, None, session.piece, session.norm_stats).snapshot()
        self._asked = 0
        self.answer: Answer | None = None
        """How the last answer went; None before the first one."""
        self.system = system

    @property
    def system(self) -> str | None:
        """What the model is told first. Setting it raises: InputError without a chat template."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        if text is not None and self._chat is None:
            why = "and --raw uses none" if self.writer.chat else "which this model does not have; finetune it with one"
            raise InputError(f"a system text needs a chat template, {why}")
        self._system = text

    @property
    def end(self) -> int:
        """The id that ends an answer."""
        return min(self._chat.stop_ids) if self._chat else self.writer.tokenizer.eos_id

    @property
    def messages(self) -> tuple[Message, ...]:
        """The turns, without files."""
        return tuple(entry for entry in self.entries if not isinstance(entry, Reading))

    @property
    def turns(self) -> int:
        """Answers so far."""
        return sum(message["role"] == "assistant" for message in self.messages)

    # ------------------------------------------------------------------------------------------- forward

    def ask(self, text: str, how: Answering, given_up: Callable[[], bool] = lambda: False) -> Writing:
        """A user's turn; iterating over what is returned reads it and yields the answer as it is written.

        At the end `answer` says how it went. Broken off before, the conversation stays where it was. `given_up` is
        asked after every token; once it says so, what was said so far is the answer. While the turn is read it raises
        GivenUp instead: nothing was said.
        Raises: InputError for an empty turn; DataError if the template refuses it. Nothing has changed then.
        """
        before, new = self._place(), self._new(text)
        return self._answer(before, new, self._opening((*self.messages, *new)), how, given_up)

    def go_on(self, how: Answering, given_up: Callable[[], bool] = lambda: False) -> Writing:
        """Write on where the session stands. Raises: InputError if the last turn of a chat has its answer."""
        self._check_unanswered()
        return self._answer(self._place(), (), [], how, given_up)

    def _check_unanswered(self) -> None:
        if self._chat and self.turns:
            raise InputError("the last turn of this session has its answer; ask something: -p TEXT")

    def _answer(
        self, before: "_Place", new: tuple[Message, ...], ids: list[int], how: Answering, given_up: Callable[[], bool]
    ) -> Writing:
        """Read `ids`, those of the new turns, and write the answer to them."""

        def done(writing: Writing) -> None:
            self._close(writing.unread)
            self.entries = (*self.entries, *new, {"role": "assistant", "content": writing.text})
            self._earlier = (*self._earlier, replace(before, earlier=()))[-KEPT:]
            self.answer = Answer(writing.finish, len(writing.ids), len(ids))

        how = how._replace(sampling=replace(how.sampling, seed=(how.sampling.seed + self._asked) % 2**63))
        self._asked += 1
        writing = Writing(self.session, self.writer.tokenizer, ids, how, self._ends, self._allowed, given_up)
        writing.done, writing.undone, writing.unwanted = done, lambda: self._go(before), given_up
        return writing

    def samples(self, text: str | None, how: Answering, count: int) -> list[Written]:
        """Write several answers to one turn (None: go on), all at once; none becomes part of the conversation.

        Sample i has the seed of `how` plus i - 1. Raises: as `ask`, or as `go_on`.
        """
        if text is None:
            self._check_unanswered()
        before = self._place()
        ids = self._opening((*self.messages, *self._new(text))) if text is not None else []
        stops, seed = Stops(how.stop), how.sampling.seed
        samplings = [replace(how.sampling, seed=(seed + number) % 2**63) for number in range(count)]
        try:
            if ids:
                self.session.feed(ids)
            requests = [Request((), how.max_new_tokens, sampling, stops, ids) for sampling in samplings]
            return write_together(self.writer, [self.session.branch() for _ in requests], requests, self._ends)
        finally:
            self._go(before)

    def _new(self, text: str) -> tuple[Message, ...]:
        """A user's turn, behind the system text if it is the first. Raises: InputError for an empty one."""
        if not (text.strip() if self._chat else text):
            raise InputError("the turn is empty; expected text" if self._chat else f"the prompt has {ZERO_TOKENS}")
        start = () if self.system is None or self.messages else ({"role": "system", "content": self.system},)
        return (*start, {"role": "user", "content": text})

    def _close(self, ids: Sequence[int]) -> None:
        """Read the rest of an answer, and what ends it; without a template the text simply goes on behind it."""
        for token in (*ids, self.end) if self._chat else ids:
            self.session.step(token)

    def read(self, ids: Iterable[int], about: Callable[[], Reading]) -> None:
        """Read a file of any length into the conversation. `about` is asked for its entry once all was read.

        Raises: what `ids` raises; the conversation is where it was then.
        """
        before = self._place()
        try:
            if self.session.position == 0 and self.writer.bos:
                self.session.feed([self.writer.tokenizer.bos_id])
            self.session.feed(ids)
        except BaseException:
            self._go(before)
            raise
        self.entries = (*self.entries, about())
        self._earlier = (*self._earlier, replace(before, earlier=()))[-KEPT:]

    def _opening(self, messages: tuple[Message, ...]) -> list[int]:
        """The ids to read so that the model answers; a session that must read all anew is put at its beginning."""
        tokenizer, began = self.writer.tokenizer, self.session.position > 0
        if self._chat is None:
            ids = self._text_ids(messages[-1]["content"])
            return ids if began or not self.writer.bos else [tokenizer.bos_id, *ids]
        if not self.turns:
            ids = self._chat.encode(messages, answer=True).ids
            return ids[1:] if began and ids[:1] == [tokenizer.bos_id] else ids
        more = self._chat.continuation(self.messages, messages)
        if more is not None:
            return more
        if any(isinstance(entry, Reading) for entry in self.entries):
            raise InputError(
                "the chat template writes earlier turns anew, and files that were read stand between them; "
                "start over with /new and read the files first"
            )
        ids = self._chat.encode(messages, answer=True).ids
        self.session.rewind(self._blank)
        return ids

    def _text_ids(self, text: str) -> list[int]:
        """The ids of a text that goes on from here. Raises: DataError for text that UTF-8 cannot hold."""
        tokenizer = self.writer.tokenizer
        if not self.session.position or any("\ud800" <= character <= "\udfff" for character in text):
            return tokenizer.encode(text)  # which says where half a surrogate pair stands
        ids: list[int] = tokenizer.encode_array(text, begins=False).tolist()
        return ids

    # ------------------------------------------------------------------------------------------- in a file

    def save(self, path: Path, *, kv: bool = False) -> None:
        """Write a session file; with keys and values (`kv`) it goes on bit for bit. Raises: as `save_session`."""
        session, writer = self.session, self.writer
        if writer.owner is None:
            raise InputError(f"{path}: this model is of no model directory, so nothing could tell whose session it is")
        contents = Contents(
            here=_mark(self._place()),
            turns=tuple(map(_mark, self._earlier)),
            branches={name: _mark(place) for name, place in self._branches.items()},
            current=self.current,
            system=self.system,
            norm_stats=session.norm_stats,
            state=session.state if kv else None,
        )
        save_session(path, contents, as_megalodon(writer.model, "a session file"), writer.owner)

    @classmethod
    def load(cls, writer: Writer, path: Path, *, raw: bool = False) -> "Conversation":
        """Go on where a session file stands. Raises: CheckpointError as `load_session`."""
        if writer.owner is None:
            raise InputError(
                f"{path}: this model is of no model directory, so nothing tells whether the session is its"
            )
        contents = load_session(path, as_megalodon(writer.model, "a session file"), writer.owner)
        talk = cls(writer, Session(writer.model, norm_stats=contents.norm_stats), contents.system, raw=raw)
        try:
            talk._go(replace(_place_of(contents.here), earlier=tuple(map(_place_of, contents.turns))))
            talk._branches = {name: _place_of(mark) for name, mark in contents.branches.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: its transcript is none of ours: {error!r}") from error
        talk.session.rewind(contents.here.snapshot, contents.state)
        talk.current = contents.current
        return talk

    @classmethod
    def rebuild(
        cls, writer: Writer, history: History, read: Callable[["Conversation", Reading], None], *, raw: bool = False
    ) -> "Conversation":
        """Read the transcript of a session again, with any model; `read` reads its files.

        Raises: what `read` raises; InputError for a system text and a model without a chat template.
        """
        talk = cls(writer, Session(writer.model, norm_stats=history.norm_stats), raw=raw)
        for entry in map(entry_of, history.transcript):
            if isinstance(entry, Reading):
                read(talk, entry)
            elif entry["role"] == "system":
                talk.system = entry["content"]
            elif entry["role"] == "user":
                before, new = talk._place(), talk._new(entry["content"])
                talk.session.feed(talk._opening((*talk.messages, *new)))
                talk.entries = (*talk.entries, *new)
                talk._earlier = (*talk._earlier, replace(before, earlier=()))[-KEPT:]
            else:
                talk._close(talk._text_ids(entry["content"]))
                talk.entries = (*talk.entries, entry)
        if not talk.messages:
            talk.system = history.system
        return talk

    # ------------------------------------------------------------------------------------------- back and aside

    def undo(self, count: int = 1) -> tuple[Entry, ...]:
        """Go back before the last `count` turns or files; returns what was taken back.

        Raises: InputError if there are not so many, or they are too far back; nothing has changed then.
        """
        if not 1 <= count <= len(self._earlier):
            raise InputError(f"{count} cannot be undone; turns and files that can: {len(self._earlier)}")
        place = self._earlier[-count]
        undone = self.entries[len(place.entries) :]
        self._go(replace(place, earlier=self._earlier[:-count]))
        return undone

    def retry(self, how: Answering, given_up: Callable[[], bool] = lambda: False) -> Writing:
        """Ask the last question again, with the next seed; broken off, the answer there was is there again.

        Raises: InputError if the last thing was no question.
        """
        before = self._place()
        last = next((e["content"] for e in reversed(self.messages) if e["role"] == "user"), None)
        if last is None or isinstance(self.entries[-1], Reading):
            raise InputError("there is no answer to write again; ask something first")
        self.undo()
        try:
            writing = self.ask(last, how, given_up)
        except BaseException:
            self._go(before)
            raise
        writing.undone = lambda: self._go(before)
        return writing

    def branch(self, name: str) -> None:
        """Begin a branch here and go on in it; the one so far stays as it is. Raises: InputError if it exists."""
        if name == self.current or name in self._branches:
            raise InputError(f"branch {name} exists; choose another name, or /checkout {name}")
        self._branches[self.current] = self._place()
        self.current = name

    def checkout(self, name: str) -> None:
        """Go on in another branch; this one stays as it is. Raises: InputError if there is none of this name."""
        if name == self.current:
            return
        if name not in self._branches:
            raise InputError(f"no branch {name}; there are: {', '.join(self.branches)}")
        place = self._branches.pop(name)
        self._branches[self.current] = self._place()
        self.current = name
        self._go(place)
        if first := self.messages[:1]:
            self._system = first[0]["content"] if first[0]["role"] == "system" else None

    @property
    def branches(self) -> list[str]:
        """Names of all branches, this one too."""
        return sorted((self.current, *self._branches))

    def new(self, system: str | None) -> str:
        """Begin anew in a branch of its own; returns its name. What was said stays in the branch so far."""
        self.system = system
        number = 2
        while (name := f"talk-{number}") in self.branches:
            number += 1
        self.branch(name)
        self._go(_Place((), self._blank))
        return name

    def _place(self) -> _Place:
        return _Place(self.entries, self.session.snapshot(), self._earlier)

    def _go(self, place: _Place) -> None:
        self.session.rewind(place.snapshot)
        self.entries, self._earlier = place.entries, place.earlier


def _mark(place: _Place) -> Mark:
    return Mark(place.snapshot, tuple(map(entry_json, place.entries)))


def _place_of(mark: Mark) -> _Place:
    return _Place(tuple(map(entry_of, mark.transcript)), mark.snapshot)


def exported(messages: Iterable[Message]) -> str:
    """A conversation as a line of JSON that finetuning reads."""
    return json.dumps({"messages": [dict(message) for message in messages]}, ensure_ascii=False) + "\n"


def entry_json(entry: Entry) -> dict[str, Any]:
    """An entry of the transcript as JSON."""
    return {"read": entry._asdict()} if isinstance(entry, Reading) else dict(entry)


def entry_of(value: Mapping[str, Any]) -> Entry:
    """The inverse. Raises: KeyError, TypeError or ValueError for anything else."""
    if "read" in value:
        read = value["read"]
        return Reading(str(read["name"]), str(read["sha256"]), int(read["tokens"]))
    return {"role": str(value["role"]), "content": str(value["content"])}
