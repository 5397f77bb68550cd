"""The Megalodon language model, top-down: configuration, block, model, initialisation.

Ma et al. 2024, arXiv 2404.08801, computed as the released code (XuezheMax/megalodon, cff8ba5) computes it; the state
dict has its names. Legend: B batch, L length, D model width, H heads, Z query/key width, V value width, F feed-forward
width, N averages a feature, G norm groups, C chunk. Not here: the ops (megalodon_kernels), loss (loss.py), training.
"""

import hashlib
import math
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import dropout

from megalodon.config import Config
from megalodon.model.attention import ChunkAttention, Place, Rotary, document_positions
from megalodon.model.cema import Cema
from megalodon.model.feed_forward import FeedForward
from megalodon.model.layers import Embedding, Float32Module, Linear, QuantisedLinear, RMSNorm
from megalodon.model.state import LayerState, Prefix, State
from megalodon.model.timestep_norm import TimestepNorm
from megalodon_kernels import Backend, qk_rope, swiglu
from megalodon_kernels.chunk_attention.open_chunk import open_lengths

WIDEST = 2**20
"""The largest width. A foreign configuration may say anything; within bounds a model of it can be laid out."""


class ModelConfig(Config):
    """Sizes and options of a model, under the names of the released configuration."""

    num_layers: int = Field(8, ge=1, le=1024)
    """Blocks."""
    model_dim: int = Field(1024, ge=2, le=WIDEST)
    """D, width of the residual stream."""
    num_heads: int = Field(1, ge=1, le=WIDEST)
    """H, attention heads."""
    z_dim: int = Field(256, ge=1, le=WIDEST)
    """Z, width of queries and keys, all heads together."""
    value_dim: int = Field(2048, ge=1, le=WIDEST)
    """V, width of values, all heads together."""
    ffn_hidden_dim: int = Field(2048, ge=1, le=WIDEST)
    """F, hidden width of the feed-forward network."""
    cema_ndim: int = Field(16, ge=1, le=WIDEST)
    """N, complex moving averages a feature."""
    norm_num_groups: int = Field(32, ge=1, le=WIDEST)
    """G, groups of features that share TimestepNorm statistics."""
    chunk_size: int = Field(2048, ge=1, le=2**31)
    """C, tokens: attention and rotary positions restart at each multiple."""
    rope_base: float | None = Field(None, gt=0)
    """Base of the rotary frequencies; null = 10,000."""
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
    norm_eps: float = Field(1e-5, gt=0)
    """Added to variances inside the root, in every norm."""
    init_mode: Literal["he", "bert", "xavier", "none"] = "he"
    """Initial values of the matrices of a block."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability, on embeddings and on the output of both halves of a block."""
    hidden_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability, on the hidden values inside both halves."""
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability, on attention weights after the softmax."""
    vocab_size: int = Field(ge=1, le=2**31)
    """Rows of the embedding."""
    output_size: int = Field(-1, ge=-1, le=2**31)
    """Rows of the output matrix; -1 = vocab_size."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if problems := self._problems():
            raise ValueError("; ".join(problems))
        return self

    def _problems(self) -> list[str]:
        """What does not go together."""
        problems = []
        for whole, part in (("model_dim", "norm_num_groups"), ("z_dim", "num_heads"), ("value_dim", "num_heads")):
            if getattr(self, whole) % getattr(self, part):
                problems.append(f"{whole} {getattr(self, whole)} is not a multiple of {part} {getattr(self, part)}")
        if not problems and (self.z_dim // self.num_heads) % 2:
            problems.append(f"z_dim {self.z_dim} / num_heads {self.num_heads} is odd; rotary pairs need it even")
        if self.norm_num_groups == self.model_dim:
            problems.append(f"norm_num_groups {self.norm_num_groups} equals model_dim; a group needs 2 features")
        if self.output_size == 0:
            problems.append("output_size is 0; expected -1 (the vocabulary) or at least 1")
        if self.share_emb and self.output_size not in (-1, self.vocab_size):
            problems.append(
                f"output_size {self.output_size} differs from vocab_size {self.vocab_size} with share_emb; use -1"
            )
        return problems

    @property
    def num_outputs(self) -> int:
        """Rows of the output matrix."""
        return self.vocab_size if self.output_size == -1 else self.output_size

    @property
    def rotary_base(self) -> float:
        """Base of the rotary frequencies."""
        return 10_000.0 if self.rope_base is None else self.rope_base

    @property
    def has_dropout(self) -> bool:
        """Whether training draws random numbers."""
        return any((self.dropout, self.hidden_dropout, self.attention_dropout))

    def flops_per_token(self, seq_len: int) -> float:
        """Return the floating-point operations a token needs in forward and backward pass together.

        Counted: 6 for each parameter but the embedding rows (a tied matrix counts as output); 3 x (2Z + 2V) for each
        key a query sees, on average (C + 1) / 2 of a chunk, in each layer; 3 x 12 for each of the D x N complex
        averages of a layer (a complex multiply-add and the read-out). Not counted: norms, activations, anything
        computed twice.
        """
        matrices = self.num_parameters() - (0 if self.share_emb else self.vocab_size * self.model_dim)
        keys = (min(self.chunk_size, seq_len) + 1) / 2
        attention = 3 * keys * 2 * (self.z_dim + self.value_dim)
        cema = 3 * 12 * self.model_dim * self.cema_ndim
        return 6 * matrices + self.num_layers * (attention + cema)

    def num_parameters(self) -> int:
        """Parameters of the model, without building it; a tied matrix counts once."""
        D, Z, V, F, N = self.model_dim, self.z_dim, self.value_dim, self.ffn_hidden_dim, self.cema_ndim
        a = int(self.norm_affine)
        attention = 2 * D + (4 * D * N + 2 * D) + a * D + 2 * (D * V + V) + (D * Z + Z) + (D * D + D) + D * V + 4 * Z
        ffn = 2 * a * D + (3 if self.swiglu else 2) * D * F + (D if self.rescale_nffn else 0)
        head = 0 if self.share_emb else self.num_outputs * D
        return self.num_layers * (attention + ffn) + self.vocab_size * D + head + 2 * D


PRESETS: dict[str, dict[str, Any]] = {
    "mega200M": {"num_layers": 12, "model_dim": 1024, "num_heads": 1, "z_dim": 256, "value_dim": 2048}
    | {"ffn_hidden_dim": 2560, "norm_num_groups": 32, "chunk_size": 2048},
    "mega1.3B": {"num_layers": 24, "model_dim": 2048, "num_heads": 2, "z_dim": 512, "value_dim": 4096}
    | {"ffn_hidden_dim": 4864, "norm_num_groups": 64, "chunk_size": 2048},
    "mega1.3B_pg19": {"num_layers": 24, "model_dim": 2048, "num_heads": 2, "z_dim": 512, "value_dim": 4096}
    | {"ffn_hidden_dim": 3584, "norm_num_groups": 64, "chunk_size": 2048}
    | {"swiglu": True, "scale_emb": True, "share_emb": True},
    "mega7.1B": {"num_layers": 32, "model_dim": 4096, "num_heads": 4, "z_dim": 1024, "value_dim": 8192}
    | {"ffn_hidden_dim": 11264, "norm_num_groups": 64, "chunk_size": 2048},
    "mega7.3B": {"num_layers": 32, "model_dim": 4096, "num_heads": 4, "z_dim": 1024, "value_dim": 8192}
    | {"ffn_hidden_dim": 8192, "norm_num_groups": 64, "chunk_size": 2048, "swiglu": True},
    "paper-7b": {"num_layers": 32, "model_dim": 4096, "num_heads": 4, "z_dim": 1024, "value_dim": 8192}
    | {"ffn_hidden_dim": 8192, "norm_num_groups": 64, "chunk_size": 4096, "swiglu": True, "rope_base": 100_000.0},
}
"""Released configurations, and the 7B one with the chunk and rotary base that the paper states (section 4.1)."""


class Mega(Float32Module):
    """The attention half of a block (arXiv 2404.08801, sections 3.1 to 3.4).

    u = TimestepNorm(x);  m = RMSNorm(CEMA(u));  q, k from m, v from u;  y = W₁m + W₂(attention ⊙ silu(W_r m)) + x
    """

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__()
        D, Z, V = config.model_dim, config.z_dim, config.value_dim
        self.num_heads, self.eps, self.backend = config.num_heads, config.norm_eps, backend
        self.dropout, self.hidden_dropout = config.dropout, config.hidden_dropout
        self.timenorm = TimestepNorm(D, config.norm_num_groups, config.norm_eps, backend)
        self.cema = Cema(D, config.cema_ndim, backend)
        self.rmsnorm = RMSNorm(D, config.norm_eps, config.norm_affine, backend)
        self.wv = Linear(D, V, bias=True)
        self.wz = Linear(D, Z, bias=True)
        self.wr = Linear(D, V, bias=True)
        self.wh1 = Linear(D, D, bias=True)
        self.wh2 = Linear(V, D, bias=False)
        self.attention = ChunkAttention(config.chunk_size, config.attention_dropout, backend)
        self.gamma = nn.Parameter(torch.empty(2, Z))
        self.beta = nn.Parameter(torch.empty(2, Z))

    def forward(self, x: Tensor, place: Place, state: LayerState | None) -> tuple[Tensor, LayerState]:
        """(B, L, D) -> (B, L, D), the state after it."""
        u, norm = self.timenorm(x, state and state.norm, place.starts, place.prefix)
        ema, h = self.cema(u, state and state.cema, place.starts, place.prefix)
        m = dropout(self.rmsnorm(ema), self.hidden_dropout, self.training)
        v = swiglu(self.wv(u), backend=self.backend).unflatten(-1, (self.num_heads, -1))
        z = self.wz(m)
        q, k = qk_rope(z, self.gamma, self.beta, place.turn, eps=self.eps, dtype=v.dtype, backend=self.backend)
        gated, open_k, open_v = self.attention(q, k, v, self.wr(m), place, state and (state.k, state.v))
        gated = dropout(gated, self.hidden_dropout, self.training)
        y = dropout(self.wh1(m) + self.wh2(gated), self.dropout, self.training)
        return y.to(x.dtype) + x, LayerState(open_k, open_v, norm, h)


class Block(nn.Module):
    """y = Mega(x); out = x + FFN(LayerNorm(y)): the second residual is the block's input (two hops, section 3.5)."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__()
        self.mega = Mega(config, backend)
        self.nffn = FeedForward(
            config.model_dim,
            config.ffn_hidden_dim,
            swiglu=config.swiglu,
            rescale=config.rescale_nffn,
            eps=config.norm_eps,
            affine=config.norm_affine,
            dropout=config.dropout,
            hidden_dropout=config.hidden_dropout,
            backend=backend,
        )

    def forward(self, x: Tensor, place: Place, state: LayerState | None) -> tuple[Tensor, LayerState]:
        """(B, L, D) -> (B, L, D), the state after it."""
        y, state = self.mega(x, place, state)
        return self.nffn(y, x), state


