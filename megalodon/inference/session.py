"""Reading and writing with a model: feed any number of tokens in constant memory, then generate.

    session = Session(model)
    session.feed(ids)                         # any length, in pieces; only the last logits exist
    other = session.branch()                  # both continue from here, independently
    place = session.snapshot()                # later: session.rewind(place), by reading less than a chunk
    for token in generate(session, [], 64, SamplingConfig(temperature=0)): ...
    writer = load_writer(path)                # the model, its tokenizer and chat template

Not here: how a token is chosen (sampling.py), whole characters (stream.py), a session's file (session_file.py),
many texts at once (batch.py).
"""

import contextlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from megalodon.checkpoint.adapter_files import is_adapter, load_adapter, read_adapter_info
from megalodon.checkpoint.tensors import load_language_model, read_model_info
from megalodon.data.chat import ChatFormat
from megalodon.data.tokenizer import Tokenizer, load_tokenizer
from megalodon.errors import CheckpointError, InputError
from megalodon.inference.norm_window import KEPT, NormStats, check_norm_stats, is_due, refreshed
from megalodon.inference.sampling import Chooser, SamplingConfig, allowed_ids
from megalodon.inference.stream import TokenStream
from megalodon.model.architectures import LanguageModel, ModelState, as_megalodon, make_decoder
from megalodon.model.decoder import Decoder
from megalodon.model.llama import LlamaDecoder
from megalodon.model.megalodon import Megalodon

PIECE = 1024
"""Tokens of one forward pass while reading: bounds the memory of a prompt of any length. Longer pieces are little
faster and leave the heap less even: at 4096, resident memory still grew by 15 % after the first 20,000 tokens."""


Finish = Literal["stop", "length", "interrupted"]

ZERO_TOKENS = "zero tokens; expected at least 1; give some text"


class Past(NamedTuple):
    """What a session had read where its open chunk began; all that continue from there share it."""

    state: ModelState
    """At the last chunk boundary; or where a session began that was given a state inside a chunk."""
    position: int
    """Tokens read until then."""
    recent: tuple[tuple[int, ...], ...]
    """Under `window` the ids of the last 8 chunks before it, else nothing."""


class Snapshot(NamedTuple):
    """A place to come back to: less than a chunk of ids, and a past that it shares."""

    past: Past
    tail: tuple[int, ...]
    """Ids read since."""
    logits: Tensor | None
    """Of the next token: (V,); None before any token."""

    @property
    def position(self) -> int:
        """Tokens read."""
        return self.past.position + len(self.tail)


