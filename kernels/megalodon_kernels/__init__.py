"""The public ops of Megalodon: pure functions of tensors, state in, state out. Needs torch alone."""

from megalodon_kernels.cema import cema
from megalodon_kernels.chunk_attention import chunk_attention
from megalodon_kernels.dispatch import Backend, KernelError
from megalodon_kernels.timestep_norm import timestep_norm
from megalodon_kernels.timestep_norm.statistics import Statistics, no_statistics

__all__ = ["Backend", "KernelError", "Statistics", "cema", "chunk_attention", "no_statistics", "timestep_norm"]
