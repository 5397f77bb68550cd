"""From token ids to text that can be shown at once: whole characters only, stop strings never half shown.

Not here: which ids come (sampling.py), the screen (megalodon_cli/console.py).
"""

import codecs
from collections.abc import Iterable

from megalodon.data.tokenizer import Tokenizer
from megalodon.errors import InputError


class TokenStream:
    """Turns ids into text as they come; the text does not depend on how the bytes are cut into tokens.

    Args:
        tokenizer: gives the bytes of each id.
        stop: strings that end the text where the first of them is complete; they are not part of it.
    Raises: InputError for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Iterable[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        if "" in self._stop:
            raise InputError("a stop string is empty; expected at least 1 character")
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
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
        text = self._held + text
        # The stop string that is complete first wins, as if the characters came one by one.
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self._stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
