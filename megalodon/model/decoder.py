"""Decoding: the step of a whole model, one token a row, on a state of fixed size that moves in place.

    decoder = Decoder(model, state)
    logits = decoder.step(tokens)             # (B,) ids -> (B, num_outputs)
    state = decoder.state()                   # an ordinary state, to keep, save or continue from

The same function as `Megalodon.forward` with L = 1, formed so that a token costs little more than reading the weights:
what depends on the parameters alone is formed once, the keys and values of a chunk have their place from the start,
and a GPU is never asked for a number. Not here: the state updates (megalodon_kernels.decode), choosing tokens
(megalodon.inference).
"""

import math
import operator
from collections.abc import Callable
from itertools import chain
from typing import NamedTuple, Self, cast

import torch
from torch import Tensor
from torch.nn.functional import silu

from megalodon.model.megalodon import Block, Megalodon
from megalodon.model.quantised import num_quantised
from megalodon.model.row_product import Scratch, row_product
from megalodon.model.state import LayerState, State
from megalodon.model.timestep_norm import TimestepNorm
from megalodon_kernels import Backend, Statistics
from megalodon_kernels.decode import attention_step, norm_cema_step, norm_step

PACK_LIMIT = 1 << 32
"""Bytes of parameters, quantised ones as float32, up to which a CPU copies the matrices into faster layouts."""