class Session:
    """A model and what it has read so far; one sequence.

    At a chunk boundary keys and values are empty and all memory is a small state. A session keeps that of the last
    boundary and the ids since, so it goes back to any earlier place (`rewind`) by reading less than a chunk again.

    Args:
        model: stays as it is; dropout is off while the session runs it.
        state: of one row, to continue from; None means nothing was read yet.
        piece: tokens of one forward pass, at least 1.
        norm_stats: `cumulative`, or `window` (norm_window.py).
    """

    def __init__(
        self,
        model: LanguageModel,
        state: ModelState | None = None,
        piece: int = PIECE,
        norm_stats: NormStats = "cumulative",
    ) -> None:
        if state is not None and len(state.position) != 1:
            raise InputError(f"session: the state has {len(state.position)} rows; expected 1")
        if piece < 1:
            raise InputError(f"session: piece is {piece}; expected at least 1 token")
        self.model = model
        self.piece = piece
        self.norm_stats = check_norm_stats(norm_stats)
        if norm_stats == "window":
            as_megalodon(model, "norm_stats window")
        begin = model.empty_state(1) if state is None else state
        if self.norm_stats == "window" and int(begin.position):
            raise InputError("session: under norm_stats window a state needs the ids before it; rewind to a snapshot")
        self._past, self._tail = Past(begin, int(begin.position), ()), list[int]()
        self._state: ModelState | None = begin  # None: the decoder has it, or the open chunk is to be read again
        self._decoder: Decoder | LlamaDecoder | None = (
            None  # at this place only while `_decoding`; else kept for what it has formed
        )
        self._decoding = False
        self._logits: Tensor | None = None

    @property
    def state(self) -> ModelState:
        """What was read so far, as a value; after `rewind` it is formed here, from less than a chunk."""
        if self._state is None:
            if self._decoding and self._decoder is not None:
                self._state = self._decoder.state()
            else:
                self._read_again()
        return self._state

    @property
    def memory(self) -> int:
        """Bytes that hold all before the open chunk: the same at any length, if reading began at a boundary.

        Of a Llama, which has no chunks, all keys and values.
        """
        state = self._past.state if self.constant else self.state
        size: int = state.num_bytes()
        return size

    @property
    def constant(self) -> bool:
        """Whether `memory` keeps its size however much is read."""
        return isinstance(self.model, Megalodon)

    @property
    def position(self) -> int:
        """Tokens read so far."""
        return self._past.position + len(self._tail)

    @property
    def logits(self) -> Tensor:
        """Logits of the next token: (V,) float32 (float64 in a float64 model). Raises: InputError before any token."""
        if self._logits is None:
            raise InputError("session: zero tokens were fed, so there is no next token to predict; feed at least 1")
        return self._logits

    def feed(self, ids: Iterable[int]) -> Tensor:
        """Read tokens, any number but zero, and return the logits after the last one: (V,).

        If an id does not fit, the session stays where it was.

        Raises:
            InputError: zero tokens.
            ValueError: an id is outside the vocabulary.
        """
        rest, hidden = iter(ids), None
        course = _Course(self.model, self._window_piece, self.state, self._past, list(self._tail))
        with torch.inference_mode(), evaluating(self.model):
            while piece := list(islice(rest, self._room(course.position))):
                self._check(piece)
                hidden = course.read(piece)
            if hidden is None:
                raise InputError("session: zero tokens to read; expected at least 1 (with BOS that is one)")
            logits = linear(hidden[0, -1], self.model.output_weight)
            self._logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        self._past, self._tail, self._state, self._decoding = course.past, course.tail, course.state, False
        return self._logits

    def step(self, token: int) -> Tensor:
        """Read one token and return the logits after it: (V,).

        The same as feeding it, by a decoder that keeps its state in place: the way to read tokens one by one. Broken
        off half way, by Ctrl-C or for want of memory, the token counts as not read.

        Raises:
            ValueError: the id is outside the vocabulary.
        """
        self._check((token,))
        decoder, C = self._decoder, self.model.config.chunk_size
        due = self.norm_stats == "window" and is_due(self.position, C)
        if decoder is None or not self._decoding or due:
            state = self.state
            if due:
                with evaluating(self.model):
                    state = refreshed(as_megalodon(self.model, "norm_stats"), state, self._past.recent, self.piece)
            self._decoder = decoder = make_decoder(self.model, state) if decoder is None else decoder.at(state)
        # In the middle of a step some layers have moved and some have not: until it is whole, the open chunk stands for
        # the state.
        self._decoding, self._state = False, None
        logits = decoder.step(torch.tensor([token], device=self.model.device))[0]
        self._logits = logits
        self._tail.append(token)
        self._decoding = True
        if self.position % C == 0:
            self._past, self._tail = _closed(self._past, self._tail, self.state, self._window_piece), []
        return logits

    def branch(self) -> "Session":
        """A second session that continues from the same place; neither moves the other."""
        twin = Session(self.model, None, self.piece, self.norm_stats)
        twin._decoder = self._decoder
        twin.rewind(self.snapshot(), self.state)
        return twin

    def snapshot(self) -> Snapshot:
        """This place, to come back to by `rewind`; it takes less than a chunk of ids."""
        return Snapshot(self._past, tuple(self._tail), self._logits)

    def rewind(self, snapshot: Snapshot, state: ModelState | None = None) -> None:
        """Go to the place of a snapshot of this session or of another one of the same model and norm policy.

        The open chunk is read again when its state is next needed: less than a chunk, however much was read before.

        Args:
            state: at that place, if it is at hand: then nothing is read again.
        """
        self._past, self._tail, self._logits = snapshot.past, list(snapshot.tail), snapshot.logits
        self._state, self._decoding = snapshot.past.state if state is None and not snapshot.tail else state, False

    @property
    def _window_piece(self) -> int | None:
        """Tokens of a pass that renews the statistics; None under `cumulative`."""
        return self.piece if self.norm_stats == "window" else None

    def _read_again(self) -> None:
        course = _Course(self.model, self._window_piece, self._past.state, self._past, [])
        with torch.inference_mode(), evaluating(self.model):
            for start in range(0, len(self._tail), self.piece):
                course.read(self._tail[start : start + self.piece])
        self._state = course.state

    def _room(self, position: int) -> int:
        """Tokens of the next pass: to the end of a piece, all of which lie on a grid that meets the chunks'.

        So wherever reading began, chunks stay whole, and a pass longer than a chunk ends where one does.
        """
        C, piece = self.model.config.chunk_size, self.piece
        if piece < C:
            inside = position % C
            return min(piece - inside % piece, C - inside)
        span = piece // C * C
        return span - position % span

    def _check(self, ids: Iterable[int]) -> None:
        vocab_size = self.model.config.vocab_size
        bad = next((token for token in ids if not 0 <= token < vocab_size), None)
        if bad is not None:
            raise ValueError(f"session: token id {bad} is outside the vocabulary 0 … {vocab_size - 1}")


