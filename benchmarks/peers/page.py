"""The figures of docs/benchmarks.json as tables: in docs/benchmarks.md, in README, and as lines while measuring.

Only what stands between `<!-- NAME -->` and `<!-- /NAME -->` is written; the prose around it stays.
Not here: pictures (pictures.py).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from goals import Goal, goals
from megalodon.errors import InputError
from results import Document, Entry, place, target, write_whole
from timing import LEAST_TURNS

BLOCKS = ("train", "jax", "cema", "decode", "gpu")
"""Sections of the page, each with its table; `goals` and `origins` follow."""
MAIN = (
    ("Training, 8 M, 2,048 tokens", "Llama", "train/8M/2048/eager"),
    ("Training, 8 M, 16,384 tokens", "Llama", "train/8M/16384/eager"),
    ("Training, 50 M, 2,048 tokens", "Llama", "train/50M/2048/eager"),
    ("Training, 50 M, 16,384 tokens", "Llama", "train/50M/16384/eager"),
    ("Training, 8 M, 4,096 tokens", "JAX port, jitted", "jax/8M/4096"),
    ("CEMA forward + backward, 4,096 tokens", "FFT convolution", "cema/4096"),
    ("Decoding, 8 M, after 0 tokens", "Llama", "decode/8M/0"),
    ("Decoding, 8 M, after 32,768 tokens", "Llama", "decode/8M/32768"),
)
"""Rows of README: what, against whom, the entry whose first figure it is."""
PICTURES = (
    ("decode/8M/0", "Tokens written a second after a growing context: Megalodon and Llama", "docs/decode_depth.svg"),
    ("train/8M/2048/eager", "Tokens trained a second at growing length: Megalodon and Llama", "docs/train_length.svg"),
)
"""Of README: the entry without which there is no picture, what it shows, where it lies."""


def write(path: Path, document: Document) -> None:
    """Rewrite the generated tables of the page. Raises: InputError if it has no place for one."""
    text = path.read_text(encoding="utf-8") if path.exists() else _empty()
    write_whole(path, render(text, document, str(path)))


def render(text: str, document: Document, source: str) -> str:
    """The text of the page with the tables of a document."""
    for block in BLOCKS:
        found = {key: entry for key, entry in document["entries"].items() if key.startswith(f"{block}/")}
        text = between(text, block, section_lines(found), source)
    text = between(text, "goals", goal_lines(goals()), source)
    return between(text, "origins", origin_lines(document), source)


def write_readme(path: Path, document: Document) -> None:
    """Rewrite the table of README. Raises: InputError if it has no place for it."""
    write_whole(path, between(path.read_text(encoding="utf-8"), "speed", readme_lines(document), str(path)))


def readme_lines(document: Document) -> list[str]:
    """The main ratios, those that were measured, and where; then the pictures."""
    measured = {key: entry for key, entry in document["entries"].items() if "error" not in entry}
    rows, runs = [], set()
    for what, whom, key in MAIN:
        if key in measured:
            found = measured[key]["figures"][0]
            rows.append((what, whom, f"{_value(found, found['median'])} x", _range(found, measured[key]["turns"])))
            runs.add(measured[key]["run"])
    machines = sorted({_machine(document["runs"][run]) for run in runs})
    shown = [f"![{what}]({path})" for key, what, path in PICTURES if key in measured]
    lines = table(("", "against", "speed over it", "smallest, largest"), rows)
    return [*lines, "", *(f"On {machine}." for machine in machines), "", *shown]


def section_lines(entries: Mapping[str, Entry]) -> list[str]:
    """Tables of a section: figures with target and verdict, then the rates of every side."""
    if not entries:
        return ["Not measured."]
    figures = [row for key, entry in entries.items() for row in _figure_rows(key, entry)]
    rates = [row for key, entry in entries.items() for row in _rate_rows(key, entry)]
    heads = ("entry", "figure", "median", "smallest, largest", "target", "reached")
    lines = [*table(heads, figures), ""]
    return lines + table(("entry", "side", "median", "smallest, largest", "turns", "seconds in all"), rates)


def lines_of(key: str, entry: Entry) -> list[str]:
    """An entry as it is shown while the campaign runs."""
    return [" ".join(cell for cell in row[1:] if cell) for row in (*_figure_rows(key, entry), *_rate_rows(key, entry))]


def goal_lines(found: Sequence[Goal]) -> list[str]:
    """What a GPU is expected to do; every line is marked as a prediction."""
    rows = [
        (g.name, f"{g.floor * 1e3:,.3f} ms" if g.formula != "ratio of operations" else f"{g.floor:.2f} x", g.formula,
         f"prediction: {g.predicted}", g.wanted)
        for g in found
    ]  # fmt: skip
    return table(("", "floor", "counted as", "expected", "wanted"), rows)


def origin_lines(document: Document) -> list[str]:
    """The runs that figures come from, each with its entries: no entry is of two."""
    entries = {key: entry["run"] for key, entry in document["entries"].items()}
    rows = [
        (run["date"], _machine(run), f"`{run['commit']}`", f"`{run['command']}`", ", ".join(_short(entries, name)))
        for name, run in document["runs"].items()
    ]
    return table(("date", "machine and versions", "commit", "command", "entries"), rows)


def between(text: str, name: str, lines: Sequence[str], source: str) -> str:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->`. Raises: InputError if these are not there."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise InputError(f"{source}: {begin} … {end} is missing; put the two lines where the table belongs")
    whole = "\n".join([begin, *lines, end])
    return pattern.sub(lambda _: whole, text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    cells = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]


def _empty() -> str:
    blocks = "\n".join(f"## {name}\n<!-- {name} -->\n<!-- /{name} -->\n" for name in (*BLOCKS, "goals", "origins"))
    return f"# Benchmarks\n\n{blocks}"


def _figure_rows(key: str, entry: Entry) -> Iterator[tuple[str, ...]]:
    if "error" in entry:
        yield f"`{key}`", f"**not measured: {entry['error']}**", "", "", "", "**no**"
        return
    for found in entry["figures"]:
        unit = " %" if found["unit"] == "%" else ""
        verdict = {True: "yes", False: "**no**", None: ""}[found["reached"]]
        shown = f"{_value(found, found['median'])}{unit}"
        yield f"`{key}`", found["figure"], shown, _range(found, entry["turns"]), target(found), verdict


def _rate_rows(key: str, entry: Entry) -> Iterator[tuple[str, ...]]:
    for side, rate in entry.get("rates", {}).items():
        span = f"{_number(rate['low'])}, {_number(rate['high'])}"
        yield (
            f"`{key}`",
            side,
            f"{_number(rate['median'])} {rate['unit']}",
            span,
            str(entry["turns"]),
            f"{entry['seconds']:.0f}",
        )


def _range(figure: Mapping[str, Any], turns: int) -> str:
    """Smallest and largest value, and how many there were if they were few; nothing of a figure that was counted."""
    if "low" not in figure:
        return ""
    spread = [_value(figure, figure["low"]), _value(figure, figure["high"])]
    shown = spread if figure["low"] < figure["high"] else []  # one turn; or counted, by an older version
    few = [f"{turns} turn{'s' * (turns > 1)} only"] if turns < LEAST_TURNS else []
    return ", ".join(shown + few)


def _value(figure: Mapping[str, Any], value: float) -> str:
    if figure["unit"] == "%":
        return f"{value * 100:.0f}"
    return f"{value:.2f}" if value < 20 else f"{value:.0f}"


def _number(value: float) -> str:
    if value >= 1e9:
        return f"{value / 1e9:,.0f} G"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _machine(run: Mapping[str, Any]) -> str:
    return f"{place(run)}; {run['versions']}"


def _short(entries: Mapping[str, str], run: str) -> list[str]:
    """What a run measured: a section instead of its keys, if all that is there of it comes from this run."""
    others = {key.partition("/")[0] for key, name in entries.items() if name != run}
    sections = {key: key.partition("/")[0] for key, name in entries.items() if name == run}
    return list(dict.fromkeys(key if section in others else section for key, section in sections.items()))
