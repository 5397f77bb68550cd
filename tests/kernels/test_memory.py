"""What an op keeps for its backward pass, in bytes beyond its inputs."""

import torch
from torch import Tensor

from megalodon_kernels import cema


def test_cema_keeps_at_most_one_and_a_half_of_x() -> None:
    B, L, D, N = 2, 512, 24, 16
    x = torch.randn(B, L, D, requires_grad=True)
    coefficients = [torch.rand(D, N), -torch.rand(D, N).double(), torch.rand(D, N).double(), torch.randn(D, N, 2)]
    inputs = [x, *(value.requires_grad_() for value in coefficients), torch.randn(D, requires_grad=True)]
    kept: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        y, _ = cema(*inputs, backend="portable")
    for value in inputs:
        kept.pop(value.untyped_storage().data_ptr(), None)
    assert y.requires_grad and 0 < sum(kept.values()) <= 1.5 * x.untyped_storage().nbytes()
