"""Lists of numbers as the command line writes them, and shapes of ops as JSON. Not here: what is measured at them."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalodon.config import parse_count, parse_share
from megalodon.errors import InputError

EXPECTED = "numbers such as 512,32Ki or a range such as 512-32Ki*2"
MOST = 100
"""Numbers of one option."""
LARGEST = 1 << 50
"""Positions are counted in 64 bits: from here on, no number of tokens reaches their end."""

Shapes = dict[str, list[dict[str, int]]]
"""Op -> its shapes; each holds the sizes that differ from the model's."""


def counts(text: str, option: str, least: int = 1) -> tuple[int, ...]:
    """Read `512,32Ki`, or `512-32Ki*2`: each number so many times the one before, up to the last one included.

    Raises: InputError naming the option, what came and what was expected.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, rest = part.partition("-")
        last, star, factor = rest.partition("*")
        try:
            if dash:
                low, high, times = (int(str(parse_count(n))) for n in (first, last, factor if star else ""))
                if not (0 < low <= high and times >= 2):
                    raise ValueError
                while low <= high and len(found) <= MOST:
                    found.append(low)
                    low *= times
            else:
                found.append(int(str(parse_count(part))))
        except ValueError:
            raise InputError(f"{option}: `{part}` of `{text}`: expected {EXPECTED}") from None
    large = next((number for number in found if number > LARGEST), None)
    if large is not None:
        raise InputError(f"{option}: {large} is too large: expected at most {LARGEST}")
    small = next((number for number in found if number < least), None)
    if small is not None:
        raise InputError(f"{option}: {small} is too small: expected at least {least}")
    if len(found) > MOST:
        raise InputError(f"{option}: `{text}` is more than {MOST} numbers; expected fewer")
    return tuple(dict.fromkeys(found))


def share(text: str, option: str) -> float:
    """Read `10%` or `0.1`. Raises: InputError."""
    try:
        found = float(text) if not text.endswith("%") else float(str(parse_share(text)))
    except ValueError:
        found = -1.0
    if not 0 <= found < float("inf"):
        raise InputError(f"{option}: `{text}` is not a share such as 10% or 0.1")
    return found


def shapes(text: str, ops: Mapping[str, str]) -> Shapes:
    """Read shapes for ops, as JSON or from a file of JSON.

        [{"L": 4096}, {"B": 8, "L": "32Ki"}]             for every op
        {"cema": [{"L": 4096, "N": 8}]}                  for some ops, and no other op is measured

    Args:
        ops: every op with the names of its sizes.
    Raises: InputError for what is not JSON, an unknown op or size, or a size that is no number.
    """
    source = "--shapes"
    if not text.strip():
        raise InputError(f'{source}: it is empty; expected JSON such as {{"cema": [{{"L": 4096}}]}}, or a file of it')
    if not text.lstrip().startswith(("{", "[")):
        source = f"--shapes {text}"
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            said = (getattr(error, "strerror", None) or "not UTF-8").lower()
            raise InputError(
                f'{source}: {said}; expected JSON such as {{"cema": [{{"L": 4096}}]}}, or a file of it'
            ) from None
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: not JSON: {error}") from None
    if given == []:
        raise InputError(f'{source}: the list is empty; expected shapes such as [{{"L": 4096}}]')
    if isinstance(given, list):
        # sizes that an op does not have do not concern it
        every = {name for sizes in ops.values() for name in sizes.split()}
        read = [_shape(shape, source, every) for shape in given]
        return {op: [{n: v for n, v in s.items() if n in sizes.split()} for s in read] for op, sizes in ops.items()}
    if not isinstance(given, dict) or not given:
        raise InputError(f'{source}: expected a list of shapes, or op -> list of shapes: {{"cema": [{{"L": 4096}}]}}')
    found: Shapes = {}
    for op, listed in given.items():
        if op not in ops:
            near = difflib.get_close_matches(op, ops, 1)
            raise InputError(
                f"{source}: no op `{op}`; " + (f"did you mean {near[0]}?" if near else f"ops: {', '.join(ops)}")
            )
        if not isinstance(listed, list) or not listed:
            raise InputError(f'{source}: {op}: expected a list of shapes such as [{{"L": 4096}}]')
        found[op] = [_shape(shape, f"{source}: {op}", set(ops[op].split())) for shape in listed]
    return found


def _shape(shape: Any, place: str, known: set[str]) -> dict[str, int]:
    if not isinstance(shape, dict):
        raise InputError(f'{place}: `{json.dumps(shape):.40}` is no shape; expected one such as {{"L": 4096}}')
    found = {}
    for name, size in shape.items():
        if name not in known:
            raise InputError(f"{place}: no size `{name}` here; sizes: {', '.join(sorted(known))}")
        try:
            read = parse_count(size)
        except ValueError:
            read = None
        if not isinstance(read, int) or isinstance(read, bool) or read < 1:
            raise InputError(f"{place}: {name} is {json.dumps(size)}; expected a count such as 4096 or 4Ki")
        found[name] = read
    return found
