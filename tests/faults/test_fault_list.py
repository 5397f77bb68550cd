"""Every item of the fault list that applies to one process has a test, and every test it names exists."""

import ast
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

APPLICABLE = {*range(1, 18), *range(24, 38), 42, 45}


def items(repository: Path) -> tuple[dict[str, Any], ...]:
    found: tuple[dict[str, Any], ...] = runpy.run_path(str(repository / "tests/faults/fault_list.py"))["ITEMS"]
    return found


def functions(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            yield node.name


def test_every_item_is_there_once_and_has_a_test(repository: Path) -> None:
    numbers = [item["item"] for item in items(repository)]
    assert sorted(numbers) == sorted(APPLICABLE)
    assert [item["item"] for item in items(repository) if not item["tests"] and "why_not" not in item] == []


def test_every_test_that_is_named_exists(repository: Path) -> None:
    named = {test for item in items(repository) for test in item["tests"]}
    missing = [
        t for t in sorted(named) if t.partition("::")[2] not in set(functions(repository / t.partition("::")[0]))
    ]
    assert missing == []


def test_every_test_of_a_numbered_fault_is_named(repository: Path) -> None:
    named = {test for item in items(repository) for test in item["tests"]}
    for path in sorted((repository / "tests/faults").glob("test_*.py")):
        shown = path.relative_to(repository)
        numbered = {f"{shown}::{name}" for name in functions(path) if name.startswith("test_") and name[5].isdigit()}
        assert numbered <= named, numbered - named
