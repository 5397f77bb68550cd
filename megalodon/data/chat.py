"""Conversations -> token ids and which of them are trained on, by a chat template.

    chat = ChatFormat(load_template("chatml"), tokenizer, bos=True)
    chat.encode([{"role": "user", "content": "Hi"}], answer=True).ids       # up to where the model is to write
    chat.stop_ids                                                           # what ends its answer

Markers, such as <|im_start|>, are what a template writes in that form. Each is one id that no text encodes to: what
people write can never pass for one. Between markers, and at the ends of what the model is to write, text is encoded
piece by piece, so that a conversation has the same ids whether it is read as a whole or turn by turn.
Not here: running the template (template.py), reading files of conversations (conversations.py).
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megalodon.data.template import GENERATION_BEGIN, GENERATION_END, MAX_SOURCE, Renderer, TemplateError
from megalodon.data.tokenizer import Tokenizer
from megalodon.errors import DataError

Message = Mapping[str, str]
TrainOn = Literal["assistant", "last", "all"]

TEMPLATE_FILE, MARKERS_FILE = "chat_template.jinja", "chat.json"
PLAIN = """\
{%- for message in messages %}
{%- if message.role == "system" %}{{ message.content + "\\n\\n" }}
{%- elif message.role == "user" %}{{ "User:\\n" + message.content + "\\n\\n" }}
{%- else %}{{ "Assistant:\\n" }}{% generation %}{{ message.content + eos_token }}{% endgeneration %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "Assistant:\\n" }}{% endif %}"""
CHATML = """\
{%- for message in messages %}
{{- "<|im_start|>" + message.role + "\\n" }}
{%- if message.role == "assistant" %}{% generation %}{{ message.content + "<|im_end|>" }}{% endgeneration %}
{%- else %}{{ message.content + "<|im_end|>" }}
{%- endif %}
{{- "\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}"""
BUILT_IN = {"plain": PLAIN, "chatml": CHATML}

_MARKER = re.compile(r"<\|[\w.-]+\|>")
_BOS, _EOS, _ESCAPE = "\ufdd0", "\ufdd1", "\ufdd4"
_OWN = (_BOS, _EOS, GENERATION_BEGIN, GENERATION_END, _ESCAPE)
"""Noncharacters that mean something in a rendered text; where people wrote them they are escaped."""
_PROBE: tuple[Message, ...] = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


class ChatTemplate(NamedTuple):
    """Jinja that writes a conversation as one text."""

    name: str
    source: str

    @property
    def sha256(self) -> str:
        """Of the source."""
        return hashlib.sha256(self.source.encode()).hexdigest()


def load_template(given: str) -> ChatTemplate:
    """Return the template that `plain`, `chatml` or FILE.jinja names. Raises: DataError."""
    if given in BUILT_IN:
        return ChatTemplate(given, BUILT_IN[given])
    path = Path(given)
    if path.suffix not in (".jinja", ".jinja2", ".j2"):
        raise DataError(f"chat template {given}: expected {', '.join(BUILT_IN)} or a file ending in .jinja")
    return ChatTemplate(path.stem, _read(path))


def default_template(tokenizer: Tokenizer) -> ChatTemplate:
    """Return chatml for a tokenizer that has ids for its markers, else plain, which needs none."""
    enough = len(tokenizer.reserved_ids) >= len(_markers(CHATML))
    return load_template("chatml" if enough else "plain")


def _read(path: Path) -> str:
    try:
        source = path.read_bytes()[: 4 * MAX_SOURCE + 1].decode()
    except OSError as error:
        raise DataError(f"{path}: {(error.strerror or str(error)).lower()}; expected a chat template") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start:,} is not UTF-8; expected a chat template") from None
    if len(source) > MAX_SOURCE:
        raise DataError(f"{path}: has more than {MAX_SOURCE:,} characters; expected a chat template")
    return source


class Encoded(NamedTuple):
    """A conversation as ids; `trained` says of each whether a loss is taken where it is the target."""

    ids: list[int]
    trained: list[bool]


class _Piece(NamedTuple):
    """A part of a rendered conversation: a text, or a marker by its id."""

    text: str
    marker: int | None
    trained: bool


class ChatFormat:
    """A template with the tokenizer whose ids its conversations become.

    Args:
        template:  what writes a conversation as text.
        tokenizer: its reserved ids become the markers, in the order in which they stand in the template; markers that
                   find none take ids above its vocabulary, rows that the model must then have.
        bos:       whether a conversation begins with BOS, as documents did in training.
        markers:   the ids that a saved model of this template gave them; None assigns them.
        learnt:    markers that the model knows from another template: they keep their ids, no other marker takes one.
    Raises:
        DataError: the template cannot be used; the message says why.
    """

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        *,
        bos: bool,
        markers: Mapping[str, int] | None = None,
        learnt: Mapping[str, int] | None = None,
    ) -> None:
        self.template, self.tokenizer, self.bos = template, tokenizer, bos
        names = _markers(template.source)
        self.markers = dict(_assigned(names, tokenizer, learnt or {}) if markers is None else markers)
        if missing := [name for name in names if name not in self.markers]:
            raise DataError(f"chat template {template.name}: no id for {', '.join(missing)}; tune the model again")
        self.new_rows = max((token + 1 for token in self.markers.values()), default=0) - tokenizer.vocab_size
        self.new_rows = max(0, self.new_rows)
        self._known = {**self.markers, _BOS: tokenizer.bos_id, _EOS: tokenizer.eos_id}
        self._cut = re.compile("|".join(map(re.escape, sorted(self._known, key=len, reverse=True))))
        self._renderer = self._checked(lambda: Renderer(template.source, trusted=template.source in BUILT_IN.values()))
        self._marked = bool(re.search(r"{%[-+]?\s*generation\s*[-+]?%}", template.source))
        self.stop_ids = self._stop_ids()

    def encode(self, messages: Sequence[Message], *, answer: bool = False, trained: TrainOn = "assistant") -> Encoded:
        """Return the ids of a conversation.

        Args:
            messages: turns, each with `role` and `content`.
            answer:   end with the opening of the assistant's turn, where the model is to write.
            trained:  which ids are trained on: the assistant's turns with what ends them, the last of these, or all.
        Raises:
            DataError: the template refuses the conversation, loops, or writes what it wrote before otherwise.
        """
        return self._encoded(self._pieces(messages, answer), trained)

    def continuation(self, before: Sequence[Message], messages: Sequence[Message]) -> list[int] | None:
        """Return the ids to read after those of `before`, so that the model is to answer `messages`.

        Args:
            before:   turns that were read, up to and with what ends the assistant's last answer.
            messages: the same with new turns behind them.
        Returns:
            None if the template writes the earlier turns differently now: then everything must be read anew.
        Raises:
            DataError: as `encode`.
        """
        read = _up_to_last_answer(self._pieces(before, False))
        whole = self._pieces(messages, True)
        if not read or whole[: len(read)] != read:
            return None
        return self._encoded(whole[len(read) :], "all", begins=False).ids

    def describe(self, encoded: Encoded) -> list[tuple[str, bool]]:
        """Return the text of ids in runs, each with whether it is trained on; markers by their names, for people."""
        names = {token: name for name, token in self.markers.items()}
        names |= {self.tokenizer.bos_id: "<bos>", self.tokenizer.eos_id: "<eos>"}
        runs: list[tuple[bytes, bool]] = []
        for token, trained in zip(*encoded, strict=True):
            shown = names[token].encode() if token in names else self.tokenizer.token_bytes(token)
            if runs and runs[-1][1] == trained:
                runs[-1] = (runs[-1][0] + shown, trained)
            else:
                runs.append((shown, trained))
        return [(text.decode(errors="replace"), trained) for text, trained in runs]

    def save(self, directory: Path) -> None:
        """Write the template and the ids of its markers into a model directory."""
        (directory / TEMPLATE_FILE).write_text(self.template.source, encoding="utf-8", newline="")
        about = {"name": self.template.name, "sha256": self.template.sha256, "markers": self.markers}
        (directory / MARKERS_FILE).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path, tokenizer: Tokenizer, *, bos: bool) -> "ChatFormat | None":
        """Return the format that was saved with a model; None if there is none. Raises: DataError."""
        path = directory / MARKERS_FILE
        if not path.exists() and not (directory / TEMPLATE_FILE).exists():
            return None
        try:
            about = json.loads(path.read_bytes())
            name, sha256, markers = str(about["name"]), about["sha256"], about["markers"]
            if not all(type(token) is int and 0 <= token < 1 << 31 for token in markers.values()):
                raise ValueError("an id of a marker is no number")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path}: {error}; expected name, sha256 and markers of a chat template") from None
        template = ChatTemplate(name, _read(directory / TEMPLATE_FILE))
        if template.sha256 != sha256:
            raise DataError(
                f"{directory / TEMPLATE_FILE}: sha256 is {template.sha256[:8]}, expected {str(sha256)[:8]}; "
                "the template was changed after the model learnt it, put it back"
            )
        return cls(template, tokenizer, bos=bos, markers=markers)

    def _checked(self, call: Any) -> Any:
        try:
            return call()
        except TemplateError as error:
            raise DataError(f"chat template {self.template.name}: {error}") from None

    def _render(self, messages: Sequence[Message], answer: bool) -> str:
        escaped = [{**message, "content": self._escaped(message["content"])} for message in messages]
        values = {"messages": escaped, "add_generation_prompt": answer, "bos_token": _BOS, "eos_token": _EOS}
        text: str = self._checked(lambda: self._renderer.render(values))
        return text

    def _escaped(self, text: str) -> str:
        """Break what would pass for a marker, or for a sign of ours."""
        if not any(sign in text for sign in _OWN) and not _MARKER.search(text):
            return text
        for number, sign in reversed(list(enumerate(_OWN))):  # the escape itself first
            text = text.replace(sign, f"{_ESCAPE}{number}")
        return _MARKER.sub(lambda found: f"{found[0][0]}{_ESCAPE}-{found[0][1:]}", text)

    def _pieces(self, messages: Sequence[Message], answer: bool) -> list[_Piece]:
        text = self._render(messages, answer)
        pieces = []
        for part, trained in self._by_marks(text) if self._marked else self._by_prefixes(messages, text):
            place = 0
            for found in self._cut.finditer(part):
                pieces += [
                    _Piece(part[place : found.start()], None, trained),
                    _Piece("", self._known[found[0]], trained),
                ]
                place = found.end()
            pieces.append(_Piece(part[place:], None, trained))
        return [piece for piece in pieces if piece.text or piece.marker is not None]

    def _by_marks(self, text: str) -> list[tuple[str, bool]]:
        """Cut a text at the ends of `{% generation %}`."""
        parts: list[tuple[str, bool]] = []
        for number, part in enumerate(text.split(GENERATION_BEGIN)):
            inside, mark, outside = part.partition(GENERATION_END)
            if bool(mark) != bool(number):
                raise DataError(f"chat template {self.template.name}: {{% generation %}} stands inside another")
            parts += [(inside, bool(number)), (outside, False)]
        return parts

    def _by_prefixes(self, messages: Sequence[Message], text: str) -> list[tuple[str, bool]]:
        """Find the assistant's turns of a template without marks: what is behind the opening of each, up to its end."""
        parts, place = [], 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            opening, whole = self._render(messages[:number], True), self._render(messages[: number + 1], False)
            if not (opening.startswith(text[:place]) and whole.startswith(opening) and text.startswith(whole)):
                raise DataError(
                    f"chat template {self.template.name}: writes turn {number + 1} differently once more turns follow, "
                    "so what is trained on cannot be found; mark it with {% generation %} … {% endgeneration %}"
                )
            # What stands behind the last marker of the turn, a newline say, belongs to the next.
            ends = [found.end() for found in self._cut.finditer(whole) if found.end() > len(opening)]
            end = ends[-1] if ends else len(whole)
            parts += [(text[place : len(opening)], False), (text[len(opening) : end], True)]
            place = end
        return [*parts, (text[place:], False)]

    def _encoded(self, pieces: Sequence[_Piece], trained: TrainOn, begins: bool = True) -> Encoded:
        last = _last_answer(pieces)
        ids: list[int] = []
        flags: list[bool] = []
        own_bos = bool(pieces) and pieces[0].marker == self.tokenizer.bos_id
        if begins and self.bos and not own_bos:
            ids, flags = [self.tokenizer.bos_id], [False]
        for number, piece in enumerate(pieces):
            new = [piece.marker] if piece.marker is not None else self._text_ids(piece.text, begins and number == 0)
            takes = {"assistant": piece.trained, "last": piece.trained and number >= last, "all": True}[trained]
            ids += new
            flags += [takes] * len(new)
        return Encoded(ids, flags)

    def _text_ids(self, text: str, begins: bool) -> list[int]:
        plain = re.sub(f"{_ESCAPE}([0-9-])", lambda found: "" if found[1] == "-" else _OWN[int(found[1])], text)
        try:
            plain.encode()
        except UnicodeEncodeError:
            return self.tokenizer.encode(plain)  # says where
        found: list[int] = self.tokenizer.encode_array(plain, begins=begins).tolist()
        return found

    def _stop_ids(self) -> frozenset[int]:
        """The marker that ends the assistant's turn."""
        ends = [piece.marker for piece in self._pieces(_PROBE, False) if piece.trained and piece.marker is not None]
        if not ends:
            raise DataError(
                f"chat template {self.template.name}: nothing ends the assistant's turn; expected a marker such as "
                "<|im_end|> or {{ eos_token }} behind its content"
            )
        return frozenset((ends[-1],))


def _markers(source: str) -> list[str]:
    """The markers of a template, in order."""
    return list(dict.fromkeys(_MARKER.findall(source)))


def _assigned(names: Sequence[str], tokenizer: Tokenizer, learnt: Mapping[str, int]) -> dict[str, int]:
    new = range(tokenizer.vocab_size, tokenizer.vocab_size + len(names) + len(learnt))
    free = (token for token in (*tokenizer.reserved_ids, *new) if token not in learnt.values())
    return {name: learnt[name] if name in learnt else next(free) for name in names}


def _last_answer(pieces: Sequence[_Piece]) -> int:
    """Where the last run of trained pieces begins."""
    place = max((number for number, piece in enumerate(pieces) if piece.trained), default=0)
    while place and pieces[place - 1].trained:
        place -= 1
    return place


def _up_to_last_answer(pieces: list[_Piece]) -> list[_Piece]:
    """The pieces up to the marker that ends the assistant's last turn."""
    ends = [number for number, piece in enumerate(pieces) if piece.trained and piece.marker is not None]
    return pieces[: ends[-1] + 1] if ends else []
