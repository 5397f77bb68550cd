"""Configuration: strict frozen values, and the loader that reads YAML into them and knows where each value came from.

    class OptimConfig(Config):
        lr: float = 1e-3
        '''Peak learning rate.'''                      # the docstring under a field is its help

    read_layer(path) -> Node                           # a tree of values that remembers its places
    merge(layers, one_of) -> Node                      # a later layer wins per key; lists are replaced
    override(tree, ["optim.lr=1e-3", "~train.seed"])   # the command line is a place too
    validate(tree, OptimConfig) -> OptimConfig         # or InvalidRecipe: every error at once, with its place

Scalars are those of YAML 1.2: `1e-4` is a number; `on`, `no` and `12:30` are strings. Sequences become tuples.
Not here: which sections a recipe has (megalodon/recipe.py), where recipe files lie (megalodon_cli/recipe_files.py).
"""

import difflib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
import pydantic_core
import yaml
from pydantic import BeforeValidator, ConfigDict, GetCoreSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import core_schema

from megalodon.errors import RecipeError

ConfigT = typing.TypeVar("ConfigT", bound="Config")


class Config(pydantic.BaseModel):
    """Base of every configuration class: unknown keys and wrong types are errors, values never change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What the name of a recipe looks like: it names files and folders too."""
LARGEST = 2**63 - 1
"""The largest number of a recipe: what computes with it has 64 bits."""

_DECIMAL = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_BYTES = {"": 1} | {f"{prefix}B": size for prefix, size in (_DECIMAL | {"G": 10**9} | _BINARY).items() if prefix != "B"}


@dataclass(frozen=True, slots=True, eq=False)
class Quantity:
    """Reads text with a unit as a number; what is no text stays. Raises: ValueError naming the forms that are read."""

    expected: str
    units: Mapping[str, float]
    whole: bool = False

    def __call__(self, value: object) -> object:
        """Return the number that a text stands for."""
        if not isinstance(value, str):
            return value
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z%]*)", value.strip())
        if not match or match[2] not in self.units:
            raise ValueError(f"`{value}` is not {self.expected}")
        number = Fraction(match[1]) * Fraction(str(self.units[match[2]]))  # 7% is 0.07 exactly
        if number > LARGEST:
            raise ValueError(f"`{value:.40}` is too large: expected at most {LARGEST}")
        if self.whole and number.denominator > 1:
            raise ValueError(f"`{value}` is {float(number):g}: expected {self.expected}")
        return int(number) if self.whole else float(number)


parse_count = Quantity("a count such as 8192, 10B or 8Ki", _DECIMAL | _BINARY, whole=True)
parse_bytes = Quantity("a size such as 100MB or 2GiB", _BYTES, whole=True)
parse_duration = Quantity("a time such as 90s, 20m or 2h", {"s": 1, "m": 60, "h": 3600, "d": 86400})
parse_share = Quantity("a share such as 0.02 or 2%", {"%": 0.01})

Count = Annotated[int, BeforeValidator(parse_count)]
Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Share = Annotated[float, BeforeValidator(parse_share)]


AMOUNT = "a part of the horizon such as 2%, 500 steps or 1B tokens"


