"""The baseline: a Llama with full attention (Hugging Face's LlamaForCausalLM) behind the contract of our own model.

    model = Llama(LlamaConfig(vocab_size=256, …), seed=0)        # trained, scored and exported as a Megalodon is
    hidden, state = model.hidden(tokens, state, starts)

It exists to be compared with: same data, same loop, same evaluation. Its state is the keys and values of all that was
read, so it grows with every token. Needs the extra `hf`, imported when a model is built. Legend: B batch, L length, T
tokens read before, D width, H heads. Not here: which of the two a recipe or a file means (architectures.py).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from megalodon.config import Config
from megalodon.model.attention import document_positions
from megalodon.model.extras import require
from megalodon.model.megalodon import check_call, generator_of
from megalodon_kernels import Backend

INITIAL_STD = 0.02
"""Of every matrix, as in Llama 2's configuration."""


class LlamaConfig(Config):
    """Sizes of the baseline, under our names: SwiGLU feed-forward, as many key as query heads, no biases."""

    num_layers: int = Field(ge=1)
    """Blocks."""
    model_dim: int = Field(ge=2)
    """D, width of the residual stream."""
    num_heads: int = Field(ge=1)
    """H, attention heads of D/H features each."""
    ffn_hidden_dim: int = Field(ge=1)
    """Hidden width of the feed-forward network."""
    rope_base: float = Field(10_000.0, gt=0)
    """Base of the rotary frequencies."""
    norm_eps: float = Field(1e-5, gt=0)
    """Added to mean squares inside the root."""
    share_emb: bool = False
    """Use the embedding as output matrix."""
    vocab_size: int = Field(ge=1)
    """Rows of the embedding and of the output matrix."""
    max_positions: int = Field(4096, ge=1)
    """Tokens of a training window: what the exported configuration names as the longest context."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.model_dim % (2 * self.num_heads):
            raise ValueError(f"model_dim {self.model_dim} is not a multiple of 2 x num_heads {self.num_heads}")
        return self

    @property
    def num_outputs(self) -> int:
        """Rows of the output matrix."""
        return self.vocab_size

    @property
    def chunk_size(self) -> int:
        """More than any text has: no chunk of it is ever complete, so a session keeps all ids and no state."""
        return 1 << 62

    @property
    def has_dropout(self) -> bool:
        """Never."""
        return False

    def num_parameters(self) -> int:
        """Parameters of the model, without building it; a tied matrix counts once."""
        D, F = self.model_dim, self.ffn_hidden_dim
        embeddings = (1 if self.share_emb else 2) * self.vocab_size * D
        return embeddings + self.num_layers * (4 * D * D + 3 * D * F + 2 * D) + D

    def flops_per_token(self, seq_len: int) -> float:
        """Operations a token needs forward and back: 6 a parameter but the embedding's, 12 D for each key it sees."""
        matrices = self.num_parameters() - (0 if self.share_emb else self.vocab_size * self.model_dim)
        return 6 * matrices + self.num_layers * 12 * self.model_dim * (seq_len + 1) / 2

    def hugging_face(self) -> dict[str, Any]:
        """The same as config.json of a transformers directory."""
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": self.vocab_size,
            "hidden_size": self.model_dim,
            "intermediate_size": self.ffn_hidden_dim,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_base},
            "hidden_act": "silu",
            "initializer_range": INITIAL_STD,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "tie_word_embeddings": self.share_emb,
            "dtype": "float32",
        }

    @classmethod
    def from_hugging_face(cls, fields: Mapping[str, Any]) -> Self:
        """Read config.json as `hugging_face` wrote it. Raises: ValueError for a Llama of another kind; pydantic's."""
        config = cls(
            num_layers=fields.get("num_hidden_layers"),  # type: ignore[arg-type]  # pydantic says what is wrong
            model_dim=fields.get("hidden_size"),  # type: ignore[arg-type]
            num_heads=fields.get("num_attention_heads"),  # type: ignore[arg-type]
            ffn_hidden_dim=fields.get("intermediate_size"),  # type: ignore[arg-type]
            rope_base=(fields.get("rope_parameters") or {}).get("rope_theta", 10_000.0),
            norm_eps=fields.get("rms_norm_eps", 1e-5),
            share_emb=fields.get("tie_word_embeddings", False),
            vocab_size=fields.get("vocab_size"),  # type: ignore[arg-type]
            max_positions=fields.get("max_position_embeddings", 4096),
        )
        expected = config.hugging_face()
        other = [key for key in fields if key in expected and key != "dtype" and fields[key] != expected[key]]
        if unknown := [key for key in fields if key not in expected] + other:
            raise ValueError(f"{', '.join(unknown)}: not a Llama of this baseline; expected {sorted(expected)}")
        return config


class LlamaState(NamedTuple):
    """What the model remembers: everything. All rows end at the same place; a row's own are its last `position`.

    Shapes:
        position: (B,) int64: tokens of the current document read so far, in each row.
        layers:   one (keys, values) a block: (B, H, T, D/H) each, T the longest position.
    """

    position: Tensor
    layers: tuple[tuple[Tensor, Tensor], ...]

    def detach(self) -> "LlamaState":
        """The same values outside the graph."""
        return self.map(Tensor.detach)

    def map(self, function: Callable[[Tensor], Tensor]) -> "LlamaState":
        """Apply `function` to every tensor."""
        return LlamaState(function(self.position), tuple((function(k), function(v)) for k, v in self.layers))

    def rows(self, numbers: Sequence[int]) -> "LlamaState":
        """The state of these rows alone, in this order."""
        index = torch.tensor(numbers, device=self.position.device)
        return self.map(lambda x: x.index_select(0, index))

    def num_bytes(self) -> int:
        """Memory of all tensors, in bytes."""
        return sum(x.nbytes for x in (self.position, *(x for layer in self.layers for x in layer)))


