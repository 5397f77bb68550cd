"""Every kernel compiles for an H100 at the 7B width, keeps its registers and fits in shared memory.

Here the compiler runs that a GPU would run, in a process without the interpreter; `python tests/kernels/sm90.py` shows
the figures themselves.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sm90 import PRODUCTION

SHARED_MEMORY = 227 * 1024
"""Bytes a block of threads may have on sm_90."""


@pytest.fixture(scope="session")
def compiled(repository: Path) -> Any:
    """op -> figures of its kernels, each op compiled once."""
    found: dict[str, list[dict[str, Any]]] = {}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(repository / "kernels"), str(repository / "tests/kernels")])

    def figures(op: str) -> list[dict[str, Any]]:
        if op not in found:
            command = [sys.executable, str(repository / "tests/kernels/sm90.py"), op]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            found[op] = [json.loads(line) for line in done.stdout.splitlines()]
        return found[op]

    return figures


@pytest.mark.parametrize("op", PRODUCTION)
def test_kernels_keep_their_registers_and_fit_in_shared_memory(compiled: Any, op: str) -> None:
    figures = compiled(op)
    assert figures
    for kernel in figures:
        assert kernel["spills"] == 0 and kernel["stack"] == 0, kernel
        assert kernel["shared"] <= SHARED_MEMORY, kernel


@pytest.mark.parametrize("op", PRODUCTION)
def test_products_run_on_tensor_cores(compiled: Any, op: str) -> None:
    for kernel in compiled(op):
        assert (kernel["tensor_core"] > 0) == kernel["uses_tensor_cores"], kernel
