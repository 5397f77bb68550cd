"""Conversations about Python's standard library, from its own docstrings: something to finetune on without a download.

    python examples/docstring_chats.py chats.jsonl

Each line is one conversation of one to three questions about a module, in the layout `messages`; about 2,000 of them.
Not here: what becomes of them (megalodon finetune).
"""

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from megalodon.data.builtin import stdlib_files

QUESTIONS = ("What does {name} of {module} do?", "And {name}?", "What is {name} for?")


def main(target: Path) -> None:
    """Write the conversations."""
    count = 0
    with target.open("w", encoding="utf-8") as lines:
        for path, relative in stdlib_files(None, "examples"):
            module = relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            answers = list(documented(path))
            while answers:
                size = 1 + len(answers) % len(QUESTIONS)
                turns, answers = answers[:size], answers[size:]
                messages = []
                for question, (name, answer) in zip(QUESTIONS, turns, strict=False):
                    messages.append({"role": "user", "content": question.format(name=name, module=module)})
                    messages.append({"role": "assistant", "content": answer})
                lines.write(json.dumps({"messages": messages}) + "\n")
                count += 1
    sys.stdout.write(f"{target}: {count:,} conversations\n")


def documented(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the public functions and classes of a file with the first paragraph of what they say of themselves."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            said = (ast.get_docstring(node) or "").split("\n\n")[0]
            if len(said) > 8:
                yield node.name, " ".join(said.split())[:300]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
