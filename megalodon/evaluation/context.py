"""How far back a model uses text: the same windows of held-out text, scored after more and more of what stands before.

For every length L the model reads the L tokens before a window from the empty state, then the window itself, each of
whose tokens is scored; L = 0 is the state reset at the window's start, the baseline. Windows are the same for all L, so
differences are paired; intervals draw windows (bootstrap.py). Where documents begin with BOS, each context does.
The gain sits at the beginning of a window, so losses are also kept by position in it: 1, 2, 3 to 4, 5 to 8 …

    choice = choose(corpus, tokens, longest=65536, target=4096, count=32)
    found = measure(model, choice, tokens, lengths=(0, 1024, 65536), how)
    print(found.used())                       what it says in words

Not here: loss by position in whole documents (scoring.py).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megalodon.config import count_name
from megalodon.errors import InputError, NumericalError
from megalodon.evaluation import bootstrap
from megalodon.evaluation.bootstrap import Interval
from megalodon.evaluation.corpus import Corpus, Int64s, Tokens
from megalodon.evaluation.perplexity import position_buckets
from megalodon.evaluation.reading import Reader
from megalodon.evaluation.scoring import How, Vocabulary
from megalodon.inference.session import evaluating
from megalodon.model.architectures import LanguageModel

Floats = NDArray[np.float64]
Told = Callable[[int], None]
"""Told now and then: tokens read so far."""


class Window(NamedTuple):
    """A stretch of text to score, with all the context that any length asks for before it."""

    document: str
    start: int
    """Number of its first token in the document."""
    ids: NDArray[np.int32]
    """(longest + target,): context, then the window."""


class Choice(NamedTuple):
    """The windows of a corpus."""

    windows: tuple[Window, ...]
    target: int
    """Tokens of a window."""
    longest: int
    """Tokens before it that are there."""
    possible: int
    """Windows that do not overlap and have so much before them."""


def choose(corpus: Corpus, tokens: Tokens, longest: int, target: int, count: int) -> Choice:
    """Take windows evenly from all documents that are long enough; fewer if the text has fewer.

    Only text counts: BOS and EOS stand in no window and in no context.
    Raises: InputError if no document is long enough, with the longest there is.
    """
    most, slots, around = 0, [], int(tokens.bos)
    for number, document in enumerate(corpus.documents(tokens)):
        length = sum(len(piece) for piece in document.pieces()) - around - int(tokens.eos)
        most = max(most, length)
        slots += [(number, longest + k * target) for k in range(max(0, length - longest) // target)]
    if not slots:
        raise InputError(
            f"--lengths {count_name(longest)}: the longest document has {most:,} tokens, and a window of {target:,} "
            f"behind so many takes {longest + target:,}; choose shorter lengths, a shorter --target, other --data, "
            "or --concatenate"
        )
    count = min(count, len(slots))
    chosen: dict[int, list[int]] = {}
    for k in range(count):
        number, start = slots[(2 * k + 1) * len(slots) // (2 * count)]
        chosen.setdefault(number, []).append(start)
    windows = []
    for number, document in enumerate(corpus.documents(tokens)):
        if number in chosen:
            ids = document.ids()[around:]
            for start in chosen[number]:
                windows.append(Window(document.name, start, ids[start - longest : start + target].astype(np.int32)))
    return Choice(tuple(windows), target, longest, len(slots))


class Use(NamedTuple):
    """What context is worth to a model: losses of W windows at K lengths."""

    lengths: tuple[int, ...]
    """Tokens before the window, ascending; 0 is the state reset at its start."""
    losses: Floats
    """(W, K) nats a token."""
    buckets: dict[int, Floats]
    """Upper end of a bucket of positions in the window -> (W, K) nats a token there."""
    bytes: Int64s
    """(W,) of the scored text."""
    scored: int
    """Tokens of a window that are scored."""

    def loss(self) -> list[Interval]:
        """Nats a token at every length, each with the interval over windows."""
        return bootstrap.ratios(self.losses, np.ones_like(self.losses))

    def over(self, base: int) -> list[Interval]:
        """Loss at every length less the loss at the length number `base`, paired by window."""
        return [self._less(column, base) for column in range(len(self.lengths))]

    def steps(self) -> list[Interval]:
        """Loss at every length but the first less the loss at the one before, paired."""
        return [self._less(b, a) for a, b in pairwise(range(len(self.lengths)))]

    def _less(self, column: int, base: int) -> Interval:
        return bootstrap.mean(self.losses[:, column] - self.losses[:, base])

    def bits_per_byte(self) -> list[float | None]:
        """At every length."""
        total = int(self.bytes.sum())
        sums = self.losses.sum(0) * self.scored / math.log(2)
        return [float(bits) / total if total else None for bits in sums]

    def used(self) -> int:
        """The largest length that is better than every shorter one beyond chance; the first length if none is."""
        columns = range(len(self.lengths))
        return max(n for k, n in enumerate(self.lengths) if all(self._less(k, s).high < 0 for s in columns[:k]))

    def hurt(self) -> tuple[int, ...]:
        """Lengths that are worse than the one before them beyond chance."""
        return tuple(n for n, step in zip(self.lengths[1:], self.steps(), strict=True) if step.low > 0)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        to_reset, steps = self.over(0), [None, *self.steps()]
        to_first = self.over(1)
        rows = zip(self.lengths, self.loss(), self.bits_per_byte(), strict=True)
        return {
            "windows": len(self.losses),
            "scored_tokens": self.scored * len(self.losses),
            "lengths": [
                {
                    "context": length,
                    "loss": loss.document(),
                    "bits_per_byte": bits,
                    "less_reset": to_reset[k].document() if k else None,
                    "less_shortest": to_first[k].document() if k > 1 else None,
                    "less_previous": step.document() if (step := steps[k]) else None,
                    "by_position": {str(end): float(b[:, k].mean()) for end, b in self.buckets.items()},
                }
                for k, (length, loss, bits) in enumerate(rows)
            ],
            "used_tokens": self.used(),
            "worse_at": list(self.hurt()),
            "window_losses": [[round(x, 6) for x in row] for row in self.losses.tolist()],
        }


def cost(choice: Choice, lengths: Sequence[int]) -> int:
    """Tokens to read."""
    return len(choice.windows) * sum(length + choice.target for length in lengths)


def measure(
    model: LanguageModel,
    choice: Choice,
    tokens: Tokens,
    lengths: Sequence[int],
    how: How,
    rows: int = 1,
    told: Told = lambda count: None,
) -> Use:
    """Score the windows after every length of context.

    Args:
        lengths: ascending, the first 0, the last at most `choice.longest`.
        rows:    windows read side by side; 1 under the norm policy `window`.
    Raises: NumericalError for a loss that is not finite.
    """
    vocabulary, done = Vocabulary(tokens.tokenizer), 0
    scored = choice.target - int(not tokens.bos)  # without BOS nothing stands before the first token where L is 0
    losses = np.empty((len(choice.windows), len(lengths), scored))
    rows = 1 if how.norm_stats == "window" else rows
    with torch.inference_mode(), evaluating(model):
        for k, length in enumerate(lengths):
            for first in range(0, len(choice.windows), rows):
                group = choice.windows[first : first + rows]
                ids = np.stack([window.ids[choice.longest - length :] for window in group]).astype(np.int64)
                if tokens.bos:
                    ids = np.pad(ids, ((0, 0), (1, 0)), constant_values=tokens.tokenizer.bos_id)
                reader, parts = Reader(model, len(group), how.norm_stats, how.piece, bf16=how.bf16), list[Tensor]()
                for count, part in _last_losses(reader, torch.from_numpy(ids), scored, vocabulary.size):
                    parts.append(part)
                    done += count
                    told(done)
                losses[first : first + rows, k] = torch.cat(parts, 1).double().cpu().numpy()
    if not np.isfinite(losses).all():
        raise NumericalError("a loss is not finite; the weights are damaged, or their products too large")
    sizes = [int(vocabulary.bytes[window.ids[-scored:]].sum()) for window in choice.windows]
    return Use(tuple(lengths), losses.mean(2), _by_position(losses), np.array(sizes), scored)


def _last_losses(reader: Reader, ids: Tensor, scored: int, num_classes: int) -> Iterator[tuple[int, Tensor]]:
    """Read rows (R, n) and yield, pass by pass, tokens read and the losses (R, l) of those among the last `scored`."""
    inputs, targets = ids[:, :-1], ids[:, 1:]
    begin = targets.shape[1] - scored
    for start, hidden in reader.read(inputs):
        end = start + hidden.shape[1]
        low = min(max(start, begin), end)
        yield reader.rows * (end - start), reader.losses(hidden[:, low - start :], targets[:, low:end], num_classes)


def _by_position(losses: Floats) -> dict[int, Floats]:
    """(W, K, T) -> upper end of a bucket of positions -> means (W, K): 1, 2, 3 to 4, 5 to 8 … T."""
    return {high: losses[:, :, low:high].mean(2) for low, high in position_buckets(losses.shape[2])}
