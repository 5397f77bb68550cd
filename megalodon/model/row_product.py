"""x Wᵀ + b for one row x, at the speed of reading W. Not here: products of many rows, which libraries do well.

One row makes a product a matter of memory alone, and there the usual call wastes most of a CPU: two cores read 11 GB/s
of a float32 matrix by it. A sum of embeddings with weights is the same product: embedding i is what input i adds to the
outputs, its weight is x_i. PyTorch's kernel for those reads 33 GB/s of 50 M float32 weights, and 26 in bfloat16, which
it also sums in float32. It costs one copy of the matrices.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from megalodon.model.layers import Linear

LONGEST = 448
"""Most outputs of a block. x is repeated for each block, so that few are better, but very long ones are slow too: on
two cores of Zen 4, 512 inputs to 3072 float32 outputs take 185 µs in blocks of 384, 216 of 512, 296 of 768, 252 of 128.
"""
VECTOR = 16
"""A block is a multiple of this long."""
SHARES = 4
"""Threads that share a matrix: a few saturate the memory."""

Scratch = dict[Any, Tensor]
"""Buffers that the products of one decoder share, so that they stay in the cache; none holds a value between calls."""


class RowProduct:
    """Several linear maps of one input, their outputs side by side; the matrices where they lie."""

    def __init__(self, *linears: Linear) -> None:
        self._linears = linears

    def prepare(self, batch: int, scratch: Scratch) -> Callable[[Tensor], Tensor]:
        """A function (batch, in), rounded to the dtype of the maps -> (batch, out)."""
        linears, dtype = self._linears, self._linears[0].weight.dtype
        if len(linears) == 1:
            return lambda x: linears[0](x.to(dtype))
        return lambda x: torch.cat([linear(x.to(dtype)) for linear in linears], dim=-1)


class BagRowProduct(RowProduct):
    """The matrices as embeddings: cut into blocks of outputs, in a block one row for each input, then the bias."""

    def __init__(self, *linears: Linear) -> None:
        biased = any(x.bias is not None for x in linears)
        joined = torch.cat([_with_bias(x) if biased else x.weight.detach() for x in linears])
        self._outputs, self._inputs = len(joined), linears[0].weight.shape[1]
        shares = min(torch.get_num_threads(), SHARES)
        count = shares * -(-self._outputs // (shares * LONGEST))
        width = VECTOR * -(-self._outputs // (count * VECTOR))
        padded = pad(joined, (0, 0, 0, count * width - self._outputs))
        self._blocks = padded.view(count, width, -1).transpose(1, 2).contiguous()  # (count, in or in + 1, width)

    def prepare(self, batch: int, scratch: Scratch) -> Callable[[Tensor], Tensor]:
        """See `RowProduct.prepare`."""
        blocks, (count, rows, width), outputs = self._blocks, self._blocks.shape, self._outputs
        key = batch, count, rows, self._inputs
        repeated = scratch.setdefault(key, blocks.new_ones(count, batch, rows))  # what meets the bias stays 1
        place, trim = repeated[..., : self._inputs], outputs < count * width
        if batch > 1:

            def multiply(x: Tensor) -> Tensor:
                place.copy_(x)
                return torch.bmm(repeated, blocks).transpose(0, 1).flatten(1)[:, :outputs]

            return multiply

        index = scratch.setdefault(count * rows, torch.arange(count * rows, dtype=torch.int32))
        embeddings, weights, first = blocks.view(-1, width), repeated.view(-1), index[::rows].contiguous()
        bag = torch._embedding_bag_forward_only

        def add_up(x: Tensor) -> Tensor:
            place.copy_(x)
            y = bag(embeddings, index, first, False, 0, False, weights)[0].view(1, -1)
            return y[:, :outputs] if trim else y

        return add_up


def _with_bias(linear: Linear) -> Tensor:
    """(out, in + 1): the bias, or 0, as the weight of one more input."""
    weight = linear.weight.detach()
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach()
    return torch.cat([weight, bias[:, None]], dim=1)


def row_product(*linears: Linear, pack: bool) -> RowProduct:
    """The kind for these maps: as they lie unless `pack`; a CPU has a faster layout, at the cost of a copy."""
    return (BagRowProduct if pack and linears[0].weight.is_cpu else RowProduct)(*linears)
