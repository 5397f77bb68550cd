"""What can be said about a run, gathered in one place: for `runs show` and for `report.md`, which a run leaves behind.

Not here: reading files (run_files.py), printing (commands/runs.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalodon_cli import console, run_files
from megalodon_cli.run_files import Row
from megalodon_cli.training_screen import line_of

LAST = 8
"""Evaluations that are shown."""
Table = list[list[str]]


def describe(run: Path) -> dict[str, Any]:
    """Return everything that is known about a run.

    summary; run (run.json); train, a list of (step, loss); evaluations; samples of the last step that has some, and
    before the first step; health, the last row; events, without the saved steps; checkpoints; ledger; environment;
    overrides; command; next.
    """
    state, rows = run_files.read(run / "run.json"), run_files.metrics(run)
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(str(row.get("kind")), []).append(row)
    samples = kinds.get("sample", [])
    environment, command = run / "environment.json", run / "command.txt"
    return {
        "summary": run_files.summary(run, state),
        "run": state,
        "train": run_files.points(rows, "train", "loss"),
        "evaluations": kinds.get("eval", []),
        "samples": [row for row in samples if row["step"] == samples[-1]["step"]],
        "before": [row for row in samples if row["step"] == 0],
        "health": kinds["health"][-1] if kinds.get("health") else None,
        "events": kinds.get("event", []),
        "checkpoints": run_files.checkpoints(run),
        "ledger": run_files.ledger(run),
        "environment": run_files.read(environment) if environment.is_file() else None,
        "overrides": run_files.overrides(run),
        "command": command.read_text(encoding="utf-8", errors="replace").strip() if command.is_file() else None,
        "next": [str(text) for text in state.get("next") or ()],
    }


def number(value: float | None, form: str = ".3f") -> str:
    """Return a number as it stands in a table; `-` for none."""
    return "-" if value is None else format(value, form)


def tables(found: dict[str, Any]) -> list[tuple[str, Table]]:
    """Return the tables about a run that have rows, each with a name; the first row is the header."""
    named = [
        ("scores", _scores(found["evaluations"])),
        ("by position", _by_position(found["evaluations"])),
        ("memory", _memory(found["health"])),
        ("checkpoints", _checkpoints(found["checkpoints"])),
    ]
    return [(name, rows) for name, rows in named if len(rows) > 1]


def _scores(evaluations: Sequence[Row]) -> Table:
    """The first evaluation and the last ones."""
    shown = [*evaluations[:1], *evaluations[1:][-LAST + 1 :]]
    rows = [[f"{e['step']:,}", number(e.get("valid_loss")), number(e.get("bits_per_byte"))] for e in shown]
    return [["step", "validation loss", "bits/byte"], *rows]


def _by_position(evaluations: Sequence[Row]) -> Table:
    """Loss by position of the first and of the last evaluation."""
    found = [e for e in evaluations if e.get("by_position")]
    shown = {e["step"]: e["by_position"] for e in (*found[:1], *found[-1:])}
    ends = list(found[-1]["by_position"]) if found else []
    head = ["loss up to position", *(f"step {step:,}" for step in shown)]
    return [head, *([end, *(number(losses.get(end)) for losses in shown.values())] for end in ends)]


def _memory(health: Row | None) -> Table:
    """How far back the averages of each layer reach."""
    rows = []
    for index, layer in enumerate(health.get("layers", ()) if health else ()):
        if isinstance(memory := layer.get("memory"), dict):
            rows.append([str(index), *(number(memory[key], ",.0f") for key in ("median", "p99.9", "max"))])
    return [["layer", "memory, tokens: median", "p99.9", "max"], *rows]


def _checkpoints(entries: Sequence[dict[str, Any]]) -> Table:
    rows = [
        [
            f"{entry['step']:,}",
            console.amount(entry["bytes"], " ", "G") + "B",
            number(entry["valid_loss"]),
            "best" if entry["best"] else "",
        ]
        for entry in entries
    ]
    return [["checkpoint", "size", "validation loss", ""], *rows]


def sections(found: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Return what is said about a run in lines, each section under its title; empty ones are left out."""
    unigram, chosen = found["run"].get("unigram_bits_per_byte"), found["overrides"]
    named = [
        ("baseline", [f"a unigram model of the same tokens: {unigram:.3f} bits/byte"] if unigram is not None else []),
        ("samples", [f"{row['prompt']}|{row['text']}" for row in found["samples"]]),
        ("before the first step", [f"{row['prompt']}|{row['text']}" for row in found["before"]]),
        ("events", _events(found["events"])),
        ("ledger", found["ledger"]),
        ("made by", _origin(found)),
        ("overrides", [f"{key} = {_shown(e['value'])}" for key, e in chosen.items() if e["origin"] == "command line"]),
    ]
    return [(title, lines) for title, lines in named if lines]


