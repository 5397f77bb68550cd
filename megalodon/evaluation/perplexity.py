"""Loss, perplexity and bits per byte on held-out tokens, also by position, and the unigram baseline.

    bits per byte = sum of losses / ln 2 / bytes of text the scored targets stand for

It compares models with different tokenizers; the end-of-text token costs bits and has no bytes.
Not here: tasks and long-context probes, when to evaluate (training/loop.py).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from megalodon.config import Config, Count
from megalodon.data.loader import IGNORED, Batch
from megalodon.data.shards import Store
from megalodon.errors import DataError
from megalodon.inference.session import evaluating
from megalodon.model.architectures import LanguageModel
from megalodon.model.loss import token_losses
from megalodon.parallel.ranks import ALONE, Ranks

_BLOCK = 1 << 22


class MessageConfig(Config):
    """One turn of a chat prompt."""

    role: Literal["system", "user", "assistant"]
    """Who speaks."""
    content: str
    """What is said."""


class ChatPromptConfig(Config):
    """A prompt as chat turns."""

    messages: tuple[MessageConfig, ...] = Field(min_length=1)
    """The turns, in order."""


class SamplesConfig(Config):
    """Texts the model writes while it learns (the `eval.samples:` section of a recipe)."""

    every: int | None = Field(default=2000, ge=1)
    """Steps between two rounds of samples; null = only at the end."""
    prompts: tuple[Annotated[str, Field(min_length=1)] | ChatPromptConfig, ...] = ()
    """What the samples start with; none = no samples."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Tokens of a sample."""


class EvalConfig(Config):
    """Validation while training (the `eval:` section of a recipe)."""

    every: int | None = Field(default=500, ge=1)
    """Steps between two evaluations; null = only at start and end."""
    tokens: Count = Field(default=2_000_000, ge=1)
    """Validation tokens, always the same ones; at most all of them."""
    at_start: bool = True
    """Evaluate before step 1."""
    by_position: bool = True
    """Loss in buckets of position 1, 2, 4 … seq_len."""
    samples: SamplesConfig = SamplesConfig()
    """Texts the model writes while it learns."""


class Evaluation(NamedTuple):
    """How well a model predicts some tokens."""

    loss: float
    """Nats a token."""
    bits_per_byte: float | None
    """None if the targets stand for no text at all."""
    tokens: int
    """Scored targets."""
    bytes: int
    """Bytes of text they stand for."""
    by_position: dict[int, float]
    """Upper end of a bucket of positions -> nats a token there: 1, 2, 3 to 4, 5 to 8 … up to the longest window."""

    def row(self, by_position: bool = True) -> dict[str, Any]:
        """Return the line of kind eval of metrics.jsonl."""
        row: dict[str, Any] = {
            "kind": "eval",
            "valid_loss": self.loss,
            "bits_per_byte": self.bits_per_byte,
            "valid_tokens": self.tokens,
        }
        if by_position:
            row["by_position"] = {str(end): loss for end, loss in self.by_position.items()}
        return row


