"""The peer that a user would pick: LlamaForCausalLM of Hugging Face transformers, with its own loss and its own cache.

Not here: its sizes (sizes.py), when it runs (train.py, decode.py).
"""

from typing import Any

import torch

from sizes import Llama, check_equal

MOST_POSITIONS = 131_072


def build(llama: Llama, num_parameters: int) -> Any:
    """A Llama with random weights, float32, attention by torch's scaled_dot_product_attention.

    Raises: ValueError if it does not have `num_parameters` within 2 %.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=llama.vocab_size,
        hidden_size=llama.model_dim,
        intermediate_size=llama.ffn_hidden_dim,
        num_hidden_layers=llama.num_layers,
        num_attention_heads=llama.num_heads,
        num_key_value_heads=llama.num_heads,
        max_position_embeddings=MOST_POSITIONS,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    check_equal(num_parameters, model.num_parameters(), "LlamaForCausalLM")
    return model


def filled_cache(model: Any, depth: int) -> Any:
    """A DynamicCache that holds `depth` tokens of random keys and values: what a prompt of that length leaves."""
    from transformers import DynamicCache

    c = model.config
    shape = (1, c.num_key_value_heads, depth, c.hidden_size // c.num_attention_heads)
    cache = DynamicCache(config=c)
    for layer in range(c.num_hidden_layers if depth else 0):
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    return cache


@torch.inference_mode()
def decode(model: Any, cache: Any, num_tokens: int) -> None:
    """Write tokens greedily, one at a time, after what the cache holds; the cache grows along."""
    token = torch.zeros(1, 1, dtype=torch.int64)
    for _ in range(num_tokens):
        logits = model(input_ids=token, cache=cache, use_cache=True).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
