"""How often a model recalls: every task of recall.py at every length and depth, scored in two ways.

`exact`: greedy decoding would write the answer, whole. `first`: the answer is the likeliest of its ten candidates, by
the sum of its tokens' log-probabilities; chance is 10 %. Intervals are Wilson's. Nothing is promised: what a model
finds is reported. A prompt is read once; its state serves all candidates.
Not here: the tasks (recall.py).
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from megalodon.evaluation.continuations import after
from megalodon.evaluation.corpus import Tokens
from megalodon.evaluation.reading import Reader
from megalodon.evaluation.recall import CANDIDATES, DEPTHLESS, TASKS, Material, Sample
from megalodon.evaluation.scoring import How
from megalodon.inference.session import evaluating
from megalodon.model.architectures import LanguageModel

DEPTHS = (0.1, 0.5, 0.9)
_Z = 1.959964
"""Of a 95 % interval."""
_TAIL = 400
"""Characters of a prompt's end that a log of samples holds."""


class Answer(NamedTuple):
    """What became of one sample."""

    task: str
    length: int
    depth: float | None
    prompt_tokens: int
    answer: str
    greedy: str
    """The likeliest token at every place of the answer, those before it given."""
    exact: bool
    rank: int
    """1: the answer is the likeliest candidate."""
    prompt_end: str


class Plan(NamedTuple):
    """What is asked."""

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int
    """At every length and depth."""
    seed: int
    haystack: Sequence[str]

    def cells(self) -> list[tuple[str, int, float | None]]:
        """Task, length and depth of every cell."""
        return [
            (task, length, depth)
            for task in self.tasks
            for length in self.lengths
            for depth in ((None,) if task in DEPTHLESS else DEPTHS)
        ]

    def cost(self) -> int:
        """Tokens to read, about."""
        return self.samples * sum(length for _, length, _ in self.cells())

    def sample(self, tokens: Tokens, task: str, length: int, depth: float | None, number: int) -> Sample:
        """One sample: the same for the same seed, whatever else is asked."""
        draw = random.Random(f"{self.seed}/{task}/{length}/{depth}/{number}")
        return TASKS[task](draw, Material(tokens, length, depth or 0.0, self.haystack))


class Recall(NamedTuple):
    """All answers."""

    answers: list[Answer]

    def document(self) -> dict[str, Any]:
        """As JSON."""
        cells: dict[tuple[str, int, float | None], list[Answer]] = {}
        for answer in self.answers:
            cells.setdefault((answer.task, answer.length, answer.depth), []).append(answer)
        return {
            "chance_first": 1 / CANDIDATES,
            "cells": [
                {
                    "task": task,
                    "length": length,
                    "depth": depth,
                    "samples": len(own),
                    "prompt_tokens": sum(answer.prompt_tokens for answer in own) / len(own),
                    "exact": wilson(sum(answer.exact for answer in own), len(own)),
                    "first": wilson(sum(answer.rank == 1 for answer in own), len(own)),
                    "mean_rank": sum(answer.rank for answer in own) / len(own),
                }
                for (task, length, depth), own in cells.items()
            ],
        }


def wilson(hits: int, count: int) -> dict[str, float]:
    """A share with its 95 % interval, which is sound also near 0 and 1 and for few samples."""
    share, scale = hits / count, 1 + _Z**2 / count
    middle = share + _Z**2 / (2 * count)
    spread = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return {"value": share, "low": max(0.0, (middle - spread) / scale), "high": min(1.0, (middle + spread) / scale)}


def ask(
    model: LanguageModel, tokens: Tokens, plan: Plan, how: How, told: Callable[[int], None] = lambda count: None
) -> Recall:
    """Ask everything. Raises: InputError for a length too short for a task, NumericalError."""
    found, done = [], 0
    for cell in plan.cells():
        for number in range(plan.samples):
            sample = plan.sample(tokens, *cell, number)
            greedy, rank, exact = answer(model, tokens, sample, how)
            done += len(sample.ids)
            told(done)
            end = tokens.tokenizer.decode(sample.ids[-_TAIL:].tolist())[-_TAIL:]
            found.append(Answer(*cell, len(sample.ids), sample.answer, greedy, exact, rank, end))
    return Recall(found)


def answer(model: LanguageModel, tokens: Tokens, sample: Sample, how: How) -> tuple[str, int, bool]:
    """The greedy text at the answer's places, the rank of the answer, and whether greedy decoding writes it."""
    reader = Reader(model, 1, how.norm_stats, how.piece, bf16=how.bf16)
    with torch.inference_mode(), evaluating(model):
        last = reader.last(torch.from_numpy(sample.ids)[None])
        ids = [tokens.tokenizer.encode_array(text, False).tolist() for text in (sample.answer, *sample.others)]
        rows = 1 if reader.window else CANDIDATES
        right, *wrong = after(reader, last, ids, tokens.tokenizer.vocab_size, rows)
    rank = 1 + sum(found.nats >= right.nats for found in wrong)
    return tokens.tokenizer.decode(right.likeliest), rank, right.greedy