def evaluate(
    model: LanguageModel,
    batches: Iterable[Batch],
    bytes_table: NDArray[np.int64],
    num_classes: int,
    *,
    block: int = 2048,
    bf16: bool = False,
    stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> Evaluation | None:
    """Score every target of the batches; each row starts from an empty state.

    Several ranks share the batches, whole windows each, and all return the same.

    Args:
        model:       keeps its training mode; dropout is off meanwhile.
        bytes_table: (num_classes,) bytes of text of each id.
        num_classes: ids of the tokenizer; rows of the output matrix above get no probability.
        block:       tokens whose logits exist at a time.
        bf16:        matrix products in bfloat16.
        stop:        asked before every batch; True, on any rank, abandons the evaluation.
        ranks:       over which the model is spread.
    Returns:
        None if it was abandoned.
    Raises:
        DataError: the batches hold no target.
    """
    sums, counts = np.zeros(0), np.zeros(0, dtype=np.int64)
    num_bytes = 0
    with evaluating(model):
        for batch, mine in _shared(batches, ranks):
            (stopping,) = ranks.any(stop())
            if stopping:
                return None
            losses = _losses(model, batch, num_classes, block, bf16)
            if not mine:
                continue
            scored = batch.targets != IGNORED
            num_bytes += int(bytes_table[batch.targets[scored]].sum())
            grow = max(0, batch.targets.shape[1] - len(sums))
            sums, counts = np.pad(sums, (0, grow)), np.pad(counts, (0, grow))
            sums[: losses.shape[1]] += losses.sum(0)
            counts[: losses.shape[1]] += scored.sum(0)
    sums, counts, num_bytes = _joined(sums, counts, num_bytes, ranks)
    tokens = int(counts.sum())
    if tokens == 0:
        raise DataError("validation: no target to score; raise eval.tokens or give more validation text")
    total = float(sums.sum())
    bits = total / math.log(2) / num_bytes if num_bytes else None
    return Evaluation(total / tokens, bits, tokens, num_bytes, _buckets(sums, counts))


def _shared(batches: Iterable[Batch], ranks: Ranks) -> Iterator[tuple[Batch, bool]]:
    """This rank's batches, and whether it is to score them: all ranks run the model equally often."""
    given = iter(batches)
    while several := list(islice(given, ranks.readers)):
        mine = ranks.reader < len(several)
        yield several[ranks.reader if mine else 0], mine


def _joined(
    sums: NDArray[np.float64], counts: NDArray[np.int64], num_bytes: int, ranks: Ranks
) -> tuple[NDArray[np.float64], NDArray[np.int64], int]:
    """Sums and counts by position, and bytes, over the batches of all ranks."""
    if ranks.readers == 1:
        return sums, counts, num_bytes
    longest = ranks.most(len(sums))
    mine = [*np.pad(sums, (0, longest - len(sums))), *np.pad(counts, (0, longest - len(counts))), num_bytes]
    total = np.array(ranks.sums(mine)) / ranks.layout.tp  # the ranks that hold a layer between them all scored it
    return total[:longest], total[longest:-1].astype(np.int64), int(total[-1])


@torch.no_grad()
def _losses(model: LanguageModel, batch: Batch, num_classes: int, block: int, bf16: bool) -> NDArray[np.float64]:
    """(B, L) nats, 0 where ignored."""
    tokens, targets, starts = (torch.from_numpy(x) for x in batch)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        hidden, _ = model.hidden(tokens.to(model.device), starts=starts if bool(starts.any()) else None)
        losses = token_losses(hidden, model.output_weight, targets.to(model.device), block, num_classes=num_classes)
    found: NDArray[np.float64] = losses.double().cpu().numpy()
    return found


def _buckets(sums: NDArray[np.float64], counts: NDArray[np.int64]) -> dict[int, float]:
    """Mean loss of positions 1, 2, 3 to 4, 5 to 8 …, by the upper end; a bucket without targets is left out."""
    spans = [(low, high, int(counts[low:high].sum())) for low, high in position_buckets(len(sums))]
    return {high: float(sums[low:high].sum()) / tokens for low, high, tokens in spans if tokens}


def position_buckets(length: int) -> Iterator[tuple[int, int]]:
    """Yield buckets of positions from 0 as [low, high): the first, the second, 2 more, 4 more … up to the length."""
    low = 0
    while low < length:
        high = min(length, max(1, 2 * low))
        yield low, high
        low = high


def unigram_bits_per_byte(
    train: Store, batches: Iterable[Batch], bytes_table: NDArray[np.int64], num_classes: int
) -> float | None:
    """Return bits per byte of the same targets under the token frequencies of the training store, each plus one.

    A model that has learnt anything about order stands below it. None if the targets stand for no text.
    Raises: DataError naming the place of an id outside the vocabulary.
    """
    seen = np.ones(num_classes, dtype=np.int64)
    for start in range(0, train.num_tokens, _BLOCK):
        counts = np.bincount(train.tokens(start, min(train.num_tokens, start + _BLOCK)), minlength=num_classes)
        if len(counts) > num_classes:
            high = train.tokens(start, min(train.num_tokens, start + _BLOCK)) >= num_classes
            raise train.bad_token(start + int(np.argmax(high)))
        seen += counts
    nats = np.log(seen.sum()) - np.log(seen)
    total, num_bytes = 0.0, 0
    for batch in batches:
        targets = batch.targets[batch.targets != IGNORED]
        total += float(nats[targets].sum())
        num_bytes += int(bytes_table[targets].sum())
    return total / math.log(2) / num_bytes if num_bytes else None
