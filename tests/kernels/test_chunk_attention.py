"""The kernels of chunk attention: wide values, slabs, documents kept apart in the gradients, what they refuse."""

from typing import Any

import pytest
import torch
from test_ops import case, run
from tolerances import OP, assert_close
from torch import Tensor

import megalodon_kernels
from megalodon_kernels import KernelError
from megalodon_kernels.chunk_attention import kernel
from megalodon_kernels.chunk_attention.joined import chunks, join


def draw(dtype: torch.dtype = torch.float64, **shapes: tuple[int, ...]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def wide_values() -> dict[str, Any]:
    """Queries and keys of two steps, values of three slices, the last of each ragged; chunks that end inside a tile."""
    B, L, H, Z, V = 1, 83, 2, 37, 41
    inputs = draw(q=(B, L, H, Z), k=(B, L, H, Z), v=(B, L, H, V), gate=(B, L, H, V))
    return inputs | {"q": inputs["q"] / 4, "chunk_size": 45}


def test_wide_values_are_the_reference() -> None:
    (expected, expected_gradients), (actual, gradients) = (
        run("chunk_attention", wide_values(), backend) for backend in ("reference", "triton")
    )
    for a, e in zip(actual + gradients, expected + expected_gradients, strict=True):
        assert_close(a, e, OP[torch.float64])


def test_the_size_of_a_slab_does_not_move_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, expected_gradients = run("chunk_attention", wide_values(), "triton")
    monkeypatch.setattr(kernel, "SLAB_BYTES", 1)
    actual, gradients = run("chunk_attention", wide_values(), "triton")
    for a, e in zip(actual + gradients, expected + expected_gradients, strict=True):
        assert torch.equal(a, e)


def test_packed_is_separate_and_a_nan_reaches_no_other_gradient() -> None:
    """The document in the middle is NaN, cotangent included; those beside it share its tiles of queries and keys."""
    inputs = case("chunk_attention", "L37-starts", torch.float32)
    inputs["starts"] = torch.zeros(3, 37, dtype=torch.bool)
    inputs["starts"][:, [0, 13, 29]] = True
    names = ("q", "k", "v", "gate")
    dy = torch.randn(inputs["v"].shape)
    for x in [dy, *(inputs[name] for name in names)]:
        x[:, 13:29] = float("nan")

    def outcome(part: slice) -> list[Tensor]:
        leaves = [inputs[name][:, part].clone().requires_grad_() for name in names]
        q, k, v, gate = leaves
        y = megalodon_kernels.chunk_attention(
            q, k, v, 16, starts=inputs["starts"][:, part], gate=gate, backend="triton"
        )[0]
        return [y, *torch.autograd.grad(y, leaves, dy[:, part])]

    packed = outcome(slice(0, 37))
    for part in (slice(0, 13), slice(29, 37)):
        for together, alone in zip(packed, outcome(part), strict=True):
            assert_close(together[:, part], alone, OP[torch.float32])


def test_chunks_of_packed_documents_behind_an_open_chunk() -> None:
    """Two of three slots hold keys of the open chunk; a document begins at the third token; chunks of four."""
    starts = torch.tensor([[False, False, True, False, False, False, False], [True] + 6 * [False]])
    begin, end = chunks(torch.tensor([2, 2]), starts, 4, 3, 7)
    #            past   |  the call
    assert begin.tolist() == [[0, 1, 1, 1, 1, 5, 5, 5, 5, 9], [0, 1, 1, 3, 3, 3, 3, 7, 7, 7]]
    assert end.tolist() == [[1, 5, 5, 5, 5, 9, 9, 9, 9, 10], [1, 3, 3, 7, 7, 7, 7, 10, 10, 10]]


def test_joined_keys_lie_against_the_call_and_their_gradient_lies_back() -> None:
    past = torch.tensor([[1.0, 2.0, 7.0], [3.0, 7.0, 7.0], [7.0, 7.0, 7.0]], requires_grad=True)
    new = torch.tensor([[4.0], [5.0], [6.0]], requires_grad=True)
    joined = join(past, new, torch.tensor([2, 1, 0]))
    assert joined.tolist() == [[7, 1, 2, 4], [7, 7, 3, 5], [7, 7, 7, 6]]
    d_past, d_new = torch.autograd.grad(joined, [past, new], torch.arange(12.0).view(3, 4))
    assert d_past.tolist() == [[1, 2, 0], [6, 4, 5], [8, 9, 10]]
    assert d_new.tolist() == [[3], [7], [11]]


@pytest.mark.parametrize("gated", [False, True])
def test_both_operators_say_what_they_do(gated: bool) -> None:
    """Schema, shapes without computing, no aliasing of inputs: torch.library.opcheck."""
    x = draw(torch.float32, q=(1, 5, 2, 4), k=(1, 5, 2, 4), v=(1, 5, 2, 3), gate=(1, 5, 2, 3), dy=(1, 5, 2, 3))
    gate = x["gate"] if gated else None
    begin, end = chunks(torch.zeros(1, dtype=torch.int64), None, 4, 0, 5)
    inputs = (x["q"], x["k"], x["v"], gate)
    torch.library.opcheck(kernel.attention_forward.op, (*inputs, begin, end, 4))
    y, mixed, lse = kernel.attention_forward(*inputs, begin, end, 4)
    kept = (mixed if gated else y, lse, begin, end, 4)
    torch.library.opcheck(kernel.attention_backward.op, (x["dy"], *inputs, *kept))


def test_dropout_is_refused_by_name_and_a_gate_of_another_dtype_always() -> None:
    inputs = case("chunk_attention", "L1-starts", torch.float32)
    with pytest.raises(KernelError, match=r"backend triton cannot run: dropout is 0\.1, expected 0"):
        megalodon_kernels.chunk_attention(**inputs, dropout=0.1, backend="triton")
    with pytest.raises(ValueError, match=r"gate is torch\.bfloat16 but v is torch\.float32; expected the same dtype"):
        megalodon_kernels.chunk_attention(**(inputs | {"gate": inputs["gate"].bfloat16()}))
