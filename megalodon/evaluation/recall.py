"""Tasks that need something from far back, made offline from a seed, at any length in tokens and any depth.

    passkey      a number in a text that repeats itself
    needle       the same in real text
    multikey     a table of names and numbers; one is asked for
    associative  letters that stand for digits; the one that is asked for stood only once
    copy         a row of letters, filler, then its beginning: go on
    listops      the value of nested operations (listops.py)

Text is tokenised line by line, as long documents are, so a prompt has the length it is to have in the tokens of any
tokenizer, up to a line less. Not here: how answers are scored (answers.py), questions from a file (questions.py).
"""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from megalodon.data.builtin import generated_texts
from megalodon.errors import DataError, InputError
from megalodon.evaluation.corpus import Corpus, Int64s, Tokens
from megalodon.evaluation.listops import grow

CANDIDATES = 10
"""Answers among which the right one is to be the likeliest: chance is one in so many."""
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
HAYSTACK = 8 << 20
"""Tokens of a document of real text that are held, and characters of all, at most."""
_WIDTH = 120
"""Characters after which a line of real text is cut at a space."""
_SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Sample(NamedTuple):
    """A prompt, and what may follow it."""

    ids: Int64s
    """Of the prompt, BOS included."""
    answer: str
    others: tuple[str, ...]
    """Wrong answers of the same form."""


class Material:
    """What a prompt is made of.

    Args:
        tokens:   of the model.
        length:   tokens of prompt and answer, at most.
        depth:    where the fact stands: 0 the beginning of the text, 1 its end.
        haystack: lines of real text.
    """

    def __init__(self, tokens: Tokens, length: int, depth: float, haystack: Sequence[str]) -> None:
        self.tokens, self.length, self.depth, self.haystack = tokens, length, depth, haystack
        self._known: dict[str, Int64s] = {}

    def ids(self, text: str) -> Int64s:
        """The ids of a line inside a text."""
        if text not in self._known:
            self._known[text] = self.tokens.tokenizer.encode_array(text, False).astype(np.int64)
        return self._known[text]

    def room(self, *texts: str) -> int:
        """Tokens that are left beside BOS and these texts."""
        return self.length - int(self.tokens.bos) - sum(len(self.ids(text)) for text in texts)

    def within(self, room: int, lines: Iterable[str]) -> list[Int64s]:
        """As many of the first lines as so many tokens hold. Raises: InputError if that is not one."""
        found, used = list[Int64s](), 0
        for line in lines:
            own = self.ids(line)
            used += len(own)
            if used > room:
                break
            found.append(own)
        if not found:
            raise InputError(f"--lengths {self.length:,}: too short for a task of recall; expected longer ones")
        return found

    def prompt(self, parts: Iterable[Int64s]) -> Int64s:
        """Parts as one text, after BOS where documents begin with one."""
        first = [np.array([self.tokens.tokenizer.bos_id])] if self.tokens.bos else []
        return np.concatenate([*first, *parts])

    def hidden(self, filler: Iterable[str], fact: str, question: str, answer: str) -> Int64s:
        """A prompt: the fact in filler, at the depth, then the question."""
        around = self.within(self.room(fact, question, answer), filler)
        sizes = np.cumsum([0, *(len(part) for part in around)])
        place = int(np.searchsorted(sizes, self.depth * sizes[-1]))
        return self.prompt([*around[:place], self.ids(fact), *around[place:], self.ids(question)])


def passkey(draw: random.Random, material: Material) -> Sample:
    """A number that was said once in a text that repeats itself."""
    answer, *others = _numbers(draw)
    fact = f"The pass key is{answer}. Remember it.{answer} is the pass key.\n"
    question = "What is the pass key? The pass key is"
    return Sample(material.hidden(itertools.repeat(FILLER), fact, question, answer), answer, tuple(others))


def needle(draw: random.Random, material: Material) -> Sample:
    """A number that was said once in real text, which begins anywhere and goes round."""
    answer, *others = _numbers(draw)
    asked, start = f"\nThe number of {_name(draw)} is", draw.randrange(len(material.haystack))
    text = itertools.islice(itertools.cycle(material.haystack), start, None)
    return Sample(material.hidden(text, f"{asked}{answer}.\n", asked, answer), answer, tuple(others))


