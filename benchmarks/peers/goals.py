"""What a GPU is expected to do at 7B, from counted bytes and operations: predictions, each with its formula.

Shape: 32,768 tokens, width 4,096, 64 norm groups, bfloat16, attention chunk 4,096. Assumed are the rates below, those
of one H200; a measurement replaces them. Not here: measurements (gpu.py, make gpu-check).
"""

from typing import NamedTuple

from sizes import SEVEN_B, llama_flops, ours_flops

COPY, MATMUL = 4.3e12, 790e12
"""Bytes a second read and written; operations a second in bfloat16."""
TOKENS, WIDTH = 32_768, 4096


class Goal(NamedTuple):
    """A floor, what is expected over it, and what is aimed at."""

    name: str
    floor: float
    """Seconds, or a ratio of speeds."""
    formula: str
    predicted: str
    wanted: str


def goals() -> list[Goal]:
    """Every line of the GPU that has no measured figure yet."""
    element, ours, llama = TOKENS * WIDTH / COPY, SEVEN_B.ours, SEVEN_B.llama
    seen = (ours.chunk_size + 1) / 2
    attention = TOKENS * 2 * (ours.z_dim + ours.value_dim) * seen / MATMUL
    weights = 2 * (ours.num_parameters() - ours.vocab_size * ours.model_dim) / COPY
    ratios = [llama_flops(llama, length) / ours_flops(ours, length) for length in (32_768, 4096)]
    return [
        Goal(
            "CEMA forward",
            4 * element,
            "4 B an element: x read, y written",
            "1.4 to 2.2 x floor",
            "≤ 2.0 x floor, ≥ 25 x FFT",
        ),
        Goal("CEMA backward", 6 * element, "6 B: x, dy read, dx written", "2.0 to 2.3 x floor", "≤ 2.7 x floor"),
        Goal("TimestepNorm forward", 6 * element, "6 B: x read twice, y written", "1.1 x floor", "≤ 1.2 x floor"),
        Goal("TimestepNorm backward", 10 * element, "10 B: x, dy twice, dx once", "1.1 x floor", "≤ 1.2 x floor"),
        Goal("attention forward", attention, "2 (Z + V) (C + 1) / 2 a token", "58 to 68 % of peak", "≥ 60 % of peak"),
        Goal("decode, a token", weights, "2 B a parameter, embedding excepted", "1.12 to 1.3 x floor", "≤ 1.3 x floor"),
        Goal("speed over Llama 2 7B, 32K", ratios[0], "ratio of operations", "at equal utilisation", "≥ 1.32"),
        Goal("speed over Llama 2 7B, 4K", ratios[1], "ratio of operations", "at equal utilisation", "≥ 0.90"),
    ]
