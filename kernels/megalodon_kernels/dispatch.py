"""Which implementation of an op runs, and whether its arguments fit together. Not here: the implementations.

An op is a folder; each of its implementations has the same signature. `reference` is the meaning, `portable` the fast
path in plain PyTorch, `triton` the GPU kernels. A backend asked for by name runs or raises; nothing falls back in
silence. What `auto` takes is logged once an op, under the name of this package.
"""

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "reference", "portable", "triton"]
LEAST_CAPABILITY = (8, 0)
"""Ampere: the first generation with bfloat16 tensor cores."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton, which reads this variable when a kernel is defined, runs kernels by its interpreter on a CPU."""
TRITON_IS_HERE = importlib.util.find_spec("triton") is not None
"""It is installed on Linux alone."""

_instead_of_auto: Backend = "auto"  # a plain global: torch.compile cannot read a ContextVar
_assumed: "Card | None" = None
_reported: set[tuple[str, str]] = set()
_log = logging.getLogger("megalodon_kernels")


class Card(NamedTuple):
    """What the kernels ask of a GPU."""

    capability: tuple[int, int]
    """Compute capability."""
    shared_memory: int
    """Bytes that a block of threads may take."""


class KernelError(RuntimeError):
    """An op cannot run the way it was asked to."""

    exit_code = 3


def choose(
    op: str, backend: str, device: torch.device, dtype: torch.dtype, unfit: str | None = None, shared_memory: int = 0
) -> str:
    """Return which implementation of `op` runs: "reference", "portable" or "triton".

    `auto` takes Triton on a CUDA device of capability 8.0 or above for float32 and bfloat16 inputs that its kernels
    can take, else the portable path; never the interpreter, which is for tests and runs by name alone.

    Args:
        op: for messages.
        backend: one of `Backend`.
        device, dtype: of the op's main input.
        unfit: why the kernels cannot take these inputs, as "what came; what was expected"; None if they can.
        shared_memory: bytes that a block of threads of its largest kernel takes.
    Raises:
        KernelError: `backend` is no backend, or it is "triton" and this call cannot run there.
    """
    if backend not in get_args(Backend):
        raise KernelError(f"{op}: backend is {backend!r}; expected one of {', '.join(get_args(Backend))}")
    if backend == "auto":
        backend = _instead_of_auto
    if backend == "auto":
        fits = (device.type == "cuda" or assumes()) and _obstacle(device, dtype, unfit, shared_memory) is None
        chosen = "triton" if fits else "portable"
        _report(op, chosen, device)
        return chosen
    if backend == "triton" and (obstacle := _obstacle(device, dtype, unfit, shared_memory)):
        raise KernelError(f"{op}: backend triton cannot run: {obstacle}; use backend auto or portable")
    return backend


def _obstacle(device: torch.device, dtype: torch.dtype, unfit: str | None, shared_memory: int) -> str | None:
    """What keeps Triton from running a call; None if nothing does."""
    if not TRITON_IS_HERE:
        return "Triton is not installed (pip install triton)"
    if device.type == "cuda" or _assumed:
        capability = _assumed.capability if _assumed else torch.cuda.get_device_capability(device)
        if capability < LEAST_CAPABILITY:
            return f"the device has compute capability {capability[0]}.{capability[1]}, expected 8.0 or above"
        if dtype not in (torch.float32, torch.bfloat16):
            return f"the dtype is {dtype}, expected float32 or bfloat16"
        available = _assumed.shared_memory if _assumed else _shared_memory(device)
        if shared_memory > available:
            return f"its kernels take {shared_memory >> 10} KiB of shared memory, the device has {available >> 10}"
    elif not INTERPRETED:
        return f"the device is {device.type}, expected cuda (or TRITON_INTERPRET=1, for tests)"
    return unfit


def _shared_memory(device: torch.device) -> int:
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


@contextlib.contextmanager
def assume(card: Card) -> Iterator[None]:
    """Inside, tensors without values are treated as if they lay on such a GPU: what runs there is asked for its shapes.

    For a plan made on another machine; a tensor with values must not come here.
    """
    global _assumed
    before, _assumed = _assumed, card
    try:
        yield
    finally:
        _assumed = before


def assumes() -> bool:
    """Whether a GPU is assumed; see `assume`."""
    return _assumed is not None


def _report(op: str, chosen: str, device: torch.device) -> None:
    # Under torch.compile a log call would break the graph; a GPU that is assumed runs nothing.
    if (op, chosen) not in _reported and not assumes() and not torch.compiler.is_compiling():
        _reported.add((op, chosen))
        _log.info("%s: backend %s on %s", op, chosen, device)


@contextlib.contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Inside, `auto` means `backend`: how a test runs a whole model on one implementation."""
    global _instead_of_auto
    before, _instead_of_auto = _instead_of_auto, backend
    try:
        yield
    finally:
        _instead_of_auto = before


def check_shapes(op: str, known: str, expected: Mapping[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """Compare each argument of `op` with the shape that those in `known` ask for; an absent one fits.

    Raises:
        ValueError: what came, what was expected, what to do.
    """
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{op}: {name} is {tuple(tensor.shape)} but {known}; "
                f"expected {shape}; pass the {name} that belongs to it"
            )
