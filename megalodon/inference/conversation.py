"""A conversation with a model: turns, files it reads, undo, branches; all in constant memory.

    talk = Conversation(writer, Session(writer.model))
    for text in talk.ask("Hello", Answering(SamplingConfig(), 256)): ...
    talk.undo(1);  talk.branch("other");  talk.checkout("main")

Every turn keeps the place before it, which shares its large part with its neighbours (session.py), so that going back
reads less than a chunk however long the conversation is. Not here: the screen (megalodon_cli/chat_screen.py), the file
of a session (session_file.py), how turns become ids (megalodon/data/chat.py).
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from megalodon.data.chat import Message
from megalodon.errors import InputError
from megalodon.inference.sampling import SamplingConfig, allowed_ids
from megalodon.inference.session import Session, Snapshot, Writer, generate
from megalodon.inference.stream import TokenStream

KEPT = 32
"""Places before turns that are kept; further back nothing can be undone."""

Finish = Literal["stop", "length", "interrupted"]


class Reading(NamedTuple):
    """A file that was read between two turns: what the transcript keeps of it."""

    name: str
    sha256: str
    tokens: int


Entry = Message | Reading


class Answering(NamedTuple):
    """How an answer is written."""

    sampling: SamplingConfig
    max_new_tokens: int
    stop: tuple[str, ...] = ()


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
        if system is not None and self._chat is None:
            raise InputError(
                "a system text needs a chat template, which this model does not have; finetune it with one"
            )

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

    def ask(self, text: str, how: Answering, given_up: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Read a user's turn and yield the answer as it is written; at the end `answer` says how it went.

        `given_up` is asked after every token; once it says so, what was said so far is the answer.
        Raises: InputError for an empty turn; DataError if the template refuses it. Nothing has changed then.
        """
        if not text.strip():
            raise InputError("the turn is empty; expected text")
        start = [] if self.system is None or self.messages else [{"role": "system", "content": self.system}]
        before = self._place()
        messages = (*self.messages, *start, {"role": "user", "content": text})
        ids = self._opening(messages)
        stream, pieces = TokenStream(self.writer.tokenizer, how.stop), []
        sampling = replace(how.sampling, seed=(how.sampling.seed + self._asked) % 2**63)
        self._asked += 1
        unread: list[int] = []
        finish: Finish = "stop"
        try:
            self.session.feed(ids)
            count = 0
            for token in generate(self.session, [], how.max_new_tokens, sampling, self._ends, self._allowed):
                count, unread = count + 1, [token]
                pieces.append(stream.push(token))
                yield pieces[-1]
                if stream.stopped or given_up():
                    finish = "stop" if stream.stopped else "interrupted"
                    break
                unread = [] if count < how.max_new_tokens else unread
            else:
                finish = "length" if unread else "stop"
            pieces.append(stream.flush())
            yield pieces[-1]
            self.session.feed([*unread, self.end])
        except BaseException:
            self._go(before)
            raise
        self.entries = (*self.entries, *start, messages[-1], {"role": "assistant", "content": "".join(pieces)})
        self._earlier = (*self._earlier, replace(before, earlier=()))[-KEPT:]
        self.answer = Answer(finish, count, len(ids))

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
            ids: list[int] = tokenizer.encode_array(messages[-1]["content"], begins=not began).tolist()
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

    # ------------------------------------------------------------------------------------------- back and aside

    def undo(self, count: int = 1) -> tuple[Entry, ...]:
        """Go back before the last `count` turns or files; returns what was taken back.

        Raises: InputError if there are not so many, or they are too far back; nothing has changed then.
        """
        if not 1 <= count <= len(self._earlier):
            raise InputError(f"{count} turns cannot be undone; {len(self._earlier)} can")
        place = self._earlier[-count]
        undone = self.entries[len(place.entries) :]
        self._go(replace(place, earlier=self._earlier[:-count]))
        return undone

    def retry(self, how: Answering, given_up: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Ask the last question again, with the next seed. Raises: InputError if the last thing was no question."""
        last = next((e["content"] for e in reversed(self.messages) if e["role"] == "user"), None)
        if last is None or isinstance(self.entries[-1], Reading):
            raise InputError("there is no answer to write again; ask something first")
        self.undo()
        yield from self.ask(last, how, given_up)

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

    @property
    def branches(self) -> list[str]:
        """Names of all branches, this one too."""
        return sorted((self.current, *self._branches))

    def new(self, system: str | None) -> str:
        """Begin anew in a branch of its own; returns its name. What was said stays in the branch so far."""
        number = 2
        while (name := f"talk-{number}") in self.branches:
            number += 1
        self.branch(name)
        self._go(_Place((), self._blank))
        self.system = system
        return name

    def _place(self) -> _Place:
        return _Place(self.entries, self.session.snapshot(), self._earlier)

    def _go(self, place: _Place) -> None:
        self.session.rewind(place.snapshot)
        self.entries, self._earlier = place.entries, place.earlier


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