class Llama(nn.Module):
    """A Llama with initialised weights; its state dict has the names of LlamaForCausalLM.

    Args:
        config: sizes.
        seed: of the initial weights; each depends on the seed and its own name alone.
        backend: of the loss of training; the layers are PyTorch's.
    Raises:
        EnvironmentFault: the extra `hf` is missing.
    """

    def __init__(self, config: LlamaConfig, seed: int = 0, backend: Backend = "auto") -> None:
        super().__init__()
        require("transformers", "model.arch llama needs", "hf")
        from transformers import LlamaConfig as TheirConfig
        from transformers import LlamaForCausalLM

        self.config = config
        self.backend: Backend = backend
        with torch.random.fork_rng(devices=[]):  # it draws weights, which are then drawn anew
            whole = LlamaForCausalLM(TheirConfig.from_dict({**config.hugging_face(), "attn_implementation": "sdpa"}))
        self.model, self.lm_head = whole.model, whole.lm_head
        if self.device.type != "meta":
            initialise(self, seed)

    def forward(
        self, tokens: Tensor, state: LlamaState | None = None, starts: Tensor | None = None
    ) -> tuple[Tensor, LlamaState]:
        """Logits (B, L, vocab_size) of the next token at every position, and the state; see `Megalodon.forward`."""
        hidden, state = self.hidden(tokens, state, starts)
        logits = nn.functional.linear(hidden, self.output_weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), state

    def hidden(
        self, tokens: Tensor, state: LlamaState | None = None, starts: Tensor | None = None
    ) -> tuple[Tensor, LlamaState]:
        """The same up to the final norm: (B, L) -> (B, L, D). A token sees its own document alone.

        Raises: ValueError: a shape does not fit or, on a CPU, an id.
        """
        check_call(tokens, None if state is None else len(state.position), starts, self.config.vocab_size)
        B, L = tokens.shape
        before = self.empty_state(B) if state is None else state
        if L == 0:
            return self.output_weight.new_zeros(B, 0, self.config.model_dim), before
        starts = None if starts is None else starts.to(tokens.device)
        position = document_positions(before.position, starts, L)
        from transformers import DynamicCache

        cache: Any = DynamicCache(before.layers if before.layers[0][0].shape[2] else None)
        out = self.model(
            input_ids=tokens,
            position_ids=position,
            attention_mask=self._mask(before, starts, L),
            cache=cache,
            use_cache=True,
        )
        after = position[:, -1] + 1
        longest = int(after.max())
        layers = tuple((x.keys[:, :, -longest:], x.values[:, :, -longest:]) for x in cache.layers)
        return out.last_hidden_state, LlamaState(after, layers)

    def _mask(self, before: LlamaState, starts: Tensor | None, L: int) -> Tensor | None:
        """(B, 1, L, T + L) bool: what each token sees; None if that is all before it, which needs no mask."""
        T = before.layers[0][0].shape[2]
        begins = starts is not None and bool((starts[:, 1:] if T == 0 else starts).any())
        if not begins and bool((before.position == T).all()):
            return None
        B, device = len(before.position), before.position.device
        number = torch.zeros(B, L, dtype=torch.int64, device=device) if starts is None else starts.cumsum(1)
        own = torch.arange(T, device=device) >= T - before.position[:, None]
        past = own[:, None] & (number == 0)[..., None]
        here = (number[:, :, None] == number[:, None]) & torch.ones(L, L, dtype=torch.bool, device=device).tril()
        return torch.cat([past, here], -1)[:, None]

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks."""
        blocks: nn.ModuleList = self.model.layers
        return blocks

    @property
    def output_weight(self) -> nn.Parameter:
        """The output matrix (vocab_size, D); the embedding itself if it is shared."""
        weight: nn.Parameter = self.lm_head.weight
        return weight

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.output_weight.device

    def num_parameters(self) -> int:
        """Parameters, a tied matrix once."""
        return sum(p.numel() for p in self.parameters())

    def empty_state(self, batch_size: int) -> LlamaState:
        """The state of `batch_size` rows that have read nothing."""
        c, weight = self.config, self.output_weight
        nothing = weight.new_zeros(batch_size, c.num_heads, 0, c.model_dim // c.num_heads).detach()
        position = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)
        return LlamaState(position, ((nothing, nothing),) * c.num_layers)


class LlamaDecoder:
    """One token at a time, with the interface of `Decoder`: a forward pass of length 1 each."""

    def __init__(self, model: Llama, state: LlamaState | None = None) -> None:
        self.model, self._state = model, model.empty_state(1) if state is None else state

    def at(self, state: LlamaState) -> Self:
        """A second decoder of the same model."""
        return type(self)(self.model, state)

    def state(self) -> LlamaState:
        """What was read so far, as a value."""
        return self._state

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Read one token of each row: (B,) ids -> (B, vocab_size) logits of the next."""
        logits, self._state = self.model(tokens[:, None], self._state)
        last: Tensor = logits[:, -1]
        return last


@torch.no_grad()
def initialise(model: Llama, seed: int) -> None:
    """Draw every matrix from a normal distribution of std 0.02, each from the seed and its own name; norms are 1."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        draw = generator_of(seed, name)
        with torch.device("cpu"):
            value = torch.randn(parameter.shape, generator=draw)
        parameter.copy_(value * INITIAL_STD)
