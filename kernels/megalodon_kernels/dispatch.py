"""Which implementation of an op runs, and whether its arguments fit together. Not here: the implementations.

An op is a folder; each of its implementations has the same signature. `reference` is the meaning, `portable` the fast
path in plain PyTorch. A backend asked for by name runs or raises; nothing falls back in silence.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, get_args

from torch import Tensor

Backend = Literal["auto", "reference", "portable"]
Op = TypeVar("Op", bound=Callable[..., Any])


class KernelError(RuntimeError):
    """An op cannot run the way it was asked to."""

    exit_code = 3


def choose(op: str, backend: str, implementations: Mapping[str, Op]) -> Op:
    """Return the implementation of `op` that `backend` names; `auto` takes the portable one.

    Raises:
        KernelError: `backend` is not the name of an implementation.
    """
    name = "portable" if backend == "auto" else backend
    if name not in implementations:
        known = ", ".join(get_args(Backend))
        raise KernelError(f"{op}: backend is {backend!r}; expected one of {known}")
    return implementations[name]


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
