"""CEMA, forward and backward, against the same average as a convolution by FFT; and what each keeps for the backward.

The convolution is the formulation of the released code in plain PyTorch: a complex kernel of the whole length from the
powers of q, and real FFTs padded to twice the length. Not here: the op itself (megalodon_kernels.cema).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megalodon_kernels import cema
from timing import Contest, Ratio, Side, constant

CLOSE = 1e-4
"""Largest difference of the sides, relative to the root mean square: phases of float32 at a length of 4,096."""


class Inputs(NamedTuple):
    """Arguments of the op, leaves that want gradients; shapes as in `megalodon_kernels.cema`."""

    x: Tensor
    p: Tensor
    log_decay: Tensor
    angle: Tensor
    gamma: Tensor
    omega: Tensor


def entries(smoke: bool) -> dict[str, Callable[[], Contest]]:
    """Key -> what builds its contest."""
    length, dim = (64, 8) if smoke else (4096, 512)
    return {"cema/4096": lambda: _against_fft(length, dim, 16)}


def draw(length: int, dim: int, states: int) -> Inputs:
    """Coefficients as a new model has them, and a random x of one row."""
    draw = torch.Generator().manual_seed(0)
    alpha, delta = (0.2 * torch.randn(dim, states, generator=draw, dtype=torch.float64) for _ in range(2))
    theta = torch.logit(dim ** (-(torch.randperm(dim, generator=draw) + 1).double() / dim))
    n = torch.arange(1, states + 1)
    gamma = torch.randn(dim, states, 2, generator=draw) * math.sqrt(1 / states)
    values = Inputs(
        x=torch.randn(1, length, dim, generator=draw),
        p=alpha.sigmoid().float(),
        log_decay=torch.log1p(-alpha.sigmoid() * delta.sigmoid()),
        angle=n * (theta.sigmoid() * (2 * math.pi / states))[:, None],
        gamma=gamma,
        omega=torch.randn(dim, generator=draw) / 4,
    )
    return Inputs(*(value.requires_grad_() for value in values))


def cema_by_fft(x: Tensor, p: Tensor, log_decay: Tensor, angle: Tensor, gamma: Tensor, omega: Tensor) -> Tensor:
    """y = irfft(rfft(x) · rfft(k)), k[t] = Re Σ_n gamma p q^t, padded to 2L; plus omega x. (B, L, D) -> (B, L, D)."""
    L = x.shape[1]
    t = torch.arange(L, dtype=torch.float32, device=x.device)
    log_q = torch.complex(log_decay.float(), angle.float())
    weights = torch.view_as_complex(gamma) * p
    kernel = (weights[..., None] * torch.exp(log_q[..., None] * t)).sum(1).real  # (D, L)
    spectrum = torch.fft.rfft(x.transpose(1, 2), n=2 * L) * torch.fft.rfft(kernel, n=2 * L)
    return torch.fft.irfft(spectrum, n=2 * L)[..., :L].transpose(1, 2) + omega * x


def our_cema(*inputs: Tensor) -> Tensor:
    """The op without the state it returns."""
    return cema(*inputs)[0]


def saved_bytes(run: Callable[[], Tensor], inputs: Sequence[Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass beside its inputs, each piece of memory once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    kept: dict[int, Tensor] = {}  # holds the tensors, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _output = run()
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)


def check_equal(inputs: Inputs) -> None:
    """Compare outputs and gradients of both formulations. Raises: ArithmeticError if one is further off than 1e-4."""
    toward = torch.randn(inputs.x.shape, generator=torch.Generator().manual_seed(1))
    found = []
    for run in (our_cema, cema_by_fft):
        y = run(*inputs)
        found.append((y, *torch.autograd.grad(y, inputs, toward)))
    for name, ours, other in zip(("y", *(f"d{field}" for field in Inputs._fields)), *found, strict=True):
        error = float((ours - other).detach().square().mean().sqrt() / other.detach().square().mean().sqrt())
        if not error <= CLOSE:
            raise ArithmeticError(f"cema: {name} by FFT differs by {error:.1e} from ours; expected at most {CLOSE:.0e}")


def _against_fft(length: int, dim: int, states: int) -> Contest:
    inputs = draw(length, dim, states)
    check_equal(inputs)
    toward = torch.randn(inputs.x.shape)
    runs = {"ours": our_cema, "FFT": cema_by_fft}
    sides = {
        name: Side(lambda run=run: torch.autograd.grad(run(*inputs), inputs, toward), length)
        for name, run in runs.items()
    }
    saved = {name: saved_bytes(lambda run=run: run(*inputs), inputs) / inputs.x.nbytes for name, run in runs.items()}
    constants = [
        constant("ours: saved for backward beside the inputs, over x", saved["ours"], at_most=1.5),
        constant("FFT: saved for backward beside the inputs, over x", saved["FFT"]),
    ]
    return Contest(sides, [Ratio("speed over the FFT formulation", "ours", "FFT", at_least=24)], constants)
