"""A launcher of kernels as one operator of PyTorch, so that torch.compile neither enters nor breaks at it.

    @operator("rms_norm_forward")
    def _forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...     # launches, returns new tensors

    @_forward.register_fake
    def _(x: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...            # the same shapes and dtypes, nothing computed

An eager call goes straight to the launcher: PyTorch's dispatcher would add about 10 us. Not here: gradients. The
private autograd.Function of an op calls two operators, forward and backward.
"""

from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from megalodon_kernels.dispatch import assumes

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Operator(Generic[Arguments, Result]):
    """The launcher and its registration; see above.

    Args:
        name: of the operator, inside the namespace `megalodon`.
        launch: its annotations become the schema; it returns new tensors and leaves its inputs alone.
        mutates: names of the inputs it writes to; for steps of decoding only.
    """

    def __init__(self, name: str, launch: Callable[Arguments, Result], mutates: tuple[str, ...]) -> None:
        self.launch = launch
        self.op = torch.library.custom_op(f"megalodon::{name}", launch, mutates_args=mutates)

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if torch.compiler.is_compiling() or assumes():  # both ask for shapes alone
            result: Result = self.op(*args, **kwargs)
            return result
        return self.launch(*args, **kwargs)

    def register_fake(self, fake: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """Decorator: what the operator returns, without computing it; shapes may be symbolic."""
        self.op.register_fake(fake)
        return fake


def operator(
    name: str, mutates: tuple[str, ...] = ()
) -> Callable[[Callable[Arguments, Result]], Operator[Arguments, Result]]:
    """Decorator: register a launcher as `megalodon::name`."""

    def register(launch: Callable[Arguments, Result]) -> Operator[Arguments, Any]:
        return Operator(name, launch, mutates)

    return register
