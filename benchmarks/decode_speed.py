"""Time one token of decoding on a CPU: at depth 0 and at a depth of a million, beside the time to read the weights.

    python benchmarks/decode_speed.py                     # 8 M and 50 M parameters, float32 and bfloat16
    python benchmarks/decode_speed.py --sizes 8M --repeats 5

Both depths begin at the same place of a chunk and take turns, so that what else the machine does meets both alike; the
deep state is that of the short prompt with its position moved on by whole chunks, which is all that depth is to the
model's size and work. Not here: other models (make bench).
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from megalodon.inference.sampling import SamplingConfig
from megalodon.inference.session import Session, generate
from megalodon.model.decoder import Decoder
from megalodon.model.megalodon import Megalodon, ModelConfig
from megalodon.model.state import State
from megalodon_kernels import Statistics

SHARED = {"num_heads": 1, "swiglu": True, "cema_ndim": 16, "chunk_size": 512}
MODELS = {
    "8M": ModelConfig(num_layers=6, model_dim=256, z_dim=64, value_dim=512, ffn_hidden_dim=704, norm_num_groups=16,
                      vocab_size=4096, **SHARED),
    "50M": ModelConfig(num_layers=10, model_dim=512, z_dim=128, value_dim=1024, ffn_hidden_dim=1536,
                       norm_num_groups=32, vocab_size=8192, **SHARED),
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEPTH = 1_000_000
PROMPT, STEPS = 16, 64
"""Tokens read before the first measured one, and tokens measured in a turn."""


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description="Time of a decoding step, flatness in depth, distance from the floor.")
    parser.add_argument("--sizes", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=5, help="turns of each measurement (default 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    sys.stdout.write(f"{platform.machine()}, {given.threads} threads, torch {torch.__version__}; µs are medians\n\n")
    titles = ["model", "tok/s at 0", "µs at 0", "µs at 1M", "1M / 0", "generate µs", "read µs", "step / read"]
    sys.stdout.write(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}\n")
    for size in given.sizes:
        for name, dtype in DTYPES.items():
            sys.stdout.write(f"| {size} {name} | {' | '.join(measure(MODELS[size], dtype, given.repeats))} |\n")
            sys.stdout.flush()


def measure(config: ModelConfig, dtype: torch.dtype, repeats: int) -> list[str]:
    """The cells of one row of the table."""
    model = Megalodon(config).to(dtype).eval()
    with torch.inference_mode():
        shallow = model(torch.arange(PROMPT)[None])[1]
    decoder = Decoder(model)
    kinds: dict[str, Callable[[], list[float]]] = {
        "shallow": lambda: step_times(decoder.at(shallow)),
        "deep": lambda: step_times(decoder.at(deepened(shallow, DEPTH // config.chunk_size * config.chunk_size))),
        "generate": lambda: generate_times(model),
        "read": lambda: read_times(model),
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    ratios = []
    for _ in range(repeats):
        turn = {name: run() for name, run in kinds.items()}
        ratios.append(statistics.median(turn["deep"]) / statistics.median(turn["shallow"]))
        for name, seconds in turn.items():
            times[name] += seconds
    micro = {name: 1e6 * statistics.median(seconds) for name, seconds in times.items()}
    spread = f"{statistics.median(ratios):.3f} ({min(ratios):.2f} … {max(ratios):.2f})"
    return [
        f"{1e6 / micro['shallow']:.0f}",
        f"{micro['shallow']:.0f}",
        f"{micro['deep']:.0f}",
        spread,
        f"{micro['generate']:.0f}",
        f"{micro['read']:.0f}",
        f"{micro['shallow'] / micro['read']:.2f}",
    ]


def deepened(state: State, tokens: int) -> State:
    """The same state as if `tokens` more had been read before it, a whole number of chunks."""

    def norm(x: Statistics) -> Statistics:
        return Statistics(x.count + tokens, x.mean, x.var)

    layers = tuple(layer._replace(norm=norm(layer.norm)) for layer in state.layers)
    return State(state.position + tokens, layers, norm(state.norm))


def step_times(decoder: Decoder) -> list[float]:
    """Seconds of each step, the first few left out."""
    token = torch.tensor([5])
    return [timed(lambda: decoder.step(token)) for _ in range(STEPS)][4:]


def generate_times(model: Megalodon) -> list[float]:
    """Seconds between two tokens of `generate` with its default sampling."""
    session = Session(model)
    session.feed(range(PROMPT))
    moments = [time.perf_counter()]
    for _ in generate(session, [], STEPS, SamplingConfig()):
        moments.append(time.perf_counter())
    return [b - a for a, b in pairwise(moments[5:])]


def read_times(model: Megalodon) -> list[float]:
    """Seconds to read every weight once, all threads at it: the largest element of each matrix, whatever its value."""
    embedding = model.embed.weight
    weights: list[Tensor] = [p.detach() for p in model.parameters() if p is not embedding]  # a step reads one row of it
    joined = torch.cat([weight.flatten().to(embedding.dtype) for weight in weights])
    words = joined.view(torch.int32)
    return [timed(words.max) for _ in range(STEPS // 2)][4:]


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
