"""The model = its equations written down once more (tests/official/equations.py), for every option."""

import pytest
import torch
from factories import random_tokens, tiny_model
from official import equations
from tolerances import LOGITS, assert_near

OPTIONS = [
    {},
    {"swiglu": True},
    {"rescale_nffn": True},
    {"scale_emb": True, "share_emb": True},
    {"norm_affine": False},
    {"rope_base": 100_000.0, "num_heads": 1},
    {"cema_ndim": 1, "norm_num_groups": 1},
    {"chunk_size": 1},
    {"output_size": 31},
    {"norm_eps": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_model_is_its_equations(options: dict[str, object], dtype: torch.dtype) -> None:
    model = tiny_model(dtype, **options)
    tokens = random_tokens(1, 23)
    expected = equations.logits(model.config, model.state_dict(), tokens[0].tolist())
    actual, _ = model(tokens)
    assert actual.dtype == dtype
    assert_near(actual[0], expected, 10 * LOGITS[dtype])


def test_backends_agree() -> None:
    portable, reference = tiny_model(backend="portable"), tiny_model(backend="reference")
    tokens = random_tokens(2, 23)
    assert_near(portable(tokens)[0], reference(tokens)[0], LOGITS[torch.float64])
