"""The model written down once more, from the equations alone: one row, loops over time, float64, no op of ours.

Tests compare with it where no recording is at hand. Deliberately naive: a document is a list of tokens, attention looks
at all earlier tokens and drops those of other chunks, statistics are means over everything seen so far.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import silu, softmax

from megalodon.model.megalodon import ModelConfig


def logits(config: ModelConfig, weights: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """Logits (T, outputs) of one document, for a state dict under the released names."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = w["embed.weight"][tokens]
    if config.scale_emb:
        x = x * config.model_dim**0.5
    for i in range(config.num_layers):
        part = {name.removeprefix(f"layers.{i}."): t for name, t in w.items() if name.startswith(f"layers.{i}.")}
        x = block(config, part, x, w["rope.freqs"])
    return timestep_norm(config, w, "output.final_norm.", x) @ w["output.output.weight"].T


def block(c: ModelConfig, w: dict[str, Tensor], x: Tensor, freqs: Tensor) -> Tensor:
    """(T, D) -> (T, D)."""
    T, H = len(x), c.num_heads
    u = timestep_norm(c, w, "mega.timenorm.", x)
    m = cema(c, w, u)
    m = m / torch.sqrt(m.square().mean(-1, keepdim=True) + c.norm_eps)
    if c.norm_affine:
        m = m * (1 + w["mega.rmsnorm.weight"])
    z = (m @ w["mega.wz.weight"].T + w["mega.wz.bias"]).view(T, H, -1)
    z = (z / torch.sqrt(z.square().mean(-1, keepdim=True) + c.norm_eps)).view(T, -1)
    scale = math.sqrt(c.z_dim // H)
    q = (z * (1 + w["mega.gamma"][0]) / scale + w["mega.beta"][0]).view(T, H, -1)
    k = (z * (1 + w["mega.gamma"][1]) / scale + w["mega.beta"][1]).view(T, H, -1)
    v = silu(u @ w["mega.wv.weight"].T + w["mega.wv.bias"]).view(T, H, -1)
    r = silu(m @ w["mega.wr.weight"].T + w["mega.wr.bias"])
    attended = torch.zeros_like(v)
    for t in range(T):
        same_chunk = [s for s in range(t + 1) if s // c.chunk_size == t // c.chunk_size]
        for h in range(H):
            scores = torch.stack(
                [
                    turned(q[t, h], t % c.chunk_size, freqs) @ turned(k[s, h], s % c.chunk_size, freqs)
                    for s in same_chunk
                ]
            )
            attended[t, h] = softmax(scores, 0) @ v[same_chunk, h]
    y = m @ w["mega.wh1.weight"].T + w["mega.wh1.bias"] + (attended.view(T, -1) * r) @ w["mega.wh2.weight"].T + x
    f = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, unbiased=False, keepdim=True) + c.norm_eps)
    if c.norm_affine:
        f = f * (1 + w["nffn.norm.weight"]) + w["nffn.norm.bias"]
    hidden = silu(f @ w["nffn.fc1.weight"].T)
    if c.swiglu:
        hidden = hidden * (f @ w["nffn.fc3.weight"].T)
    out = hidden @ w["nffn.fc2.weight"].T
    return x + (w["nffn.alpha"] * out if c.rescale_nffn else out)


def turned(x: Tensor, position: int, freqs: Tensor) -> Tensor:
    """Adjacent pairs rotated by position · frequency."""
    pairs = x.view(-1, 2)
    cos, sin = torch.cos(position * freqs), torch.sin(position * freqs)
    even, odd = pairs[:, 0], pairs[:, 1]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten()


def timestep_norm(c: ModelConfig, w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Mean and variance of everything a group has seen, by definition: over a growing prefix."""
    groups = x.view(len(x), c.norm_num_groups, -1)
    rows = []
    for t in range(len(x)):
        seen = groups[: t + 1].transpose(0, 1).flatten(1)  # (G, all elements so far)
        mean, var = seen.mean(1), seen.var(1, unbiased=False)
        rows.append(((groups[t] - mean[:, None]) / torch.sqrt(var[:, None] + c.norm_eps)).flatten())
    return torch.stack(rows) * (1 + w[name + "weight"]) + w[name + "bias"]


def cema(c: ModelConfig, w: dict[str, Tensor], x: Tensor) -> Tensor:
    """The recurrence, feature by feature and component by component."""
    alpha, delta = w["mega.cema.alpha"][..., 0].sigmoid(), w["mega.cema.delta"][..., 0].sigmoid()
    base = w["mega.cema.theta"][:, 0, 0].sigmoid() * 2 * math.pi / c.cema_ndim
    angle = base[:, None] * torch.arange(1, c.cema_ndim + 1)
    q = (1 - alpha * delta) * torch.complex(torch.cos(angle), torch.sin(angle))
    gamma = torch.complex(w["mega.cema.gamma"][..., 0], w["mega.cema.gamma"][..., 1]) / math.sqrt(c.cema_ndim)
    h, rows = torch.zeros_like(q), []
    for x_t in x:
        h = q * h + alpha * x_t[:, None]
        rows.append((gamma * h).sum(1).real + w["mega.cema.omega"][:, 0] * x_t)
    return torch.stack(rows)
