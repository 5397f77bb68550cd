"""How a finished model runs, without a change to what it computes: recomputation, compilation, determinism.

    recompute(model, "block")            # activations are computed again in the backward pass instead of kept
    note = compile_model(model, …)       # parts are compiled in place; names of parameters stay
    with deterministic(True): …

Not here: which model (model/megalodon.py), how many rows a pass has and what memory it takes (memory.py).
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megalodon.errors import EnvironmentFault
from megalodon.model.adapters import is_adapted
from megalodon.model.architectures import LanguageModel, attention_half, pointwise_parts

Recompute = Literal["none", "attention", "block"]
Compile = Literal["auto", "block"] | bool
LIMIT = 64
"""Shapes a compiled part is compiled for, one more is an error; windows that grow (warm-up) need one a length."""


def recompute(model: LanguageModel, what: Recompute) -> None:
    """Let every block, or its attention half, keep its input alone until its gradient is needed.

    The forward pass of that part then runs twice, with the random numbers of the first time: loss and gradients are
    bitwise those of `none`. Where no gradient is recorded nothing changes.
    """
    for block in model.layers if what != "none" else ():
        part = block if what == "block" else attention_half(block)
        part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False)


def keep_all(model: LanguageModel) -> None:
    """Take back `recompute`."""
    for block in model.layers:
        for part in (block, attention_half(block)):
            vars(part).pop("forward", None)


def compile_model(model: LanguageModel, wanted: Compile, device: torch.device) -> str | None:
    """Compile parts of the model in place; return what the user should know of it, if anything.

    By default those without a graph break, feed-forward networks and RMSNorms: the portable ops read document starts
    on the host. In float32 on CPU cores (AVX-512, torch 2.13, quickstart and books-tiny) a step takes 0.93 to 1.07 of
    its eager time, the noise of the measurement, and 18 s to 29 s more before the first; whole blocks, which break
    around those ops, take 110 s and gain 3 % to 5 %. So `auto` leaves a CPU alone. On a GPU it compiles: the parts are
    bound by memory there (expected, not measured yet). Each shape is compiled for itself, so that a resumed run
    computes what an uninterrupted one does. A recipe cannot ask for blocks where document starts give every batch
    shapes of its own, nor under `recompute`, which hides a block with graph breaks from the compiler.

    Args:
        wanted: auto, True: compile these parts or raise, block: whole blocks or raise, False: nothing.
    Raises:
        EnvironmentFault: True or block, and a compiler is missing or does not work.
    """
    if wanted is False:
        return None
    if wanted == "auto" and device.type == "cpu":
        return "train.compile auto: not compiled, a step gains little by it on a CPU"
    fault = _missing_compiler(device) or _failing_compiler(device)
    name = str(wanted).lower()
    if fault and wanted != "auto":
        raise EnvironmentFault(f"train.compile is {name}, but {fault}", "install it, or train.compile=false")
    if fault:
        return f"train.compile auto: not compiled, {fault}"
    whole = wanted == "block"
    # Where graphs break, torch would run what exceeds the limit as it was written, and say nothing.
    torch._dynamo.config.fail_on_recompile_limit_hit |= whole
    for part in model.layers if whole else _parts(model):
        # DoRA asks for its weights in a way that breaks the graph.
        unbroken = not whole and not is_adapted(model)
        part.compile(dynamic=False, fullgraph=unbroken, recompile_limit=LIMIT, options={"fallback_random": True})
    what = "whole blocks" if whole else "feed-forward networks and RMSNorms"
    return f"train.compile {name}: {what} are compiled in the first step"


@contextlib.contextmanager
def eager(model: LanguageModel) -> Iterator[None]:
    """Run a compiled model as it was written: batches and prompts of many shapes would each be compiled."""
    parts = [part for part in (*model.layers, *_parts(model)) if part._compiled_call_impl is not None]
    calls = [part._compiled_call_impl for part in parts]
    for part in parts:
        part._compiled_call_impl = None
    try:
        yield
    finally:
        for part, call in zip(parts, calls, strict=True):
            part._compiled_call_impl = call


def _parts(model: LanguageModel) -> list[nn.Module]:
    return [part for block in model.layers for part in pointwise_parts(block)]


def _missing_compiler(device: torch.device) -> str | None:
    """Ask torch for the compilers it would use: CXX, else g++; on a GPU Triton too. None if they are there."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "no C++ compiler was found (g++, or the one that CXX names)"
    if device.type == "cuda" and not has_triton():
        return "Triton, which compiles for a GPU, was not found (pip install triton)"
    return None


def _failing_compiler(device: torch.device) -> str | None:
    """Compile one small function; return what went wrong: headers may be missing where a compiler is there."""
    probe: Callable[[torch.Tensor], torch.Tensor] = torch.compile(_probe, dynamic=False, fullgraph=True)
    try:
        probe(torch.zeros(32, device=device))
    except Exception as error:  # whatever a compiler does wrong, it cannot be used
        lines = [line for line in str(error).splitlines() if line.strip()] or ["no reason was given"]
        return f"the compiler does not work: {type(error).__name__}: {lines[0]}"
    return None


def _probe(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(x) * x


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Make PyTorch refuse operations whose result may differ between two runs; cuDNN and TF32 included.

    On a GPU cuBLAS also needs CUBLAS_WORKSPACE_CONFIG=:4096:8, set before CUDA starts (the command does it); torch
    raises where it is missing.
    """
    if not wanted:
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    fill: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switches = cudnn.deterministic, cudnn.benchmark, matmul.fp32_precision, fill
    torch.use_deterministic_algorithms(True)
    _switch(True, False, "ieee", False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        _switch(*switches)


def _switch(cudnn_deterministic: bool, cudnn_benchmark: bool, matmul: str, fill: bool) -> None:
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn_deterministic, cudnn_benchmark
    torch.backends.cuda.matmul.fp32_precision = matmul
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