def _shown(value: Any) -> str:
    from megalodon.config import show

    return show(value)


def _events(events: Sequence[Row]) -> list[str]:
    """How many of each kind, then the last ones."""
    if not events:
        return []
    counts: dict[str, int] = {}
    for row in events:
        counts[str(row.get("event"))] = counts.get(str(row.get("event")), 0) + 1
    total = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return [total, *map(line_of, events[-LAST:])]


def _origin(found: dict[str, Any]) -> list[str]:
    """Command, versions, device and data of a run."""
    environment, data = found["environment"] or {}, found["run"].get("data") or {}
    versions = [f"{name} {environment[name]}" for name in ("megalodon-lm", "torch", "python") if environment.get(name)]
    device = environment.get("accelerator") or environment.get("device")
    lines = [found["command"] or "", ", ".join([*versions, *([str(device)] if device else [])])]
    lines.append(", ".join(f"{name} {str(value)[:12]}" for name, value in data.items()))
    return [line for line in lines if line]


def _side_by_side(found: dict[str, Any]) -> list[str]:
    """What the base and the tuned model answered to the same prompts, as lines of a Markdown table; none without."""
    pairs = list(zip(found["before"], found["samples"], strict=False))
    if not pairs or found["samples"][-1]["step"] == 0:
        return []
    last = found["samples"][-1]["step"]
    rows = [["prompt", "base, step 0", f"tuned, step {last:,}"], ["---"] * 3]
    rows += [[_cell(text) for text in (old["prompt"], old["text"], new["text"])] for old, new in pairs]
    return [f"| {' | '.join(row)} |" for row in rows]


def _cell(text: str) -> str:
    """Text of a model as it stands in a cell of a table, whatever is in it."""
    plain = console.printable(text)
    for sign in "\\|`*_<>[]#":
        plain = plain.replace(sign, f"\\{sign}")
    return plain.strip().replace("\n", "<br>") or "(nothing)"


def markdown(run: Path) -> str:
    """Return the report of a run as Markdown."""
    found = describe(run)
    summary = found["summary"]
    of = f" of {summary['steps']:,}" if summary["steps"] else ""
    parts = [f"# {summary['name']}", f"{found['run'].get('status')}, step {summary['step']:,}{of}"]
    for title, rows in tables(found):
        head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        lines = [f"| {' | '.join(row)} |" for row in (head, ["---:"] * len(head), *body)]
        parts += [f"## {title[0].upper()}{title[1:]}", "\n".join(lines)]
    beside = _side_by_side(found)
    parts += ["## Answers", "\n".join(beside)] if beside else []
    for title, lines in sections(found):
        if beside and title in ("samples", "before the first step"):
            continue
        parts += [f"## {title[0].upper()}{title[1:]}", "\n".join(["````text", *lines, "````"])]
    if found["next"]:
        parts += ["## Next", "\n".join(["```sh", *found["next"], "```"])]
    return "\n\n".join(parts) + "\n"
