"""Train the recipe books-tiny on folders of books and write its curve, scores and samples as a section of Markdown.

    python benchmarks/books_tiny.py --books DIR --valid DIR2 --out section.md

Takes up to 45 minutes on two cores; the same command continues a stopped run, and only reports a finished one.
Not here: training itself (megalodon pretrain), which runs in a process of its own.
"""

import argparse
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def main() -> None:
    """Train if needed, then report."""
    parser = argparse.ArgumentParser(description="Train books-tiny and write its results as Markdown.")
    parser.add_argument("--books", type=Path, required=True, help="folder of .txt files to train on")
    parser.add_argument("--valid", type=Path, required=True, help="folder of .txt files to validate on")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--run", type=Path, default=Path("runs/books-tiny"), help="run directory")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="further changes of the recipe")
    given = parser.parse_args()
    paths = [f"data.sources.books.path={given.books}", f"data.valid.path={given.valid}"]
    arguments = ["pretrain", "books-tiny", *paths, *given.changes, "-o", str(given.run)]
    ended = subprocess.run([sys.executable, "-m", "megalodon_cli", *arguments], check=False)
    if ended.returncode:
        sys.exit(ended.returncode)
    rows = [json.loads(line) for line in (given.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    record = json.loads((given.run / "run.json").read_text(encoding="utf-8"))
    given.out.write_text(section(shlex.join(["megalodon", *arguments]), record, rows), encoding="utf-8")
    sys.stdout.write(f"{given.out} written\n")


def section(command: str, record: Row, rows: list[Row]) -> str:
    """The Markdown of one run."""
    steps = [row for row in rows if row["kind"] == "train"]
    scores = [row for row in rows if row["kind"] == "eval"]
    samples = [row for row in rows if row["kind"] == "sample"]
    last, unigram = scores[-1], record["unigram_bits_per_byte"]
    machine = f"{platform.machine()} {platform.system()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return "\n".join(
        [
            "### books-tiny: a small model on long books",
            "",
            f"`{command}` on {machine}: {record['parameters']:,} parameters, {record['step']:,} steps, "
            f"{record['tokens']:,} tokens, {record['seconds'] / 60:.1f} minutes in all "
            f"({median([row['tok_per_s'] for row in steps]):,.0f} tokens/s while training).",
            "",
            f"Validation ({last['valid_tokens']:,} tokens of books that were not trained on): "
            f"**{last['bits_per_byte']:.3f} bits/byte**, {1 - last['bits_per_byte'] / unigram:.0%} below "
            f"a unigram model of the same tokens ({unigram:.3f}).",
            "",
            *table(("step", "training loss", "validation loss", "bits/byte"), curve(steps, scores)),
            "",
            "Validation loss by position in the window, nats a token; a bucket ends at the position given:",
            "",
            *table(("position", "loss"), [(f"{int(p):,}", f"{v:.3f}") for p, v in last["by_position"].items()]),
            "",
            "Samples of the finished model, prompt in bold:",
            "",
            *(line for row in samples if row["step"] == samples[-1]["step"] for line in quote(row)),
        ]
    )


def curve(steps: list[Row], scores: list[Row]) -> list[tuple[str, ...]]:
    """A row for each evaluation; the training loss is the mean of the steps since the one before."""
    found: list[tuple[str, ...]] = []
    before = 0
    for score in scores:
        losses = [row["loss"] for row in steps if before < row["step"] <= score["step"] and row["loss"] is not None]
        mean = f"{sum(losses) / len(losses):.3f}" if losses else "-"
        found.append((f"{score['step']:,}", mean, f"{score['valid_loss']:.3f}", f"{score['bits_per_byte']:.3f}"))
        before = score["step"]
    return found


def median(values: list[float]) -> float:
    """The middle value."""
    return sorted(values)[len(values) // 2]


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a Markdown table, numbers to the right."""
    lines = [header, tuple("---:" for _ in header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def quote(row: Row) -> list[str]:
    """A sample as a block quote."""
    prompt = row["prompt"].rstrip()
    text = f"**{prompt}**{row['prompt'][len(prompt) :]}{row['text'].rstrip()}"
    return [f"> {line}" for line in text.splitlines()] + [""]


if __name__ == "__main__":
    main()
