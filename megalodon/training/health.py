"""How each layer of a model in training is: how far back it remembers, how its statistics and scales stand.

    health_row(model, state) -> {"kind": "health", "layers": [{…}, …], "final_norm": {…}}

Reads parameters and one state, takes no gradient and runs no layer. Not here: when to look (loop.py), the checks of
`megalodon doctor` (profiling/health.py).
"""

from typing import Any

import torch
from torch import Tensor

from megalodon.model.architectures import LanguageModel, ModelState
from megalodon.model.cema import Cema
from megalodon.model.megalodon import Megalodon


@torch.no_grad()
def health_row(model: LanguageModel, state: ModelState | None) -> dict[str, Any] | None:
    """Return the row of kind `health` of metrics.jsonl, one entry a layer; None for a model without CEMA.

        memory       tokens, over the D channels: median, 99.9 percentile and maximum of `memory_tokens`
        decay        |q| over all D x N averages: 99.9 percentile and maximum
        gamma        Frobenius norm of CEMA's read-out weights
        query, key   norms of the scales 1 + gamma of queries and keys
        variance     running variance of TimestepNorm over rows and groups: minimum, maximum, share below norm_eps
        cema_state   largest modulus of a complex average

    Args:
        model: its parameters are read.
        state: what the rows of the last pass left behind; None leaves variance and cema_state out.
    """
    if not isinstance(model, Megalodon):
        return None
    layers = []
    for number, block in enumerate(model.layers):
        mega: Any = block.mega
        decay = mega.cema.coefficients()[1].exp().flatten()
        scales = 1 + mega.gamma
        layer = {
            "memory": _spread(memory_tokens(mega.cema)),
            "decay": {"p99.9": float(decay.quantile(0.999)), "max": float(decay.max())},
            "gamma": float(mega.cema.gamma.norm()),
            "query": float(scales[0].norm()),
            "key": float(scales[1].norm()),
        }
        if state is not None:
            after = state.layers[number]
            layer["variance"] = _variance(after.norm.var, model.config.norm_eps)
            layer["cema_state"] = float(torch.view_as_complex(after.cema.contiguous()).abs().max())
        layers.append(layer)
    row: dict[str, Any] = {"kind": "health", "layers": layers}
    return row if state is None else row | {"final_norm": _variance(state.norm.var, model.config.norm_eps)}


@torch.no_grad()
def memory_tokens(cema: Cema) -> Tensor:
    """Return how far back each channel remembers, in tokens: (D,) float64, on the device of the parameters.

    Average n of channel d forgets by 1/e in m = -1/log|q| tokens and answers an input of j tokens ago with at most
    w exp(-j/m), w = p |gamma|/√N. The memory of the channel is the mean age of what it hears under that envelope:

        M_d = ∫ j Σ_n w_dn exp(-j/m_dn) dj / ∫ Σ_n w_dn exp(-j/m_dn) dj = Σ_n w_dn m_dn² / Σ_n w_dn m_dn

    With one average it is m itself; averages that are not read out (gamma = 0) do not count.
    """
    p, log_decay, _, gamma = cema.coefficients()
    tokens = -1 / log_decay
    heard = p.double() * gamma.double().norm(dim=-1) * tokens
    memory: Tensor = (heard * tokens).sum(-1) / heard.sum(-1)
    return memory


def _spread(values: Tensor) -> dict[str, float]:
    """Median, 99.9 percentile and maximum."""
    return {"median": float(values.median()), "p99.9": float(values.quantile(0.999)), "max": float(values.max())}


def _variance(var: Tensor, eps: float) -> dict[str, float]:
    return {"min": float(var.min()), "max": float(var.max()), "below_eps": float((var < eps).double().mean())}
