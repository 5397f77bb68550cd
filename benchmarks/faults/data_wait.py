"""How long a training step of books-tiny waits for its data: some real steps of the recipe, from text to the metrics.

    python benchmarks/faults/data_wait.py --data ../shared/data/books/train --json wait.json

Not here: how fast the loader is by itself (benchmarks/loader_speed.py).
"""

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from report import figure, write_figures

STEPS = 6
MOST = 0.01


def main() -> None:
    """Train some steps and write the figure."""
    parser = argparse.ArgumentParser(description="Share of a step of books-tiny that waits for data.")
    parser.add_argument("--data", type=Path, default=None, help="folder of books; Python's own library if left out")
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megalodon-wait-") as folder:
        run = Path(folder) / "run"
        changes = [
            f"data.sources.books.path={(given.data or Path(sysconfig.get_paths()['stdlib'])).resolve()}",
            f"data.dir={folder}/data",
            "data.valid.fraction=0.1",
        ]
        changes += ["eval.at_start=false", "checkpoint.every=null", "checkpoint.export=false", "eval.every=null"]
        command = [sys.executable, "-m", "megalodon_cli", "pretrain", "books-tiny", *changes]
        subprocess.run([*command, "--stop-at-step", str(STEPS), "-o", str(run)], check=True)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if row["kind"] == "train"][1:]  # the first one opens the files
    share = sum(row["data_seconds"] for row in steps) / sum(row["seconds"] for row in steps)
    figures = [
        figure("steps of books-tiny", len(steps)),
        figure("seconds of a step", sum(row["seconds"] for row in steps) / len(steps)),
        figure("share of a step that waits for data", share, f"< {MOST:.0%}", share < MOST),
    ]
    write_figures(given.json, "data_wait", figures)


if __name__ == "__main__":
    main()
