"""The memory of a run on one device, estimated in microseconds: what `recipes ls` shows.

    least_memory(model_config, train, optim, seq_len=8192, gpu=False)        # bytes, with one window a pass

A closed form: the coefficients are what the ops keep for the pass back, read off a plan (plan.py), which runs them in
shape only; tests hold the two together. Documents are taken for as long as a window, and packing them costs the
portable path some more. Not here: several devices, several windows, anything but memory.
"""

from typing import NamedTuple

from megalodon.model.architectures import LanguageModelConfig
from megalodon.model.llama import LlamaConfig
from megalodon.model.megalodon import ModelConfig
from megalodon.training.memory import logits_bytes, state_bytes
from megalodon.training.optim import OptimConfig
from megalodon.training.plan import TrainConfig


class _Layer(NamedTuple):
    """Bytes that a block keeps of a window, by recompute policy."""

    none: float
    attention: float
    block: float


def least_memory(
    config: LanguageModelConfig, train: TrainConfig, optim: OptimConfig, *, seq_len: int, gpu: bool, reserve: int = 0
) -> int:
    """Return the bytes of a run on one device whose passes have one window each.

    Args:
        gpu:     in bfloat16 by the kernels of a GPU, else in float32 by the portable path.
        reserve: bytes of the process beside its tensors.
    """
    T, D, n = seq_len, config.model_dim, config.num_layers
    count = config.num_parameters()
    outer = config.num_outputs * D * (1 if config.share_emb else 2)
    bf16 = train.precision == "bf16-mixed" or (train.precision == "auto" and gpu)
    layer = _megalodon(config, T, bf16) if isinstance(config, ModelConfig) else _llama(config, T, bf16)
    kept = {"none": layer.none, "attention": layer.attention, "block": layer.block}[train.recompute]
    # The pass back begins with what is computed again: a whole block, or the attention half once the other is done.
    again = {"none": 0.0, "attention": max(0.0, layer.none - 2 * kept + layer.block), "block": layer.none - kept}
    cast = 2 * (count - outer) if bf16 and train.recompute == "none" else 0  # weights in bfloat16 are kept too
    weights, moments, averages = state_bytes(count, optim)
    logits = logits_bytes(min(train.loss_chunk, T), config.num_outputs, D, bf16=bf16, written_over=gpu)
    ends = 4 * config.num_outputs * D + 12 * T * D + logits
    return round(2 * weights + moments + averages + n * kept + again[train.recompute] + cast + ends + reserve)


def _megalodon(config: ModelConfig, T: int, bf16: bool) -> _Layer:
    D, Z, V, F, H = config.model_dim, config.z_dim, config.value_dim, config.ffn_hidden_dim, config.num_heads
    N, G, gate = config.cema_ndim, config.norm_num_groups, int(config.swiglu)
    if bf16:
        half: float = T * ((10 + 2 * gate) * D + (4 + 2 * gate) * F + 8)
        whole: float = (
            T * ((26 + 2 * gate) * D + 6 * Z + 10 * V + (4 + 2 * gate) * F + 12 * G + 32 + 4 * H) + 60 * D * N
        )
    else:
        half = T * (12 * D + 8 * (1 + gate) * F + 8)
        states = (T / 4 + 68) * D * N
        whole = T * (24 * D + 12 * Z + 24 * V + 8 * (1 + gate) * F + 16 * G + 20 + 4 * H) + states
    return _Layer(whole, half, 4 * T * D)


def _llama(config: LlamaConfig, T: int, bf16: bool) -> _Layer:
    D, F, H = config.model_dim, config.ffn_hidden_dim, config.num_heads
    whole, inner = (34, 8) if bf16 else (40, 16)
    return _Layer(T * (whole * D + inner * F + 4 * H + 8), T * (20 * D + inner * F + 8), 4 * T * D)
