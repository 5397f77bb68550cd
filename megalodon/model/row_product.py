"""x Wᵀ + b for one row x, at the speed of reading W. Not here: products of many rows, which libraries do well.

One row makes a product a matter of memory alone, and there the usual call wastes most of a CPU: over 170 MB of matrices
on two cores, in float32, it reads 11 GB/s whatever the threads; the layouts below read 20 to 37 GB/s. In bfloat16 it
reads 14 GB/s, and 19 from a matrix in the library's own layout. All of that costs one copy of the matrices.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megalodon.model.layers import Linear

MAX_PARTS = 4
"""Threads that share a matrix: a few saturate the memory, and each leaves a partial result to be summed."""


class RowProduct:
    """Several linear maps of one input, their outputs side by side; the matrices where they lie."""

    def __init__(self, *linears: Linear) -> None:
        self._linears = linears

    def prepare(self, batch: int) -> Callable[[Tensor], Tensor]:
        """A function (batch, in) -> (batch, out); its result may be a buffer that the next call overwrites."""
        if len(self._linears) == 1:
            return self._linears[0]
        return lambda x: torch.cat([linear(x) for linear in self._linears], dim=-1)


def _joined(linears: Sequence[Linear]) -> tuple[Tensor, Tensor | None]:
    """(out, in) and (out,) of maps that all have a bias or none."""
    weights = [x.weight.detach() for x in linears]
    biases = [x.bias.detach() for x in linears if x.bias is not None]
    return torch.cat(weights), torch.cat(biases) if biases else None


class PackedRowProduct(RowProduct):
    """One matrix in the layout of oneDNN, which would otherwise be made anew in every call: for bfloat16."""

    def __init__(self, *linears: Linear) -> None:
        weight, self._bias = _joined(linears)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1)

    def prepare(self, batch: int) -> Callable[[Tensor], Tensor]:
        """See `RowProduct.prepare`."""
        run, weight, bias = torch.ops.mkldnn._linear_pointwise, self._weight, self._bias
        return lambda x: run(x, weight, bias, "none", [], "")


class SharedRowProduct(RowProduct):
    """A share of the matrix for each thread, the longer of its sides in memory order: for float32.

    A matrix with more outputs than inputs is transposed and shared by inputs: the partial results are summed. The
    others stay as they are and are shared by outputs.
    """

    def __init__(self, *linears: Linear) -> None:
        weight, bias = _joined(linears)
        outputs, inputs = weight.shape
        self._by_inputs = outputs > inputs
        self._parts = min(torch.get_num_threads(), MAX_PARTS)
        while (inputs if self._by_inputs else outputs) % self._parts:
            self._parts -= 1
        self._weight = weight.t().contiguous() if self._by_inputs else weight.t()  # (in, out)
        self._bias = weight.new_zeros(outputs) if bias is None else bias

    def prepare(self, batch: int) -> Callable[[Tensor], Tensor]:
        """See `RowProduct.prepare`."""
        weight, bias, parts, baddbmm = self._weight, self._bias, self._parts, torch.baddbmm
        inputs, outputs = weight.shape
        if batch > 1:
            return lambda x: torch.addmm(bias, x, weight)
        y = weight.new_empty(1, outputs)
        if self._by_inputs:
            shares, partial = weight.view(parts, -1, outputs), weight.new_empty(parts, 1, outputs)
            first = torch.cat([bias.view(1, 1, -1), bias.new_zeros(parts - 1, 1, outputs)])
            return lambda x: torch.sum(baddbmm(first, x.view(parts, 1, -1), shares, out=partial), 0, out=y)
        shares, pieces = weight.view(inputs, parts, -1).transpose(0, 1), y.view(parts, 1, -1)
        first = bias.view(parts, 1, -1)

        def by_outputs(x: Tensor) -> Tensor:
            baddbmm(first, x.expand(parts, 1, -1), shares, out=pieces)
            return y

        return by_outputs


def row_product(*linears: Linear, pack: bool) -> RowProduct:
    """The kind for these maps: as they lie unless `pack`; a CPU has faster layouts, at the cost of a copy."""
    weight = linears[0].weight
    if not pack or not weight.is_cpu:
        return RowProduct(*linears)
    return PackedRowProduct(*linears) if weight.dtype == torch.bfloat16 else SharedRowProduct(*linears)
