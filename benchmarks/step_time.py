"""Time training steps of a shipped recipe on random tokens, with and without keeping freed memory, in turns.

    python benchmarks/step_time.py quickstart
    python benchmarks/step_time.py books-tiny train.precision=bf16-mixed

Each run is a fresh process; printed are the medians over the rounds. Not here: training on text (megalodon pretrain).
"""

import argparse
import statistics
import subprocess
import sys
import time

import torch

from megalodon.model.loss import cross_entropy
from megalodon.model.megalodon import Megalodon
from megalodon.training.host import keep_freed_memory
from megalodon.training.optim import build_optimizer
from megalodon_cli import recipe_files

STEPS = 5


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Seconds of a training step on 8,192 random tokens.")
    parser.add_argument("recipe", help="a shipped recipe")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="changes of the recipe")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind (default 3)")
    parser.add_argument("--once", choices=("keep", "return"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.once:
        sys.stdout.write(f"{measure(given.recipe, given.changes, given.once == 'keep')}\n")
        return
    again = [sys.executable, __file__, given.recipe, *given.changes, "--once"]
    found: dict[str, list[float]] = {"keep": [], "return": []}
    for _ in range(given.rounds):
        for kind, seconds in found.items():
            seconds.append(float(subprocess.run([*again, kind], capture_output=True, text=True, check=True).stdout))
    keep, give = (statistics.median(seconds) for seconds in found.values())
    sys.stdout.write(
        f"{given.recipe} {' '.join(given.changes)}: {give:.3f} s a step of 8,192 tokens as glibc does by default, "
        f"{keep:.3f} s keeping freed memory ({1 - keep / give:.0%} less); {8192 / keep:,.0f} tokens/s; "
        f"medians of {given.rounds} processes, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )


def measure(recipe: str, changes: list[str], keep: bool) -> float:
    """Median seconds of a step; the first two are warm-up."""
    if keep and not keep_freed_memory():
        sys.exit("this system has no glibc")
    config = recipe_files.load([recipe], changes).pretraining()
    model_config = config.model_config_for(config.padded_vocab_size())
    model = Megalodon(model_config)
    optimizer = build_optimizer(dict(model.named_parameters()), config.optim)
    rows = 8192 // config.data.seq_len
    tokens = torch.randint(model_config.vocab_size, (rows, config.data.seq_len))
    starts = torch.zeros(tokens.shape, dtype=torch.bool)
    starts[0, config.data.seq_len // 3] = True
    seconds = []
    for _ in range(STEPS + 2):
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16-mixed"):
            hidden, _ = model.hidden(tokens, starts=starts)
            loss, count = cross_entropy(hidden, model.output_weight, tokens.roll(-1, 1))
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[2:])


if __name__ == "__main__":
    main()
