"""The step of decoding in as few PyTorch calls as it takes: the CPU path, and any device without Triton.

With one token, the count of calls is the time: each costs one or two microseconds, its arithmetic less. So buffers and
views are made when a step is prepared. States are float64 on a CPU, so that millions of steps do not add up their
roundings, and so is the arithmetic between them.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def norm_step_portable(
    count: Tensor, mean: Tensor, var: Tensor, scale: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """See `megalodon_kernels.decode.norm_step`."""
    (B, G), D, scale, bias = mean.shape, len(scale), scale.to(mean.dtype), bias.to(mean.dtype)
    wide, y = mean.new_empty(B, D), torch.empty(B, D, dtype=dtype, device=mean.device)
    groups, grid, each_mean, width = wide.view(B * G, -1), wide.view(B, G, -1), mean[..., None], (D // G,)
    rate, step, left, deviation = mean.new_empty(B, 1), *(torch.empty_like(mean) for _ in range(3))
    each_deviation, floor = deviation[..., None], mean.new_tensor(eps)
    counter, one = count[:, None], mean.new_ones(1, 1)
    scale, bias = scale.view(G, -1), bias.view(G, -1)

    def run(x: Tensor) -> Tensor:
        wide.copy_(x)
        # A layer norm gives mean and 1/deviation of each group in half the time of var_mean. A variance of 0 is 1/∞².
        _, m, r = torch.native_layer_norm(groups, width, None, None, 0.0)
        m, s = m.view(B, G), r.view(B, G).pow_(-2)
        torch.div(one, counter.add_(1), out=rate)
        # The way of the mean times what is then left of it is d²(n - 1)/n, and 0 at the first token.
        torch.sub(m, mean, out=step)
        mean.lerp_(m, rate)
        var.lerp_(s.addcmul_(step, torch.sub(m, mean, out=left)), rate)
        torch.add(var, floor, out=deviation).sqrt_()
        torch.addcmul(bias, grid.sub_(each_mean).div_(each_deviation), scale, out=grid)
        return y.copy_(wide)

    return run


def norm_cema_step_portable(
    count: Tensor,
    mean: Tensor,
    var: Tensor,
    h: Tensor,
    scale: Tensor,
    bias: Tensor,
    p: Tensor,
    q: Tensor,
    gamma: Tensor,
    omega: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """See `megalodon_kernels.decode.norm_cema_step`."""
    norm = norm_step_portable(count, mean, var, scale, bias, eps, dtype)
    states, rotate = torch.view_as_complex(h), torch.view_as_complex(q)
    # Complex numbers as pairs of reals: Re Σ gamma h is a plain sum, and p has the imaginary part 0.
    pairs, rows = h.flatten(2), h.view(-1, 1, 2 * h.shape[2])
    inflow = torch.stack([p, torch.zeros_like(p)], dim=-1).flatten(1)
    weight = (gamma * gamma.new_tensor([1, -1])).flatten(1)[..., None].repeat(len(h), 1, 1)
    wide, skip = h.new_empty(h.shape[:2]), h.new_empty(h.shape[:2])
    ema = torch.empty_like(wide, dtype=dtype)
    column, read = wide[..., None], skip.view(-1, 1, 1)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        u = norm(x)
        wide.copy_(u)
        states.mul_(rotate)
        pairs.addcmul_(inflow, column)
        torch.mul(wide, omega, out=skip)
        read.baddbmm_(rows, weight)
        return u, ema.copy_(skip)

    return run


def attention_step_portable(
    k_cache: Tensor, v_cache: Tensor, slot: Tensor
) -> Callable[[Tensor, Tensor, Tensor, int | None], Tensor]:
    """See `megalodon_kernels.decode.attention_step`."""
    B, H, C, _ = k_cache.shape
    keys, values = k_cache.flatten(0, 1), v_cache.flatten(0, 1)  # (B·H, C, ·)
    key_places, value_places = keys.flatten(0, 1), values.flatten(0, 1)
    first, time = torch.arange(B * H, device=slot.device).mul_(C), torch.arange(C, device=slot.device)
    wide = torch.promote_types(k_cache.dtype, torch.float32)
    # The values are most of what is read: a single head is cut in two, for two threads.
    parts = 2 if B * H == 1 and v_cache.shape[-1] % 2 == 0 and torch.get_num_threads() > 1 else 1
    columns = keys.mT
    pieces = values.unflatten(-1, (parts, -1)).permute(0, 2, 1, 3).flatten(0, 1)  # (B·H·parts, C, V/parts)

    def run(q: Tensor, k: Tensor, v: Tensor, longest: int | None) -> Tensor:
        place = slot if B * H == 1 else first + slot.repeat_interleave(H)
        key_places.index_copy_(0, place, k.reshape(B * H, -1).to(k_cache.dtype))
        value_places.index_copy_(0, place, v.reshape(B * H, -1).to(v_cache.dtype))
        seen = longest or C
        scores = torch.bmm(q.reshape(B * H, 1, -1).to(wide), columns[..., :seen].to(wide))
        if B > 1 or longest is None:
            later = time[:seen] > slot[:, None]
            scores.view(B, H, seen).masked_fill_(later[:, None], float("-inf"))
        weights = scores.softmax(-1).to(v_cache.dtype)
        if parts > 1:
            weights = weights.expand(parts, 1, seen)
        return torch.bmm(weights, pieces[:, :seen]).view(B, H, -1).to(v.dtype)

    return run