def multikey(draw: random.Random, material: Material) -> Sample:
    """The number of one of as many names as there is room for; the other candidates are those of other names."""
    numbers: dict[str, int] = {}
    taken: set[int] = set()

    def table() -> Iterator[str]:
        while True:
            name, number = _name(draw), draw.randrange(100_000, 1_000_000)
            if name not in numbers and number not in taken:
                numbers[name] = number
                taken.add(number)
                yield f"The number of {name} is {number}.\n"

    rows = table()
    fact, (asked, number) = next(rows), next(iter(numbers.items()))
    ids = material.hidden(rows, fact, f"The number of {asked} is", f" {number}")
    names = list(numbers)[1:-1]  # for the last one there was no room
    if len(names) < CANDIDATES - 1:
        raise InputError(f"--lengths {material.length:,}: too short for {CANDIDATES} names; expected longer ones")
    others = (f" {numbers[name]}" for name in draw.sample(names, CANDIDATES - 1))
    return Sample(ids, f" {number}", tuple(others))


def associative(draw: random.Random, material: Material) -> Sample:
    """The digit of a letter that stood only once, among letters that come again and again with theirs."""
    asked, *rest = draw.sample(_LETTERS, len(_LETTERS))
    digits = {letter: draw.randrange(10) for letter in _LETTERS}

    def line(letters: Iterable[str]) -> str:
        return " ".join(f"{letter} {digits[letter]}" for letter in letters) + "\n"

    fact = line([*draw.choices(rest, k=5), asked, *draw.choices(rest, k=4)])
    filler = (line(draw.choices(rest, k=10)) for _ in itertools.count())
    answer = f" {digits[asked]}"
    return Sample(material.hidden(filler, fact, asked, answer), answer, _other_digits(digits[asked]))


def copying(draw: random.Random, material: Material) -> Sample:
    """The rest of a row of 24 letters whose beginning comes again after filler."""
    row, *others = ("".join(draw.choices(_LETTERS, k=24)) for _ in range(CANDIDATES))
    fact, question, answer = f"The letters are {row}.\n", f"The letters are {row[:4]}", row[4:]
    ids = material.hidden(itertools.repeat(FILLER), fact, question, answer)
    return Sample(ids, answer, tuple(other[4:] for other in others))


def listops(draw: random.Random, material: Material) -> Sample:
    """The value of a tree of operations; all of the text is needed, so depth has no meaning."""
    size = material.length
    while size >= 4:  # how many tokens a symbol takes is up to the tokenizer
        tree = grow(draw, size)
        symbols, value = tree.symbols(), tree.value()
        lines = [f"{' '.join(symbols[n : n + 32])} " for n in range(0, len(symbols), 32)]
        ids, answer = material.prompt(map(material.ids, [*lines, "="])), f" {value}"
        whole = len(ids) + len(material.ids(answer))
        if whole <= material.length:
            return Sample(ids, answer, _other_digits(value))
        size = min(size - 1, size * material.length // whole)
    raise InputError(f"--lengths {material.length:,}: too short for operations on digits; expected longer ones")


TASKS: Mapping[str, Callable[[random.Random, Material], Sample]] = {
    "passkey": passkey,
    "needle": needle,
    "multikey": multikey,
    "associative": associative,
    "copy": copying,
    "listops": listops,
}
DEPTHLESS = frozenset({"listops"})
"""Tasks that need all of their text."""


def haystack(corpus: Corpus | None, tokens: Tokens) -> list[str]:
    """Lines of real text, cut at spaces where they are long; made-up sentences without a corpus.

    Raises: DataError for a corpus without text.
    """
    held, size = list[str](), 0
    texts = generated_texts() if corpus is None else _texts(corpus, tokens)
    for line in itertools.chain.from_iterable(map(_lines, texts)):
        held.append(line)
        size += len(line)
        if size >= HAYSTACK:
            break
    if corpus is not None and not held:
        raise DataError(f"{corpus.name} holds no text; expected some, in which a needle can be hidden")
    return held


def _texts(corpus: Corpus, tokens: Tokens) -> Iterator[str]:
    for document in corpus.documents(tokens):
        ids = itertools.chain.from_iterable(piece.tolist() for piece in document.pieces())
        yield tokens.tokenizer.decode(itertools.islice(ids, HAYSTACK))


def _lines(text: str) -> Iterator[str]:
    for line in text.splitlines(keepends=True):
        start = 0
        while len(line) - start > _WIDTH:
            space = line.find(" ", start + _WIDTH // 2, start + _WIDTH)
            end = space if space >= 0 else start + _WIDTH
            yield line[start:end]
            start = end
        yield line[start:]


def _numbers(draw: random.Random) -> list[str]:
    return [f" {number}" for number in draw.sample(range(10_000, 100_000), CANDIDATES)]


def _name(draw: random.Random) -> str:
    return "".join(draw.choices(_SYLLABLES, k=3))


def _other_digits(digit: int) -> tuple[str, ...]:
    return tuple(f" {other}" for other in range(10) if other != digit)
