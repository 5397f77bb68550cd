"""Measure what checkpoints cost a run: the stall of a save in the loop and in the background, against a mere copy.

    python benchmarks/checkpoint_cost.py books-tiny
    python benchmarks/checkpoint_cost.py quickstart --dir /data/scratch --json cost.json

Trains the recipe's model on random tokens, 8,192 a step, and saves in turns: in the loop, and in the background of
a step. Printed are medians over the rounds, and shares of training time at one save every five minutes. The share of a
save in the background is an upper bound: what the loop waits for, and all processor time of the writer, as if there
were one processor only.
Not here: the save itself (megalodon/checkpoint), training on text (megalodon pretrain).
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megalodon.checkpoint.saver import Commit, Saver
from megalodon.checkpoint.store import CheckpointConfig, step_path
from megalodon.model.loss import cross_entropy
from megalodon.model.megalodon import Megalodon
from megalodon.training.host import keep_freed_memory
from megalodon.training.optim import build_optimizer, optimizer_tensors
from megalodon_cli import recipe_files

EVERY_SECONDS = 300
"""Time between two saves for which the share is given."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What checkpoints cost a run.")
    parser.add_argument("recipe", help="a shipped recipe")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="changes of the recipe")
    parser.add_argument("--rounds", type=int, default=5, help="saves of each kind (default 5)")
    parser.add_argument("--dir", type=Path, help="where to write; default: the folder for temporary files")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.dir) as directory:
        figures = measure(given.recipe, given.changes, Path(directory), given.rounds)
    if given.json:
        given.json.write_text(json.dumps({"name": "checkpoint_cost", "figures": figures}, indent=1) + "\n")
    sys.stdout.write(f"{report(' '.join((given.recipe, *given.changes)), figures)}\n")


def trainer(recipe: str, changes: list[str]) -> tuple[Callable[[], None], dict[str, Tensor]]:
    """Return a function that takes one training step on random tokens, and the tensors that a checkpoint holds."""
    config = recipe_files.load([recipe], changes).pretraining()
    model_config = config.model_config_for(config.padded_vocab_size())
    model = Megalodon(model_config)
    optimizer = build_optimizer(dict(model.named_parameters()), config.optim)
    tokens = torch.randint(model_config.vocab_size, (max(1, 8192 // config.data.seq_len), config.data.seq_len))

    def step() -> None:
        hidden, _ = model.hidden(tokens)
        loss, count = cross_entropy(hidden, model.output_weight, tokens.roll(-1, 1))
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    tensors: dict[str, Tensor] = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    return step, tensors | optimizer_tensors(optimizer)


def measure(recipe: str, changes: list[str], directory: Path, rounds: int) -> dict[str, float]:
    """Return medians over the rounds, in seconds unless the name says otherwise."""
    keep_freed_memory()
    step, tensors = trainer(recipe, changes)
    saver = Saver(directory, CheckpointConfig(keep_last=2))
    found: dict[str, list[float]] = {}
    for turn in range(rounds + 1):  # the first is warm-up
        row = {"copy": timed(lambda: {name: tensor.detach().clone() for name, tensor in tensors.items()})}
        row["step"] = timed(step)
        busy = time.process_time()
        saver.save(2 * turn, tensors, {}, {})
        row["stall_in_loop"] = ended(saver).seconds
        row["processor"] = time.process_time() - busy
        begin = time.perf_counter()
        saver.save(2 * turn + 1, tensors, {}, {}, background=True)
        row["stall_in_background"] = time.perf_counter() - begin
        step()
        row["write_in_background"] = ended(saver).seconds
        if turn:
            for name, value in row.items():
                found.setdefault(name, []).append(value)
    figures = {name: statistics.median(values) for name, values in found.items()}
    figures["share_in_loop"] = figures["stall_in_loop"] / EVERY_SECONDS
    figures["share_in_background"] = (figures["stall_in_background"] + figures["processor"]) / EVERY_SECONDS
    size = sum(path.stat().st_size for path in step_path(directory, 2 * rounds).rglob("*") if path.is_file())
    count = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("model."))
    return {**figures, "bytes": size, "parameters": count}


def ended(saver: Saver) -> Commit:
    """Wait for a save and return what was committed."""
    commit = saver.poll(wait=True)
    assert commit is not None
    return commit


def timed(call: Callable[[], object]) -> float:
    """Return how many seconds a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def report(what: str, figures: dict[str, float]) -> str:
    """The figures in a few lines."""
    f = figures
    return "\n".join(
        [
            f"{what}: {f['parameters']:,.0f} parameters, {f['bytes'] / 1e6:.1f} MB a checkpoint, "
            f"{f['step']:.3f} s a step of 8,192 tokens, {torch.get_num_threads()} threads, torch {torch.__version__}",
            f"  copy of the tensors {f['copy']:.3f} s; processor time of a save {f['processor']:.3f} s",
            f"  in the loop:       stall {f['stall_in_loop']:.3f} s, {f['share_in_loop']:.3%} of the time "
            f"at one save in {EVERY_SECONDS} s",
            f"  in the background: stall {f['stall_in_background']:.3f} s, "
            f"written in {f['write_in_background']:.3f} s, at most {f['share_in_background']:.3%} of the time",
        ]
    )


if __name__ == "__main__":
    main()
