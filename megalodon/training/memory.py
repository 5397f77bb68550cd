"""What a run needs of its device's memory, how many windows fit into a pass, and what to do when memory ran out.

    plan = fitted(model_config, plan, available_memory(plan.device))     # micro_batch: auto, settled before step 1
    with explained(plan): …                                             # what PyTorch raises becomes OutOfMemory

Not here: activations computed again (execution.py), what else a run will do (plan.py).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalodon.errors import OutOfMemory
from megalodon.model.adapters import trainable
from megalodon.model.architectures import LanguageModel, LanguageModelConfig, build_model
from megalodon.training.activations import PARTS, kept_by_part, pass_loss
from megalodon.training.execution import recompute
from megalodon.training.metrics import peak_memory
from megalodon.training.optim import OptimConfig
from megalodon.training.plan import MICRO_TOKENS, Needs, Plan

MARGIN = 1.25
"""What a pass takes beside the activations it keeps: gradients of activations, scratch of matrix products."""
_GIB = 2**30


def available_memory(device: torch.device) -> int | None:
    """Return the free bytes of a device; of a CPU what the system says is available. None if that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def fitted(
    model_config: LanguageModelConfig,
    plan: Plan,
    available: int | None,
    micro_rows: int | None = None,
    build: Callable[[LanguageModel], None] = lambda model: None,
) -> Plan:
    """Return the plan with what it needs and, with `micro_batch: auto`, the windows of a pass that fit.

    On a CPU these are as many as 8,192 tokens hold, where a step is fastest, or fewer if the memory asks for it; on a
    GPU the most that a real pass forward and back has room for. Nothing of it touches the run or the global generator.

    Args:
        available:  bytes; None does not bound a CPU.
        micro_rows: the choice of an earlier part of the same run, which holds: other sums round in another way.
        build:      called with the model that is measured, such as puts adapters in; see `Run.build`.
    Raises:
        OutOfMemory: not even one window fits.
    """
    if plan.layout.world_size > 1:  # what one process would need says little of what each of several does
        fits = micro_rows and plan.rank_rows % micro_rows == 0
        return replace(plan, micro_rows=micro_rows) if micro_rows and fits else plan
    with explained(plan), _untouched(plan.device):
        with explained(plan, building=True):
            model = _built(model_config, plan, build)
        needs = _measured(model, plan)
        if plan.config.micro_batch == "auto" and micro_rows is None:
            candidates = [n for n in range(plan.rows, 0, -1) if plan.rows % n == 0]
            if plan.device.type == "cpu":
                few = [n for n in candidates if n == 1 or n * plan.seq_len <= MICRO_TOKENS["cpu"]]
                micro_rows = first_that_fits(few, lambda n: available is None or needs.total(n) <= available)
            else:
                micro_rows = first_that_fits(candidates, lambda n: _fits(model, plan, n))
            if micro_rows is None:
                raise _no_room(replace(plan, micro_rows=1, needs=needs), f"{(available or 0) / _GIB:.1f} GiB are free")
    return replace(plan, micro_rows=micro_rows or plan.micro_rows, needs=needs)


