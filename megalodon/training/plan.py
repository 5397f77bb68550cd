"""What a run will do, worked out and checked before anything starts: length, batch, arithmetic, device.

    plan = make_plan(train, optim, checkpoint, log, parallel, seq_len=…, windows=…, device="auto")

Not here: doing it (loop.py), the learning rate of a step (schedule.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field

from megalodon.checkpoint.store import CheckpointConfig
from megalodon.config import Config, Count, InvalidRecipe, Place, Problem, show
from megalodon.errors import EnvironmentFault, InputError, RecipeError
from megalodon.parallel.layout import ONE, Layout, ParallelConfig, check_layout, resolve_layout
from megalodon.training.guard import GuardConfig
from megalodon.training.metrics import LogConfig
from megalodon.training.optim import OptimConfig
from megalodon.training.schedule import SeqLenWarmupConfig, check_warmup, horizon_steps

MICRO_TOKENS = {"cpu": 8_192, "cuda": 16_384}
"""Tokens of a forward pass with `micro_batch: auto`, before the memory was looked at (memory.py)."""


class TrainConfig(Config):
    """Length, batch and arithmetic of training (the `train:` section of a recipe)."""

    max_tokens: Count | None = Field(default=None, ge=1)
    """Horizon in tokens; give one of max_tokens, max_steps, max_epochs. Sets the length of the schedule too."""
    max_steps: Count | None = Field(default=None, ge=1)
    """Horizon in optimizer steps."""
    max_epochs: float | None = Field(default=None, gt=0)
    """Horizon in passes over the training windows."""
    batch_tokens: Count = Field(default=524_288, ge=1)
    """Tokens of an optimizer step over all devices; accumulation follows."""
    micro_batch: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Sequences in one forward pass; auto, found before step 1: on a CPU as many as 8,192 tokens hold, fewer if memory
    is short; on a GPU the most that a real pass has room for."""
    precision: Literal["auto", "bf16-mixed", "bf16", "fp32"] = "auto"
    """Arithmetic: auto is bf16-mixed on a GPU and fp32 on a CPU."""
    backend: Literal["auto", "triton", "portable", "reference"] = "auto"
    """Implementation of the ops."""
    compile: Literal["auto", "block"] | bool = "auto"
    """torch.compile of feed-forward networks and RMSNorms; auto: off on a CPU, where it gains little, on on a GPU if
    the compilers are there; true: compile or refuse; block: whole blocks, which take minutes before the first step and
    need data.isolate none and recompute none."""
    recompute: Literal["none", "attention", "block"] = "none"
    """Activations computed again in the backward pass instead of kept: of no part, of the attention half of every
    block, of whole blocks. Gradients stay the same bit by bit."""
    seq_len_warmup: SeqLenWarmupConfig | None = None
    """Windows cut into shorter ones at first, such as {start: 512, over: 5%}; null = none."""
    loss_chunk: Count = Field(default=2048, ge=1)
    """Tokens per slice of the loss; the logits of a whole sequence never exist."""
    seed: int = Field(default=1, ge=0)
    """Seed of weights, data order and dropout."""
    deterministic: bool = False
    """Refuse operations whose result may differ between two runs; also cuDNN's choice of algorithms, and TF32."""
    guard: GuardConfig = GuardConfig()
    """What happens to a step that looks wrong."""


class Needs(NamedTuple):
    """Bytes of its device that a run needs; the windows' are measured on one (memory.py), the others derived."""

    weights: int
    """Parameters, their gradients and, with optim.ema, their average."""
    optimizer: int
    loss: int
    """The logits of a slice, and the gradient of the output matrix."""
    window: int
    """Of each window of a pass."""
    window_recomputed: int
    """The same with `recompute: block`; derived."""
    kept: tuple[tuple[str, int], ...] = ()
    """Part of the model -> bytes that it keeps of a window for the pass back, largest first (activations.PARTS)."""

    def total(self, rows: int, *, recomputed: bool = False) -> int:
        """Return the bytes of a run whose passes have so many windows."""
        window = self.window_recomputed if recomputed else self.window
        return self.weights + self.optimizer + self.loss + rows * window


