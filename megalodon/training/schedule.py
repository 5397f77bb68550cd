"""The length of a run in steps, and the learning rate as a pure function of the step. Not here: the optimizer."""

import math

from megalodon.training.optim import OptimConfig


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
