"""A conversion holds a few tensors at a time, however large the model is."""

import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
from conversions import run, save

from megalodon.checkpoint import weight_files
from megalodon.interop import parity

ROOT = Path(__file__).parents[2]
BENCHMARK = ROOT / "benchmarks/convert_memory.py"


@pytest.mark.parametrize("changes", [{}, {"verify": False}, {"dtype": "bf16"}, {"to": "ref"}], ids=str)
def test_few_tensors_are_in_memory_at_a_time(
    tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save(tmp_path / "m", num_layers=6, vocab_size=300, share_emb=False)
    largest = max(tensor.nbytes for tensor in model.state_dict().values())
    total = sum(tensor.nbytes for tensor in model.state_dict().values())
    live, peak, whole = [0], [0], weight_files.read_piece

    def counted(box: Any) -> Any:
        tensor = whole(box)
        live[0] += tensor.nbytes
        peak[0] = max(peak[0], live[0])
        weakref.finalize(tensor, lambda size=tensor.nbytes: live.__setitem__(0, live[0] - size))
        return tensor

    monkeypatch.setattr(weight_files, "read_piece", counted)
    monkeypatch.setattr(parity, "SMALL", 0)
    run(tmp_path / "m", tmp_path / "out", shard_bytes=30_000, **changes)
    assert 0 < peak[0] <= 2 * largest < total / 3


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--no-verify"], [], ["--to", "ref", "--and-back"]], ids=" ".join)
def test_resident_memory_does_not_grow_with_the_model(tmp_path: Path, options: list[str]) -> None:
    """Two layers of the 200M model and twelve: 366 MB against 882 MB of weights, of which the largest has 131 MB.

    From run to run the allocator keeps up to 200 MB of tensors of 8 to 10 MB that were freed, fewer than are mapped by
    themselves (32 MB); so the bound is two of the largest tensor, half of what the weights grow by.
    """
    peaks = []
    for layers in ("2", "12"):
        command = [sys.executable, str(BENCHMARK), "--folder", str(tmp_path), "--preset", "mega200M"]
        command += ["--dtype", "fp32", "--layers", layers, *options]
        found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        rows = [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]
        assert rows and all(row["exit_code"] == 0 for row in rows), found.stderr
        peaks.append(max(row["peak_rss_gb"] for row in rows))
    assert peaks[1] < peaks[0] + 2 * 0.131
