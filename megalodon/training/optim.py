"""The optimizer of a run: AdamW as in the paper, its parameter groups, clipping, and averaged weights.

Not here: the learning rate of a step (schedule.py), the verdict on a gradient (guard.py).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from megalodon.config import Amount, Config, show


class OptimConfig(Config):
    """AdamW and its schedule (the `optim:` section of a recipe)."""

    name: Literal["adamw"] = "adamw"
    """The optimizer."""
    lr: float = Field(default=6e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running mean and of the running square of the gradient."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the running square."""
    grad_clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the whole gradient; null = no clipping."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay, multiplied by the learning rate."""
    decay: Literal["all", "matrices"] = "all"
    """What decays: all parameters (as released; norm scales are stored minus 1) or matrices only."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up; wsd stays at the peak and falls over the last fifth."""
    warmup: Amount = Amount(0.02, "share")
    """Linear warm-up from 0: part of the horizon, or `500 steps`, `1B tokens`."""
    final_lr: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end of the horizon, as a part of the peak."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of averaged weights, such as 0.999, evaluated beside the others and exported instead; null = none."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the penalty on log² of the softmax normaliser; the logged loss is without it."""

    @field_validator("betas")
    @classmethod
    def _decays(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"`{show(betas)}`: expected two numbers from 0 to below 1, such as [0.9, 0.95]")
        return betas


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over named parameters: one group that decays and, with `matrices`, one that does not.

    Each group carries `names`, the parameters in its order. The learning rate is set before each step by the loop.
    The state exists from the start, all zero, so that a checkpoint of any step holds the same tensors.
    """
    decayed: dict[str, nn.Parameter] = {}
    kept: dict[str, nn.Parameter] = {}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            (decayed if config.decay == "all" or is_matrix(name, parameter) else kept)[name] = parameter
    groups = [
        {"params": list(group.values()), "names": list(group), "weight_decay": decay}
        for group, decay in ((decayed, config.weight_decay), (kept, 0.0))
        if group
    ]
    # One pass over each parameter instead of ten: on two AVX-512 cores 7 ms for 8 M parameters instead of 25. On a CPU
    # it takes a gradient for laid out as its parameter is, which autograd sees to.
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    for parameter in (*decayed.values(), *kept.values()):
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the live state of AdamW by parameter name: optim.exp_avg.*, optim.exp_avg_sq.*, optim.step.*."""
    return {
        f"optim.{kind}.{name}": optimizer.state[parameter][kind]
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for kind in ("exp_avg", "exp_avg_sq", "step")
    }


def parameter_of(name: str) -> str:
    """Name of a tensor in a checkpoint -> the parameter whose shape it has; the name itself for any other tensor."""
    for prefix in ("model.", "ema.", "optim.exp_avg.", "optim.exp_avg_sq."):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def is_matrix(name: str, parameter: Tensor) -> bool:
    """True for weights of linear maps and embeddings: two dimensions and a `.weight` name, not the tables of CEMA."""
    return parameter.dim() == 2 and name.endswith("weight")


GROUPS = ("embed", "cema", "norm", "attn", "ffn", "head")
"""The groups of parameters in logs."""


def group_of(name: str) -> str:
    """Return the group of a parameter in logs, one of GROUPS."""
    owner = name.split(".")[-2]
    if owner.endswith("norm"):
        return "norm"
    special = {"embed": "embed", "embed_tokens": "embed", "cema": "cema", "output": "head", "lm_head": "head"}
    return special.get(owner) or ("ffn" if ".nffn." in name or ".mlp." in name else "attn")


def gradient_norms(
    gradients: Mapping[str, Tensor],
    copies: Callable[[str], int] = lambda name: 1,
    sums: Callable[[Sequence[float]], list[float]] = list,
) -> tuple[Tensor, dict[str, float]]:
    """Return the norm of the whole gradient, () float32, and that of each group.

    Args:
        gradients: by name of the parameter; with several ranks of this one's parts.
        copies:    how many ranks have the same part of a gradient: it counts once.
        sums:      numbers -> their sums over ranks.
    """
    alike: dict[tuple[str, int], list[Tensor]] = {}
    for name, gradient in gradients.items():
        alike.setdefault((group_of(name), copies(name)), []).append(gradient)
    norms = torch.stack([torch.nn.utils.get_total_norm(parts) for parts in alike.values()]).double().tolist()
    squares = dict.fromkeys(GROUPS, 0.0)  # all of them, as a rank may have no part of some group
    for (group, held), norm in zip(alike, norms, strict=True):
        squares[group] += norm * norm / held
    totals = dict(zip(squares, sums(list(squares.values())), strict=True))
    shown = dict.fromkeys([*map(group_of, gradients), *(group for group, square in totals.items() if square)])
    norm = torch.tensor(math.sqrt(sum(totals.values())), dtype=torch.float32)
    return norm, {group: math.sqrt(totals[group]) for group in shown}


def nonfinite_gradients(gradients: Mapping[str, Tensor]) -> dict[str, int]:
    """Return parameter -> how many values of its gradient are not finite, where there are any."""
    counts = {name: int((~gradient.isfinite()).sum()) for name, gradient in gradients.items()}
    return {name: count for name, count in counts.items() if count}


def clip(parameters: Mapping[str, nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scale the gradients in place so that their norm, given, is at most `limit`."""
    torch.nn.utils.clip_grads_with_norm_(list(parameters.values()), limit, norm)


class AveragedWeights:
    """A moving average of the parameters in float32, in which the initial weights have no part.

        a_1 = w_1,   a_n = d_n a_(n-1) + (1 - d_n) w_n,   d_n = min(decay, 1 - 1/n)

    That is the plain mean of the first 1/(1 - decay) updates and an exponential average from there on.

    Args:
        parameters: that are averaged; frozen ones are not.
        decay:      from 0 to below 1.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.live = {name: p for name, p in parameters.items() if p.requires_grad}
        self.mean = {name: p.detach().to(torch.float32, copy=True) for name, p in self.live.items()}

    @torch.no_grad()
    def restart(self) -> None:
        """Begin with what the parameters hold by now."""
        for name, parameter in self.live.items():
            self.mean[name].copy_(parameter)

    @torch.no_grad()
    def update(self, count: int) -> None:
        """Take in the parameters after their `count`-th update, from 1."""
        torch._foreach_lerp_(list(self.mean.values()), list(self.live.values()), max(1 - self.decay, 1 / count))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange parameters and averages; a second call brings them back bit by bit."""
        for name, parameter in self.live.items():  # by value: others hold the memory of a parameter too
            before = parameter.clone()
            parameter.copy_(self.mean[name])
            self.mean[name].copy_(before)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the model have the averaged weights while the context lasts."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def tensors(self) -> dict[str, Tensor]:
        """Return the live averages by parameter name, as they stand in a checkpoint: ema.*."""
        return {f"ema.{name}": mean for name, mean in self.mean.items()}
