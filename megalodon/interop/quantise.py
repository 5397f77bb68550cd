"""Matrices -> small integers and scales, by torchao (extra `quant`).

int8: symmetric, one scale a row. int4: symmetric, one scale for each group of a row, chosen by half-quadratic
minimisation of the error (HQQ), two to a byte. Embedding and output matrix are int8 in both.
Not here: the maps that use them (model/layers.py).
"""

import logging
import warnings

import torch
from torch import Tensor

from megalodon.checkpoint.tensor_files import Form
from megalodon.checkpoint.weight_files import Tensors
from megalodon.interop.sources import state_dict_of
from megalodon.model.extras import check_installed
from megalodon.model.layers import dequantised
from megalodon.model.megalodon import ModelConfig
from megalodon.model.quantised import Kind, Quantisation, kind_of, num_groups, packed, quantised_matrices, stored_as


def require_torchao() -> None:
    """Raises: EnvironmentFault if the extra that quantising needs is not installed."""
    check_installed("torchao", "--quantize needs", "quant")


def quantised(config: ModelConfig, tensors: Tensors, quantisation: Quantisation) -> Tensors:
    """The state dict of a model with integers and scales in the place of its matrices; all else in float32.

    Args:
        tensors: exactly the state dict.
    """
    matrices = set(quantised_matrices(config))
    forms: dict[str, Form] = {}
    for name, form in tensors.forms.items():
        if name in matrices:
            forms |= {n: Form(*held) for n, held in stored_as(name, form.shape, quantisation).items()}
        elif not (config.share_emb and name == "output.output.weight"):
            forms[name] = form if not form.torch_dtype.is_floating_point else Form(form.shape, "float32")
    last: dict[str, tuple[Tensor, Tensor]] = {}

    def read(name: str) -> Tensor:
        matrix, _, part = name.rpartition(".")
        if matrix not in matrices:
            return tensors.read(name).to(forms[name].torch_dtype)
        if matrix not in last:
            last.clear()  # integers and scale are asked for one after the other, or read again
            last[matrix] = quantise(tensors.read(matrix).float(), kind_of(matrix, quantisation), quantisation)
        return last[matrix][1 if part == "scale" else 0]

    return Tensors(forms, read)


def quantise(matrix: Tensor, kind: Kind, quantisation: Quantisation) -> tuple[Tensor, Tensor]:
    """Matrix (out, in) float32 -> integers (out, in) int8 or (out, ⌈in/2⌉) uint8, scales (out, groups) float32.

    Raises: EnvironmentFault: torchao is missing.
    """
    require_torchao()
    groups = num_groups(matrix.shape[1], kind, quantisation)
    size = matrix.shape[1] // groups
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of kernels for devices that are not here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, PerRow
            from torchao.quantization.quantize_.workflows.intx.intx_choose_qparams_algorithm import (
                IntxChooseQParamsAlgorithm,
            )

            if kind == "int8":
                found = Int8Tensor.from_hp(matrix, granularity=PerRow())
                return found.qdata, found.scale
            algorithm = IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY
            found = IntxUnpackedToInt8Tensor.from_hp(
                matrix,
                (1, size),
                getattr(torch, "int4"),  # noqa: B009  # not in torch's annotations
                intx_choose_qparams_algorithm=algorithm,
            )
            return packed(found.qdata), found.scale.float()
    finally:
        logging.disable(level)


def plain(config: ModelConfig, tensors: Tensors, quantisation: Quantisation) -> Tensors:
    """The state dict that quantised tensors stand for, in float32."""
    matrices, shapes = set(quantised_matrices(config)), state_dict_of(config)
    forms = {name: Form(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in shapes.items()}

    def read(name: str) -> Tensor:
        name = "embed.weight" if config.share_emb and name == "output.output.weight" else name
        if name not in matrices:
            return tensors.read(name)
        integers = tensors.read(f"{name}.{kind_of(name, quantisation)}")
        return dequantised(integers, tensors.read(f"{name}.scale"), shapes[name].shape[1])

    return Tensors(forms, read)
