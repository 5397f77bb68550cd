"""`.pth` files as tensors that are read one by one, by a process that is not trusted (pickle_process.py).

    with PickledFiles([Path("consolidated.pth")]) as files:
        files.forms[0]["embed.weight"]; files.read(0, "embed.weight")

Nothing of the file is unpickled here. Not here: what the tensors mean (official_files.py).
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from megalodon.checkpoint.tensor_files import DTYPES, Form, bytes_of
from megalodon.errors import CheckpointError

SECONDS = 300.0
"""How long the process may be silent."""
HEADER_BYTES = 2**24
"""The longest list of tensors that is taken from it."""
_BESIDE_FILES = 4 * 10**9
"""Address space of the process besides the files it maps, and besides what Python and torch take (more with CUDA)."""
_TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


class PickledFiles:
    """Some `.pth` files, opened by a process of their own, which ends with the block.

    Args:
        paths: the files.
        seconds: how long the process may be silent before it is ended.
    Raises:
        CheckpointError: a file holds anything but tensors by name, code above all; or the process died or fell silent.
    """

    forms: list[dict[str, Form]]
    """Shape and dtype by name, for each file."""

    def __init__(self, paths: Sequence[Path], seconds: float = SECONDS) -> None:
        self._paths, self._seconds = list(paths), seconds
        for path in self._paths:
            if not path.is_file():
                raise CheckpointError(f"{path} is missing")

    def __enter__(self) -> Self:
        script = Path(__file__).with_name("pickle_process.py")
        # -I: neither the current directory nor a variable says what it imports; nor may one of torch's loosen the load.
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("TORCH_", "PYTHON"))}
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is answered here alone
            bufsize=0,
        )
        try:
            sizes = sum(path.stat().st_size for path in self._paths)
            self._ask({"paths": [str(path.resolve()) for path in self._paths], "memory": 2 * sizes + _BESIDE_FILES})
            self.forms = self._header()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def read(self, file: int, name: str) -> Tensor:
        """Return one tensor. Raises: CheckpointError if the process died or fell silent."""
        form = self.forms[file][name]
        tensor = torch.empty(form.shape, dtype=form.torch_dtype)
        view, at = bytes_of(tensor), 0
        self._ask({"file": file, "name": name})
        while at < len(view):
            at += self._into(view[at:])
        return tensor

    @property
    def _where(self) -> str:
        return str(self._paths[0]) if len(self._paths) == 1 else f"{self._paths[0].parent}/consolidated.NN.pth"

    def _ask(self, question: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
        except BrokenPipeError:
            raise self._ended() from None

    def _into(self, view: memoryview) -> int:
        """Read what has come, at least a byte."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + self._seconds
        while not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
            if time.monotonic() >= deadline:
                self._process.kill()
                raise CheckpointError(f"{self._where}: nothing came of it for {self._seconds:g} s; it was given up")
        count = os.readv(descriptor, [view[: 1 << 26]])
        if not count:
            raise self._ended()
        return count

    def _ended(self) -> CheckpointError:
        code = self._process.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return CheckpointError(
            f"{self._where}: the process that reads it ended ({how}); expected plain tensors by name"
        )

    def _header(self) -> list[dict[str, Form]]:
        line = bytearray()
        piece = bytearray(1 << 16)
        while not line.endswith(b"\n"):
            if len(line) > HEADER_BYTES:
                raise CheckpointError(f"{self._where}: its list of tensors has no end")
            line += piece[: self._into(memoryview(piece))]
        answer = json.loads(line)
        if "error" in answer:
            raise CheckpointError(f"{self._where} {answer['error']}")
        return [{name: self._form(name, entry) for name, entry in file.items()} for file in answer["tensors"]]

    def _form(self, name: str, entry: Sequence[Any]) -> Form:
        dtype, shape = entry
        if dtype not in _TYPES:
            raise CheckpointError(f"{self._where}: {name} is {dtype}; expected a plain float or integer type")
        return Form(tuple(int(n) for n in shape), dtype)
