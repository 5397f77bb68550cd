"""Measure session files and reading, and print it as Markdown: size, time to save and restore, memory while reading.

    python benchmarks/sessions.py
    python benchmarks/sessions.py --tokens 100000 --repeats 5

The model has 6 layers of width 256. The table is made for docs/sessions.md. Not here: what a file holds
(megalodon/inference/session_file.py).
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from megalodon.data.tokenizer import ByteTokenizer
from megalodon.inference.conversation import Conversation, Reading
from megalodon.inference.session import Owner, Session, Writer
from megalodon.inference.text_file import open_text, token_ids
from megalodon.model.megalodon import Megalodon, ModelConfig
from megalodon.profiling.streaming import WARMUP, resident_memory

TOKENIZER = ByteTokenizer()
MODEL = ModelConfig(
    num_layers=6,
    model_dim=256,
    num_heads=1,
    z_dim=64,
    value_dim=512,
    ffn_hidden_dim=512,
    cema_ndim=16,
    norm_num_groups=32,
    chunk_size=512,
    vocab_size=TOKENIZER.vocab_size,
)
LINE = "It was a dark and stormy night; the rain fell in torrents.\n"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Session files and reading: size, time, memory.")
    parser.add_argument(
        "--tokens", type=int, default=1_000_000, help="tokens of the file that is read (default 1000000)"
    )
    parser.add_argument("--repeats", type=int, default=9, help="the median of so many is shown (default 9)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    owner = Owner("1" * 64, TOKENIZER.sha256, None, "random")
    writer = Writer(Megalodon(MODEL).eval(), TOKENIZER, True, None, owner)
    with tempfile.TemporaryDirectory() as folder:
        lines = [
            f"`python benchmarks/sessions.py --tokens {given.tokens} --repeats {given.repeats} "
            f"--threads {given.threads}` on {platform.machine()} {platform.system()}, Python "
            f"{platform.python_version()}, torch {torch.__version__}: {MODEL.num_parameters():,} parameters, 6 layers "
            "of width 256, chunks of 512.",
            "",
            *files(writer, Path(folder), given.repeats),
            "",
            *reading(writer, Path(folder), given.tokens),
        ]
    sys.stdout.write("\n".join(lines) + "\n")


def files(writer: Writer, folder: Path, repeats: int) -> list[str]:
    """Size and times at several places, with and without keys and values, after little and after much text."""
    rows = [
        "| session | file, bytes | save, ms | restore, ms | first logits after it, ms |",
        "|---|---:|---:|---:|---:|",
    ]
    C = MODEL.chunk_size
    for name, length, kv in (
        ("at a boundary, 8 chunks read", 8 * C, False),
        ("at a boundary, 64 chunks read", 64 * C, False),
        ("end of a chunk, 511 ids", 9 * C - 1, False),
        ("end of a chunk, `--kv`", 9 * C - 1, True),
    ):
        talk = Conversation(writer, Session(writer.model))
        talk.session.feed(5 + number % 200 for number in range(length))
        path, moments = folder / "a.mega", []
        for _ in range(repeats):
            began = time.perf_counter()
            talk.save(path, kv=kv)
            saved = time.perf_counter()
            other = Conversation.load(writer, path)
            restored = time.perf_counter()
            other.session.feed([9])
            moments.append((saved - began, restored - saved, time.perf_counter() - restored))
        times = " | ".join(f"{1e3 * statistics.median(column):.1f}" for column in zip(*moments, strict=True))
        rows.append(f"| {name} | {path.stat().st_size:,} | {times} |")
    return rows


def reading(writer: Writer, folder: Path, tokens: int) -> list[str]:
    """Resident memory and speed while a file is read as --read and /read do it."""
    path = folder / "book.txt"
    path.write_text((LINE * (tokens // len(LINE) + 1))[:tokens])
    talk, memory, began = Conversation(writer, Session(writer.model)), list[tuple[int, int]](), time.perf_counter()
    file = open_text(path)

    def told(size: int, count: int) -> None:
        if count >= WARMUP:
            memory.append((count, resident_memory()))

    talk.read(token_ids(file, TOKENIZER, told), lambda: Reading(path.name, file.sha256, tokens))
    seconds = time.perf_counter() - began
    first, most = memory[0][1], max(resident for _, resident in memory)
    talk.save(path.with_suffix(".mega"))
    size = path.with_suffix(".mega").stat().st_size
    return [
        f"A file of {tokens:,} tokens is read in {seconds:,.0f} s, {tokens / seconds:,.0f} tok/s; resident memory is "
        f"{first / 1e6:.1f} MB after {memory[0][0]:,} tokens and grows by at most {most / first - 1:.2%}; "
        f"the session file has {size:,} bytes."
    ]


if __name__ == "__main__":
    main()