class _Course:
    """Reading on from a place by forward passes: the state, the last boundary and the ids since move along."""

    def __init__(
        self, model: LanguageModel, window: int | None, state: ModelState, past: Past, tail: list[int]
    ) -> None:
        self.model, self.window, self.state, self.past, self.tail = model, window, state, past, tail

    @property
    def position(self) -> int:
        return self.past.position + len(self.tail)

    def read(self, ids: list[int]) -> Tensor:
        """Read ids that all fit; returns the hidden values (1, L, D) of the last pass.

        One pass, or several where its state is wanted at a boundary inside.
        """
        C, start = self.model.config.chunk_size, 0
        while start < len(ids):
            end = start + self._reach(len(ids) - start)
            if self.window and is_due(self.position, C):
                self.state = refreshed(
                    as_megalodon(self.model, "norm_stats"), self.state, self.past.recent, self.window
                )
            tokens = torch.tensor(ids[start:end], device=self.model.device)[None]
            hidden, self.state = self.model.hidden(tokens, self.state)
            self.tail += ids[start:end]
            start = end
            if self.position % C == 0:
                self.past, self.tail = _closed(self.past, self.tail, self.state, self.window), []
        return hidden

    def _reach(self, length: int) -> int:
        """How many of so many tokens one pass takes: up to the last boundary in them; under `window` to the first."""
        C, position = self.model.config.chunk_size, self.position
        last = C - position % C if self.window else (position + length) // C * C - position
        return last if 0 < last < length else length


def _closed(past: Past, chunks: list[int], state: ModelState, window: int | None) -> Past:
    """The past at a boundary; `chunks` are the ids since the one before."""
    recent = (*past.recent, tuple(chunks))[-KEPT:] if window else ()
    return Past(state, past.position + len(chunks), recent)


@contextlib.contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Dropout is off inside; afterwards every part of the model is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Owner(NamedTuple):
    """Whose sessions these are: sha256 of all that gives a state its meaning."""

    weights: str
    tokenizer: str
    template: str | None
    """Of the chat template; None if the model has none."""
    name: str
    """Of the model, for messages: `200m, step 19,000`."""


class Writer(NamedTuple):
    """A model with the tokenizer it was trained with."""

    model: LanguageModel
    tokenizer: Tokenizer
    bos: bool
    """Whether documents began with BOS in training, so that prompts do too."""
    chat: ChatFormat | None = None
    """How conversations are written, if the model was tuned for them."""
    owner: Owner | None = None
    """Whose its sessions are; None for a model that is no directory's: they cannot be saved."""


def load_writer(directory: Path) -> Writer:
    """Load a model directory, or an adapter directory with its base, for writing, on the CPU.

    Raises:
        EnvironmentFault: an adapter, and peft is missing.
        CheckpointError: a file is missing, truncated or changed, or the tokenizer is not the model's.
        DataError: the directory holds no tokenizer, or a chat template that cannot be used.
    """
    adapter = is_adapter(directory)
    info = read_adapter_info(directory) if adapter else read_model_info(directory)
    model = (load_adapter(directory) if adapter else load_language_model(directory)).eval()
    tokenizer = load_tokenizer(directory)
    expected = info.get("tokenizer_sha256", tokenizer.sha256)
    if tokenizer.sha256 != expected:
        raise CheckpointError(
            f"{directory}: the tokenizer is {tokenizer.sha256[:8]}, but the model was trained with {expected[:8]}; "
            "put the tokenizer files of the run back"
        )
    bos = bool(info.get("bos", True))
    chat = ChatFormat.load(directory, tokenizer, bos=bos)
    rows = tokenizer.vocab_size + (chat.new_rows if chat else 0)
    if rows > model.config.vocab_size:
        raise CheckpointError(
            f"{directory}: the tokenizer has {rows:,} ids, the model {model.config.vocab_size:,} rows; "
            "put the tokenizer files of the run back"
        )
    recipe, step = info.get("recipe"), info.get("step")
    name = str(recipe.get("name", directory.name)) if isinstance(recipe, dict) else directory.name
    name += f", step {step:,}" if isinstance(step, int) else ""
    weights, template = str(info["weights_sha256"]), chat.template.sha256 if chat else None
    return Writer(model, tokenizer, bos, chat, Owner(weights, tokenizer.sha256, template, name))