class Decoder:
    """A model, and a state of B rows that each step moves on by one token a row.

    The state is the decoder's own: those passed in and given back are values that no later step touches.

    Args:
        model: runs as in evaluation, without dropout. If its parameters change, the next step uses the new ones. Its
            backend is that of the ops of a step (megalodon_kernels.decode); between them all is PyTorch.
        state: to continue from; None means one row that has read nothing.
    Raises:
        KernelError: the model's backend cannot run these ops here.
    """

    def __init__(self, model: Megalodon, state: State | None = None) -> None:
        self.model = model
        self._constants = _Constants(model)
        self.load(model.empty_state(1) if state is None else state)

    def at(self, state: State) -> Self:
        """A second decoder of the same model, which shares what was formed of its parameters."""
        twin = object.__new__(type(self))
        twin.model, twin._constants = self.model, self._constants
        twin.load(state)
        return twin

    def load(self, state: State) -> None:
        """Go on from another state, of any number of rows."""
        C, wide, dtype = self.model.config.chunk_size, self._constants.wide, self.model.output_weight.dtype
        # The libraries of a CPU multiply bfloat16 by a routine made for each length, so float32 holds the same values.
        dtype = torch.promote_types(dtype, torch.float32) if self.model.device.type == "cpu" else dtype

        def cache(opened: Tensor) -> Tensor:
            B, P, H, width = opened.shape
            places = torch.zeros(B, H, C, width, dtype=dtype, device=opened.device)
            places[:, :, :P] = opened.transpose(1, 2)
            return places

        with torch.inference_mode():
            self._position = state.position.clone(memory_format=torch.contiguous_format)
            self._layers = [
                _Layer(cache(x.k), cache(x.v), _own(x.norm), x.cema.to(wide, copy=True).contiguous())
                for x in state.layers
            ]
            self._norm = _own(state.norm)
            self._prepare()

    def state(self) -> State:
        """What was read so far, as a value."""
        dtype = self.model.output_weight.dtype
        slots = (self._position % self.model.config.chunk_size)[:, None]
        longest = int(slots.max())
        unused = (torch.arange(longest, device=slots.device) >= slots)[..., None, None]

        def open_chunk(cache: Tensor) -> Tensor:
            # Once a cache has been filled, what lies behind a row's slot is left from the chunk before.
            return cache[:, :, :longest].transpose(1, 2).masked_fill(unused, 0).contiguous().to(dtype)

        layers = [LayerState(open_chunk(x.k), open_chunk(x.v), _cloned(x.norm), x.h.clone()) for x in self._layers]
        return State(self._position.clone(), tuple(layers), _cloned(self._norm))

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Read one token of each row.

        Args:
            tokens: (B,) int64 ids below vocab_size.
        Returns:
            (B, num_outputs): logits of the next token, float32 (float64 in a float64 model).
        """
        if not self._constants.fresh():
            self._constants = _Constants(self.model)
            self._prepare()
        if tokens.is_cpu:
            return self._forward(tokens)
        self._tokens.copy_(tokens)
        return self._replay().clone()

    def _prepare(self) -> None:
        """Make what a step needs besides the state: its parts with their buffers."""
        c, B, dtype = self._constants, len(self._position), self.model.output_weight.dtype
        self._tokens, self._slot = torch.zeros_like(self._position), torch.zeros_like(self._position)
        scratch: Scratch = {}
        pairs, backend = zip(c.blocks, self._layers, strict=True), self.model.backend
        self._blocks = [_block_step(block, layer, self._slot, dtype, scratch, backend) for block, layer in pairs]
        self._final_norm = norm_step(*self._norm, c.norm.scale, c.norm.bias, dtype, eps=c.norm.eps, backend=backend)
        self._output = c.output.prepare(B, scratch)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    def _forward(self, tokens: Tensor) -> Tensor:
        """The step itself: from tokens to logits; every state moves on."""
        slot, C = self._slot, self.model.config.chunk_size
        torch.remainder(self._position, C, out=slot)
        # Only the keys that are there are read. On a GPU the question would cost more than the keys.
        longest = int(slot if len(slot) == 1 else slot.max()) + 1 if slot.is_cpu else None
        turn = self._constants.turns.index_select(0, slot)
        x = self._constants.embed.index_select(0, tokens)
        if self.model.config.scale_emb:
            x = x * math.sqrt(self.model.config.model_dim)
        for step in self._blocks:
            x = step(x, turn, longest)
        logits = self._output(self._final_norm(x))
        self._position.add_(1)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _replay(self) -> Tensor:
        """The step on a GPU, where a launch costs more than its work: recorded as a graph, all of them cost one.

        The first step runs as it is, which compiles the kernels; the second is recorded; from there on it is replayed.
        """
        if self._logits is None:
            self._logits = self._forward(self._tokens)
            return self._logits
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._logits = self._forward(self._tokens)
            self._graph = graph  # only now: a recording that fails leaves none
        self._graph.replay()
        return self._logits


class _Layer(NamedTuple):
    """The state of one block, all of it moved in place.

    Shapes:
        k:    (B, H, C, Z/H): rotated keys of the open chunk; v: (B, H, C, V/H): its values.
        norm: Statistics of the block's TimestepNorm.
        h:    (B, D, N, 2): the complex averages.
    """

    k: Tensor
    v: Tensor
    norm: Statistics
    h: Tensor


def _own(norm: Statistics) -> Statistics:
    """A copy to move in place. Before the first token mean and variance carry no weight, whatever they hold."""
    empty = (norm.count == 0)[:, None]
    mean = norm.mean.double().masked_fill(empty, 0).contiguous()
    var = norm.var.double().masked_fill(empty, 1).contiguous()
    return Statistics(norm.count.clone(memory_format=torch.contiguous_format), mean, var)


def _cloned(norm: Statistics) -> Statistics:
    return Statistics(*(x.clone() for x in norm))


class _Constants:
    """What a step needs of the parameters, formed once."""

    def __init__(self, model: Megalodon) -> None:
        # The dictionaries in which the parameters hang: one put in place of another is noticed too.
        self._owners = [module._parameters for module in model.modules()]
        self._owners.append(model.rope._buffers)  # type: ignore[arg-type]  # values may be None in either
        self._ids = self._look()
        self._parameters = [p for owner in self._owners for p in owner.values() if p is not None]
        # Torch counts no changes of those made for inference.
        self._counted = [p for p in self._parameters if not p.is_inference()]
        self._places, self._versions = self._measure()
        # Roundings of millions of steps must not add up in the state: on a CPU float64 costs little.
        cpu, matrix = model.device.type == "cpu", model.output_weight
        self.wide = torch.float64 if cpu else torch.promote_types(matrix.dtype, torch.float32)
        pack = sum(p.numel() * p.element_size() for p in model.parameters()) + 4 * num_quantised(model) <= PACK_LIMIT
        with torch.inference_mode():
            self.embed = model.embed.weight.detach()
            places = torch.arange(model.config.chunk_size, device=model.device)[:, None]
            self.turns = model.rope(places, model.config.chunk_size)  # (C, 1, 1, Z/H/2)
            self.blocks = [_BlockConstants(cast(Block, block), self.wide, pack) for block in model.layers]
            self.norm = _NormConstants(model.output.final_norm, self.wide)
            self.output = row_product(model.output.output, pack=pack)

    def fresh(self) -> bool:
        """Whether the parameters are still those that this was formed from."""
        return self._look() == self._ids and self._measure() == (self._places, self._versions)

    def _look(self) -> list[int]:
        """Which parameters there are."""
        return list(map(id, chain.from_iterable(owner.values() for owner in self._owners)))

    def _measure(self) -> tuple[list[int], list[int]]:
        """Where each parameter lies and how often it was changed."""
        return list(map(Tensor.data_ptr, self._parameters)), list(map(_VERSION, self._counted))


_VERSION = operator.attrgetter("_version")


class _NormConstants:
    """Of a TimestepNorm."""

    def __init__(self, norm: TimestepNorm, wide: torch.dtype) -> None:
        self.scale, self.bias, self.eps = 1 + norm.weight.to(wide), norm.bias.to(wide), norm.eps


class _BlockConstants:
    """Of a block; see `megalodon.model.megalodon.Block` for what it computes."""

    def __init__(self, block: Block, wide: torch.dtype, pack: bool) -> None:
        mega, nffn = block.mega, block.nffn
        self.norm = _NormConstants(mega.timenorm, wide)
        p, log_decay, angle, gamma = mega.cema.coefficients()
        q = torch.view_as_real(torch.polar(log_decay.exp(), angle))
        self.p, self.q, self.gamma, self.omega = (x.to(wide) for x in (p, q, gamma, mega.cema.omega[:, 0]))
        # x / sqrt(mean(x²) + eps) is √D x / hypot(‖x‖, √(D eps)): two calls instead of five.
        D, weight = len(self.omega), mega.rmsnorm.weight
        self.rms_floor = mega.gamma.new_tensor(math.sqrt(D * mega.eps))
        self.rms_scale = math.sqrt(D) * (mega.gamma.new_ones(D) if weight is None else 1 + weight)
        # z is divided by its root mean square and by √(Z/H), so by its norm. Row 0 is for queries, row 1 for keys.
        self.z_scale, self.z_bias = (x.view(2, mega.num_heads, -1) for x in (1 + mega.gamma, mega.beta))
        self.z_floor = mega.gamma.new_tensor(math.sqrt(self.z_scale.shape[-1] * mega.eps))
        self.value, self.hidden_2 = row_product(mega.wv, pack=pack), row_product(mega.wh2, pack=pack)
        from_m = mega.wz, mega.wr, mega.wh1
        self.from_m, self.widths = row_product(*from_m, pack=pack), [x.out_features for x in from_m]
        weight, bias = nffn.norm.weight, nffn.norm.bias
        self.layer_norm = (D,), None if weight is None else 1 + weight, bias, nffn.norm.eps
        self.swiglu, self.halves = nffn.fc3 is not None, [nffn.fc1.out_features] * 2
        self.first = row_product(*([nffn.fc1] if nffn.fc3 is None else [nffn.fc1, nffn.fc3]), pack=pack)
        self.second = row_product(nffn.fc2, pack=pack)
        self.alpha = nffn.alpha


BlockStep = Callable[[Tensor, Tensor, int | None], Tensor]


def _block_step(
    c: _BlockConstants, state: _Layer, slot: Tensor, dtype: torch.dtype, scratch: Scratch, backend: Backend
) -> BlockStep:
    """x (B, D), the rotation of this place (B, 1, 1, Z/H/2), the most keys any row sees -> (B, D)."""
    (B, H, _, dz), wide, eps = state.k.shape, c.z_scale.dtype, c.norm.eps
    cema = c.p, c.q, c.gamma, c.omega
    norm_cema = norm_cema_step(*state.norm, state.h, c.norm.scale, c.norm.bias, *cema, dtype, eps=eps, backend=backend)
    attend = attention_step(state.k, state.v, slot, backend=backend)
    feed_forward = _feed_forward_step(c, B, dtype, scratch)
    from_m, value, hidden_2 = (product.prepare(B, scratch) for product in (c.from_m, c.value, c.hidden_2))
    qk = c.z_scale.new_empty(B, 2, H, dz)
    pairs, (queries, keys) = torch.view_as_complex(qk.view(B, 2, H, -1, 2)), qk.unbind(1)
    rms_floor, rms_scale, z_floor, z_scale, z_bias = c.rms_floor, c.rms_scale, c.z_floor, c.z_scale, c.z_bias
    length, hypot, split = torch.linalg.vector_norm, torch.hypot, torch.split_with_sizes

    def step(x: Tensor, turn: Tensor, longest: int | None) -> Tensor:
        u, ema = norm_cema(x)
        ema = ema.to(wide)
        m = ema.div(hypot(length(ema, dim=-1, keepdim=True), rms_floor)).mul_(rms_scale)
        z, r, y = split(from_m(m), c.widths, -1)
        z = z.reshape(B, 1, H, dz).to(wide)
        torch.addcmul(z_bias, z.div(hypot(length(z, dim=-1, keepdim=True), z_floor)), z_scale, out=qk)
        pairs.mul_(turn)
        attended = attend(queries, keys, silu(value(u)).view(B, H, -1), longest)
        return feed_forward(x, hidden_2(silu(r).mul_(attended.view(B, -1))).add_(y).add_(x))

    return step


def _feed_forward_step(c: _BlockConstants, B: int, dtype: torch.dtype, scratch: Scratch) -> Callable[..., Tensor]:
    """The block's input x (B, D) and y (B, D) after the attention half -> (B, D)."""
    first, second, wide = c.first.prepare(B, scratch), c.second.prepare(B, scratch), c.z_scale.dtype
    (shape, weight, bias, eps), swiglu, alpha = c.layer_norm, c.swiglu, c.alpha
    split, halves = torch.split_with_sizes, c.halves

    def step(x: Tensor, y: Tensor) -> Tensor:
        hidden = first(torch.layer_norm(y.to(wide), shape, weight, bias, eps))
        if swiglu:
            gate, hidden = split(hidden, halves, -1)
            hidden = silu(gate).mul_(hidden)
        else:
            hidden = silu(hidden)
        out = second(hidden)
        if alpha is not None:
            out = (alpha * out).to(dtype)
        return out.add_(x)

    return step