@dataclass(frozen=True)
class Plan:
    """What a run will do, worked out and checked before anything starts."""

    config: TrainConfig
    optim: OptimConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    horizon: int
    """Optimizer steps."""
    seq_len: int
    rows: int
    """Windows of a step, all ranks together."""
    micro_rows: int
    """Windows of a forward pass; divides `rank_rows`."""
    device: torch.device
    bf16: bool
    """Matrix products in bfloat16 through autocast; parameters, sums and the optimizer stay float32."""
    needs: Needs | None = None
    """What it takes of the device's memory; None until it was measured."""
    layout: Layout = ONE
    """Of the ranks that train together."""

    @property
    def rank_rows(self) -> int:
        """Windows of a step that a rank reads, or has a piece of."""
        return self.rows // self.layout.data_ranks

    @property
    def batch_tokens(self) -> int:
        """Tokens of a step."""
        return self.rows * self.seq_len


def make_plan(
    config: TrainConfig,
    optim: OptimConfig,
    checkpoint: CheckpointConfig,
    log: LogConfig,
    parallel: ParallelConfig,
    *,
    seq_len: int,
    windows: int,
    device: str = "auto",
    world_size: int = 1,
    chunk_size: int | None = None,
    split: Mapping[str, int] | None = None,
    dropout: bool = False,
) -> Plan:
    """Work out horizon, batch and arithmetic of a run.

    Args:
        seq_len:    tokens of a window.
        windows:    training windows of an epoch.
        device:     auto, cpu, cuda or cuda:N.
        world_size: processes that train together.
        chunk_size, split, dropout: of the model; see `check_layout`.
    Raises:
        InvalidRecipe: values that this version cannot honour, each by its key.
        RecipeError: numbers that do not go together; each is named.
        EnvironmentFault: the device is not there.
    """
    place = device_named(device)
    _refuse_unsupported(config, place)
    if config.seq_len_warmup:
        check_warmup(config.seq_len_warmup, seq_len)
    layout = resolve_layout(parallel, world_size)
    given = None if config.micro_batch == "auto" else config.micro_batch
    check_layout(
        layout,
        seq_len=seq_len,
        chunk_size=chunk_size,
        batch_tokens=config.batch_tokens,
        micro_batch=given,
        split=split,
        dropout=dropout,
    )
    if layout.tp > 1 and config.compile not in ("auto", False):
        said = f"train.compile {show(config.compile)} with parallel.tp {layout.tp}"
        raise RecipeError(f"{said}: parts of a layer exchange features, which is not compiled; expected auto or false")
    if layout.cp > 1 and config.compile == "block":
        said = f"train.compile block with parallel.cp {layout.cp}"
        raise RecipeError(f"{said}: blocks exchange states, which is not compiled; expected auto, true or false")
    shortest, piece = config.seq_len_warmup, layout.cp * (chunk_size or 1)
    if shortest and layout.cp > 1 and shortest.start % piece:
        whole = f"parallel.cp {layout.cp} x model.chunk_size {chunk_size:,} = {piece:,}"
        raise RecipeError(f"train.seq_len_warmup.start {shortest.start:,} is not a multiple of {whole}")
    rows = config.batch_tokens // seq_len
    rank_rows = rows // layout.data_ranks
    limit = max(1, MICRO_TOKENS[place.type] * layout.cp // seq_len)
    micro = given or max(n for n in range(1, rank_rows + 1) if rank_rows % n == 0 and n <= limit)
    horizon = horizon_steps(
        max_steps=config.max_steps,
        max_tokens=config.max_tokens,
        max_epochs=config.max_epochs,
        batch_tokens=config.batch_tokens,
        epoch_tokens=windows * seq_len,
    )
    bf16 = config.precision == "bf16-mixed" or (config.precision == "auto" and place.type == "cuda")
    return Plan(config, optim, checkpoint, log, horizon, seq_len, rows, micro, place, bf16, layout=layout)


def device_named(name: str) -> torch.device:
    """Return the device that `--device` means. Raises: InputError for no device, EnvironmentFault for one not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: expected auto, cpu, cuda or cuda:N") from None
    if device.type not in MICRO_TOKENS or (device.type == "cpu" and device.index is not None):
        raise InputError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EnvironmentFault(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def _refuse_unsupported(config: TrainConfig, device: torch.device) -> None:
    """Raises: InvalidRecipe with a problem for each value that this version would otherwise ignore."""
    gpu = device.type == "cuda"
    values: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
        ("train.precision", config.precision, ("auto", "bf16-mixed", "fp32")),
        ("train.backend", config.backend, ("auto", "portable", "reference", *(["triton"] if gpu else []))),
    )
    refused = [
        Problem(
            Place("recipe"), key, f"{show(value)} is not available here; expected {' or '.join(map(show, allowed))}"
        )
        for key, value, allowed in values
        if value not in allowed
    ]
    if refused:
        raise InvalidRecipe(refused)