class Output(nn.Module):
    """The final TimestepNorm and the output matrix."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__()
        self.final_norm = TimestepNorm(config.model_dim, config.norm_num_groups, config.norm_eps, backend)
        self.output = Linear(config.model_dim, config.num_outputs, bias=False)


class Megalodon(nn.Module):
    """A Megalodon language model with initialised weights.

        logits, state = model(tokens)                    # any length
        logits, state = model(more_tokens, state)        # continues; the same logits as in one call

    Args:
        config: sizes and options.
        seed: of the initial weights; each depends on the seed and its own name alone.
        backend: which implementation of the ops runs, here, in decoding and in the loss of training.
    """

    def __init__(self, config: ModelConfig, seed: int = 0, backend: Backend = "auto") -> None:
        super().__init__()
        self.config = config
        self.backend: Backend = backend
        self.embed = Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(Block(config, backend) for _ in range(config.num_layers))
        self.output = Output(config, backend)
        if config.share_emb:
            self.output.output.weight = self.embed.weight
        self.rope = Rotary(config.z_dim // config.num_heads, config.rotary_base)
        if not self.embed.weight.is_meta:
            initialise(self, seed)

    def forward(self, tokens: Tensor, state: State | None = None, starts: Tensor | None = None) -> tuple[Tensor, State]:
        """Logits of the next token at every position, and the state after the last one.

        Args:
            tokens: (B, L) int64 ids below vocab_size; B ≥ 1, any L, also 0.
            state:  what an earlier call returned; None means nothing was read yet.
            starts: (B, L) bool: True at the first token of a document: all memory of what came before ends there.
                    None means that no document begins inside the call. Pass it on the CPU: then no GPU is waited for.
        Returns:
            logits: (B, L, num_outputs) float32 (float64 in a float64 model).
            state:  a new value; the one passed in is untouched. It is part of the graph when gradients are recorded.
        Raises:
            ValueError: a shape does not fit or, on a CPU, an id; the message shows what was expected.
        """
        hidden, state = self.hidden(tokens, state, starts)
        logits = nn.functional.linear(hidden, self.output_weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), state

    def hidden(
        self,
        tokens: Tensor,
        state: State | None = None,
        starts: Tensor | None = None,
        prefix: Prefix | None = None,
    ) -> tuple[Tensor, State]:
        """The same up to the final norm: (B, L) -> (B, L, D), for a loss that never holds all logits.

        prefix: if the tokens are a piece of a sequence of which other ranks read the rest; the state is that before all
                of it, and the one returned is that behind the piece.
        """
        check_call(tokens, None if state is None else len(state.position), starts, self.config.vocab_size)
        if state is not None and len(state.layers) != len(self.layers):
            raise ValueError(f"model: the state has {len(state.layers)} layers but the model has {len(self.layers)}")
        B, L = tokens.shape
        if L == 0:
            return self.output_weight.new_zeros(B, 0, self.config.model_dim), state or self.empty_state(B)
        place = self._place(tokens, state, starts, prefix)
        x = self.embed(tokens)
        if self.config.scale_emb:
            x = x * math.sqrt(self.config.model_dim)
        x = dropout(x, self.config.dropout, self.training)
        layers = []
        for i, block in enumerate(self.layers):
            x, after = block(x, place, state and state.layers[i])
            layers.append(after)
        x, norm = self.output.final_norm(x, state and state.norm, place.starts, prefix)
        return x, State(place.after, tuple(layers), norm)

    @property
    def output_weight(self) -> nn.Parameter:
        """The output matrix (num_outputs, D); the embedding itself if it is shared."""
        return self.output.output.weight

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.embed.weight.device

    def num_parameters(self) -> int:
        """Parameters, a tied matrix once, quantised ones too."""
        held = sum(module.num_parameters for module in self.modules() if isinstance(module, QuantisedLinear))
        return held + sum(p.numel() for p in self.parameters())

    def empty_state(self, batch_size: int) -> State:
        """The state of `batch_size` rows that have read nothing."""
        c, B, device, dtype = self.config, batch_size, self.device, self.output_weight.dtype
        H, wide = c.num_heads, torch.float64 if device.type == "cpu" else torch.promote_types(dtype, torch.float32)

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(B, *shape, dtype=dtype, device=device)

        norm = self.output.final_norm.empty_statistics(B)
        layers = tuple(
            LayerState(
                k=empty(0, H, c.z_dim // H, dtype=dtype),
                v=empty(0, H, c.value_dim // H, dtype=dtype),
                norm=norm,
                cema=empty(c.model_dim, c.cema_ndim, 2, dtype=wide),
            )
            for _ in range(c.num_layers)
        )
        return State(empty(dtype=torch.int64), layers, norm)

    def _place(self, tokens: Tensor, state: State | None, starts: Tensor | None, prefix: Prefix | None) -> Place:
        """What all layers share. With the kernels a GPU is waited for here alone: for a state and its starts."""
        (B, L), C = tokens.shape, self.config.chunk_size
        past = prefix or state
        before = None if past is None else past.position.to(tokens.device)
        read = torch.zeros(B, dtype=torch.int64, device="cpu") if past is None else past.position.cpu()
        if state is not None and prefix is None:
            self._check_open_chunk(read % C, state)
        longest = int(open_lengths(read % C, None if starts is None else starts.cpu(), C, L).max())
        starts = None if starts is None else starts.to(tokens.device)
        origin = tokens.new_zeros(1) if before is None else before
        position = document_positions(origin[:1] if bool((read == read[0]).all()) else origin, starts, L)
        after = (position[:, -1] + 1).expand(B)
        turn = torch.view_as_real(self.rope(position, C)[:, :, 0])
        return Place(before, after, starts, longest, turn, prefix)

    def _check_open_chunk(self, filled: Tensor, state: State) -> None:
        """Here, once, for the attention of every layer, which then trusts it."""
        held, most = min(layer.k.shape[1] for layer in state.layers), int(filled.max())
        if most > held:
            raise ValueError(
                f"model: position says {most} tokens are in the open chunk but the state holds {held} keys; "
                "pass a state that an earlier call returned"
            )


def check_call(tokens: Tensor, rows: int | None, starts: Tensor | None, vocab_size: int) -> None:
    """Raises: ValueError if the arguments of a call do not fit, with what was expected.

    Args:
        tokens, starts: see `Megalodon.forward`.
        rows:           of the state that was passed in; None without one.
    """
    if tokens.dim() != 2 or not len(tokens) or tokens.dtype != torch.int64:
        raise ValueError(
            f"model: tokens are {tuple(tokens.shape)} {tokens.dtype}; expected (B, L) torch.int64 with B ≥ 1"
        )
    if rows is not None and rows != len(tokens):
        raise ValueError(f"model: the state has {rows} rows but tokens have {len(tokens)}")
    if starts is not None and (starts.shape != tokens.shape or starts.dtype != torch.bool):
        raise ValueError(
            f"model: starts are {tuple(starts.shape)} {starts.dtype}; expected {tuple(tokens.shape)} torch.bool"
        )
    # On a GPU this would wait for the device at every step; the token store has checked its ids there.
    if tokens.device.type == "cpu" and tokens.numel():
        low, high = (int(bound) for bound in tokens.aminmax())
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"model: token id {bad} is outside the vocabulary 0 … {vocab_size - 1}")


@torch.no_grad()
def initialise(model: Megalodon, seed: int) -> None:
    """Give every parameter its initial value, as the released code does; no scaling with depth.

    A parameter is drawn from its own generator, seeded by (seed, name): equal for every layout and order of building,
    and the global generator is left alone.
    """
    for name, parameter in model.named_parameters():
        with torch.device("cpu"):  # generators are of the CPU, wherever the model is being built
            value = initial_value(name, parameter.shape, model.config, seed)
        parameter.copy_(value)


def generator_of(seed: int, name: str) -> torch.Generator:
    """The generator that a parameter is drawn from."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """The whole value that `initialise` gives the parameter of this name and shape, on the CPU."""
    D, draw = config.model_dim, generator_of(seed, name)
    *_, owner, kind = name.split(".")
    if owner in ("embed", "output"):
        return _truncated_normal(shape, std=D**-0.5, cut=3 * D**-0.5, draw=draw)
    if owner == "cema":
        if kind in ("alpha", "delta"):
            return 0.2 * torch.randn(shape, generator=draw)
        if kind == "theta":
            order = torch.randperm(D, generator=draw) + 1
            return torch.logit(D ** (-order.double() / D)).view(shape)
        if kind == "gamma":
            real = torch.randn(shape[:-1], generator=draw)
            return torch.stack([real, torch.zeros_like(real)], dim=-1)
        return _truncated_normal(shape, std=0.25, cut=1.0, draw=draw)
    if kind == "alpha":
        layer = int(name.split(".")[1])
        return torch.full(shape, 0.1 * 0.5**layer)
    if len(shape) == 1 or owner == "mega":
        return torch.zeros(shape)
    return _matrix(shape, config.init_mode, draw)


def _matrix(shape: torch.Size, mode: str, draw: torch.Generator) -> Tensor:
    fan_out, fan_in = shape
    if mode == "he":
        return torch.randn(shape, generator=draw) * math.sqrt(1 / (3 * fan_in))
    if mode == "bert":
        return torch.randn(shape, generator=draw) * 0.02
    if mode == "xavier":
        return (torch.rand(shape, generator=draw) * 2 - 1) * math.sqrt(6 / (fan_in + fan_out))
    # "none" is for loading: NaN makes a forgotten tensor visible at once.
    return torch.full(shape, float("nan"))


def _truncated_normal(shape: torch.Size, std: float, cut: float, draw: torch.Generator) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(shape), std=std, a=-cut, b=cut, generator=draw)
