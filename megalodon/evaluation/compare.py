"""Two models on the same text: the difference in bits per byte with its interval, paired by what the bootstrap draws.

Each unit of text, a document or a block of one (scoring.py), is scored by both, so what is hard for both cancels. Units
are stretches of text, whatever tokens a model makes of it: models with different tokenizers are compared too.
Not here: loading and scoring.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from megalodon.errors import CheckFailed
from megalodon.evaluation import bootstrap
from megalodon.evaluation.bootstrap import Interval
from megalodon.evaluation.context import Use
from megalodon.evaluation.scoring import Block, Scores


class Difference(NamedTuple):
    """One model less another one."""

    model: str
    against: str
    bits_per_byte: Interval
    """Below zero: `model` is better."""
    units: int
    drawn: str

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {**self._asdict(), "bits_per_byte": self.bits_per_byte.document()}


def difference(model: str, scores: Scores, against: str, others: Scores) -> Difference | None:
    """Compare two models that scored the same corpus; None if its tokens stand for no text.

    Raises: CheckFailed if they did not read the same documents: a fault of this program.
    """
    if scores.documents != others.documents:
        raise CheckFailed(
            f"{model} read {scores.documents:,} documents, {against} {others.documents:,}; expected the same"
        )
    if not scores.bytes or not others.bytes:
        return None
    joined = max(scores.joined, others.joined)
    own, other = scores.units(joined), others.units(joined)
    keys = sorted(own.keys() | other.keys())  # a tokenizer may have no token that begins in a block
    a, b = (np.array([units.get(key, Block())[:2] for key in keys], dtype=np.float64) for units in (own, other))
    found = bootstrap.difference(a[:, 0] / math.log(2), a[:, 1], b[:, 0] / math.log(2), b[:, 1])
    return Difference(model, against, found, len(keys), scores.drawn)


class ContextDifference(NamedTuple):
    """One model less another one at every length of context."""

    model: str
    against: str
    lengths: tuple[int, ...]
    loss: list[Interval]
    """Nats a token, paired by window."""

    def document(self) -> dict[str, Any]:
        """As JSON."""
        rows = zip(self.lengths, self.loss, strict=True)
        lengths = [{"context": length, "loss": loss.document()} for length, loss in rows]
        return {"model": self.model, "against": self.against, "lengths": lengths}


def context_difference(model: str, use: Use, against: str, other: Use) -> ContextDifference:
    """Compare two models of one tokenizer that scored the same windows."""
    columns = (use.losses - other.losses).T
    return ContextDifference(model, against, use.lengths, [bootstrap.mean(column) for column in columns])
