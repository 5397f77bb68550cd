"""Measure how many tokens/s the loader gives from a warm store, on one core; print a Markdown table.

    python benchmarks/loader_speed.py
    python benchmarks/loader_speed.py --json loader_speed.json

The store is made up in a temporary directory: documents of log-normal length, 500 tokens in the middle. Windows are
drawn in the order of training. Not here: what a training step waits (data_seconds in metrics.jsonl).
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megalodon.data.loader import Loader
from megalodon.data.shards import Store, TokenDocument, open_store, write_store

VOCAB_SIZE = 32_000
BATCH_TOKENS = 1 << 16
HEADER = ("| reader | isolate | window | million tokens/s |", "| --- | --- | ---: | ---: |")


def main() -> None:
    """Make a store, read it and print."""
    parser = argparse.ArgumentParser(description="Tokens/s of the loader from a warm store.")
    parser.add_argument("--tokens", type=int, default=40_000_000, help="tokens of the store (default 40000000)")
    parser.add_argument("--seconds", type=float, default=2.0, help="processor time of each measurement (default 2)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = write_store(Path(folder) / "store", documents(given.tokens), VOCAB_SIZE, shard_tokens=1 << 24).path
        figures = {
            f"{reader}_{isolate}_{seq_len}_tokens_per_s": speed(
                open_store(path, reader=reader), seq_len, isolate, given
            )
            for reader in ("mmap", "pread")
            for isolate in ("doc", "none")
            for seq_len in (1024, 4096, 16384)
        }
    rows = [f"| {' | '.join(name.split('_')[:3])} | {figure / 1e6:,.0f} |" for name, figure in figures.items()]
    sys.stdout.write("\n".join([*HEADER, *rows, ""]))
    if given.json:
        given.json.write_text(json.dumps({"name": "loader_speed", "figures": figures}) + "\n")


def documents(tokens: int) -> Iterator[TokenDocument]:
    """Documents of mixed length, drawn with a fixed seed, until there are `tokens`."""
    draw = np.random.default_rng(0)
    while tokens > 0:
        length = min(tokens, int(draw.lognormal(np.log(500), 1.5)) + 1)
        yield TokenDocument("made-up", draw.integers(0, VOCAB_SIZE, length), length)
        tokens -= length


def speed(store: Store, seq_len: int, isolate: str, given: argparse.Namespace) -> int:
    """Tokens of an epoch's first batches per second of processor time, once all of the store was read."""
    loader = Loader(store, seq_len, isolate, seed=0)  # type: ignore[arg-type]
    rows = BATCH_TOKENS // seq_len
    for first in range(0, loader.num_samples - rows, rows):
        loader.batch(first, rows)
    begin, first = time.process_time(), 0
    while time.process_time() - begin < given.seconds:
        loader.batch(first, rows)
        first += rows
    return round(first * seq_len / (time.process_time() - begin))


if __name__ == "__main__":
    main()
