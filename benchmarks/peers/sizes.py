"""The models that are compared, of equal parameters, and what they count: parameters and floating-point operations.

A training step of T tokens takes, forward and backward (twice the forward pass), each multiply-add as two:

    6 T P                       P: weights of the linear maps, output matrix included; the embedding is looked up
    3 T n 2 (K + V') (S + 1)/2  attention of n layers: K, V' width of keys and values, all heads; S the longest row a
                                query sees: the length for Llama, the chunk for Megalodon; what the mask leaves
    3 T n D (2 R + 8 N)         CEMA by rows of R = 32 tokens: a Toeplitz product, into and out of the N complex states

Norms, activations, rotations, softmax and the optimizer are not counted. Not here: running the models (train.py).
"""

from typing import NamedTuple

from megalodon.model.megalodon import PRESETS, ModelConfig

CEMA_ROW = 32
"""R above, tokens."""
CLOSE = 0.02
"""Largest difference of the parameters of two sides, as a part."""


class Llama(NamedTuple):
    """Sizes of a Llama: full attention in every layer, SwiGLU, untied output, no biases (arXiv 2302.13971)."""

    num_layers: int
    model_dim: int
    num_heads: int
    ffn_hidden_dim: int
    vocab_size: int

    def num_parameters(self) -> int:
        """Parameters of the model."""
        D, norms = self.model_dim, (2 * self.num_layers + 1) * self.model_dim
        return self.num_linear() + self.vocab_size * D + norms

    def num_linear(self) -> int:
        """P: weights of linear maps, the output matrix included."""
        D = self.model_dim
        return self.num_layers * (4 * D * D + 3 * D * self.ffn_hidden_dim) + self.vocab_size * D


class Size(NamedTuple):
    """Two models of equal parameters."""

    ours: ModelConfig
    llama: Llama


def _pair(layers: int, dim: int, ours_ffn: int, llama_ffn: int, heads: int, vocab: int, chunk: int = 512) -> Size:
    ours = ModelConfig(
        num_layers=layers,
        model_dim=dim,
        num_heads=1,
        z_dim=dim // 4,
        value_dim=2 * dim,
        ffn_hidden_dim=ours_ffn,
        swiglu=True,
        norm_num_groups=32,
        chunk_size=chunk,
        vocab_size=vocab,
    )
    return Size(ours, Llama(layers, dim, heads, llama_ffn, vocab))


SIZES = {
    "8M": _pair(6, 256, ours_ffn=608, llama_ffn=912, heads=4, vocab=4096),  # recipes books-tiny, books-tiny-llama
    "50M": _pair(8, 640, ours_ffn=1024, llama_ffn=1728, heads=10, vocab=8192),
    "tiny": _pair(1, 64, ours_ffn=96, llama_ffn=192, heads=1, vocab=128, chunk=32),
}
"""`tiny` shows that everything runs; no figure comes from it."""

SMOKE = 32
"""Lengths are divided by it where everything is only shown to run."""

SEVEN_B = Size(
    ModelConfig(**{**PRESETS["paper-7b"], "vocab_size": 32_000}),
    Llama(num_layers=32, model_dim=4096, num_heads=32, ffn_hidden_dim=11_008, vocab_size=32_000),
)
"""The pair of the paper: Megalodon 7B and Llama 2 7B."""


def scaled(name: str, length: int, smoke: bool) -> tuple[Size, int]:
    """The size of that name and a length; for a smoke test the smallest size and a short length."""
    return (SIZES["tiny"], length // SMOKE) if smoke else (SIZES[name], length)


def num_linear(config: ModelConfig) -> int:
    """P of Megalodon: weights of linear maps, the output matrix included; no biases, norms or tables of CEMA."""
    D, Z, V, F = config.model_dim, config.z_dim, config.value_dim, config.ffn_hidden_dim
    block = D * Z + 3 * D * V + D * D + (3 if config.swiglu else 2) * D * F
    return config.num_layers * block + config.num_outputs * D


def ours_flops(config: ModelConfig, length: int) -> float:
    """Operations a token of a training step on one row of `length` tokens, a multiple of the chunk or shorter."""
    seen = (min(length, config.chunk_size) + 1) / 2
    attention = 2 * (config.z_dim + config.value_dim) * seen
    cema = config.model_dim * (2 * CEMA_ROW + 8 * config.cema_ndim)
    return 6 * num_linear(config) + 3 * config.num_layers * (attention + cema)


def llama_flops(llama: Llama, length: int) -> float:
    """Operations a token of a training step on one row of `length` tokens."""
    attention = 2 * 2 * llama.model_dim * (length + 1) / 2
    return 6 * llama.num_linear() + 3 * llama.num_layers * attention


def check_equal(ours: int, theirs: int, what: str) -> None:
    """Refuse a comparison of models that differ by more than 2 % of their parameters. Raises: ValueError."""
    if abs(ours - theirs) > CLOSE * theirs:
        raise ValueError(
            f"{what} has {theirs:,} parameters, ours {ours:,}; expected a difference of at most {CLOSE:.0%}"
        )
