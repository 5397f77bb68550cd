"""From the logits of one position to the next token id. Not here: the loop that feeds it back (session.py).

The order is the usual one: repetition penalty, temperature, top-k, top-p, min-p, then one draw. Everything runs in
float64 on the CPU with a generator of its own, so that a seed gives the same text and no other random number moves.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megalodon.data.tokenizer import Tokenizer
from megalodon.errors import InputError, NumericalError


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen.

    Raises: InputError for a value out of range; nothing is clamped.
    """

    temperature: float = 0.8
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 50
    """Only the k most likely tokens; 0 = all."""
    top_p: float = 0.95
    """Only the fewest most likely tokens that together have this probability; 1 = all."""
    min_p: float = 0.0
    """Only tokens with at least this share of the highest probability; 0 = all."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens in the prompt or the new text, multiplies negative ones; 1 = off."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        finite = math.isfinite
        ranges = {
            "temperature": (finite(self.temperature) and self.temperature >= 0, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            "min_p": (0 <= self.min_p < 1, "from 0 (off) to below 1"),
            "repetition_penalty": (finite(self.repetition_penalty) and self.repetition_penalty > 0, "above 0; 1 = off"),
            "seed": (0 <= self.seed < 2**63, f"from 0 to {2**63 - 1}"),
        }
        for name, (fits, expected) in ranges.items():
            if not fits:
                raise InputError(f"{name} is {getattr(self, name)}; expected {expected}")

    def generator(self) -> torch.Generator:
        """A new generator at the seed."""
        return torch.Generator().manual_seed(self.seed)


class Chooser:
    """Chooses the ids of one text, one after the other.

    Args:
        config:      how.
        num_outputs: rows of the output matrix.
        prompt_ids:  to which the repetition penalty applies, as to what is chosen.
        allowed:     (num_outputs,) bool: ids that may be chosen; None means all.
    """

    def __init__(
        self, config: SamplingConfig, num_outputs: int, prompt_ids: Iterable[int] = (), allowed: Tensor | None = None
    ) -> None:
        self.config, self.allowed, self.generator = config, allowed, config.generator()
        self.seen = torch.zeros(num_outputs, dtype=torch.bool)
        # Ids without an output row (an output smaller than the vocabulary) cannot be written, so not repeated either.
        self.seen[[token for token in set(prompt_ids) if token < num_outputs]] = True

    def __call__(self, logits: Tensor) -> int:
        """The next id, from its logits (V,). Raises: NumericalError if they are not finite."""
        token = sample(logits, self.config, self.generator, self.allowed, self.seen)
        self.seen[token] = True
        return token


def allowed_ids(tokenizer: Tokenizer, num_outputs: int, ends: Iterable[int] = ()) -> Tensor:
    """Which ids may be written: (num_outputs,) bool; not the rows that pad the vocabulary, of special ids EOS and
    `ends` alone.

    Raises: InputError if the tokenizer has more ids than the model has outputs.
    """
    if tokenizer.vocab_size > num_outputs:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size:,} ids but the model only {num_outputs:,} outputs; "
            "use the tokenizer that the model was trained with"
        )
    allowed = torch.arange(num_outputs) < tokenizer.vocab_size
    allowed[sorted(tokenizer.special_ids - {tokenizer.eos_id})] = False
    allowed[sorted(ends)] = True
    return allowed


def sample(
    logits: Tensor,
    config: SamplingConfig,
    generator: torch.Generator,
    allowed: Tensor | None = None,
    seen: Tensor | None = None,
) -> int:
    """Choose the next token.

    Args:
        logits:    (V,) of one position, any float dtype and device.
        config:    how to choose.
        generator: a CPU generator; one number is drawn from it, none at temperature 0.
        allowed:   (V,) bool: ids that may be chosen; None means all.
        seen:      (V,) bool: ids that the repetition penalty applies to; None means none.
    Returns:
        The id; of equal logits the lower id counts as the more likely one.
    Raises:
        NumericalError: a logit is NaN, or no allowed id has a finite one.
    """
    scores = logits.detach().to("cpu", torch.float64)
    if seen is not None and config.repetition_penalty != 1:
        punished = torch.where(scores > 0, scores / config.repetition_penalty, scores * config.repetition_penalty)
        scores = torch.where(seen, punished, scores)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    best = float(scores.max())
    if not math.isfinite(best):
        raise NumericalError(f"the highest logit is {best}; expected a finite number; the weights are damaged")
    if config.temperature == 0:
        return int(scores.argmax())
    # The best score is subtracted first: at a tiny temperature the others underflow to probability 0, never overflow.
    scores, ids = _ranked((scores - best) / config.temperature, config.top_k)
    kept = scores.softmax(0)
    # top-p is measured among what top-k left; a token stays if those before it have not reached the share yet.
    before = kept.cumsum(0) - kept
    kept = kept[(before < config.top_p * kept.sum()) & (kept >= config.min_p * kept[0]) & (kept > 0)]
    cumulative = kept.cumsum(0)
    draw = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
    place = int(torch.searchsorted(cumulative, draw, right=True))
    return int(ids[min(place, len(kept) - 1)])


def _ranked(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The `top_k` highest scores (0: all) and their ids, highest first, of equal scores the lower id first."""
    if not 0 < top_k < len(scores):
        return scores.sort(descending=True, stable=True)
    # Sorting a whole vocabulary takes longer than a layer. Which of several equal scores topk takes is open, so all
    # that reach its last one are candidates.
    candidates = (scores >= scores.topk(top_k, sorted=False).values.min()).nonzero().flatten()
    order = scores[candidates].sort(descending=True, stable=True)
    return order.values[:top_k], candidates[order.indices[:top_k]]
