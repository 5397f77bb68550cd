"""From token ids to text that can be shown at once: whole characters only, stop strings never half shown.

Not here: which ids come (sampling.py), the screen (megalodon_cli/console.py).
"""

import codecs
from collections import deque
from collections.abc import Iterable

from megalodon.data.tokenizer import Tokenizer
from megalodon.errors import InputError


class Stops:
    """Strings that end a text, all looked for at once: a step a character, however many there are.

    The automaton of Aho and Corasick (1975): a node is a beginning of a string; where no string goes on, the longest
    end of what was read that is a beginning itself takes its place.

    Raises: InputError for an empty string.
    """

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fallback, self._depth, self._found = [0], [0], [0]
        for string in strings:
            if not string:
                raise InputError("a stop string is empty; expected at least 1 character")
            node = 0
            for character in string:
                if character not in self._next[node]:
                    self._next[node][character] = len(self._next)
                    self._next.append({})
                    self._fallback.append(0)
                    self._depth.append(self._depth[node] + 1)
                    self._found.append(0)
                node = self._next[node][character]
            self._found[node] = len(string)
        waiting = deque(self._next[0].values())
        while waiting:
            node = waiting.popleft()
            for character, child in self._next[node].items():
                self._fallback[child] = self.follow(self._fallback[node], character)
                self._found[child] = self._found[child] or self._found[self._fallback[child]]
                waiting.append(child)

    def follow(self, node: int, character: str) -> int:
        """The node after one more character."""
        while node and character not in self._next[node]:
            node = self._fallback[node]
        return self._next[node].get(character, 0)

    def found(self, node: int) -> int:
        """Characters of the longest string that is complete at a node; 0 for none."""
        return self._found[node]

    def begun(self, node: int) -> int:
        """Characters with which a string may have begun."""
        return self._depth[node]


class TokenStream:
    """Turns ids into text as they come; the text does not depend on how the bytes are cut into tokens.

    Args:
        tokenizer: gives the bytes of each id.
        stop: strings that end the text where the first of them is complete; they are not part of it.
    Raises: InputError for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Iterable[str] | Stops = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = stop if isinstance(stop, Stops) else Stops(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._node = 0
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; all text after it is dropped."""
        return self._stopped

    def push(self, token: int) -> str:
        """Take one id and return the text that is certain now; it may be empty."""
        return self._show(self._decoder.decode(self._tokenizer.token_bytes(token)))

    def flush(self) -> str:
        """Return what was held back: the start of a stop string that never came, U+FFFD for a broken character."""
        text = self._show(self._decoder.decode(b"", final=True))
        if not self._stopped:
            text, self._held = text + self._held, ""
        return text

    def _show(self, text: str) -> str:
        if self._stopped:
            return ""
        begin = len(self._held)
        whole = self._held + text
        for place, character in enumerate(text, begin + 1):
            self._node = self._stops.follow(self._node, character)
            if length := self._stops.found(self._node):
                self._stopped, self._held = True, ""
                return whole[: place - length]
        certain = len(whole) - self._stops.begun(self._node)
        self._held = whole[certain:]
        return whole[:certain]
