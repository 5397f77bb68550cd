"""How much memory `megalodon convert` takes, on a random model of any preset. Makes the model, converts it, reports.

    python benchmarks/convert_memory.py --folder /big/disk --preset paper-7b --dtype bf16 --to native
    python benchmarks/convert_memory.py --folder /big/disk --preset mega200M --dtype fp32 --to ref --no-verify

The command runs in a process of its own, whose largest resident memory the system reports when it has ended; that of
the process which reads `.pth` files is among it. The model stays in the folder and is used again.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from megalodon.checkpoint.store import write_json
from megalodon.checkpoint.tensor_files import Form
from megalodon.checkpoint.tensors import finish_directory
from megalodon.checkpoint.weight_files import Tensors, write_weights
from megalodon.interop.conversion import cast_to
from megalodon.interop.sources import state_dict_of
from megalodon.model.megalodon import PRESETS, ModelConfig


def random_model(directory: Path, config: ModelConfig, dtype: str) -> None:
    """Write a model directory with random weights, one tensor in memory at a time."""
    shapes = state_dict_of(config)
    forms = {n: Form(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in shapes.items()}

    def draw(name: str) -> torch.Tensor:
        if not forms[name].torch_dtype.is_floating_point or "prior" in name:
            return torch.zeros(forms[name].shape, dtype=forms[name].torch_dtype)
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
        return 0.02 * torch.randn(forms[name].shape, generator=torch.Generator().manual_seed(seed))

    directory.mkdir(parents=True)
    write_json(directory / "config.json", {"model_type": "megalodon", **config.model_dump(mode="json")})
    tensors = cast_to(config, Tensors(forms, draw), dtype)  # type: ignore[arg-type]
    finish_directory(directory, write_weights(directory, tensors, 2 * 10**9), {})


def measured(command: list[str]) -> tuple[int, int, float, str]:
    """Run a command; its exit code, largest resident bytes, seconds and output."""
    begin = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024, time.monotonic() - begin, said


def main() -> None:
    """Make, convert, report a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--preset", choices=PRESETS, default="paper-7b")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--to", default="native", choices=("native", "hf", "ref"))
    parser.add_argument("--layers", type=int, help="only so many layers: memory depends on one of them")
    parser.add_argument("--cast", choices=("fp32", "bf16"), help="--dtype of the conversion")
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--and-back", action="store_true", help="also convert the result back to native")
    arguments = parser.parse_args()
    sizes = PRESETS[arguments.preset] | ({} if arguments.layers is None else {"num_layers": arguments.layers})
    config = ModelConfig(vocab_size=32000, **sizes)
    source = arguments.folder / f"{arguments.preset}-{config.num_layers}-{arguments.dtype}"
    if not (source / "megalodon.json").exists():
        shutil.rmtree(source, ignore_errors=True)
        random_model(source, config, arguments.dtype)
    steps = [(source, arguments.folder / "converted", arguments.to)]
    if arguments.and_back:
        steps.append((steps[0][1], arguments.folder / "back", "native"))
    options = ["--no-verify"] if arguments.no_verify else []
    options += ["--dtype", arguments.cast] if arguments.cast else []
    for place, target, to in steps:
        shutil.rmtree(target, ignore_errors=True)
        command = [sys.executable, "-m", "megalodon_cli", "convert", str(place), str(target), "--to", to, *options]
        code, memory, seconds, said = measured(command)
        size = sum(path.stat().st_size for path in target.glob("*") if path.suffix in (".safetensors", ".pth"))
        row = {
            "parameters": config.num_parameters(),
            "dtype": arguments.dtype,
            "from": place.name,
            "to": to,
            "verified": not arguments.no_verify,
            "weights_gb": round(size / 1e9, 2),
            "peak_rss_gb": round(memory / 1e9, 2),
            "seconds": round(seconds),
            "exit_code": code,
            "said": said.splitlines()[1:2],
        }
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
    for _, target, _ in steps:
        shutil.rmtree(target, ignore_errors=True)


if __name__ == "__main__":
    main()
