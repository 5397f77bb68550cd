"""Stream tokens through a small model on a CPU; print speed and resident memory as a Markdown table and as JSON.

    python benchmarks/streaming.py --tokens 1000000

The table is made for docs/results.md. Not here: the measurement (megalodon/profiling/streaming.py).
"""

import argparse
import json
import platform
import sys

import torch

from megalodon.inference.session import PIECE
from megalodon.model.megalodon import ModelConfig
from megalodon.profiling.streaming import WARMUP, Point, StreamReport, stream_memory

MODEL = ModelConfig(
    num_layers=4,
    model_dim=128,
    num_heads=1,
    z_dim=64,
    value_dim=256,
    ffn_hidden_dim=320,
    cema_ndim=8,
    norm_num_groups=16,
    chunk_size=512,
    vocab_size=512,
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Resident memory and speed while tokens stream through a model.")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens to read (default 1000000)")
    parser.add_argument("--piece", type=int, default=PIECE, help=f"tokens of one forward pass (default {PIECE})")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    report = stream_memory(given.tokens, MODEL, given.piece, report=_progress)
    options = " ".join(f"--{name} {value}" for name, value in vars(given).items())
    command = f"python benchmarks/streaming.py {options}"
    sys.stdout.write(markdown(report, command) + "\n" + json.dumps(document(report, command)) + "\n")


def _progress(point: Point) -> None:
    sys.stderr.write(f"{point.tokens:,} tokens, {point.seconds:.1f} s, {point.resident / 1e6:.1f} MB\n")


def machine() -> str:
    """Processor, cores and versions in a line."""
    return (
        f"{platform.machine()} {platform.system()}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def markdown(report: StreamReport, command: str) -> str:
    """The figures as a section: some ten rows, evenly spread."""
    after = [point for point in report.points if point.tokens >= WARMUP]
    step = max(1, len(after) // 10)
    shown = [*after[:-1:step], after[-1]]
    rows = [f"| {p.tokens:,} | {p.seconds:.1f} | {p.resident / 1e6:.1f} |" for p in shown]
    return "\n".join(
        [
            f"`{command}` on {machine()}: a model of {report.num_parameters:,} parameters "
            f"reads {report.tokens:,} tokens at {report.tokens_per_second:,.0f}/s; "
            f"its state takes {report.state_bytes:,} bytes; "
            f"resident memory grows by {report.growth:.2%} after the first {WARMUP:,} tokens.",
            "",
            "| tokens read | seconds | resident memory, MB |",
            "| ---: | ---: | ---: |",
            *rows,
            "",
        ]
    )


def document(report: StreamReport, command: str) -> dict[str, object]:
    """Every figure, for machines."""
    figures = {**report._asdict(), "points": [point._asdict() for point in report.points]}
    derived = {"tokens_per_second": report.tokens_per_second, "growth": report.growth}
    return {"command": command, "machine": machine(), **figures, **derived}


if __name__ == "__main__":
    main()
