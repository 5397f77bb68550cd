"""What docs/parallel.md says of several ranks, measured on this machine: the tables of that page, in Markdown.

    python benchmarks/several_ranks.py layouts              how far every layout lies from one rank (minutes)
    python benchmarks/several_ranks.py exchange             scan against serial hand-over of states; layers are sleeps
    python benchmarks/several_ranks.py memory               what each rank of a model holds until it is saved
    python benchmarks/several_ranks.py weak --turns 3       tokens/s of two processes over those of one on one core

Not here: what is compared (tests/parallel/test_equality.py), GPUs.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "parallel")]
LAYERS, LAYER, SEQUENTIAL, STATE = 8, 0.020, 0.006, 512 * 2**10 // 4
"""Layers, seconds of one, seconds of it that wait for the state, float32 numbers of a state."""


def layouts(given: argparse.Namespace) -> None:
    """The largest relative error of each layout over all its cases."""
    import test_equality as equality
    from ranks import on_ranks

    names = {torch.float64: "float64", torch.float32: "float32"}
    ones = {
        (isolated, dtype): equality.train(None, isolated, 1, False, dtype)
        for isolated, dtype in itertools.product((False, True), names)
    }
    print_row("layout", "cases", "loss", "gradients", "after 3 steps", "loss, float32", "gradients, float32")
    print_row("---", *["---:"] * 6)
    for name, layout in equality.LAYOUTS.items():
        worst, cases = dict.fromkeys(["loss64", "grad64", "steps", "loss32", "grad32"], 0.0), 0
        for isolated, accumulate, again in itertools.product((False, True), (1, 2), (False, True)):
            accumulate = min(accumulate, equality.ROWS // layout.data_ranks)
            for dtype in names:
                one = ones[isolated, dtype]
                how = (layout, isolated, accumulate, again, dtype)
                for found in on_ranks(layout.world_size, equality.as_rank, *how):
                    rank, bits = equality.Found(*found), names[dtype][-2:]
                    loss = abs(rank.losses[0] / one.losses[0] - 1)
                    worst[f"loss{bits}"] = max(worst[f"loss{bits}"], loss)
                    errors = [_error(rank.gradients[key], value) for key, value in one.gradients.items()]
                    worst[f"grad{bits}"] = max(worst[f"grad{bits}"], *errors)
                    if bits == "64":
                        errors = [_error(rank.tensors[key], value) for key, value in one.tensors.items()]
                        worst["steps"] = max(worst["steps"], *errors)
            cases += 1
        print_row(name, cases, *(f"{error:.0e}" for error in worst.values()))


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


def exchange(given: argparse.Namespace) -> None:
    """One forward pass in which layers are sleeps and states are real messages."""
    from ranks import on_ranks

    print_row("ranks", "hand-over", "serial", "scan", "scan, doubling", "no exchange")
    print_row("---:", "---", *["---:"] * 4)
    for ranks, sharded in itertools.product(given.ranks, (False, True)):
        cells = []
        for form in ("serial", "gather", "doubling", "none"):
            if form == "doubling" and ranks & (ranks - 1):
                cells.append("-")
                continue
            turns = [max(on_ranks(ranks, _pass, form, sharded, given.extra / 1e3)) for _ in range(given.turns)]
            cells.append(f"{statistics.median(turns) * 1e3:.0f} ms")
        print_row(ranks, "weights gathered a layer" if sharded else "weights whole", *cells)


def _pass(form: str, sharded: bool, extra: float) -> float:
    """Seconds of a forward pass on this rank."""
    import torch.distributed as dist

    from megalodon.parallel.chunk import ChunkPrefix
    from megalodon.parallel.collectives import exchange as messages

    group: Any = dist.group.WORLD
    rank, ranks = dist.get_rank(), dist.get_world_size()
    state = torch.zeros(1, STATE // 2, 1, 2)
    slow = torch.full((STATE // 2, 1), -0.01, dtype=torch.float64)
    prefix = None if form in ("serial", "none") else ChunkPrefix(group, None, 1, 32, 32, form=form)  # type: ignore[arg-type]
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(LAYERS):
        if sharded:
            dist.barrier()  # what gathering a layer's weights is to the ranks that share them
        if form == "serial":
            messages([], [(state, rank - 1)] if rank else [], group)
            time.sleep(SEQUENTIAL)
            messages([(state, rank + 1)] if rank + 1 < ranks else [], [], group)
            time.sleep(LAYER - SEQUENTIAL)
            continue
        time.sleep(LAYER)
        if prefix is not None:
            prefix.averages(state, slow, slow, None)
            time.sleep(extra)
    dist.barrier()
    return time.perf_counter() - begin


def weak(given: argparse.Namespace) -> None:
    """Two processes with twice the batch against one process that has one core to itself."""
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(given.turns):
            one = _speed(Path(folder), f"one-{turn}", given, 1)
            two = _speed(Path(folder), f"two-{turn}", given, 2)
            ratios.append(two / one / 2)
            sys.stderr.write(f"turn {turn + 1}: {one:,.0f} and {two:,.0f} tokens/s, {ratios[-1]:.1%} of twice\n")
    print_row("recipe", "turns", "two processes over twice one, median", "range")
    print_row("---", "---:", "---:", "---:")
    print_row(given.recipe, given.turns, f"{statistics.median(ratios):.1%}", f"{min(ratios):.1%} to {max(ratios):.1%}")


def _speed(folder: Path, name: str, given: argparse.Namespace, processes: int) -> float:
    """Median tokens/s of the steps after the first."""
    changes = [f"train.max_steps={given.steps}", f"train.batch_tokens={given.batch_tokens * processes}"]
    changes += [
        "eval.at_start=false",
        "eval.every=null",
        "eval.samples.prompts=[]",
        "eval.tokens=1",
        "checkpoint.export=false",
    ]
    command = [sys.executable, "-m", "megalodon_cli", "pretrain", given.recipe, *changes, "-q", "-o", name]
    command += ["--gpus", str(processes)] if processes > 1 else []

    def pinned() -> None:
        if processes == 1:
            os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=folder, env=environment, preexec_fn=pinned, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["tok_per_s"] for row in rows if row["kind"] == "train" and row["step"] > 1)


def memory(given: argparse.Namespace) -> None:
    """The most memory that a rank takes until its model is built, its optimizer there, and a checkpoint written."""
    from ranks import on_ranks

    print_row("ranks", "its part of weights and moments", "at most, built", "at most, saved", "seconds of the save")
    print_row("---:", *["---:"] * 4)
    for ranks in given.ranks:
        with tempfile.TemporaryDirectory() as folder:
            found = on_ranks(ranks, _held, folder, given.recipe)
        most = [max(one[key] for one in found) for key in range(3)]
        print_row(ranks, *(f"{size / 2**20:,.0f} MiB" for size in most), f"{max(one[3] for one in found):.1f}")


def _held(folder: str, recipe: str) -> tuple[int, int, int, float]:
    """Bytes of this rank's part; the most resident ones, above the start, once built and once saved; seconds."""
    import resource

    from megalodon.checkpoint.saver import Saver
    from megalodon.parallel.layout import Layout, ParallelConfig
    from megalodon.parallel.mesh import Mesh
    from megalodon.parallel.several import SeveralRanks
    from megalodon.training.plan import make_plan
    from megalodon.training.weights import Weights
    from megalodon_cli import recipe_files

    def resident() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    config = recipe_files.load([recipe], []).pretraining()
    model_config = config.model_config_for(config.padded_vocab_size())
    world = torch.distributed.get_world_size()
    ranks, layout = SeveralRanks(Mesh(Layout(dp_shard=world), "cpu")), ParallelConfig(dp_shard=world)
    train = config.train.model_copy(update={"batch_tokens": world * config.data.seq_len, "micro_batch": 1})
    plan = make_plan(
        train, config.optim, config.checkpoint, config.log, layout,
        seq_len=config.data.seq_len, windows=world, device="cpu", world_size=world,
    )  # fmt: skip
    begin = resident()
    weights = Weights(model_config, plan, ranks)
    weights.begin(None)
    built = resident() - begin
    tensors, share = weights.saved()
    saver = Saver(Path(folder), config.checkpoint)
    clock = time.perf_counter()
    saver.save(1, tensors, {}, {}, share=share)
    saver.poll(wait=True)
    return sum(x.nbytes for x in weights.live().values()), built, resident() - begin, time.perf_counter() - clock


def print_row(*cells: object) -> None:
    """One line of a Markdown table."""
    sys.stdout.write("| " + " | ".join(map(str, cells)) + " |\n")
    sys.stdout.flush()


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    parts.add_parser("layouts").set_defaults(run=layouts)
    simulated = parts.add_parser("exchange")
    simulated.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    simulated.add_argument("--turns", type=int, default=5)
    simulated.add_argument(
        "--extra", type=float, default=1.0, help="ms a layer that reading out the received state takes"
    )
    simulated.set_defaults(run=exchange)
    holding = parts.add_parser("memory")
    holding.add_argument("--recipe", default="200m")
    holding.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    holding.set_defaults(run=memory)
    scaling = parts.add_parser("weak")
    scaling.add_argument("--recipe", default="quickstart")
    scaling.add_argument("--steps", type=int, default=12)
    scaling.add_argument("--batch-tokens", type=int, default=8192, help="of each process")
    scaling.add_argument("--turns", type=int, default=3)
    scaling.set_defaults(run=weak)
    given = parser.parse_args()
    given.run(given)


if __name__ == "__main__":
    main()
