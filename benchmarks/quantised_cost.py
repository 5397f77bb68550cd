"""What quantising costs a trained model: bits per byte on the validation part of its run, and the size of its file.

    megalodon pretrain quickstart
    python benchmarks/quantised_cost.py quickstart --tokens 400000

Rows that `megalodon convert --quantize` does not write (other groups, matrices left out) are what its choices were made
from: there the matrices of the model are replaced by what their integers stand for. Sizes are those of the tensors.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megalodon.checkpoint.tensors import load_model
from megalodon.checkpoint.weight_files import tensors_in_memory
from megalodon.data.loader import token_bytes_table, validation_batches
from megalodon.data.prepare import open_prepared
from megalodon.evaluation.perplexity import evaluate
from megalodon.interop.conversion import cast_to
from megalodon.interop.quantise import quantise
from megalodon.model.layers import dequantised
from megalodon.model.megalodon import Megalodon
from megalodon.model.quantised import OUTER, Quantisation, quantised_matrices, stored_as
from megalodon_cli import checkpoints

VARIANTS: dict[str, tuple[Quantisation, bool]] = {
    "int8": (Quantisation(kind="int8"), True),
    "int8, embedding and output bf16": (Quantisation(kind="int8"), False),
    "int4, groups of 32": (Quantisation(kind="int4", group_size=32), True),
    "int4, groups of 64": (Quantisation(kind="int4", group_size=64), True),
    "int4, groups of 128": (Quantisation(kind="int4", group_size=128), True),
}
"""Name -> how, and whether embedding and output matrix are int8 too."""


def size_of(model: Megalodon, held: dict[str, Quantisation]) -> int:
    """Bytes of the tensors, matrices in `held` as integers, other matrices in bf16 if nothing is held so."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    forms = cast_to(model.config, tensors_in_memory(state), "bf16").forms
    total = 0
    for name, form in forms.items():
        if name in held:
            parts = stored_as(name, form.shape, held[name]).values()
            total += sum(
                torch.empty(shape, dtype=getattr(torch, dtype), device="meta").nbytes for shape, dtype in parts
            )
        elif not held or name in OUTER:
            total += form.num_bytes
        else:
            total += form.num_values * (8 if form.dtype == "int64" else 4)
    return total


@torch.no_grad()
def replaced(model: Megalodon, held: dict[str, Quantisation]) -> None:
    """Give the matrices the values that their integers stand for."""
    for name, how in held.items():
        parameter: Tensor = model.get_parameter(name)
        kind = "int8" if name in OUTER else how.kind
        integers, scale = quantise(parameter.detach(), kind, how)
        parameter.copy_(dequantised(integers, scale, parameter.shape[1]))


def main() -> None:
    """Print a line of JSON for each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a finished run of `megalodon pretrain`")
    parser.add_argument("--store", type=Path, help="its token store; data/NAME unless it is elsewhere")
    parser.add_argument("--tokens", type=int, default=400_000)
    arguments = parser.parse_args()
    directory = checkpoints.model_directory(arguments.run)
    prepared = open_prepared(arguments.store or Path("data") / Path(arguments.run).name)
    info = json.loads((directory / "megalodon.json").read_text())
    table = token_bytes_table(prepared.tokenizer)

    def batches() -> Iterator[object]:
        yield from validation_batches(prepared.valid, info["seq_len"], info["isolate"], 8, arguments.tokens)

    def score(change: Callable[[Megalodon], None]) -> float:
        model = load_model(directory)
        change(model)
        found = evaluate(model, batches(), table, prepared.tokenizer.vocab_size)  # type: ignore[arg-type]
        assert found is not None
        return found.bits_per_byte

    plain = load_model(directory)
    whole, reference = score(lambda model: None), size_of(plain, {})

    def narrow(model: Megalodon) -> None:
        for parameter, other in zip(model.parameters(), load_model(directory).bfloat16().parameters(), strict=True):
            parameter.data = other.float().detach()

    rows = [("float32", whole, sum(t.nbytes for t in plain.state_dict().values())), ("bf16", score(narrow), reference)]
    for name, (how, outer) in VARIANTS.items():
        held = {n: how for n in quantised_matrices(plain.config) if outer or n not in OUTER}
        rows.append((name, score(lambda model, held=held: replaced(model, held)), size_of(plain, held)))  # type: ignore[misc]
    for name, loss, size in rows:
        row = {"weights": name, "bits_per_byte": round(loss, 5), "cost_percent": round(100 * (loss / whole - 1), 3)}
        sys.stdout.write(json.dumps({**row, "bytes": size, "of_bf16": round(size / reference, 3)}) + "\n")


if __name__ == "__main__":
    main()
