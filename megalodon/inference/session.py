"""Reading and writing with a model: feed any number of tokens in constant memory, then generate.

    session = Session(model)
    session.feed(ids)                         # any length, in pieces; only the last logits exist
    other = session.branch()                  # both continue from here, independently
    for token in generate(session, [], 64, SamplingConfig(temperature=0)): ...
    model, tokenizer, bos = load_writer(path)

Not here: how a token is chosen (sampling.py), whole characters (stream.py), saving a session.
"""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from megalodon.checkpoint.tensors import load_model, read_model_info
from megalodon.data.tokenizer import Tokenizer, load_tokenizer
from megalodon.errors import CheckpointError, InputError
from megalodon.inference.sampling import SamplingConfig, allowed_ids, sample
from megalodon.inference.stream import TokenStream
from megalodon.model.decoder import Decoder
from megalodon.model.megalodon import Megalodon
from megalodon.model.state import State

PIECE = 1024
"""Tokens of one forward pass while reading: bounds the memory of a prompt of any length. Longer pieces are little
faster and leave the heap less even: at 4096, resident memory still grew by 15 % after the first 20,000 tokens."""


BROKEN_OFF = "session: a step was broken off half way and took the state with it; continue from a branch"


class Session:
    """A model and what it has read so far; one sequence.

    Args:
        model: stays as it is; dropout is off while the session runs it.
        state: of one row, to continue from; None means nothing was read yet.
        piece: tokens of one forward pass, at least 1.
    """

    def __init__(self, model: Megalodon, state: State | None = None, piece: int = PIECE) -> None:
        if state is not None and len(state.position) != 1:
            raise InputError(f"session: the state has {len(state.position)} rows; expected 1")
        if piece < 1:
            raise InputError(f"session: piece is {piece}; expected at least 1 token")
        self.model = model
        self.piece = piece
        self._state: State | None = model.empty_state(1) if state is None else state  # None while the decoder has it
        self._decoder: Decoder | None = None  # at this place only while `_decoding`; else kept for what it has formed
        self._decoding = False
        self._read = int(self.state.position)
        self._logits: Tensor | None = None

    @property
    def state(self) -> State:
        """What was read so far, as a value. Raises: InputError if a step was broken off half way."""
        if self._state is None:
            if self._decoder is None:
                raise InputError(BROKEN_OFF)
            self._state = self._decoder.state()
        return self._state

    @property
    def position(self) -> int:
        """Tokens read so far."""
        return self._read

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
        rest = iter(ids)
        state, hidden, read = self.state, None, self._read
        with torch.inference_mode(), evaluating(self.model):
            # Pieces end at multiples of `piece`, so that chunks stay whole wherever reading began.
            while piece := list(islice(rest, self.piece - read % self.piece)):
                self._check(piece)
                tokens = torch.tensor(piece, device=self.model.device)[None]
                hidden, state = self.model.hidden(tokens, state)
                read += len(piece)
            if hidden is None:
                raise InputError("session: zero tokens to read; expected at least 1 (with BOS that is one)")
            logits = linear(hidden[0, -1], self.model.output_weight)
            self._logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        self._state, self._read, self._decoding = state, read, False
        return self._logits

    def step(self, token: int) -> Tensor:
        """Read one token and return the logits after it: (V,).

        The same as feeding it, by a decoder that keeps its state in place: the way to read tokens one by one.

        Raises:
            ValueError: the id is outside the vocabulary.
            InputError: an earlier step was broken off half way, by Ctrl-C or for want of memory.
        """
        self._check((token,))
        if not self._decoding:
            self._decoder = Decoder(self.model, self.state) if self._decoder is None else self._decoder.at(self.state)
            self._decoding = True
        decoder = self._decoder
        # Ours again once the step is whole: broken off in the middle, some layers have moved and some have not.
        self._decoder = self._state = None
        if decoder is None:
            raise InputError(BROKEN_OFF)
        self._logits = decoder.step(torch.tensor([token], device=self.model.device))[0]
        self._decoder, self._read = decoder, self._read + 1
        return self._logits

    def branch(self) -> "Session":
        """A second session that continues from the same place; neither moves the other."""
        twin = Session(self.model, self.state, self.piece)
        twin._logits, twin._decoder = self._logits, self._decoder
        return twin

    def _check(self, ids: Iterable[int]) -> None:
        vocab_size = self.model.config.vocab_size
        bad = next((token for token in ids if not 0 <= token < vocab_size), None)
        if bad is not None:
            raise ValueError(f"session: token id {bad} is outside the vocabulary 0 … {vocab_size - 1}")


@contextlib.contextmanager
def evaluating(model: Megalodon) -> Iterator[None]:
    """Dropout is off inside; afterwards every part of the model is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Writer(NamedTuple):
    """A model with the tokenizer it was trained with."""

    model: Megalodon
    tokenizer: Tokenizer
    bos: bool
    """Whether documents began with BOS in training, so that prompts do too."""


def load_writer(directory: Path) -> Writer:
    """Load a model directory for writing, on the CPU.

    Raises:
        CheckpointError: a file is missing, truncated or changed, or the tokenizer is not the model's.
        DataError: the directory holds no tokenizer.
    """
    info = read_model_info(directory)
    model = load_model(directory).eval()
    tokenizer = load_tokenizer(directory)
    expected = info.get("tokenizer_sha256", tokenizer.sha256)
    if tokenizer.sha256 != expected:
        raise CheckpointError(
            f"{directory}: the tokenizer is {tokenizer.sha256[:8]}, but the model was trained with {expected[:8]}; "
            "put the tokenizer files of the run back"
        )
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size:,} ids, the model {model.config.vocab_size:,} rows; "
            "put the tokenizer files of the run back"
        )
    return Writer(model, tokenizer, bool(info.get("bos", True)))


def generate(
    session: Session,
    prompt_ids: Collection[int],
    max_new_tokens: int,
    sampling: SamplingConfig,
    stop_ids: Collection[int] = (),
    allowed: Tensor | None = None,
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
    Raises:
        InputError: nothing was read, or max_new_tokens is below 1.
        NumericalError: the logits are not finite.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    if prompt_ids:
        session.feed(prompt_ids)
    logits, generator = session.logits, sampling.generator()
    seen = torch.zeros(len(logits), dtype=torch.bool)
    # Ids without an output row (an output smaller than the vocabulary) cannot be written, so not repeated either.
    seen[[token for token in set(prompt_ids) if token < len(seen)]] = True
    for number in range(max_new_tokens):
        token = sample(session.logits, sampling, generator, allowed, seen)
        if token in stop_ids:
            return
        seen[token] = True
        yield token
        if number + 1 < max_new_tokens:
            session.step(token)


def prompt_tokens(tokenizer: Tokenizer, prompt: str, *, bos: bool) -> list[int]:
    """The ids of a prompt, after BOS if documents began with one in training. Raises: InputError for zero tokens."""
    ids = tokenizer.encode(prompt)
    if not ids:
        raise InputError("the prompt has zero tokens; expected at least 1; give some text")
    return [tokenizer.bos_id, *ids] if bos else ids


def generate_text(
    model: Megalodon,
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
    stream = TokenStream(tokenizer, stop)
    allowed = allowed_ids(tokenizer, model.config.num_outputs)
    ids = prompt_tokens(tokenizer, prompt, bos=bos)
    written = []
    for token in generate(
        Session(model), ids, max_new_tokens, sampling or SamplingConfig(), [tokenizer.eos_id], allowed
    ):
        written.append(stream.push(token))
        if stream.stopped or given_up():
            break
    return "".join(written) + stream.flush()
