"""Sizes and options of a Megalodon language model, for transformers."""

from transformers import PreTrainedConfig


class MegalodonConfig(PreTrainedConfig):
    """Names and defaults are those of the released configuration.

    Raises: ValueError for sizes that do not fit each other.
    """

    model_type = "megalodon"
    keys_to_ignore_at_inference = ["cache"]  # noqa: RUF012  (transformers reads a plain list)
    attribute_map = {  # noqa: RUF012
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "intermediate_size": "ffn_hidden_dim",
        "tie_word_embeddings": "share_emb",
    }

    vocab_size: int = 32000
    """Rows of the embedding; those above the tokenizer's ids are padding."""
    output_size: int = -1
    """Rows of the output matrix; -1 = vocab_size."""
    num_layers: int = 8
    """Blocks."""
    model_dim: int = 1024
    """D, width of the residual stream."""
    num_heads: int = 1
    """H, attention heads."""
    z_dim: int = 256
    """Z, width of queries and keys, all heads together."""
    value_dim: int = 2048
    """V, width of values, all heads together."""
    ffn_hidden_dim: int = 2048
    """F, hidden width of the feed-forward network."""
    cema_ndim: int = 16
    """N, complex moving averages a feature."""
    norm_num_groups: int = 32
    """G, groups of features that share TimestepNorm statistics."""
    chunk_size: int = 2048
    """C, tokens: attention and rotary positions restart at each multiple."""
    rope_base: float | None = None
    """Base of the rotary frequencies; None = 10,000."""
    swiglu: bool = False
    """Gated feed-forward network."""
    rescale_nffn: bool = False
    """Learned per-feature scale on the feed-forward output."""
    scale_emb: bool = False
    """Multiply embeddings by sqrt(D)."""
    share_emb: bool = False
    """Use the embedding as output matrix."""
    norm_affine: bool = True
    """Scale and bias of RMSNorm and LayerNorm; TimestepNorm always has them."""
    norm_eps: float = 1e-5
    """Added to variances inside the root, in every norm."""
    init_mode: str = "he"
    """Initial values of the matrices of a block: he, bert, xavier or none (NaN, for loading)."""
    dropout: float = 0.0
    """Probability, on embeddings and on the output of both halves of a block."""
    hidden_dropout: float = 0.0
    """Probability, on the hidden values inside both halves."""
    attention_dropout: float = 0.0
    """Probability, on attention weights after the softmax."""
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for whole, part in (("model_dim", "norm_num_groups"), ("z_dim", "num_heads"), ("value_dim", "num_heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{whole} {getattr(self, whole)} is not a multiple of {part} {getattr(self, part)}")
        if (self.z_dim // self.num_heads) % 2:
            raise ValueError(f"z_dim {self.z_dim} / num_heads {self.num_heads} is odd; rotary pairs need it even")
        if self.norm_num_groups == self.model_dim:
            raise ValueError(f"norm_num_groups {self.norm_num_groups} equals model_dim; a group needs 2 features")
        if self.init_mode not in ("he", "bert", "xavier", "none"):
            raise ValueError(f"init_mode is {self.init_mode}; expected he, bert, xavier or none")
        if self.share_emb and self.output_size not in (-1, self.vocab_size):
            raise ValueError(f"output_size {self.output_size} differs from vocab_size {self.vocab_size} with share_emb")

    @property
    def num_outputs(self) -> int:
        """Rows of the output matrix."""
        return self.vocab_size if self.output_size == -1 else self.output_size


__all__ = ["MegalodonConfig"]
