"""The length of a run in steps; the learning rate and the length of windows as pure functions of the step.

Not here: the optimizer, the cutting of windows (loop.py).
"""

import math

from pydantic import Field

from megalodon.config import Amount, Config, Count
from megalodon.errors import RecipeError
from megalodon.training.optim import OptimConfig


class SeqLenWarmupConfig(Config):
    """Shorter windows at first (the `train.seq_len_warmup:` section of a recipe)."""

    start: Count = Field(ge=1)
    """Tokens of the first windows; data.seq_len is reached from it by doubling."""
    over: Amount
    """How long the windows grow: part of the horizon, `500 steps` or `1B tokens`."""


def horizon_steps(
    *, max_steps: int | None, max_tokens: int | None, max_epochs: float | None, batch_tokens: int, epoch_tokens: int
) -> int:
    """Return the number of optimizer steps of a run, at least 1; of tokens and epochs the last step is whole.

    Args:
        max_steps, max_tokens, max_epochs: one of them is set.
        batch_tokens: tokens of a step.
        epoch_tokens: tokens of all training windows.
    """
    if max_steps is not None:
        return max_steps
    tokens = max_tokens if max_tokens is not None else (max_epochs or 0) * epoch_tokens
    return max(1, math.ceil(tokens / batch_tokens))


def learning_rate(config: OptimConfig, step: int, horizon: int, batch_tokens: int) -> float:
    """Return the learning rate of step 1, 2 … horizon; later steps have that of the last one.

    It rises linearly to the peak, which it reaches at the last warm-up step, and then follows the schedule down to
    final_lr x peak at the horizon: cosine, linear, wsd (peak until the last fifth of the horizon, then linear), or
    constant (the peak throughout).
    """
    warmup = config.warmup.steps(horizon, batch_tokens)
    if step < warmup:
        return config.lr * step / warmup
    done = min(1.0, (step - warmup) / max(1, horizon - warmup))
    match config.schedule:
        case "cosine":
            left = 0.5 * (1 + math.cos(math.pi * done))
        case "linear":
            left = 1 - done
        case "wsd":
            left = max(0.0, min(1.0, (horizon - step) / max(1, min(horizon // 5, horizon - warmup))))
        case "constant":
            return config.lr
    return config.lr * (config.final_lr + (1 - config.final_lr) * left)


def check_warmup(config: SeqLenWarmupConfig, seq_len: int) -> None:
    """Raises: RecipeError unless doubling leads from `start` to `seq_len` tokens; with the lengths that would fit."""
    doubled, rest = divmod(seq_len, config.start)
    if rest or doubled < 2 or doubled & (doubled - 1):
        fits, half = [], seq_len
        while half % 2 == 0:
            half //= 2
            fits.append(half)
        shown = ", ".join(f"{n:,}" for n in reversed(fits)) or "none, as it is odd"
        raise RecipeError(
            f"train.seq_len_warmup.start {config.start:,} does not lead to data.seq_len {seq_len:,} by doubling; "
            f"fits: {shown}"
        )


def window_length(config: SeqLenWarmupConfig | None, step: int, horizon: int, batch_tokens: int, seq_len: int) -> int:
    """Return the tokens of the pieces into which windows of `seq_len` are cut in step 1, 2 …

    The first `over` steps are divided evenly among start, 2 start, 4 start … seq_len / 2; from then on it is seq_len.
    The tokens of a step, their order and every target stay as they are; memory ends at the cuts.
    """
    if config is None:
        return seq_len
    steps = config.over.steps(horizon, batch_tokens)
    if step > steps:
        return seq_len
    lengths = (seq_len // config.start).bit_length() - 1
    return config.start << (step - 1) * lengths // steps
