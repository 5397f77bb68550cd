"""What every op costs at a shape: its inputs, the bytes it has to move, the operations it has to do.

`megalodon profile` and `kernels/gpu_check.py` go through COSTS: an op with an entry here is timed and compared with its
reference by both. Bytes and operations are floors: each tensor moved once, nothing computed twice unless the entry says
so; a measured time over the floor is how far an implementation is from what the machine could do.
Not here: measuring (measuring.py), small inputs for tests (cases.py).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalodon_kernels.cema import cema
from megalodon_kernels.chunk_attention import chunk_attention
from megalodon_kernels.decode import attention_step as prepare_attention_step
from megalodon_kernels.decode import norm_cema_step as prepare_norm_cema_step
from megalodon_kernels.linear_cross_entropy import linear_cross_entropy
from megalodon_kernels.norm import layer_norm, rms_norm
from megalodon_kernels.qk_rope import qk_rope
from megalodon_kernels.swiglu import swiglu
from megalodon_kernels.timestep_norm import timestep_norm

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """A shape: the symbols of kernels/README.md; Z and V count all heads together. The defaults are the 7B model.

    Raises: ValueError if a size is below 1 or the sizes do not go together.
    """

    B: int = 1
    L: int = 4096
    D: int = 4096
    H: int = 4
    Z: int = 1024
    V: int = 8192
    F: int = 8192
    N: int = 16
    G: int = 64
    C: int = 2048
    vocab_size: int = 32_000

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if size < 1:
                raise ValueError(f"{name} is {size}; expected at least 1")
        for whole, part in (("D", "G"), ("Z", "H"), ("V", "H")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{whole} {getattr(self, whole)} is not a multiple of {part} {getattr(self, part)}")

    @property
    def tokens(self) -> int:
        """B · L."""
        return self.B * self.L

    @property
    def keys(self) -> float:
        """Keys that a query sees on average: its chunk is cut off at itself."""
        return (min(self.C, self.L) + 1) / 2

    def named(self, names: str) -> dict[str, int]:
        """Return some of the sizes by name."""
        return {name: getattr(self, name) for name in names.split()}


class Work(NamedTuple):
    """The least that a pass has to do."""

    bytes: float
    flops: float


class Draw:
    """Random tensors of one dtype on one device, the same for the same seed."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self.wide = torch.promote_types(dtype, torch.float32)
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        """Activations: normal, in the dtype."""
        return self.parameter(*shape).to(self.dtype)

    def parameter(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Parameters: normal, float32 or better."""
        return scale * torch.randn(shape, generator=self._generator, dtype=self.wide, device=self.device)

    def uniform(self, *shape: int) -> Tensor:
        """Float64 in (0, 1)."""
        return torch.rand(shape, generator=self._generator, dtype=torch.float64, device=self.device)


Pass = Callable[[Sizes, int], Work]
"""(sizes, bytes of an activation) -> what the pass has to do."""


@dataclass(frozen=True)
class Cost:
    """An op, as it is called in training."""

    op: Callable[..., Any]
    """Called as `op(**inputs, backend=…)`."""
    sizes: str
    """The sizes that its cost depends on."""
    inputs: Callable[[Sizes, Draw], Inputs]
    forward: Pass
    backward: Pass | None
    """None: the op has no gradient."""
    calls: int = 1
    """In a block; 0 for an op that a model calls once."""
    prepared: bool = False
    """`op(…)` returns what is timed: a step of decoding, which moves its state, tensors among the inputs."""

    def call(self, inputs: Inputs, backend: str) -> Callable[[], Any]:
        """Return the call that is timed. Raises: KernelError, now or when called, if the backend cannot run it."""
        call: Callable[[], Any] = functools.partial(self.op, **inputs, backend=backend)
        return call() if self.prepared else call


def _elements(per_element: float, flops: float, width: str, parameters: Callable[[Sizes], float] = lambda s: 0) -> Pass:
    """A pass that moves `per_element` activations for each of B · L · width, and its parameters once."""

    def work(s: Sizes, size: int) -> Work:
        elements = s.tokens * getattr(s, width)
        return Work(per_element * size * elements + parameters(s), flops * elements)

    return work


def _cema(s: Sizes, draw: Draw) -> Inputs:
    alpha, delta, theta = (draw.uniform(s.D, s.N) for _ in range(3))
    return {
        "x": draw(s.B, s.L, s.D),
        "p": alpha.to(draw.wide),
        "log_decay": torch.log1p(-0.99 * alpha * delta),
        "angle": 3 * theta,
        "gamma": draw.parameter(s.D, s.N, 2, scale=s.N**-0.5),
        "omega": draw.parameter(s.D),
    }


def _cema_pass(backward: bool) -> Pass:
    """Forward reads x and writes y; backward reads x and dy and writes dx. A multiply-add of complex numbers and the
    read-out are 12 operations for each of the N averages; backward does that twice."""

    def work(s: Sizes, size: int) -> Work:
        elements, parameters = s.tokens * s.D, s.D * (28 * s.N + 4)
        if backward:
            return Work(3 * size * elements + 2 * parameters, 24 * s.N * elements)
        return Work(2 * size * elements + parameters, 12 * s.N * elements)

    return work


def _timestep_norm(s: Sizes, draw: Draw) -> Inputs:
    x = draw(s.B, s.L, s.D)
    weight, bias = (draw.parameter(s.D, scale=0.1) for _ in range(2))
    return {"x": x, "weight": weight, "bias": bias, "num_groups": s.G}


def _rms_norm(s: Sizes, draw: Draw) -> Inputs:
    return {"x": draw(s.B, s.L, s.D), "weight": draw.parameter(s.D, scale=0.1)}


def _layer_norm(s: Sizes, draw: Draw) -> Inputs:
    return _rms_norm(s, draw) | {"bias": draw.parameter(s.D, scale=0.1)}


def _qk_rope(s: Sizes, draw: Draw) -> Inputs:
    gamma, beta = (draw.parameter(2, s.Z, scale=0.1) for _ in range(2))
    angle = 6 * draw.uniform(1, s.L, s.Z // s.H // 2)
    turn = torch.stack([angle.cos(), angle.sin()], -1).to(draw.wide)
    return {"z": draw(s.B, s.L, s.Z), "gamma": gamma, "beta": beta, "turn": turn}


def _chunk_attention(s: Sizes, draw: Draw) -> Inputs:
    # Normalised queries and keys carry 1 / sqrt(Z/H) each: scores are of order 1.
    q, k = ((draw(s.B, s.L, s.H, s.Z // s.H) * (s.Z // s.H) ** -0.25) for _ in range(2))
    return {"q": q, "k": k, "v": draw(s.B, s.L, s.H, s.V // s.H), "chunk_size": s.C}


def _attention_forward(s: Sizes, size: int) -> Work:
    return Work(2 * size * s.tokens * (s.Z + s.V), 2 * s.tokens * s.keys * (s.Z + s.V))


def _attention_backward(s: Sizes, size: int) -> Work:
    """The scores once more, and five products: dP and dV over V, the scores, dQ and dK over Z."""
    return Work(size * s.tokens * (4 * s.Z + 4 * s.V), s.tokens * s.keys * (6 * s.Z + 4 * s.V))


def _linear_cross_entropy(s: Sizes, draw: Draw) -> Inputs:
    # The matrix is a parameter, rounded for the products by the op; logits are of order 1.
    return {
        "hidden": draw(s.tokens, s.D),
        "weight": draw.parameter(s.vocab_size, s.D, scale=s.D**-0.5),
        "targets": (draw.uniform(s.tokens) * s.vocab_size).long(),
    }


def _linear_cross_entropy_forward(s: Sizes, size: int) -> Work:
    """Logits and the gradients of hidden values and matrix: three products. Only what comes and goes is moved."""
    return Work(_hidden_and_matrix(s, size), 6 * s.tokens * s.D * s.vocab_size)


def _linear_cross_entropy_backward(s: Sizes, size: int) -> Work:
    """Scales the gradients that are there: each is read and written."""
    return Work(_hidden_and_matrix(s, size), (s.tokens + s.vocab_size) * s.D)


def _hidden_and_matrix(s: Sizes, size: int) -> float:
    """Bytes of hidden values in and their gradient out, and of the matrix and its gradient, in float32."""
    return 2 * s.D * (size * s.tokens + 4 * s.vocab_size)


def _gate(width: str, *, alone: bool = False) -> Callable[[Sizes, Draw], Inputs]:
    """silu(a) ⊙ b, or silu(a) alone, at one of the widths."""

    def inputs(s: Sizes, draw: Draw) -> Inputs:
        shape = s.B, s.L, getattr(s, width)
        return {"a": draw(*shape)} if alone else {"a": draw(*shape), "b": draw(*shape)}

    return inputs


def norm_cema_step(x: Tensor, *, backend: str, **state: Any) -> Callable[[], Any]:
    """A step of TimestepNorm and CEMA on the token x (B, D)."""
    return functools.partial(prepare_norm_cema_step(**state, dtype=x.dtype, backend=backend), x)  # type: ignore[arg-type]


def _norm_cema_state(s: Sizes, draw: Draw) -> Inputs:
    decay, angle, p = (draw.uniform(s.D, s.N) for _ in range(3))
    return {
        "x": draw(s.B, s.D),
        "count": torch.full((s.B,), s.L, device=draw.device),
        "mean": draw.parameter(s.B, s.G),
        "var": 0.5 + draw.parameter(s.B, s.G).square(),
        "h": draw.parameter(s.B, s.D, s.N, 2),
        "scale": 1 + draw.parameter(s.D, scale=0.1),
        "bias": draw.parameter(s.D, scale=0.1),
        "p": p.to(draw.wide),
        "q": torch.view_as_real(torch.polar(0.999 * decay, 3 * angle)).to(draw.wide),
        "gamma": draw.parameter(s.D, s.N, 2, scale=s.N**-0.5),
        "omega": draw.parameter(s.D),
    }


def _norm_cema_work(s: Sizes, size: int) -> Work:
    """The averages are read and written, and p, q and gamma of each read, in float32."""
    return Work(s.D * s.N * 4 * (4 * s.B + 5) + 2 * size * s.B * s.D, 12 * s.B * s.D * s.N)


def attention_step(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot: Tensor, *, backend: str
) -> Callable[[], Any]:
    """A step of attention on one token, where a chunk is about to be full."""
    step = prepare_attention_step(k_cache, v_cache, slot, backend=backend)  # type: ignore[arg-type]
    return functools.partial(step, q, k, v, k_cache.shape[2] if q.is_cpu else None)


def _attention_state(s: Sizes, draw: Draw) -> Inputs:
    Z, V = s.Z // s.H, s.V // s.H
    return {
        "q": draw(s.B, s.H, Z) * Z**-0.25,
        "k": draw(s.B, s.H, Z) * Z**-0.25,
        "v": draw(s.B, s.H, V),
        "k_cache": draw(s.B, s.H, s.C, Z) * Z**-0.25,
        "v_cache": draw(s.B, s.H, s.C, V),
        "slot": torch.full((s.B,), s.C - 1, device=draw.device),
    }


def _attention_step_work(s: Sizes, size: int) -> Work:
    pairs = s.B * s.C * (s.Z + s.V)
    return Work(size * pairs, 2 * pairs)


COSTS: dict[str, Cost] = {
    "cema": Cost(cema, "B L D N", _cema, _cema_pass(False), _cema_pass(True)),
    # x is read twice, for the statistics and to be normalised; in the backward pass x and dy are.
    "timestep_norm": Cost(
        timestep_norm, "B L D G", _timestep_norm, _elements(3, 8, "D"), _elements(5, 16, "D")
    ),
    "chunk_attention": Cost(
        chunk_attention, "B L H Z V C", _chunk_attention, _attention_forward, _attention_backward
    ),
    # z in, q and k out; backward z, dq and dk in, dz out. The turn is not counted: it depends on the place alone.
    "qk_rope": Cost(qk_rope, "B L H Z", _qk_rope, _elements(3, 13, "Z"), _elements(4, 21, "Z")),
    "rms_norm": Cost(rms_norm, "B L D", _rms_norm, _elements(2, 5, "D"), _elements(3, 12, "D")),
    # Three times in a block: in the feed-forward network, at the gate of attention, and on the values without a gate.
    "swiglu": Cost(swiglu, "B L F", _gate("F"), _elements(3, 5, "F"), _elements(5, 10, "F")),
    "gate": Cost(swiglu, "B L V", _gate("V"), _elements(3, 5, "V"), _elements(5, 10, "V")),
    "silu": Cost(swiglu, "B L V", _gate("V", alone=True), _elements(2, 4, "V"), _elements(3, 8, "V")),
    "layer_norm": Cost(layer_norm, "B L D", _layer_norm, _elements(2, 7, "D"), _elements(3, 14, "D")),
    "linear_cross_entropy": Cost(
        linear_cross_entropy, "B L D vocab_size", _linear_cross_entropy,
        _linear_cross_entropy_forward, _linear_cross_entropy_backward, calls=0,
    ),
    "norm_cema_step": Cost(
        norm_cema_step, "B D N G", _norm_cema_state, _norm_cema_work, None, prepared=True
    ),
    "attention_step": Cost(
        attention_step, "B H Z V C", _attention_state, _attention_step_work, None, prepared=True
    ),
}  # fmt: skip
"""Op, or a use of one, -> what it costs. A new op joins `megalodon profile` and `make gpu-check` by an entry here."""
