"""Watch the memory of `megalodon tokenize` and its workers on a synthetic corpus larger than the bound.

    python benchmarks/tokenize_memory.py                      2 GB, --mem 500MB, 2 workers
    python benchmarks/tokenize_memory.py --size 200MB --json memory.json

Half of the corpus is JSON lines, one of them far too long; half is one text file, a single document. Printed are the
largest sums over all processes of RSS (shared pages counted in each) and of PSS (shared pages counted once).
Exits with 1 above the limit. Not here: speed (tokenize_speed.py).
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megalodon.config import parse_bytes
from megalodon.data.builtin import generated_texts
from megalodon.data.tokenizer import train_sentencepiece

LIMIT_MB = 600


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Peak memory of `megalodon tokenize`, summed over its processes.")
    parser.add_argument("--size", default="2GB", help="size of the corpus (default 2GB)")
    parser.add_argument("--mem", default="500MB", help="the bound that is given to the command (default 500MB)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--dedup", choices=("none", "exact"), default="none")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    size = int(str(parse_bytes(given.size)))
    with tempfile.TemporaryDirectory(prefix="megalodon-") as folder:
        corpus = Path(folder, "corpus")
        corpus.mkdir()
        _write(corpus, size)
        train_sentencepiece(generated_texts(), 700).save(Path(folder))
        command = [sys.executable, "-m", "megalodon_cli", "-q", "tokenize", "--input", str(corpus)]
        command += ["--tokenizer", str(Path(folder, "tokenizer.model")), "-o", str(Path(folder, "store"))]
        command += ["-j", str(given.workers), "--mem", given.mem, "--on-error", "skip:1", "--dedup", given.dedup]
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        rss = pss = 0
        while process.poll() is None:
            found = _memory(process.pid)
            rss, pss = max(rss, found[0]), max(pss, found[1])
            time.sleep(0.05)
        seconds = time.perf_counter() - began
        sys.stdout.write(process.communicate()[0])
    if process.returncode:
        sys.exit(f"the command failed with {process.returncode}")
    figures = {
        "peak_rss_mb": round(rss / 1e6, 1),
        "peak_pss_mb": round(pss / 1e6, 1),
        "limit_mb": LIMIT_MB,
        "size_mb": size // 1_000_000,
        "seconds": round(seconds, 1),
    }
    sys.stdout.write("| figure | value |\n|---|---|\n" + "".join(f"| {k} | {v} |\n" for k, v in figures.items()))
    if given.json:
        given.json.write_text(json.dumps({"name": "tokenize_memory", "figures": figures}) + "\n")
    if pss > LIMIT_MB * 1_000_000:
        sys.exit(1)


def _write(corpus: Path, size: int) -> None:
    texts = list(generated_texts())
    draw = random.Random(0)
    half = size // 2
    with (corpus / "lines.jsonl").open("w") as stream:
        long = max(40_000_000, size // 20)
        stream.write('{"text": "')
        for _ in range(long // 1_000_000):
            stream.write("x" * 1_000_000)
        stream.write('"}\n')
        written = stream.tell()
        while written < half:
            # Most documents are short; some have as many bytes as one line may have.
            count = 20_000 if draw.random() < 0.0005 else draw.randrange(1, 20)
            line = json.dumps({"text": "".join(draw.choices(texts, k=count))}) + "\n"
            stream.write(line)
            written += len(line)
    with (corpus / "long.txt").open("w") as stream:
        written = 0
        while written < half:
            text = "".join(draw.choices(texts, k=1000))
            stream.write(text if draw.random() < 0.5 else text.replace("\n", " "))
            written += len(text)


def _memory(pid: int) -> tuple[int, int]:
    """Return RSS and PSS in bytes, summed over a process and all below it."""
    rss = pss = 0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ("Rss", "Pss"):
                value = int(rest.split()[0]) * 1024
                rss, pss = (rss + value, pss) if name == "Rss" else (rss, pss + value)
        children = [int(child) for path in Path(f"/proc/{pid}/task").iterdir() for child in _children(path)]
    except (OSError, ValueError):  # it has just ended
        return rss, pss
    for child in children:
        more = _memory(child)
        rss, pss = rss + more[0], pss + more[1]
    return rss, pss


def _children(task: Path) -> list[str]:
    return (task / "children").read_text().split()


if __name__ == "__main__":
    main()
