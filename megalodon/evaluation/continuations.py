"""How likely texts are after others: many pairs at once, of any lengths, without cutting any.

Pairs of like lengths are read side by side, each in its own row, padded on the right, where nothing sees the padding.
Several continuations of one long context share a reading of it. So batches change rounding alone.
Not here: whole documents (scoring.py), lm-evaluation-harness, which asks for these (harness_model.py).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from megalodon.errors import NumericalError
from megalodon.evaluation.reading import Reader
from megalodon.evaluation.scoring import How
from megalodon.inference.session import evaluating
from megalodon.model.architectures import LanguageModel

SHARED = 512
"""Tokens of a context from which on it is worth reading it once for all that may follow."""


class Pair(NamedTuple):
    """What is read, at least one token, and what follows it."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Likelihood(NamedTuple):
    """Of a continuation."""

    nats: float
    """Its log-probability."""
    greedy: bool
    """Whether greedy decoding would write it."""
    likeliest: tuple[int, ...] = ()
    """Of a short one: the likeliest id at each of its places, those before it given."""


def likelihoods(
    model: LanguageModel,
    pairs: Sequence[Pair],
    num_classes: int,
    how: How,
    rows: int,
    told: Callable[[int], None] = lambda count: None,
) -> list[Likelihood]:
    """Score pairs; as many results as pairs, in their order.

    Args:
        num_classes: ids of the tokenizer; rows of the output matrix above get no probability.
        rows:        pairs read side by side; 1 under the norm policy `window`.
        told:        told the number of pairs done, now and then.
    Raises: NumericalError for a log-probability that is not finite.
    """
    found, done = dict[int, Likelihood](), 0
    rows = 1 if how.norm_stats == "window" else rows
    with torch.inference_mode(), evaluating(model):
        for group in _groups(pairs, rows):
            own = [pairs[number] for number in group]
            shared = len(own) > 1 and len({pair.context for pair in own}) == 1
            scored = _branched(model, own, num_classes, how, rows) if shared else _padded(model, own, num_classes, how)
            found |= zip(group, scored, strict=True)
            done += len(group)
            told(done)
    return [found[number] for number in range(len(pairs))]


def _groups(pairs: Sequence[Pair], rows: int) -> Iterator[list[int]]:
    """Numbers of pairs that are scored together: those of one long context, else those of like lengths."""
    order = sorted(range(len(pairs)), key=lambda n: (len(pairs[n].context), pairs[n].context))
    alone = []
    for context, group in groupby(order, key=lambda n: pairs[n].context):
        numbers = list(group)
        if len(context) >= SHARED and len(numbers) > 1:
            yield numbers
        else:
            alone += numbers
    alone.sort(key=lambda n: len(pairs[n].context) + len(pairs[n].continuation), reverse=True)
    yield from (alone[start : start + rows] for start in range(0, len(alone), rows))


def _branched(model: LanguageModel, pairs: Sequence[Pair], num_classes: int, how: How, rows: int) -> list[Likelihood]:
    """Read the context that all have in common, then the continuations from there."""
    reader = Reader(model, 1, how.norm_stats, how.piece, bf16=how.bf16)
    last = reader.last(torch.tensor(pairs[0].context)[None])
    return after(reader, last, [pair.continuation for pair in pairs], num_classes, rows)


def after(
    reader: Reader, last: Tensor, continuations: Sequence[Sequence[int]], num_classes: int, rows: int
) -> list[Likelihood]:
    """Score continuations of what a reader of one row has read, so many side by side; it stays where it is.

    Args:
        last: (1, 1, D) hidden values of the last token that was read.
        rows: 1 under the norm policy `window`, whose statistics are those of one row.
    """
    groups = (continuations[start : start + rows] for start in range(0, len(continuations), rows))
    return [found for group in groups for found in _together(reader, last, group, num_classes)]


def _together(
    reader: Reader, last: Tensor, continuations: Sequence[Sequence[int]], num_classes: int
) -> list[Likelihood]:
    ids = torch.from_numpy(_in_rows(continuations))
    hidden = torch.cat([last.expand(len(ids), -1, -1), *(h for _, h in reader.branch(len(ids)).read(ids[:, :-1]))], 1)
    return [
        _scored(reader.model, row[: len(own)], torch.tensor(own), num_classes)
        for row, own in zip(hidden, continuations, strict=True)
    ]


def _in_rows(texts: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Texts as rows, padded on the right, where nothing sees the padding."""
    ids = np.zeros((len(texts), max(map(len, texts))), dtype=np.int64)
    for row, own in zip(ids, texts, strict=True):
        row[: len(own)] = own
    return ids


def _padded(model: LanguageModel, pairs: Sequence[Pair], num_classes: int, how: How) -> list[Likelihood]:
    """Read pairs side by side, each in its own row."""
    rows = [(*pair.context, *pair.continuation) for pair in pairs]
    ids = _in_rows(rows)
    reader = Reader(model, len(rows), how.norm_stats, how.piece, bf16=how.bf16)
    nats, greedy = [0.0] * len(pairs), [True] * len(pairs)
    for start, hidden in reader.read(torch.from_numpy(ids[:, :-1])):
        for number, (pair, own) in enumerate(zip(pairs, rows, strict=True)):
            low = max(len(pair.context) - 1 - start, 0)
            high = min(len(own) - 1 - start, hidden.shape[1])
            if low < high:
                targets = torch.tensor(own[start + low + 1 : start + high + 1])
                found = _scored(model, hidden[number, low:high], targets, num_classes)
                nats[number] += found.nats
                greedy[number] &= found.greedy
    return [Likelihood(*pair) for pair in zip(nats, greedy, strict=True)]


def _scored(model: LanguageModel, hidden: Tensor, ids: Tensor, num_classes: int) -> Likelihood:
    """(n, D) hidden values before each of n ids -> the log-probability of all of them."""
    logits = linear(hidden, model.output_weight.to(hidden.dtype))[:, :num_classes]
    logits, ids = logits.to(torch.promote_types(logits.dtype, torch.float32)), ids.to(logits.device)
    nats = float(logits.log_softmax(1).gather(1, ids[:, None]).double().sum())
    if not math.isfinite(nats):
        raise NumericalError("a log-probability is not finite; the weights are damaged, or their products too large")
    likeliest = logits.argmax(1)
    return Likelihood(nats, bool((likeliest == ids).all()), tuple(likeliest.tolist()))
