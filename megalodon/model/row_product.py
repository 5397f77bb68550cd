"""x Wᵀ + b for one row x, at the speed of reading W. Not here: products of many rows, which libraries do well.

One row makes a product a matter of memory alone, and there the usual call wastes most of a CPU: one core reads 8 to 15
GB/s of a float32 matrix by it, where plain reading reaches 22 to 28. A sum of embeddings with weights is the same
product: embedding i is what input i adds to the outputs, its weight is x_i. PyTorch's kernel for those runs at 18 to 24
GB/s, in bfloat16 too (float32 inside), if the embeddings are short. It costs one copy of the matrices.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from megalodon.model.layers import Linear

ROW_BYTES = 128
"""Bytes of an embedding: its sums stay in registers, and the kernel's prefetch, 16 embeddings ahead, is 2 KiB ahead.
Measured on one Zen 4 core over 3072 x 512 in float32: 24 GB/s at 128, 18 at 256, 15 at 512, 20 at 2048."""

Scratch = dict[Any, Tensor]
"""Buffers that the products of one decoder share, so that they stay in the cache; each is read before the next call."""


class RowProduct:
    """Linear maps of several inputs of one width, their outputs side by side; the matrices where they lie.

    Args:
        groups: the maps of each input.
    Attributes:
        widths: how the result splits: the outputs of the maps of a group, then padding before the next group.
    """

    def __init__(self, *groups: Sequence[Linear]) -> None:
        self._groups = groups
        self.widths = [width for group in groups for width in (*(len(x.weight) for x in group), 0)][:-1]

    def prepare(self, batch: int, scratch: Scratch) -> Callable[..., Tensor]:
        """A function of one (batch, in) a group, rounded to the dtype of the maps -> (batch, sum of widths)."""
        groups, dtype = self._groups, self._groups[0][0].weight.dtype
        if len(groups) == len(groups[0]) == 1:
            return lambda x: groups[0][0](x.to(dtype))

        def multiply(*xs: Tensor) -> Tensor:
            pairs = zip((x.to(dtype) for x in xs), groups, strict=True)
            return torch.cat([linear(x) for x, group in pairs for linear in group], dim=-1)

        return multiply


class BagRowProduct(RowProduct):
    """The matrices as embeddings: cut into blocks of a few outputs, in a block one row for each input, then the bias."""

    def __init__(self, *groups: Sequence[Linear]) -> None:
        weight = groups[0][0].weight
        width = ROW_BYTES // weight.element_size()
        self._inputs = weight.shape[1]
        self._biased = any(x.bias is not None for group in groups for x in group)
        parts, self._counts, self.widths = [], [], []
        for group in groups:
            matrix = torch.cat([self._with_bias(x) for x in group])
            padding = -len(matrix) % width
            parts.append(pad(matrix, (0, 0, 0, padding)))
            self._counts.append(len(parts[-1]) // width)
            self.widths += [*(len(x.weight) for x in group), padding]
        self._outputs = sum(self.widths[:-1])
        self._padded = self.widths.pop() > 0
        joined = torch.cat(parts)  # (blocks · width, inputs, and one if there is a bias)
        self._blocks = joined.unflatten(0, (-1, width)).transpose(1, 2).contiguous()

    def _with_bias(self, linear: Linear) -> Tensor:
        weight = linear.weight.detach()
        if not self._biased:
            return weight
        bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach()
        return torch.cat([weight, bias[:, None]], dim=1)

    def prepare(self, batch: int, scratch: Scratch) -> Callable[..., Tensor]:
        """See `RowProduct.prepare`."""
        blocks, (count, rows, width), outputs, padded = self._blocks, self._blocks.shape, self._outputs, self._padded
        key = (batch, count, rows, self._biased)
        if key not in scratch:
            scratch[key] = blocks.new_ones(count, batch, rows)
        repeated = scratch[key]  # the inputs, once for each block
        places = repeated[..., : self._inputs].split(self._counts)

        if batch > 1:

            def multiply(*xs: Tensor) -> Tensor:
                for place, x in zip(places, xs, strict=True):
                    place.copy_(x)
                return torch.bmm(repeated, blocks).transpose(0, 1).flatten(1)[:, :outputs]

            return multiply

        index = torch.arange(count * rows, dtype=torch.int32)
        index = scratch.setdefault(("index", count * rows), index)
        first = index[::rows].contiguous()
        embeddings, weights, bag = blocks.view(-1, width), repeated.view(-1), torch._embedding_bag_forward_only

        def add_up(*xs: Tensor) -> Tensor:
            for place, x in zip(places, xs, strict=True):
                place.copy_(x)
            y = bag(embeddings, index, first, False, 0, False, weights)[0].view(1, -1)
            return y[:, :outputs] if padded else y

        return add_up


def row_product(*groups: Sequence[Linear], pack: bool) -> RowProduct:
    """The kind for these maps: as they lie unless `pack`; a CPU has a faster layout, at the cost of a copy."""
    return (BagRowProduct if pack and groups[0][0].weight.is_cpu else RowProduct)(*groups)
