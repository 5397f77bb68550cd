"""Megalodon (Ma et al. 2024, arXiv 2404.08801) for transformers: plain PyTorch, no other package.

It computes what the released code (XuezheMax/megalodon, cff8ba5) computes, under the same names of the weights. A text
is read in chunks of C tokens. Attention stays inside a chunk; what lies before it acts through complex moving averages
(CEMA) and through norms whose statistics run over the whole text (TimestepNorm). So the memory of a text of any length
is small: averages, statistics, and keys and values of the chunk that is still open.

Legend: B batch, L length of a call, D model width, H heads, Z query/key width, V value width, F feed-forward width,
N averages a feature, G norm groups, C chunk. Every text in a batch keeps its own time: tokens that the attention mask
hides are not read at all, wherever they stand.
"""

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import dropout, pad, silu
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from .configuration_megalodon import MegalodonConfig

if "cache" not in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters:
    raise ImportError(f"megalodon needs transformers 5.24 or later, this is {transformers.__version__}; upgrade it")

BLOCK = 64
"""Tokens of one matrix product of CEMA: its cost grows with the block, the loop over blocks shrinks."""
SPAN = 8192
"""Tokens whose attention weights exist at a time."""


# What the model remembers of a text


class Statistics(NamedTuple):
    """Running statistics of a TimestepNorm: count (B,) int64 tokens, mean (B, G), var (B, G)."""

    count: Tensor
    mean: Tensor
    var: Tensor


class LayerState(NamedTuple):
    """What one block remembers.

    k (B, P, H, Z/H), v (B, P, H, V/H): rotated keys and values of the open chunk, each row's own first;
    norm: Statistics; cema (B, D, N, 2): complex averages as (real, imaginary).
    """

    k: Tensor
    v: Tensor
    norm: Statistics
    cema: Tensor


class State(NamedTuple):
    """What the model remembers: position (B,) int64 tokens read, a LayerState a block, Statistics of the last norm."""

    position: Tensor
    layers: tuple[LayerState, ...]
    norm: Statistics

    def map(self, function: Callable[[Tensor], Tensor]) -> "State":
        """Apply `function` to every tensor."""

        def norm(x: Statistics) -> Statistics:
            return Statistics(function(x.count), function(x.mean), function(x.var))

        layers = (LayerState(function(x.k), function(x.v), norm(x.norm), function(x.cema)) for x in self.layers)
        return State(function(self.position), tuple(layers), norm(self.norm))


class MegalodonCache(Cache):
    """The state of a batch of texts, of constant size: pass it to continue them.

    No tensor in it is ever changed, so `copy.copy(cache)` keeps a place to come back to.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.state: State | None = None
        self.columns = 0
        """Tokens that were passed in, padding included."""

    def __repr__(self) -> str:
        return f"MegalodonCache({self.columns} columns)"

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that were passed in, padding included."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no limit."""
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether anything was read."""
        return self.state is not None

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.columns = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._map(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: averages and statistics do not go back."""
        raise ValueError("megalodon: a running state cannot go back; keep a copy of the cache from before instead")

    def activate_past_recording(self) -> None:
        """Refused: averages and statistics do not go back."""
        raise ValueError("megalodon: a running state cannot go back, so it cannot assist another model's decoding")

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        self.state = self.state and self.state.map(function)

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else len(self.state.position)

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_linear(self) -> list[bool]:
        return [False]  # so that generate() asks how much was read and passes the rest alone

    @property
    def is_sliding(self) -> list[bool]:
        return [False]


class Place(NamedTuple):
    """Where the tokens of a call stand; the same for every block. Each row's tokens stand at its left.

    columns: (B or 1, L) on the grid of chunks: tokens that were in the open chunk, plus the number in this call.
    turn:    (B or 1, L, 1, Z/H/2) complex: by which queries and keys are rotated; restarts in every chunk.
    lengths: (B,) tokens of the call that count, the rest of a row is padding; None: all of them.
    filled:  tokens in the open chunk before the call, in each row; None: nothing was read yet.
    ends:    columns that hold a token after the call, in each row; None: no state is wanted.
    """

    columns: Tensor
    turn: Tensor
    lengths: Tensor | None
    filled: list[int] | None
    ends: list[int] | None