def generate(
    session: Session,
    prompt_ids: Collection[int],
    max_new_tokens: int,
    sampling: SamplingConfig,
    stop_ids: Collection[int] = (),
    allowed: Tensor | None = None,
    said: Iterable[int] = (),
) -> Iterator[int]:
    """Read the prompt, then yield new ids one by one.

    Afterwards the session has read all of them if a stop id ended the text, else all but the last.

    Args:
        session:        where to begin; it moves along.
        prompt_ids:     may be empty if the session has read something.
        max_new_tokens: at least 1.
        sampling:       how ids are chosen.
        stop_ids:       ids that end the text; they are not yielded.
        allowed:        (V,) bool: ids that may be chosen; None means all.
        said:           ids read before, to which the repetition penalty applies as to the prompt.
    Raises:
        InputError: nothing was read, or max_new_tokens is below 1.
        NumericalError: the logits are not finite.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    if prompt_ids:
        session.feed(prompt_ids)
    choose = Chooser(sampling, len(session.logits), (*said, *prompt_ids), allowed)
    for number in range(max_new_tokens):
        token = choose(session.logits)
        if token in stop_ids:
            return
        yield token
        if number + 1 < max_new_tokens:
            session.step(token)


class Answering(NamedTuple):
    """How a text is continued."""

    sampling: SamplingConfig
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    """Texts that end it."""


class GivenUp(KeyboardInterrupt):
    """What was begun is not wanted any more, before anything came of it."""


class Writing:
    """A text that is being written: iterate over its pieces, one a token, which may be empty, and a last one.

    Args:
        session:   where to begin; afterwards it has read what `generate` says.
        tokenizer: of the model.
        ids:       of the prompt; may be empty if the session has read something.
        how:       how it is continued.
        ends:      ids that end it.
        allowed:   (V,) bool: ids that may be written.
        given_up:  asked after every token; once it says so, the text so far is all.
    Raises:
        InputError: a stop string is empty; or what `generate` raises, when it is iterated over.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        ids: Sequence[int],
        how: Answering,
        ends: Collection[int],
        allowed: Tensor,
        given_up: Callable[[], bool] = lambda: False,
    ) -> None:
        self.session, self.prompt_ids, self.how = session, ids, how
        self.text, self.ids = "", list[int]()
        self.interrupted = False
        self._stream = TokenStream(tokenizer, how.stop)
        self._ends, self._allowed = ends, allowed
        self._start = session.position + len(ids)
        self._given_up = given_up
        self.done: Callable[[Writing], None] = lambda writing: None
        """Called when it has come to its end, `undone` when it is broken off instead."""
        self.undone: Callable[[], None] = lambda: None
        self.unwanted: Callable[[], bool] = lambda: False
        """Asked while the prompt is read; once it says so, GivenUp is raised: nothing was written yet."""
        self._pieces = self._write()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Break it off."""
        self._pieces.close()

    @property
    def unread(self) -> list[int]:
        """Ids that were written but that the session has not read."""
        return self.ids[self.session.position - self._start :]

    @property
    def finish(self) -> Finish:
        """Why it ended: an id or text that ends it, its length, or `given_up`."""
        if self.interrupted:
            return "interrupted"
        return "stop" if self._stream.stopped or len(self.ids) < self.how.max_new_tokens else "length"

    def _write(self) -> Generator[str, None, None]:
        how = self.how
        try:
            if self.prompt_ids:
                self.session.feed(self._wanted())
            tokens = generate(
                self.session, (), how.max_new_tokens, how.sampling, self._ends, self._allowed, self.prompt_ids
            )
            for token in tokens:
                self.ids.append(token)
                yield self._shown(self._stream.push(token))
                if self._stream.stopped or self._given_up():
                    self.interrupted = not self._stream.stopped
                    break
            yield self._shown(self._stream.flush())
            self.done(self)
        except BaseException:
            self.undone()
            raise

    def _wanted(self) -> Iterator[int]:
        for token in self.prompt_ids:
            if self.unwanted():
                raise GivenUp
            yield token

    def _shown(self, piece: str) -> str:
        self.text += piece
        return piece


def prompt_tokens(tokenizer: Tokenizer, prompt: str, *, bos: bool) -> list[int]:
    """The ids of a prompt, after BOS if documents began with one in training. Raises: InputError for zero tokens."""
    ids = tokenizer.encode(prompt)
    if not ids:
        raise InputError(f"the prompt has {ZERO_TOKENS}")
    return [tokenizer.bos_id, *ids] if bos else ids


def generate_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 64,
    sampling: SamplingConfig | None = None,
    *,
    bos: bool = True,
    stop: Iterable[str] = (),
    given_up: Callable[[], bool] = lambda: False,
) -> str:
    """The text a model writes after a prompt, up to EOS, a stop string or `max_new_tokens`; without the prompt.

    `given_up` is asked after every token; once it says so, the text so far is returned.
    Raises: InputError for a prompt of zero tokens, or a tokenizer that does not fit the model.
    """
    ids = prompt_tokens(tokenizer, prompt, bos=bos)
    how = Answering(sampling or SamplingConfig(), max_new_tokens, tuple(stop))
    allowed = allowed_ids(tokenizer, model.config.num_outputs)
    return "".join(Writing(Session(model), tokenizer, ids, how, [tokenizer.eos_id], allowed, given_up))
