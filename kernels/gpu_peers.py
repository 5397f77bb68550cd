"""What one would use instead of an op or a layer, in plain PyTorch: the peers that gpu_check.py times beside ours.

Not here: what is better (the table of gpu_check.py).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, rms_norm, scaled_dot_product_attention, silu

from megalodon_kernels.costs import COSTS, Draw, Inputs, Sizes

DTYPE = torch.bfloat16

Peer = tuple[Callable[[], Any], list[Tensor]]
"""A forward pass, and the tensors that its gradients are taken for."""


def _fft_cema(sizes: Sizes, device: torch.device) -> Peer:
    """CEMA as a convolution by FFT, padded to twice the length, with the kernel of length L built each time."""
    x, p, log_decay, angle, gamma, omega = _leaves("cema", sizes, device).values()
    steps = torch.arange(sizes.L, device=device)

    def kernel() -> Tensor:
        total = torch.zeros(sizes.D, sizes.L, device=device)
        for n in range(sizes.N):  # all averages at once would take 16 times the memory
            power = torch.exp(torch.complex(log_decay[:, n, None], angle[:, n, None]).to(torch.complex64) * steps)
            total = total + (torch.view_as_complex(gamma[:, n])[:, None] * p[:, n, None] * power).real
        return total

    def forward() -> Tensor:
        u = x.float().transpose(1, 2)
        size = 2 * sizes.L
        y = torch.fft.irfft(torch.fft.rfft(u, size) * torch.fft.rfft(kernel(), size), size)[..., : sizes.L]
        return (y + omega[:, None] * u).transpose(1, 2).to(x.dtype)

    return forward, [x, p, log_decay, angle, gamma, omega]


def _sliced_attention(sizes: Sizes, device: torch.device) -> Peer:
    """PyTorch's fused attention over the chunks, the values in slices as wide as a key: what has ready-made kernels."""
    inputs = _leaves("chunk_attention", sizes, device)
    C, width = min(sizes.C, sizes.L), sizes.Z // sizes.H
    parts = [inputs[name] for name in "qkv"]

    def chunks(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, C)).flatten(0, 1).transpose(1, 2)

    def forward() -> Tensor:
        q, k, v = map(chunks, parts)
        slices = [scaled_dot_product_attention(q, k, s, is_causal=True, scale=1.0) for s in v.split(width, -1)]
        return torch.cat(slices, -1)

    return forward, parts


def _eager(name: str, call: Callable[[Inputs], Tensor]) -> Callable[[Sizes, torch.device], Peer]:
    def peer(sizes: Sizes, device: torch.device) -> Peer:
        inputs = _leaves(name, sizes, device)
        return lambda: call(inputs), [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]

    return peer


def _layer_norm(i: Inputs) -> Tensor:
    x = i["x"]
    return layer_norm(x, x.shape[-1:], (1 + i["weight"]).to(x.dtype), i["bias"].to(x.dtype))


PEERS: dict[str, Callable[[Sizes, torch.device], Peer]] = {
    "cema": _fft_cema,
    "chunk_attention": _sliced_attention,
    "rms_norm": _eager("rms_norm", lambda i: rms_norm(i["x"], i["x"].shape[-1:], (1 + i["weight"]).to(i["x"].dtype))),
    "layer_norm": _eager("layer_norm", _layer_norm),
    "swiglu": _eager("swiglu", lambda i: silu(i["a"]) * i["b"]),
}
"""Op -> what one would use instead; an op without an entry has none."""


def _leaves(name: str, sizes: Sizes, device: torch.device) -> Inputs:
    """The inputs of an op, those with a gradient as leaves."""
    inputs = COSTS[name].inputs(sizes, Draw(DTYPE, device))
    return {n: x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in inputs.items()}


def llama_layer(s: Sizes, draw: Draw) -> Peer:
    """A layer of Llama 2 7B with PyTorch's fused full attention: D / 128 heads, feed-forward width 11,008."""
    heads, hidden = s.D // 128, 11_008
    shapes = [(3 * s.D, s.D), (s.D, s.D), (2 * hidden, s.D), (s.D, hidden)]
    w_in, w_out, w_up, w_down = (draw(*shape).mul_(shape[1] ** -0.5).requires_grad_() for shape in shapes)
    x, scale = draw(1, s.L, s.D).requires_grad_(), draw(s.D).requires_grad_()
    angle = torch.arange(s.L, device=draw.device)[:, None] / 10_000 ** (torch.arange(64, device=draw.device) / 64)
    cos, sin = (torch.cat([t, t], -1).to(x.dtype) for t in (angle.cos(), angle.sin()))

    def turned(y: Tensor) -> Tensor:
        a, b = y.chunk(2, -1)
        return y * cos + torch.cat([-b, a], -1) * sin

    def forward() -> Tensor:
        y = rms_norm(x, (s.D,), scale)
        q, k, v = linear(y, w_in).view(1, s.L, 3, heads, 128).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True)
        h = x + linear(mixed.transpose(1, 2).flatten(2), w_out)
        up, gate = linear(rms_norm(h, (s.D,), scale), w_up).chunk(2, -1)
        return h + linear(silu(gate) * up, w_down)

    return forward, [x, scale, w_in, w_out, w_up, w_down]