def first_that_fits(candidates: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Return the first candidate that fits, None if none does."""
    return next((n for n in candidates if fits(n)), None)


@contextlib.contextmanager
def explained(plan: Plan, *, building: bool = False) -> Iterator[None]:
    """Raises: OutOfMemory, with the plan and what would fit, for what PyTorch and Python raise on a GPU and a CPU.

    Args:
        building: the model itself is being made, which no other pass would make smaller.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        said = (str(error).splitlines() or [""])[0].rpartition("DefaultCPUAllocator: ")[2]
        said = said or "Python found none"
        if building:
            raise OutOfMemory(f"out of memory on {plan.device}: {said}", "a smaller model") from error
        used = f"at most {peak_memory(plan.device) / _GIB:.2f} GiB were in use"
        raise _no_room(plan, f"{said}; {used}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether this is what PyTorch or Python raises where memory ran out."""
    said = (str(error).splitlines() or [""])[0]
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in said


def _no_room(plan: Plan, said: str) -> OutOfMemory:
    """What was asked for, what was planned, which parts keep the most, and three edits with what each would need."""
    message = f"out of memory on {plan.device}: {said}"
    if needs := plan.needs:
        parts = {"activations": needs.window * plan.micro_rows, "weights and gradients": needs.weights}
        parts |= {"optimizer": needs.optimizer, "loss": needs.loss}
        shown = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in sorted(parts.items(), key=lambda p: -p[1]))
        message += f"; planned {needs.total(plan.micro_rows) / _GIB:.2f} GiB: {shown}"
        if largest := [f"{PARTS[name]} {size * plan.micro_rows / _GIB:.2f}" for name, size in needs.kept[:4]]:
            message += f"; activations by part: {', '.join(largest)}"
    edits = [_edit(change, needs and smaller(needs)) for change, smaller in _edits(plan)]
    return OutOfMemory(message, " · ".join([*edits, "a smaller model"][:3]))


def _edits(plan: Plan) -> Iterator[tuple[str, Callable[[Needs], int]]]:
    """Changes of the recipe that need less, those first that change least of what is trained; all derived."""
    rows = plan.micro_rows
    if rows > 1:
        half = max(n for n in range(1, rows) if plan.rank_rows % n == 0)
        yield f"train.micro_batch={half}", lambda needs: needs.total(half)
    if plan.config.recompute != "block":
        yield "train.recompute=block", lambda needs: needs.total(rows, recomputed=True)
    if plan.seq_len % 2 == 0:
        shorter = plan.seq_len // 2
        yield f"data.seq_len={shorter}", lambda needs: needs._replace(window=needs.window // 2).total(rows)
    if plan.optim.ema is not None:  # an average is as large as one of AdamW's two moments
        yield "optim.ema=null", lambda needs: needs.total(rows) - needs.optimizer // 2


def _edit(change: str, size: int | None) -> str:
    return change if size is None else f"{change} -> {size / _GIB:.2f} GiB (derived)"


@contextlib.contextmanager
def _untouched(device: torch.device) -> Iterator[None]:
    """Leave the global generators as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _built(model_config: LanguageModelConfig, plan: Plan, build: Callable[[LanguageModel], None]) -> LanguageModel:
    backend: Any = plan.config.backend
    model = build_model(model_config, plan.config.seed, backend)
    build(model)
    model.to(plan.device)
    recompute(model, plan.config.recompute)
    return model.train()


def _loss(model: LanguageModel, plan: Plan, rows: int) -> Tensor:
    tokens = torch.zeros(rows, plan.seq_len, dtype=torch.int64, device=plan.device)
    return pass_loss(model, tokens, None, bf16=plan.bf16, loss_chunk=plan.config.loss_chunk)


def _fits(model: LanguageModel, plan: Plan, rows: int) -> bool:
    """Whether a pass of `rows` windows has room beside the moments of the optimizer, which are held meanwhile."""
    try:
        copies = 2 if plan.optim.ema is None else 3
        moments = [torch.empty_like(p) for p in trainable(model).values() for _ in range(copies)]
        _loss(model, plan, rows).backward()
        del moments
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def _measured(model: LanguageModel, plan: Plan) -> Needs:
    """Needs of a run: one window is passed forward and what autograd keeps of it is counted, each storage once."""
    kept = kept_by_part(model, lambda: _loss(model, plan, 1))
    layers, rows = model.config.num_layers, min(plan.config.loss_chunk, plan.rows * plan.seq_len)
    count = sum(p.numel() for p in trainable(model).values())
    output = 4 * model.output_weight.numel()
    output = output if model.output_weight.requires_grad else 0
    window = sum(kept.values()) - output  # its gradient is kept once, however many windows there are
    inputs = layers * plan.seq_len * model.config.model_dim * 4
    block = window if plan.config.recompute == "block" else min(window, inputs + window // layers)
    weights, moments, averages = state_bytes(count, plan.optim)
    triton = plan.device.type == "cuda"
    logits = logits_bytes(rows, model.config.num_outputs, model.config.model_dim, bf16=plan.bf16, written_over=triton)
    return Needs(
        weights=4 * model.num_parameters() + weights + averages,
        optimizer=moments,
        loss=logits + output,
        window=round(MARGIN * window),
        window_recomputed=round(MARGIN * block),
        kept=tuple(sorted(kept.items(), key=lambda part: -part[1])),
    )


def state_bytes(count: int, optim: OptimConfig) -> tuple[int, int, int]:
    """Return the bytes of trained parameters (or of their gradients), of AdamW's moments, and of averaged weights."""
    return 4 * count, 8 * count, 0 if optim.ema is None else 4 * count


def checkpoint_bytes(parameters: int, trained: int, optim: OptimConfig) -> int:
    """Return the bytes of the tensors of a checkpoint, in float32: weights, moments, averages; headers not counted.

    Args:
        parameters: that a checkpoint holds: all of a model, or its adapters.
        trained:    those of them that have moments.
    """
    _, moments, averages = state_bytes(trained, optim)
    return 4 * parameters + moments + averages


def logits_bytes(tokens: int, classes: int, width: int, *, bf16: bool, written_over: bool) -> int:
    """Return the bytes of the logits of so many tokens and of what stands beside them.

    Args:
        width:        D, of the hidden states.
        written_over: the kernel of a GPU makes their gradient in place, in the dtype of the product; the portable path
                      has them in float32 too.
    """
    if not bf16:
        return 4 * tokens * classes
    return (2 if written_over else 6) * tokens * classes + 2 * classes * width
