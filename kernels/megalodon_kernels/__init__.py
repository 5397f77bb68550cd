"""The public ops of Megalodon: pure functions of tensors, state in, state out. Needs torch; Triton for its kernels."""

from megalodon_kernels.cema import cema
from megalodon_kernels.chunk_attention import chunk_attention
from megalodon_kernels.dispatch import Backend, KernelError, use_backend
from megalodon_kernels.norm import layer_norm, rms_norm
from megalodon_kernels.swiglu import swiglu
from megalodon_kernels.timestep_norm import timestep_norm
from megalodon_kernels.timestep_norm.statistics import Statistics, no_statistics

__all__ = [
    "Backend",
    "KernelError",
    "Statistics",
    "cema",
    "chunk_attention",
    "layer_norm",
    "no_statistics",
    "rms_norm",
    "swiglu",
    "timestep_norm",
    "use_backend",
]
