"""The shapes in the docstrings of the ops are the shapes of a call: read from the text, compared with the tensors."""

import inspect
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import megalodon_kernels
from megalodon_kernels import Statistics
from megalodon_kernels.cases import cases

OPS = ("cema", "timestep_norm", "chunk_attention")
SHAPE = re.compile(r"^\s*([a-z_0-9]+(?:, [a-z_0-9]+)*): +\(([^)]*)\)", re.MULTILINE)


def documented(docstring: str) -> dict[str, tuple[str, ...]]:
    """`x, y: (B, L, D) …` -> {"x": ("B", "L", "D"), …}."""
    found = {}
    for names, sizes in SHAPE.findall(docstring):
        for name in names.split(", "):
            found[name] = tuple(size.strip() for size in sizes.split(",") if size.strip())
    return found


def sections(op: str) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """The documented shapes of the arguments and of what is returned."""
    text = inspect.cleandoc(getattr(megalodon_kernels, op).__doc__)
    arguments, rest = text.split("Args:")[1].split("Returns:")
    return documented(arguments), documented(rest.split("Raises:")[0])


def check(name: str, tensor: Tensor, sizes: tuple[str, ...], bound: dict[str, int]) -> None:
    """Each letter has one size in a call; a number is that number."""
    assert tensor.dim() == len(sizes), f"{name} is {tuple(tensor.shape)}, documented as {sizes}"
    for letter, size in zip(sizes, tensor.shape, strict=True):
        expected = int(letter) if letter.isdigit() else bound.setdefault(letter, size)
        assert size == expected, f"{name}: {letter} is {size}, elsewhere {expected}"


@pytest.mark.parametrize("op", OPS)
def test_docstrings_tell_the_shapes_of_a_call(op: str) -> None:
    arguments, returned = sections(op)
    inputs = dict(cases(op))["L37-state-starts"]
    outputs: dict[str, Any] = dict(zip(returned, getattr(megalodon_kernels, op)(**inputs), strict=False))
    bound: dict[str, int] = {}
    seen = set()
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            check(name, value, arguments[name], bound)
            seen.add(name)
        elif isinstance(value, Statistics):
            for field, shape in documented(Statistics.__doc__ or "").items():
                check(f"{name}.{field}", getattr(value, field), shape, bound)
    assert seen >= arguments.keys() - {"padding"}
    assert outputs
    for name, value in outputs.items():
        check(name, value, returned[name], bound)
    letters = [size for letter, size in bound.items() if not letter.endswith("'")]
    assert len(set(letters)) == len(letters), f"two dimensions are equal: {bound}"


def test_a_wrong_shape_is_noticed() -> None:
    with pytest.raises(AssertionError, match="D is 4, elsewhere 5"):
        check("x", torch.zeros(2, 4), ("B", "D"), {"D": 5})
