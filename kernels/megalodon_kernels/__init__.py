"""The public ops of Megalodon: pure functions of tensors, state in, state out. Needs torch; Triton for its kernels."""

from megalodon_kernels.cema import cema
from megalodon_kernels.chunk_attention import chunk_attention
from megalodon_kernels.dispatch import Backend, KernelError, use_backend
from megalodon_kernels.linear_cross_entropy import LossSums, linear_cross_entropy
from megalodon_kernels.norm import layer_norm, rms_norm
from megalodon_kernels.qk_rope import qk_rope
from megalodon_kernels.swiglu import swiglu
from megalodon_kernels.timestep_norm import timestep_norm
from megalodon_kernels.timestep_norm.statistics import (
    Statistics,
    merged_statistics,
    no_statistics,
    statistics_of,
)

__all__ = [
    "Backend",
    "KernelError",
    "LossSums",
    "Statistics",
    "cema",
    "chunk_attention",
    "layer_norm",
    "linear_cross_entropy",
    "merged_statistics",
    "no_statistics",
    "qk_rope",
    "rms_norm",
    "statistics_of",
    "swiglu",
    "timestep_norm",
    "use_backend",
]
