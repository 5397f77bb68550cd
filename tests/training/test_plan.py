"""What a recipe may ask of the device it runs on."""

import pytest
import torch
from stores import tiny_plan

from megalodon.config import InvalidRecipe
from megalodon.training import plan
from megalodon.training.plan import TrainConfig


def test_the_kernels_may_be_named_on_a_gpu_alone() -> None:
    train = TrainConfig(backend="triton")
    plan._refuse_unsupported(train, torch.device("cuda"))
    with pytest.raises(InvalidRecipe, match="triton is not available here; expected auto or portable or reference"):
        plan._refuse_unsupported(train, torch.device("cpu"))
    with pytest.raises(InvalidRecipe, match="triton is not available here"):
        tiny_plan(train={"backend": "triton"})
