"""ListOps: nested operations on digits, whose value is a digit; the longer, the more of them must be kept.

    [MAX 2 9 [MIN 4 7 ] 0 ]  ->  9

After the Long Range Arena (Tay et al. 2020, arXiv 2011.04006, lra_benchmarks/data/listops.py): operators MIN, MAX, MED
(the median, rounded down) and SM (the sum, modulo 10), 2 to 10 arguments each, at most 10 operators deep. There trees
are drawn until one has a length; here one grows, a digit at a time becoming an operator, so that any length is met.
Not here: how an answer is scored (recall.py).
"""

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

MAX_DEPTH = 10
MAX_ARGUMENTS = 10
OPERATORS: Mapping[str, Callable[[Sequence[int]], int]] = {
    "MIN": min,
    "MAX": max,
    "MED": lambda values: int(statistics.median(values)),
    "SM": lambda values: sum(values) % 10,
}


@dataclass
class Node:
    """A digit, or an operator with its arguments."""

    depth: int
    """Operators around it."""
    digit: int = 0
    operator: str = ""
    arguments: list["Node"] = field(default_factory=list)

    def value(self) -> int:
        """What it comes to: 0 to 9."""
        return OPERATORS[self.operator]([a.value() for a in self.arguments]) if self.operator else self.digit

    def symbols(self) -> list[str]:
        """How it is written: `[MAX`, `2`, `]`."""
        if not self.operator:
            return [str(self.digit)]
        inside = [symbol for argument in self.arguments for symbol in argument.symbols()]
        return [f"[{self.operator}", *inside, "]"]


def grow(draw: random.Random, length: int) -> Node:
    """A tree of at most `length` symbols, and of no fewer than 11 less, if it has room for one operator: from 4 on."""
    root = Node(0)
    leaves, size = [root], 1
    while leaves and length - size >= 3:
        place = draw.randrange(len(leaves))
        leaf = leaves[place]
        leaves[place] = leaves[-1]
        leaves.pop()
        many = draw.randint(2, min(MAX_ARGUMENTS, length - size - 1))
        leaf.operator = draw.choice(list(OPERATORS))
        leaf.arguments = [Node(leaf.depth + 1, draw.randrange(10)) for _ in range(many)]
        leaves += [node for node in leaf.arguments if node.depth < MAX_DEPTH]
        size += many + 1  # the digit gives way to an operator, its arguments and a bracket
    return root
