"""Print what exceeds the size guides: 600 lines a file, 80 a function, 12 constructor arguments. Never fails.

Run by `make lint`. Not here: rules that must hold (test_architecture.py).
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def oversized(path: Path) -> Iterator[str]:
    """Yield a line for each thing in a file that is larger than the guides."""
    text = path.read_text(encoding="utf-8")
    shown = path.relative_to(ROOT)
    if (lines := text.count("\n")) > 600:
        yield f"{shown}: {lines} lines; the guide is 600"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        assert node.end_lineno is not None
        if (lines := node.end_lineno - node.lineno + 1) > 80:
            yield f"{shown}:{node.lineno}: {node.name} has {lines} lines; the guide is 80"
        count = len(node.args.args) + len(node.args.kwonlyargs) - 1
        if node.name == "__init__" and count > 12:
            yield f"{shown}:{node.lineno}: __init__ has {count} arguments; the guide is 12"


def main() -> None:
    """Print every line for the whole project."""
    for folder in ("megalodon", "megalodon_cli", "kernels", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for line in oversized(path):
                sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
