"""Time `megalodon tokenize` with 2 workers against SentencePiece alone in 1 and in 2 processes, on the same text.

    python benchmarks/tokenize_speed.py --data books
    python benchmarks/tokenize_speed.py --json speed.json

The text becomes JSON lines of about 4 kB each; the tokenizer is trained on it once. The command is timed as a whole:
start, hashing, reading, writing. SentencePiece alone encodes what lies in memory, before and after the command.
Not here: memory (tokenize_memory.py).
"""

import argparse
import itertools
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from megalodon.data.builtin import generated_texts
from megalodon.data.tokenizer import train_sentencepiece

WORKERS = 2
DOCUMENT = 4000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="MB/s of `megalodon tokenize` and of SentencePiece alone.")
    parser.add_argument("--data", type=Path, help="a folder with .txt files (default: generated sentences)")
    parser.add_argument("--size", type=int, default=300, help="megabytes of text to tokenize (default 300)")
    parser.add_argument("--raw", type=int, default=30, help="megabytes for SentencePiece alone (default 30)")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megalodon-") as folder:
        corpus, model, raw = Path(folder, "corpus.jsonl"), Path(folder, "a.model"), Path(folder, "raw.jsonl")
        first = list(_documents(given.data, 8_000_000))
        vocab_size = given.vocab_size if given.data else 700  # generated sentences know few words
        saved = train_sentencepiece(first, vocab_size)
        saved.save(Path(folder))
        Path(folder, "tokenizer.model").rename(model)
        size = _write(corpus, _documents(given.data, given.size * 1_000_000))
        # SentencePiece alone gets a part of the same documents, spread over all of them.
        _write(raw, itertools.islice(_documents(given.data, given.size * 1_000_000), 0, None, given.size // given.raw))
        one, _ = _alone(model, raw, 1)
        before, cpu_before = _alone(model, raw, WORKERS)
        command = [sys.executable, "-m", "megalodon_cli", "-q", "tokenize", "--input", str(corpus), "-j", str(WORKERS)]
        started, cpu = time.perf_counter(), _cpu_of_children()
        out = ["--tokenizer", str(model), "-o", str(Path(folder, "store"))]
        subprocess.run([*command, *out], check=True, stdout=subprocess.DEVNULL)
        ours = size / (time.perf_counter() - started) / 1e6
        our_cpu = size / (_cpu_of_children() - cpu) / 1e6
        after, cpu_after = _alone(model, raw, WORKERS)
        both, raw_cpu = (before + after) / 2, (cpu_before + cpu_after) / 2
    figures = {
        "raw_1_process_mb_s": round(one, 2),
        "raw_2_processes_mb_s": round(both, 2),
        "tokenize_2_workers_mb_s": round(ours, 2),
        "of_2_processes": round(ours / both, 3),
        "of_2_times_1_process": round(ours / (WORKERS * one), 3),
        "raw_mb_per_cpu_s": round(raw_cpu, 2),
        "tokenize_mb_per_cpu_s": round(our_cpu, 2),
        "of_cpu": round(our_cpu / raw_cpu, 3),
        "size_mb": given.size,
    }
    sys.stdout.write("| figure | value |\n|---|---|\n" + "".join(f"| {k} | {v} |\n" for k, v in figures.items()))
    if given.json:
        given.json.write_text(json.dumps({"name": "tokenize_speed", "figures": figures}) + "\n")


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _documents(folder: Path | None, size: int) -> Iterator[str]:
    """Yield documents of about 4 kB until they hold `size` bytes; the text is repeated if it is short."""
    texts = [path.read_text() for path in sorted(folder.rglob("*.txt"))] if folder else ["".join(generated_texts())]
    for text in itertools.cycle(texts):
        for start in range(0, len(text), DOCUMENT):
            yield text[start : start + DOCUMENT]
            size -= len(text[start : start + DOCUMENT].encode())
            if size <= 0:
                return


def _write(path: Path, documents: Iterator[str]) -> int:
    size = 0
    with path.open("w") as stream:
        for text in documents:
            stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size += len(text.encode())
    return size


def _alone(model: Path, corpus: Path, processes: int) -> tuple[float, float]:
    """Return MB/s of all processes together, each of which encodes the whole text at the same time as the others.

    Then the same for each second of processor time, which the load of the machine changes less.
    """
    context = multiprocessing.get_context("spawn")
    barrier, seconds = context.Barrier(processes), context.Queue()
    started = [context.Process(target=_encode, args=(model, corpus, barrier, seconds)) for _ in range(processes)]
    for process in started:
        process.start()
    found = [seconds.get() for _ in started]
    for process in started:
        process.join()
    per_cpu = sum(size for size, _, _ in found) / sum(cpu for _, _, cpu in found)
    return sum(size / spent for size, spent, _ in found) / 1e6, per_cpu / 1e6


def _encode(model: Path, corpus: Path, barrier, seconds) -> None:  # type: ignore[no-untyped-def]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    with open(corpus) as stream:
        texts = [json.loads(line)["text"] for line in stream]
    size = sum(len(text.encode()) for text in texts)
    barrier.wait()
    began, began_cpu = time.perf_counter(), time.process_time()
    for text in texts:
        processor.encode(text)
    seconds.put((size, time.perf_counter() - began, time.process_time() - began_cpu))


if __name__ == "__main__":
    main()