# The parts of a block


class Float32Module(nn.Module):
    """A module whose own parameters and buffers ignore half precision, where decays and statistics lose their meaning.

    float64 is taken as asked.
    """

    def _apply(self, fn, recurse=True):
        def keep_wide(x: Tensor) -> Tensor:
            moved = fn(x)
            return x.to(moved.device) if moved.dtype in (torch.bfloat16, torch.float16) else moved

        for child in self.children() if recurse else ():
            child._apply(fn)
        return super()._apply(keep_wide, recurse=False)


def _empty(*shape: int) -> Tensor:
    """Room for values that are float32 at least, whatever the model is built or loaded in."""
    return torch.empty(shape, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32))


def _float(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _double(x: Tensor) -> Tensor:
    """float64, where the device has it."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


class TimestepNorm(Float32Module):
    """Group norm with statistics over the text so far, the current token included (section 3.2); scale 1 + weight."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.num_groups, self.eps = config.norm_num_groups, config.norm_eps
        self.weight = nn.Parameter(_empty(config.model_dim))
        self.bias = nn.Parameter(_empty(config.model_dim))
        # The released state dict has a prior; a language model has none, its count is 0.
        self.register_buffer("prior_count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("prior_mean", _empty(self.num_groups).zero_())
        self.register_buffer("prior_logv", _empty(self.num_groups).zero_())

    def forward(self, x: Tensor, state: Statistics | None, lengths: Tensor | None) -> tuple[Tensor, Statistics]:
        """(B, L, D) -> (B, L, D) and the statistics after each row's last token."""
        B, L, _ = x.shape
        groups = _float(x).unflatten(-1, (self.num_groups, -1))
        m, s = _double(groups.mean(-1)), _double(groups.var(-1, unbiased=False))  # of each token alone: (B, L, G)
        if state is None:
            state = Statistics(m.new_zeros(B, dtype=torch.int64), torch.zeros_like(m[:, 0]), torch.ones_like(m[:, 0]))
        read = state.count.to(m.dtype)[:, None, None]
        count = read + torch.arange(1, L + 1, device=x.device)[:, None]
        # Sums of what differs from a value near the mean, and of squares: nothing cancels.
        shift = torch.where(read > 0, state.mean[:, None].to(m.dtype), m[:, :1])
        mean = shift + (m - shift).cumsum(1) / count
        before = torch.cat([shift, mean[:, :-1]], dim=1)
        spread = s + (count - 1) / count * (m - before).square()
        var = (read * state.var[:, None].to(m.dtype) + spread.cumsum(1)) / count
        y = (groups - mean.to(groups.dtype)[..., None]) * (var + self.eps).rsqrt().to(groups.dtype)[..., None]
        y = y.flatten(-2) * (1 + self.weight) + self.bias
        return y.to(x.dtype), self._after(state, mean, var, lengths)

    def _after(self, state: Statistics, mean: Tensor, var: Tensor, lengths: Tensor | None) -> Statistics:
        if lengths is None:
            # Copies: a view would keep the statistics of every token alive.
            return Statistics(state.count + mean.shape[1], mean[:, -1].clone(), var[:, -1].clone())
        last = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, mean.shape[2])
        none = (lengths == 0)[:, None]
        mean, var = (
            torch.where(none, old.to(new.dtype), new.gather(1, last)[:, 0])
            for old, new in ((state.mean, mean), (state.var, var))
        )
        return Statistics(state.count + lengths, mean, var)


class Cema(Float32Module):
    """Complex exponential moving averages of each feature (equations 2 and 3, as the released code has them).

        h_t = q h_{t-1} + p x_t,    y_t = Re Σ_n gamma_n h_{t,n} / √N + omega x_t
        p = σ(alpha),  |q| = 1 - σ(alpha) σ(delta),  arg q_n = n σ(theta) 2π/N

    Blocks of T tokens are matrix products; between blocks only h travels.
    """

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        D, N = config.model_dim, config.cema_ndim
        self.alpha = nn.Parameter(_empty(D, N, 1))
        self.delta = nn.Parameter(_empty(D, N, 1))
        self.theta = nn.Parameter(_empty(D, 1, 1))
        self.gamma = nn.Parameter(_empty(D, N, 2))
        self.omega = nn.Parameter(_empty(D, 1))

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """p, log q and gamma / √N, each (D, N), the last two complex; in float64: powers of a rounded q would drift."""
        alpha, delta, theta = (_double(x[..., 0]) for x in (self.alpha, self.delta, self.theta))
        N, p = alpha.shape[1], alpha.sigmoid()
        # The clamp stands before log1p: after it, its gradient would be NaN where the product rounds to 1.
        log_decay = torch.log1p(-(p * delta.sigmoid()).clamp(max=1 - torch.finfo(p.dtype).eps))
        angle = torch.arange(1, N + 1, device=theta.device) * (theta.sigmoid() * (2 * math.pi / N))
        return p, torch.complex(log_decay, angle), torch.view_as_complex(_double(self.gamma)) / math.sqrt(N)

    def forward(
        self, x: Tensor, state: Tensor | None, lengths: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D), state (B, D, N, 2) -> (B, L, D), and with `keep` the state after each row's last token."""
        with torch.autocast(x.device.type, enabled=False):
            return self._forward(x, state, lengths, keep)

    def _forward(self, x: Tensor, state: Tensor | None, lengths: Tensor | None, keep: bool):
        (B, L, D), wide = x.shape, torch.promote_types(x.dtype, torch.float32)
        # Roundings of a carried state must not add up over a long text: on a CPU float64 costs little.
        carry = torch.float64 if keep and x.device.type == "cpu" else wide
        T = min(BLOCK, L)
        t = torch.arange(T, device=x.device)
        p, log_q, gamma = self.coefficients()
        powers = (log_q[..., None] * t).exp()  # q^t: (D, N, T)
        enter = p[..., None] * powers.flip(-1)
        leave = (gamma * log_q.exp())[..., None] * powers
        kernel = (p[..., None] * gamma[..., None] * powers).real.sum(1) + pad(_double(self.omega), (0, T - 1))
        # K[i, j] = kernel[i - j] for i ≥ j, transposed.
        matrix = pad(kernel.to(wide), (T - 1, 0)).unfold(-1, T, 1).flip(-1).mT

        tokens = pad(x.to(wide), (0, 0, 0, -L % T)).permute(2, 0, 1).reshape(D, -1, T)  # (D, B·R, T)
        gain = torch.bmm(tokens, _pairs(enter, wide).mT)
        gain = torch.view_as_complex(gain.unflatten(-1, (-1, 2))).unflatten(1, (B, -1)).to(carry.to_complex())
        decay = (log_q * T).exp().to(gain.dtype)[:, None]
        h = torch.zeros_like(gain[:, :, 0]) if state is None else _complex(state).transpose(0, 1).to(gain.dtype)
        states = [h]
        for u in gain.unbind(2):
            states.append(decay * states[-1] + u)
        states = torch.stack(states, dim=2)  # (D, B, R + 1, N): before each block, and after the last
        seen = torch.view_as_real(states[:, :, :-1]).flatten(1, 2).flatten(-2).to(wide)
        # Re Σ leave h = Σ (Re leave · Re h - Im leave · Im h)
        y = torch.bmm(tokens, matrix).baddbmm(seen, _pairs(leave.conj(), wide))
        y = y.view(D, B, -1).permute(1, 2, 0)[:, :L].to(x.dtype)
        return y, self._after(x, states, lengths, log_q, enter) if keep else None

    def _after(self, x: Tensor, states: Tensor, lengths: Tensor | None, log_q: Tensor, enter: Tensor) -> Tensor:
        """The state after each row's last token: whole blocks, then m tokens of the next: q^m h + Σ p q^(m-1-t) x_t."""
        (B, L, D), (T, N) = x.shape, (enter.shape[-1], enter.shape[1])
        lengths = torch.full((B,), L, device=x.device) if lengths is None else lengths
        m = lengths % T
        h = states.gather(2, (lengths // T)[None, :, None, None].expand(D, B, 1, N))[:, :, 0]  # (D, B, N)
        t = torch.arange(T, device=x.device)
        rest = x.gather(1, (lengths[:, None] - T + t).clamp(min=0)[..., None].expand(B, T, D))
        rest = rest.masked_fill((t < T - m[:, None])[..., None], 0).permute(2, 0, 1).to(states.real.dtype)
        gain = torch.bmm(rest, _pairs(enter, rest.dtype).mT).unflatten(-1, (-1, 2))
        h = (log_q[:, None] * m[:, None]).exp().to(h.dtype) * h + torch.view_as_complex(gain)
        return torch.view_as_real(h.transpose(0, 1).contiguous())


def _complex(pairs: Tensor) -> Tensor:
    return torch.view_as_complex(pairs.contiguous())


def _pairs(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Complex (D, N, T) -> real (D, 2N, T): real and imaginary part of each row below each other."""
    return torch.view_as_real(x.resolve_conj()).movedim(-1, 2).flatten(1, 2).to(dtype)


class RMSNorm(Float32Module):
    """x / sqrt(mean(x²) + eps) · (1 + weight)."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(_empty(config.model_dim)) if config.norm_affine else None

    def forward(self, x: Tensor) -> Tensor:
        y = _rms_normed(x, self.eps)
        return (y if self.weight is None else y * (1 + self.weight)).to(x.dtype)


def _rms_normed(x: Tensor, eps: float) -> Tensor:
    wide = _float(x)
    return wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()


class LayerNorm(Float32Module):
    """(x - mean) / sqrt(var + eps) · (1 + weight) + bias."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(_empty(config.model_dim)) if config.norm_affine else None
        self.bias = nn.Parameter(_empty(config.model_dim)) if config.norm_affine else None

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else 1 + self.weight
        return nn.functional.layer_norm(_float(x), x.shape[-1:], weight, self.bias, self.eps).to(x.dtype)


class Rotary(Float32Module):
    """Rotary positions that restart at 0 in every chunk; adjacent features form a pair."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.head_dim = config.z_dim // config.num_heads
        self.base = 10_000.0 if config.rope_base is None else config.rope_base
        self.register_buffer("freqs", self.frequencies().to(_empty(0).dtype))

    def frequencies(self) -> Tensor:
        """base^(-2i/head_dim), rounded to float32 as the released buffer is: (head_dim/2,)."""
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        return 1.0 / (self.base**exponent)

    def forward(self, columns: Tensor, chunk_size: int) -> Tensor:
        """(B, L) -> complex (B, L, 1, head_dim/2); angles in float64, near 4096 float32 is off by 1e-4."""
        angle = _double(columns % chunk_size)[..., None, None] * _double(self.freqs)
        turn = torch.polar(torch.ones_like(angle), angle)
        return turn if self.freqs.dtype == torch.float64 else turn.to(torch.complex64)


def _rotated(x: Tensor, turn: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


class Mega(Float32Module):
    """The attention half of a block: u = TimestepNorm(x), m = RMSNorm(CEMA(u)), queries and keys from m, values from u:

    y = W₁ m + W₂ (attention ⊙ silu(W_r m)) + x
    """

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        D, Z, V = config.model_dim, config.z_dim, config.value_dim
        self.num_heads, self.eps, self.chunk_size = config.num_heads, config.norm_eps, config.chunk_size
        self.dropout, self.hidden_dropout = config.dropout, config.hidden_dropout
        self.attention_dropout = config.attention_dropout
        self.timenorm = TimestepNorm(config)
        self.cema = Cema(config)
        self.rmsnorm = RMSNorm(config)
        self.wv = nn.Linear(D, V)
        self.wz = nn.Linear(D, Z)
        self.wr = nn.Linear(D, V)
        self.wh1 = nn.Linear(D, D)
        self.wh2 = nn.Linear(V, D, bias=False)
        self.gamma = nn.Parameter(_empty(2, Z))
        self.beta = nn.Parameter(_empty(2, Z))

    def forward(self, x: Tensor, place: Place, state: LayerState | None) -> tuple[Tensor, LayerState | None]:
        """(B, L, D) -> (B, L, D) and the state after it, if one is wanted."""
        keep = place.ends is not None
        u, norm = self.timenorm(x, state and state.norm, place.lengths)
        ema, h = self.cema(u, state and state.cema, place.lengths, keep)
        m = dropout(self.rmsnorm(ema), self.hidden_dropout, self.training)
        v = silu(self.wv(u)).unflatten(-1, (self.num_heads, -1))
        q, k = (_rotated(z, place.turn).to(v.dtype) for z in self._queries_and_keys(self.wz(m)))
        attended, open_k, open_v = self._attention(q, k, v, place, state)
        gated = dropout(attended.flatten(2) * silu(self.wr(m)), self.hidden_dropout, self.training)
        y = dropout(self.wh1(m) + self.wh2(gated), self.dropout, self.training)
        return y.to(x.dtype) + x, LayerState(open_k, open_v, norm, h) if keep else None

    def _queries_and_keys(self, z: Tensor) -> tuple[Tensor, ...]:
        """(B, L, Z) -> queries and keys before rotation (B, L, H, Z/H): the norm has no scale, these have their own."""
        z = _rms_normed(z.unflatten(-1, (self.num_heads, -1)), self.eps) / math.sqrt(z.shape[-1] // self.num_heads)
        scale, bias = (x.unflatten(-1, (self.num_heads, -1)) for x in (1 + self.gamma, self.beta))
        return z * scale[0] + bias[0], z * scale[1] + bias[1]

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, place: Place, state: LayerState | None):
        """(B, L, H, ·) -> (B, L, H, V/H) and keys and values of the chunk that is open afterwards."""
        C, L = self.chunk_size, q.shape[1]
        if state is not None:
            k, v = _behind(state.k, k, place), _behind(state.v, v, place)
        width = k.shape[1]
        if width <= C:
            y = self._attend(q, k, v, place.columns)
        else:
            if state is not None:  # columns before the call ask for nothing, but chunks must be whole
                q = _behind(torch.zeros_like(q[:, :1]).expand(-1, state.k.shape[1], -1, -1), q, place)
            inside = torch.arange(C, device=q.device)[None]
            step = max(1, SPAN // C) * C
            pieces = []
            for start in range(0, width // C * C, step):
                chunks = (x[:, start : min(start + step, width // C * C)].unflatten(1, (-1, C)) for x in (q, k, v))
                y = self._attend(*(x.flatten(0, 1) for x in chunks), inside)
                pieces.append(y.unflatten(0, (len(q), -1)).flatten(1, 2))
            if rest := width % C:
                pieces.append(self._attend(q[:, -rest:], k[:, -rest:], v[:, -rest:], inside[:, :rest]))
            y = torch.cat(pieces, dim=1)
            if state is not None:
                y = y.gather(1, place.columns[..., None, None].expand(len(y), L, *y.shape[2:]))
        if place.ends is None:
            return y, None, None
        return y, _open_chunk(k, place.ends, C), _open_chunk(v, place.ends, C)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, columns: Tensor) -> Tensor:
        """softmax(q kᵀ) v, each of L queries over those of W keys that stand up to its column -> (·, L, H, V/H)."""
        scores = _float(q.transpose(1, 2) @ k.permute(0, 2, 3, 1))
        later = torch.arange(k.shape[1], device=k.device) > columns[:, None, :, None]
        weights = scores.masked_fill(later, -math.inf).softmax(-1).to(v.dtype)
        return (dropout(weights, self.attention_dropout, self.training) @ v.transpose(1, 2)).transpose(1, 2)


def _behind(open_: Tensor, new: Tensor, place: Place) -> Tensor:
    """Put what a call brings, (B, L, H, ·), behind what each row has in its open chunk, (B, P, H, ·)."""
    if len(set(place.filled)) == 1:
        return torch.cat([open_[:, : place.filled[0]], new], dim=1)
    room = torch.cat([open_, torch.zeros_like(new)], dim=1)
    return room.scatter(1, place.columns[..., None, None].expand_as(new), new)


def _open_chunk(x: Tensor, ends: list[int], chunk_size: int) -> Tensor:
    """(B, W, H, ·) on the grid -> (B, P, H, ·): of each row what stands behind its last whole chunk."""
    begins = [end // chunk_size * chunk_size for end in ends]
    longest = max(end - begin for end, begin in zip(ends, begins, strict=True))
    if len(set(begins)) == 1:
        open_ = x[:, begins[0] : begins[0] + longest]
        return open_ if open_.shape[1] == x.shape[1] else open_.clone()  # a view would keep all of x alive
    index = torch.tensor(begins, device=x.device)[:, None] + torch.arange(longest, device=x.device)
    index = index.clamp(max=x.shape[1] - 1)
    return x.gather(1, index[..., None, None].expand(-1, -1, *x.shape[2:]))


class FeedForward(Float32Module):
    """x + alpha · fc2(silu(fc1 f) ⊙ fc3 f), f = LayerNorm(y): the residual is the block's input x, not y."""

    def __init__(self, config: MegalodonConfig, layer: int) -> None:
        super().__init__()
        D, F = config.model_dim, config.ffn_hidden_dim
        self.layer, self.dropout, self.hidden_dropout = layer, config.dropout, config.hidden_dropout
        self.norm = LayerNorm(config)
        self.fc1 = nn.Linear(D, F, bias=False)
        self.fc2 = nn.Linear(F, D, bias=False)
        self.fc3 = nn.Linear(D, F, bias=False) if config.swiglu else None
        self.alpha = nn.Parameter(_empty(D)) if config.rescale_nffn else None

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        f = self.norm(y)
        hidden = silu(self.fc1(f))
        if self.fc3 is not None:
            hidden = hidden * self.fc3(f)
        out = dropout(self.fc2(dropout(hidden, self.hidden_dropout, self.training)), self.dropout, self.training)
        if self.alpha is not None:
            out = self.alpha * out
        return out.to(x.dtype) + x


class MegalodonBlock(GradientCheckpointingLayer):
    """y = Mega(x); out = x + FeedForward(y)."""

    def __init__(self, config: MegalodonConfig, layer: int) -> None:
        super().__init__()
        self.mega = Mega(config)
        self.nffn = FeedForward(config, layer)

    def forward(self, x: Tensor, place: Place, state: LayerState | None) -> tuple[Tensor, LayerState | None]:
        """(B, L, D) -> (B, L, D) and the state after it, if one is wanted."""
        y, state = self.mega(x, place, state)
        return self.nffn(y, x), state


class Output(nn.Module):
    """The final TimestepNorm, and with `head` the output matrix."""

    def __init__(self, config: MegalodonConfig, head: bool) -> None:
        super().__init__()
        self.final_norm = TimestepNorm(config)
        if head:
            self.output = nn.Linear(config.model_dim, config.num_outputs, bias=False)


# The model


class MegalodonPreTrainedModel(PreTrainedModel):
    """Initial values, and what transformers has to know."""

    config_class = MegalodonConfig
    config: MegalodonConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _is_stateful = True
    _no_split_modules = ["MegalodonBlock"]  # noqa: RUF012  (transformers reads plain lists)
    _skip_keys_device_placement = ["cache"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the released code does; no scaling with depth."""
        D = self.config.model_dim
        if isinstance(module, nn.Embedding) or module is self.get_output_embeddings():
            init.trunc_normal_(module.weight, std=D**-0.5, a=-3 * D**-0.5, b=3 * D**-0.5)
        elif isinstance(module, nn.Linear):
            self._init_matrix(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, Cema):
            init.normal_(module.alpha, std=0.2)
            init.normal_(module.delta, std=0.2)
            order = torch.randperm(D).double() + 1
            init.copy_(module.theta, torch.logit(D ** (-order / D)).view(D, 1, 1))
            real = torch.randn(module.gamma.shape[:-1])
            init.copy_(module.gamma, torch.stack([real, torch.zeros_like(real)], dim=-1))
            init.trunc_normal_(module.omega, std=0.25, a=-1.0, b=1.0)
        elif isinstance(module, Rotary):
            init.copy_(module.freqs, module.frequencies())
        else:
            for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                init.zeros_(value)
            if isinstance(module, FeedForward) and module.alpha is not None:
                init.constant_(module.alpha, 0.1 * 0.5**module.layer)

    def _init_matrix(self, weight: Tensor) -> None:
        mode = self.config.init_mode
        if mode == "he":
            init.normal_(weight, std=math.sqrt(1 / (3 * weight.shape[1])))
        elif mode == "bert":
            init.normal_(weight, std=0.02)
        elif mode == "xavier":
            init.xavier_uniform_(weight)
        else:  # `none` is for loading: NaN makes a forgotten tensor visible at once
            init.constant_(weight, math.nan)


class MegalodonModel(MegalodonPreTrainedModel):
    """Megalodon up to the final norm: tokens -> hidden values."""

    _keys_to_ignore_on_load_unexpected = [r"^output\.output\.weight$"]  # noqa: RUF012

    def __init__(self, config: MegalodonConfig, head: bool = False) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(MegalodonBlock(config, layer) for layer in range(config.num_layers))
        self.output = Output(config, head)
        self.rope = Rotary(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed = value

    def get_output_embeddings(self) -> nn.Module | None:
        return None

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    @deprecate_kwarg("cache_params", "6.0.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: MegalodonCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden values at every position; the arguments are those of `MegalodonForCausalLM`."""
        return self._read(input_ids, attention_mask, cache, inputs_embeds, use_cache, output_hidden_states, kwargs)

    def _read(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        cache: MegalodonCache | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        output_hidden_states: bool | None,
        others: dict,
    ) -> BaseModelOutputWithPast:
        _refuse(others, attention_mask, cache)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("megalodon: expected either input_ids or inputs_embeds")
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if cache is None and use_cache:
            cache = MegalodonCache()
        order = lengths = None
        if attention_mask is not None:
            shown = _shown(attention_mask, (input_ids if inputs_embeds is None else inputs_embeds).shape[1], cache)
            lengths = shown.sum(1)
            # Each row's tokens to its left, in their order; what is hidden stands behind and reaches none of them.
            order = (~shown).byte().argsort(dim=1, stable=True)
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids if order is None else input_ids.gather(1, order))
        elif order is not None:
            inputs_embeds = inputs_embeds.gather(1, order[..., None].expand_as(inputs_embeds))
        hidden, seen = self._hidden(inputs_embeds, lengths, cache, bool(output_hidden_states))
        if order is not None:
            back = order.argsort(dim=1)[..., None]
            hidden, *seen = (x.gather(1, back.expand_as(x)) for x in (hidden, *seen))
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            cache=cache if use_cache else None,
            hidden_states=tuple(seen) if output_hidden_states else None,
        )

    def _hidden(
        self, x: Tensor, lengths: Tensor | None, cache: MegalodonCache | None, all_of_them: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Embeddings (B, L, D) -> the final hidden values; with `all_of_them` also those before each block."""
        if x.shape[1] == 0:
            return x, []
        state = None if cache is None else cache.state
        place = self._place(x, lengths, state, keep=cache is not None)
        if self.config.scale_emb:
            x = x * math.sqrt(self.config.model_dim)
        x = dropout(x, self.config.dropout, self.training)
        seen, layers = [], []
        for number, block in enumerate(self.layers):
            seen += [x] if all_of_them else []
            x, after = block(x, place, None if state is None else state.layers[number])
            layers.append(after)
        x, norm = self.output.final_norm(x, state and state.norm, place.lengths)
        seen += [x] if all_of_them else []
        if cache is not None:
            read = (0 if state is None else state.position) + (place.lengths if lengths is not None else x.shape[1])
            position = torch.zeros(len(x), dtype=torch.int64, device=x.device) + read
            cache.state, cache.columns = State(position, tuple(layers), norm), cache.columns + x.shape[1]
        return x, seen

    def _place(self, x: Tensor, lengths: Tensor | None, state: State | None, keep: bool) -> Place:
        (B, L, _), C = x.shape, self.config.chunk_size
        columns, filled, ends = torch.arange(L, device=x.device)[None], None, None
        if state is not None:
            if len(state.position) != B:
                raise ValueError(f"megalodon: the cache has {len(state.position)} rows, the input {B}")
            filled = (state.position % C).tolist()
            columns = columns + (state.position[:, None] % C)
        if keep:
            new = [L] * B if lengths is None else lengths.tolist()
            ends = [n + more for n, more in zip(filled or [0] * B, new, strict=True)]
        return Place(columns, self.rope(columns, C), lengths, filled, ends)


class MegalodonForCausalLM(MegalodonModel, GenerationMixin):
    """A Megalodon language model."""

    _tied_weights_keys = {"output.output.weight": "embed.weight"}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = None

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__(config, head=True)

    def get_output_embeddings(self) -> nn.Module:
        return self.output.output

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.output.output = new_embeddings

    @property
    def base_model(self) -> "Body":
        return Body(self)

    def get_decoder(self) -> "Body":
        return Body(self)

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    @deprecate_kwarg("cache_params", "6.0.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: MegalodonCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token at every position.

        Args:
            input_ids: (B, L) int64, any L; or inputs_embeds (B, L, D), before the scaling of `scale_emb`.
            attention_mask: (B, L), or (B, all columns so far): 0 hides a token, as if it were not there. Texts of
                different lengths may be padded on either side: each begins at its own first token.
            cache: of earlier calls; it moves along.
            labels: (B, L): the loss is that of predicting labels[:, 1:]; -100 is left out.
            use_cache: return a cache; by default when not training.
            logits_to_keep: the last so many positions alone; 0 = all.
        """
        read = self._read(input_ids, attention_mask, cache, inputs_embeds, use_cache, output_hidden_states, kwargs)
        logits = _float(self.output.output(slice_logits_to_keep(read.last_hidden_state, logits_to_keep)))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.num_outputs, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=read.cache, hidden_states=read.hidden_states)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:
        """The cache of generate(): ours, whose size does not grow with the text."""
        if (kind := generation_config.cache_implementation) not in (None, "dynamic"):
            raise ValueError(f"megalodon: cache_implementation is {kind}; leave it out, there is one kind of cache")
        if model_kwargs.get("cache") is None and generation_config.use_cache is not False:
            model_kwargs["cache"] = MegalodonCache()


class Body:
    """A language model up to its final norm, for tools that bring their own head; it owns nothing."""

    def __init__(self, model: MegalodonForCausalLM) -> None:
        self._model = model

    def __call__(self, *args, **kwargs) -> BaseModelOutputWithPast:
        return MegalodonModel.forward(self._model, *args, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self._model, name)


def _refuse(given: dict, attention_mask: Tensor | None, cache: object) -> None:
    """Raise ValueError for what would be ignored in silence."""
    if cache is not None and not isinstance(cache, MegalodonCache):
        raise ValueError(f"megalodon: cache is a {type(cache).__name__}; expected what an earlier call returned")
    if given.get("output_attentions"):
        raise ValueError("megalodon: output_attentions is not offered")
    positions = given.pop("position_ids", None)
    packed = any(given.pop(name, None) is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"))
    for name in ("max_length_q", "max_length_k"):
        given.pop(name, None)
    if positions is not None and positions.shape[-1] > 1:
        jumps = positions.diff(dim=-1) != 1
        if attention_mask is not None and attention_mask.shape[-1] == positions.shape[-1]:
            jumps &= (attention_mask[:, 1:] * attention_mask[:, :-1]).bool()
        packed |= bool(jumps.any())
    if packed:
        raise ValueError("megalodon: packed texts (padding_free, packing) are not offered here; pad the batch instead")


def _shown(attention_mask: Tensor, length: int, cache: MegalodonCache | None) -> Tensor:
    """Which tokens of this call count: (B, L) bool."""
    whole = length + (0 if cache is None else cache.columns)
    if attention_mask.dim() != 2 or attention_mask.shape[1] not in (length, whole):
        got = tuple(attention_mask.shape)
        raise ValueError(f"megalodon: attention_mask is {got}; expected (batch, {length}) or (batch, {whole})")
    return attention_mask[:, attention_mask.shape[1] - length :].bool()


__all__ = ["MegalodonCache", "MegalodonForCausalLM", "MegalodonModel", "MegalodonPreTrainedModel"]
