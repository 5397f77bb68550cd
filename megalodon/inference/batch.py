"""Many texts at once: prompts of any lengths, decoded together; each with its own seed, length and stop strings.

A step of many rows reads the weights once. Each row writes what it would write alone: rows may stand at different
places of their chunks, and a row that has ended leaves. Not here: files of prompts (batch_files.py).
"""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megalodon.inference.sampling import Chooser, SamplingConfig, allowed_ids
from megalodon.inference.session import Session, Writer
from megalodon.inference.stream import Stops, TokenStream
from megalodon.model.architectures import as_megalodon
from megalodon.model.decoder import Decoder
from megalodon.model.megalodon import Megalodon
from megalodon.model.state import State, stack_states


class Request(NamedTuple):
    """A text to be continued."""

    ids: Sequence[int]
    """Of the prompt; may be empty if its session has read something."""
    max_new_tokens: int
    sampling: SamplingConfig
    stop: Stops
    said: Sequence[int] = ()
    """Ids read before, to which the repetition penalty applies as to the prompt."""


class Written(NamedTuple):
    """What the model wrote."""

    text: str
    finish_reason: str
    """`stop` or `length`."""
    new_tokens: int


def write_together(
    writer: Writer, sessions: Iterable[Session], requests: Sequence[Request], ends: Collection[int]
) -> list[Written]:
    """Continue texts together; as many as there are requests, in their order.

    Args:
        sessions: one for each request, all of one norm policy; each reads its prompt, and nothing of what is written.
        ends:     ids that end a text.
    Raises:
        InputError: a prompt of zero tokens in a session that has read nothing.
        NumericalError: the logits are not finite.
    """
    allowed = allowed_ids(writer.tokenizer, writer.model.config.num_outputs, ends)
    rows, states, logits = list[_Row](), list[State](), list[Tensor]()
    for session, request in zip(sessions, requests, strict=True):
        row = _Row(writer, request, ends, allowed)
        rows.append(row)
        if request.ids:
            session.feed(request.ids)
        # Under `window` statistics are renewed at other steps in each row; the states of a baseline have other lengths.
        if session.norm_stats == "window" or not isinstance(writer.model, Megalodon):
            while row.take(token := row.choose(session.logits)):
                session.step(token)
            continue
        states.append(session.state)
        logits.append(session.logits)
    if states:
        decoder = Decoder(as_megalodon(writer.model, "a batch"), stack_states(states))
        _decode(writer, rows, decoder, torch.stack(logits))
    return [row.written() for row in rows]


class _Row:
    """One text that is being written."""

    def __init__(self, writer: Writer, request: Request, ends: Collection[int], allowed: Tensor) -> None:
        self.choose = Chooser(request.sampling, len(allowed), (*request.ids, *request.said), allowed)
        self.stream = TokenStream(writer.tokenizer, request.stop)
        self.ends, self.limit = ends, request.max_new_tokens
        self.pieces: list[str] = []
        self.count = 0
        self.ended = False

    def take(self, token: int) -> bool:
        """Add a token; returns whether the text goes on."""
        self.ended = token in self.ends
        if not self.ended:
            self.count += 1
            self.pieces.append(self.stream.push(token))
            self.ended = self.stream.stopped
        return not self.ended and self.count < self.limit

    def written(self) -> Written:
        text = "".join(self.pieces) + self.stream.flush()
        return Written(text, "stop" if self.ended or self.stream.stopped else "length", self.count)


def _decode(writer: Writer, rows: Sequence[_Row], decoder: Decoder, logits: Tensor) -> None:
    """Write all rows to their ends."""
    while True:
        tokens = [row.choose(its) for row, its in zip(rows, logits, strict=True)]
        going = [number for number, row in enumerate(rows) if row.take(tokens[number])]
        if not going:
            return
        if len(going) < len(rows):
            decoder = decoder.at(decoder.state().rows(going))
            rows = [rows[number] for number in going]
        logits = decoder.step(torch.tensor([tokens[number] for number in going], device=writer.model.device))