@dataclass(frozen=True, slots=True)
class Amount:
    """A stretch of training: a share of the horizon, a number of steps, or a number of tokens."""

    value: float
    unit: Literal["share", "steps", "tokens"]

    @classmethod
    def parse(cls, value: object) -> Self:
        """Read `2%`, `0.02`, `500 steps` or `1B tokens`. Raises: ValueError naming the forms that are read."""
        if isinstance(value, cls):
            return value
        number, _, unit = value.strip().rpartition(" ") if isinstance(value, str) else ("", "", "")
        try:
            if unit in ("step", "steps", "token", "tokens"):
                return cls(float(str(parse_count(number))), "steps" if "step" in unit else "tokens")
            share = parse_share(value)
        except ValueError:
            share = None
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError(f"`{show(value)}` is not {AMOUNT}")
        return cls(float(share), "share")

    def steps(self, horizon: int, batch_tokens: int) -> int:
        """Return this amount as whole optimizer steps, given the horizon in steps and the tokens of a step."""
        if self.unit == "share":
            return round(self.value * horizon)
        return int(self.value) if self.unit == "steps" else -(-int(self.value) // batch_tokens)

    def __str__(self) -> str:
        return f"{self.value * 100:g}%" if self.unit == "share" else f"{int(self.value)} {self.unit}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse,
            serialization=core_schema.to_string_ser_schema(),
            json_schema_input_schema=core_schema.union_schema([core_schema.float_schema(), core_schema.str_schema()]),
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Where something was written: a file with line and column (from 1), or the command line (line 0)."""

    source: str
    line: int = 0
    column: int = 0
    text: str = ""
    """The whole source line."""
    width: int = 1
    """Characters to underline."""

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source

    def excerpt(self) -> str:
        """Return the source line with carets under the place; empty for the command line."""
        if not self.line:
            return ""
        return f"{self.line:5d} | {self.text}\n      | {' ' * (self.column - 1)}{'^' * self.width}"


Scalar = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Node:
    """A value of a recipe that remembers where its key and the value itself were written."""

    value: "Scalar | dict[str, Node] | tuple[Node, ...]"
    key: Place
    place: Place

    def plain(self) -> Any:
        """Return the value without places: dicts, tuples and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return tuple(node.plain() for node in self.value) if isinstance(self.value, tuple) else self.value

    def child(self, part: str | int) -> "Node | None":
        """Return the entry of a mapping, or of a list by number or by its `name`; None if there is none."""
        if isinstance(self.value, dict):
            return self.value.get(str(part))
        if isinstance(self.value, tuple):
            for number, item in enumerate(self.value):
                if str(part) in (str(number), _name(item, number)):
                    return item
        return None

    def find(self, path: Iterable[str | int]) -> "Node | None":
        """Return the node at a path of keys; None where nothing was written."""
        node: Node | None = self
        for part in path:
            node = node.child(part) if node else None
        return node


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in a recipe."""

    place: Place
    key: str
    text: str

    def __str__(self) -> str:
        said = not self.key or (not self.place.line and self.place.source.startswith(f"command line: {self.key}="))
        return f"{self.place}: {self.text}" if said else f"{self.place}: {self.key}: {self.text}"


class InvalidRecipe(RecipeError):
    """A recipe cannot be used; `problems` holds every reason with its place."""

    def __init__(self, problems: Sequence[Problem], hint: str | None = None) -> None:
        super().__init__("\n".join(str(problem) for problem in problems), hint)
        self.problems = tuple(problems)


class Impossible(ValueError):
    """Raised inside a validator: values that are fine alone but not together, as pairs (dotted key, message)."""

    def __init__(self, *faults: tuple[str, str]) -> None:
        super().__init__("; ".join(message for _, message in faults))
        self.faults = faults


def count_name(count: int) -> str:
    """Return 1024 as `1Ki`, 1048576 as `1Mi`, 1000 as `1,000`: what `parse_count` takes, short where it can be."""
    for unit in ("Mi", "Ki"):
        if count and count % _BINARY[unit] == 0:
            return f"{count // _BINARY[unit]:,}{unit}"
    return f"{count:,}"


def show(value: object) -> str:
    """Return a value as a recipe would write it: `null`, `true`, `[1, 2]`, `text`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {show(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(show(item) for item in value) + "]"
    return str(value)


class _Loader(yaml.SafeLoader):
    """PyYAML with the scalars of YAML 1.2 (core schema)."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", "|".join(_BOOL), list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)


def _scalar(node: yaml.ScalarNode, place: Place) -> Scalar:
    text, tag = node.value, node.tag.removeprefix("tag:yaml.org,2002:")
    if tag == "null":
        return None
    if tag == "bool" and text in _BOOL:
        return _BOOL[text]
    if tag == "str" and "\0" not in text:  # which no file name, and hardly any text, can hold
        return str(text)
    try:
        if tag == "int" and abs(number := int(text, 0 if text.startswith(("0o", "0x")) else 10)) <= LARGEST:
            return number
        if tag == "float":
            return float(text.replace(".", "", 1) if text.lstrip("+-.").lower() in ("inf", "nan") else text)
    except ValueError:
        raise InvalidRecipe([Problem(place, "", f"`{text:.40}` is not a value of type {tag}")]) from None
    said = {"int": f"`{text:.40}` is too large: expected at most {LARGEST}", "str": "a NUL character cannot stand here"}
    raise InvalidRecipe([Problem(place, "", said.get(tag, f"tag `{node.tag}`: recipes hold plain values, no tags"))])


_PLAIN = ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")
MOST_VALUES = 10_000
"""Values that one recipe may hold."""


class _Reader:
    """Turns YAML nodes into `Node`s; collects what is wrong instead of stopping at the first."""

    def __init__(self, source: str, text: str, fixed: Place | None) -> None:
        self.source, self.lines, self.fixed = source, text.splitlines(), fixed
        self.problems: list[Problem] = []
        self.count = 0

    def place(self, start: Any, end: Any = None) -> Place:
        if self.fixed:
            return self.fixed
        text = self.lines[start.line] if start.line < len(self.lines) else ""
        stop = end.column if end and end.line == start.line else len(text)
        return Place(self.source, start.line + 1, start.column + 1, text, max(1, stop - start.column))

    def node(self, raw: yaml.Node, key: Place | None = None, path: str = "") -> Node:
        place = self.place(raw.start_mark, raw.end_mark)
        key = key or place
        self.count += 1
        if self.count > MOST_VALUES:  # a few lines of aliases of aliases can stand for billions
            said = f"holds more than {MOST_VALUES:,} values, those that an alias repeats included"
            raise InvalidRecipe([Problem(place, path, said)])
        if isinstance(raw, yaml.ScalarNode):
            return Node(_scalar(raw, place), key, place)
        if raw.tag not in _PLAIN:
            raise InvalidRecipe([Problem(place, path, f"tag `{raw.tag}`: recipes hold plain values, no tags")])
        if isinstance(raw, yaml.SequenceNode):
            return Node(tuple(self.node(item, path=f"{path}.{i}") for i, item in enumerate(raw.value)), key, place)
        entries: dict[str, Node] = {}
        for name, item in raw.value:
            where = self.place(name.start_mark, name.end_mark)
            dotted = f"{path}.{name.value}".lstrip(".")
            if not isinstance(name, yaml.ScalarNode):
                self.problems.append(Problem(where, path, "a key must be a word"))
            elif name.value in entries:
                first = entries[name.value].key.line
                self.problems.append(Problem(where, dotted, f"given twice, first in line {first}; remove one of them"))
            else:
                entries[name.value] = self.node(item, where, dotted)
        return Node(entries, key, place)


def _compose(text: str, source: str, fixed: Place | None = None) -> Node:
    reader = _Reader(source, text, fixed)
    start = fixed or Place(source, 1, 1, reader.lines[0] if reader.lines else "")
    try:
        raw = yaml.compose(text, Loader=_Loader)
        tree = reader.node(raw) if raw is not None else Node(None, start, start)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = reader.place(mark) if mark else Place(source)
        raise InvalidRecipe([Problem(replace(place, width=1), "", f"not YAML: {error.problem}")]) from None
    except yaml.YAMLError as error:
        raise InvalidRecipe([Problem(start, "", f"not YAML: {' '.join(str(error).split())}")]) from None
    except RecursionError:
        raise InvalidRecipe([Problem(start, "", "nested too deeply, or an alias stands inside itself")]) from None
    if reader.problems:
        raise InvalidRecipe(reader.problems)
    return tree


def read_text(text: str, source: str) -> Node:
    """Parse the text of one recipe. Raises: InvalidRecipe for text that is not a YAML mapping, or keys given twice."""
    tree = _compose(text, source)
    if not isinstance(tree.value, dict):
        raise InvalidRecipe([Problem(tree.place, "", f"expected `key: value` lines, got `{show(tree.plain())}`")])
    return tree


def read_layer(path: Path) -> Node:
    """Read one recipe file. Raises: InvalidRecipe if it is not YAML; RecipeError for a file that cannot be read."""
    try:
        return read_text(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}", "megalodon recipes ls") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from None


OneOf = Sequence[tuple[str, Sequence[str]]]
"""Groups of alternatives as (pattern of the section, keys): setting one of them in a later layer unsets the others."""


def _groups(path: tuple[str, ...], one_of: OneOf) -> Iterator[Sequence[str]]:
    for pattern, names in one_of:
        parts = pattern.split(".")
        if len(parts) == len(path) and all(p in ("*", q) for p, q in zip(parts, path, strict=True)):
            yield names


def _conflicts(node: Node, one_of: OneOf, path: tuple[str, ...] = ()) -> Iterator[Problem]:
    if isinstance(node.value, tuple):
        for number, item in enumerate(node.value):
            yield from _conflicts(item, one_of, (*path, str(number)))
    elif isinstance(node.value, dict):
        for names in _groups(path, one_of):
            given = [key for key, item in node.value.items() if key in names and item.value is not None]
            if len(given) > 1:
                dotted = ".".join((*path, given[1]))
                yield Problem(node.value[given[1]].key, dotted, f"give one of {' and '.join(given)}, not both")
        for key, item in node.value.items():
            yield from _conflicts(item, one_of, (*path, key))


def check_alternatives(layer: Node, one_of: OneOf) -> None:
    """Raises: InvalidRecipe if one layer sets two values of which it may set one."""
    if problems := list(_conflicts(layer, one_of)):
        raise InvalidRecipe(problems)


def merge(base: Node, later: Node, one_of: OneOf = (), path: tuple[str, ...] = ()) -> Node:
    """Lay one tree over another: the later value wins per key, lists and scalars are replaced whole."""
    if not isinstance(base.value, dict) or not isinstance(later.value, dict):
        return later
    entries = dict(base.value)
    for names in _groups(path, one_of):
        if any(later.value[n].value is not None for n in names if n in later.value):
            entries = {key: node for key, node in entries.items() if key not in names}
    for key, node in later.value.items():
        entries[key] = merge(entries[key], node, one_of, (*path, key)) if key in entries else node
    return Node(entries, later.key, later.place)


class Override(typing.NamedTuple):
    """One change on the command line; `node` is None for `~key`, which goes back to the default."""

    place: Place
    path: tuple[str, ...]
    node: Node | None


def _parse_override(text: str) -> Override:
    """Read `key=value` or `~key`; the value is YAML."""
    place = Place(f"command line: {text if len(text) <= 200 else text[:200] + '…'}")
    key, equals, value = text.partition("=")
    back = key.startswith("~")
    path = tuple(key.lstrip("~").split("."))
    if back == bool(equals) or not all(path):
        raise InvalidRecipe([Problem(place, "", "expected key=value or ~key, such as optim.lr=1e-3")])
    return Override(place, path, None if back else _compose(value, place.source, fixed=place))


def _name(entry: Node, number: int) -> str:
    """Return how an entry of a list is spoken of: its `name`, else its number."""
    name = entry.value.get("name") if isinstance(entry.value, dict) else None
    return str(name.value) if name else str(number)


def _put(
    tree: Node, path: Sequence[str], node: Node | None, place: Place, one_of: OneOf, done: tuple[str, ...]
) -> Node:
    """Return `tree` with the value at `path` replaced by `node`, or removed where `node` is None."""
    part, rest = path[0], path[1:]
    if isinstance(tree.value, tuple):
        item = tree.child(part)
        if item is None or (node is None and not rest):
            known = ", ".join(_name(item, number) for number, item in enumerate(tree.value))
            text = f"no entry `{part}` in the list" if item is None else "an entry of a list has no default"
            raise InvalidRecipe([Problem(place, ".".join((*done, part)), f"{text}; entries: {known}")])
        changed = _put(item, rest, node, place, one_of, (*done, part)) if rest else node
        return replace(tree, value=tuple(changed if other is item and changed else other for other in tree.value))
    part = part if tree.child(part) else part.replace("-", "_")
    entries = dict(tree.value) if isinstance(tree.value, dict) else {}
    if rest and (node is not None or part in entries):
        entries[part] = _put(entries.get(part, Node({}, place, place)), rest, node, place, one_of, (*done, part))
    elif not rest and node is None and part in entries:
        del entries[part]
        tree = replace(tree, key=place, place=place)  # who misses the value hears of the command line
    elif node is not None:
        layer = merge(Node(entries, place, place), Node({part: Node(None, place, place)}, place, place))
        layer = merge(layer, Node({part: replace(node, key=place)}, place, place), one_of, done)
        entries = layer.value if isinstance(layer.value, dict) else entries
    return replace(tree, value=entries)


def override(tree: Node, overrides: Iterable[str], cls: type[Config], one_of: OneOf = ()) -> Node:
    """Apply changes of the command line, left to right; together they are one layer. Raises: InvalidRecipe."""
    problems: list[Problem] = []
    given: dict[tuple[str, ...], str] = {}
    for text in overrides:
        try:
            place, path, node = _parse_override(text)
            *section, name = [part.replace("-", "_") for part in path]
            if node is None and (unknown := _unknown(cls, (*section, name))):
                raise InvalidRecipe([Problem(place, ".".join(path), unknown)])
            for names in _groups(tuple(section), one_of) if node and node.value is not None else ():
                before = given.setdefault((*section, *names), name) if name in names else name
                if before != name:
                    raise InvalidRecipe([Problem(place, ".".join(path), f"give one of {before} and {name}, not both")])
            tree = _put(tree, path, node, place, one_of, ())
        except InvalidRecipe as error:
            problems += error.problems
    if problems:
        raise InvalidRecipe(problems)
    return tree


def config_classes(annotation: Any) -> list[type[Config]]:
    """Return the Config classes inside an annotation such as `tuple[SourceConfig, ...] | None`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, Config) else []
    return [cls for inner in typing.get_args(annotation) for cls in config_classes(inner)]


def _fields(classes: Iterable[type[Config]]) -> dict[str, FieldInfo]:
    """Return the keys of some classes; a field with `exclude` is not a key of a recipe."""
    fields = [(field.alias or name, field) for cls in classes for name, field in cls.model_fields.items()]
    return {name: field for name, field in fields if not field.exclude}


def fields_at(cls: type[Config], path: Sequence[str | int]) -> dict[str, FieldInfo] | None:
    """Return the fields that may stand below a path of keys; None where a value stands, or nothing at all."""
    classes, listed = [cls], False
    for part in path:
        fields = _fields(classes)
        if part in fields:
            classes = config_classes(fields[str(part)].annotation)
            listed = typing.get_origin(fields[str(part)].annotation) is tuple
        elif not listed:
            return None
        if not classes:
            return None
    return _fields(classes)


def keys(cls: type[Config], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every dotted key below a class with its field, sections before what they hold."""
    for name, field in _fields([cls]).items():
        dotted = f"{prefix}{name}"
        yield dotted, field
        for inner in config_classes(field.annotation):
            yield from keys(inner, f"{dotted}.")


def suggest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word nearest to what was typed; None if none is near."""
    near = difflib.get_close_matches(word.lower(), {k.lower(): k for k in known}, 1, 0.6)
    return {k.lower(): k for k in known}[near[0]] if near else None


def _unknown(cls: type[Config], path: Sequence[str | int]) -> str | None:
    """Return what to say about a key that no class knows; None if it is known (or lies in a free mapping)."""
    *section, name = path
    fields = fields_at(cls, section)
    if fields is None or name in fields or isinstance(name, int):
        return None if fields is not None or not section else _unknown(cls, section)
    if near := suggest(str(name), list(fields)):
        return f"unknown key; did you mean `{near}`?"
    elsewhere = [dotted for dotted, _ in keys(cls) if dotted.rpartition(".")[2] == name]
    return f"unknown key; did you mean `{elsewhere[0]}`?" if elsewhere else f"unknown key; known: {', '.join(fields)}"


_TYPES = {int: "an integer", float: "a number", str: "text", bool: "true or false", Path: "a path", type(None): "null"}


def type_name(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Return an annotation in the words of a recipe's author: `an integer`, `auto | bf16 | fp32`, `list of text`."""
    for mark in metadata:
        if isinstance(mark, BeforeValidator) and isinstance(mark.func, Quantity):
            return mark.func.expected
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return type_name(inner[0], inner[1:])
    if origin is Literal:
        return " | ".join(show(choice) for choice in inner)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_name(part) for part in inner)
    if origin is tuple and inner[-1] is ...:
        return f"list of {type_name(inner[0]).removeprefix('a ').removeprefix('an ')}"
    if origin is tuple:
        kind = "numbers" if set(inner) <= {int, float} else "values"
        return f"{len(inner)} {kind}"
    if annotation is Amount:
        return AMOUNT
    return _TYPES.get(annotation) or ("a section" if config_classes(annotation) else "a mapping")


def _say(error: pydantic_core.ErrorDetails, expected: str, field: FieldInfo | None) -> str:
    """Return one pydantic error in our words: what came, what was expected."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    got = "`" + show(value)[:80] + "`"
    if kind == "value_error":
        return str(context["error"])
    if kind == "missing" and not expected[:1].isdigit():
        return "is required"
    if re.match(r"\d+ (numbers|values)$", expected) and (
        kind in ("missing", "too_long", "too_short") or kind.endswith("_type")
    ):
        number = len(value) if isinstance(value, tuple) else 1 if isinstance(value, int | float) else None
        return f"expected {expected}, got {number or got}"
    if kind == "literal_error" and expected:
        return f"{got} is not one of {expected.replace(' | ', ', ')}"
    if kind.endswith(("_type", "_parsing")) and expected:
        return f"expected {expected}, got {got}"
    if kind == "string_pattern_mismatch" and field and field.description:
        words = " ".join(field.description.split()).rstrip(".")
        return f"{got} does not fit; expected {words[:1].lower()}{words[1:]}"
    return f"{got}: {error['msg'][:1].lower()}{error['msg'][1:]}".replace("input should be", "must be")


def _problem(tree: Node, cls: type[Config], error: pydantic_core.ErrorDetails) -> Iterator[Problem]:
    node, field = tree, None
    path: list[str | int] = []
    for part in error["loc"]:
        fields = fields_at(cls, path) or {}
        child = node.child(part)
        if child is None and part not in fields:
            continue  # the name of a union's branch, or the number of a missing list entry
        field = fields.get(str(part), field)
        path.append(_name(child, part) if child and isinstance(part, int) else part)
        node = child or node
    dotted = ".".join(str(part) for part in path)
    fault = error.get("ctx", {}).get("error")
    if isinstance(fault, Impossible):
        for key, message in fault.faults:
            full = [*path, *key.split(".")] if key else path
            there = next(n for i in range(len(full), -1, -1) if (n := tree.find(full[:i])))
            yield Problem(there.place, "" if message.startswith(key) else ".".join(map(str, full)), message)
    elif error["type"] == "extra_forbidden":
        yield Problem(node.key, dotted, _unknown(cls, path) or "unknown key")
    else:
        expected = type_name(field.annotation, field.metadata) if field else ""
        if field and expected.startswith("list of ") and isinstance(error["loc"][-1], int):
            expected = type_name(typing.get_args(field.annotation)[0])
        text = _say(error, expected, field)
        # a message of a whole section stands at the value it speaks of, on the command line if that changed it
        named = [
            child
            for name in fields_at(cls, path) or {}
            if re.search(rf"\b{name}\b", text) and (child := node.child(name))
        ]
        culprit = min(named, key=lambda child: child.place.line) if named and error["type"] == "value_error" else node
        yield Problem(culprit.place, dotted, text)


def problems_of(tree: Node, cls: type[Config], error: pydantic.ValidationError) -> list[Problem]:
    """Return every pydantic error as a problem with its place, one for each key, in the order of the file."""
    details = error.errors(include_url=False)
    details.sort(key=lambda detail: detail["type"].endswith(("_type", "literal_error")))  # of a union's branches last
    found = [problem for detail in details for problem in _problem(tree, cls, detail)]
    unique = list({(str(p.place), p.key, p.text): p for p in found}.values())
    for problem in list(unique):  # a union reports each of its branches: keep the deepest
        if problem.key and any(other.key.startswith(problem.key + ".") for other in unique):
            unique.remove(problem)
    first: dict[object, Problem] = {}
    for p in unique:
        first.setdefault((p.place.source, p.place.line, p.place.column, p.key or p.text), p)
    return sorted(first.values(), key=lambda p: (not p.place.line, p.place.source, p.place.line, p.place.column))


def validate(tree: Node, cls: type[ConfigT]) -> ConfigT:
    """Turn a tree into a frozen value of `cls`. Raises: InvalidRecipe with every error and its place."""
    try:
        return cls.model_validate(tree.plain())
    except pydantic.ValidationError as error:
        problems = problems_of(tree, cls, error)
        section = next((p.key.partition(".")[0] for p in problems if "unknown key" in p.text), None)
        hint = f"megalodon recipes schema {section}" if section in cls.model_fields else None
        raise InvalidRecipe(problems, hint or ("megalodon recipes schema" if section else None)) from None
