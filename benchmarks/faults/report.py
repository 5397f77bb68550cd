"""Figures of the campaigns and measurements -> docs/reliability.json and the generated tables of docs/reliability.md.

A measurement writes {"name": …, "figures": [{"figure", "value", "limit", "ok"}, …], …}; further keys (seed, seconds,
faults) are kept. A figure without a limit informs only. Not here: what is measured (the other files of this folder and
its neighbours).
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Section = dict[str, Any]


def figure(name: str, value: Any, limit: str | None = None, ok: bool | None = None) -> dict[str, Any]:
    """One measured value; without a limit it only informs."""
    return {"figure": name, "value": value, "limit": limit, "ok": ok}


def write_figures(path: Path, name: str, figures: Sequence[Mapping[str, Any]], **about: Any) -> None:
    """Write what one measurement found."""
    path.write_text(json.dumps({"name": name, **about, "figures": list(figures)}, indent=1, ensure_ascii=False) + "\n")


def load(path: Path) -> dict[str, Section]:
    """The sections that were measured before; none if the file is not there."""
    if not path.exists():
        return {}
    found: dict[str, Section] = json.loads(path.read_text(encoding="utf-8"))["sections"]
    return found


def save(path: Path, sections: Mapping[str, Section]) -> None:
    """Write all sections."""
    shown = json.dumps({"format": 1, "sections": sections}, indent=1, ensure_ascii=False)
    path.write_text(shown + "\n", encoding="utf-8")


def passed(section: Section) -> bool:
    """Whether a section was measured whole and no figure misses its limit."""
    return not section.get("error") and all(entry["ok"] is not False for entry in section["figures"])


def between(text: str, name: str, lines: Sequence[str]) -> str:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->`. Raises: ValueError if these are not there."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{begin} … {end} is missing")
    whole = "\n".join([begin, *lines, end])
    return pattern.sub(lambda _: whole, text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    cells = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]


def figure_lines(sections: Mapping[str, Section]) -> list[str]:
    """Every figure of every section with its limit and verdict, and where each section was measured."""
    rows = [
        (section["title"], entry["figure"], _shown(entry["value"]), entry["limit"] or "", _verdict(entry["ok"]))
        for section in sections.values()
        for entry in section["figures"]
    ]
    lines = [*table(("", "figure", "measured", "limit", ""), rows), ""]
    return lines + table(("section", "seed", "time", "date", "commit", "device", "command"), list(_origins(sections)))


def _origins(sections: Mapping[str, Section]) -> Iterator[tuple[str, ...]]:
    for section in sections.values():
        seed, seconds = section.get("seed"), section["seconds"]
        time = f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"
        machine = f"{section['device']}, {section['cores']} cores; {section['versions']}"
        yield (
            section["title"],
            "" if seed is None else str(seed),
            time,
            section["date"],
            section["commit"],
            machine,
            f"`{section['command']}`",
        )


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _verdict(ok: bool | None) -> str:
    return {True: "pass", False: "**miss**", None: ""}[ok]


def fault_lines(items: Sequence[Mapping[str, Any]], outcomes: Mapping[str, str]) -> list[str]:
    """The fault list: what is injected, what is expected, by which tests that is shown, and how they ended.

    Args:
        outcomes: test (a function of a file, its cases together) -> `passed`, `failed` or `skipped`.
    """
    rows = []
    for item in items:
        tests = item.get("tests", ())
        found = [outcomes.get(test, "not run") for test in tests]
        verdict = "pass" if found and set(found) == {"passed"} else f"**{', '.join(sorted(set(found)))}**"
        if "why_not" in item:
            verdict = f"not applicable: {item['why_not']}"
        shown = "; ".join(f"`{test.removeprefix('tests/')}`" for test in tests)
        rows.append((str(item["item"]), item["inject"], item["expected"], shown, verdict))
    return table(("#", "injected", "expected", "tests", ""), rows)
