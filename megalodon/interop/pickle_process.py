"""A process of its own that opens `.pth` files and hands over the bytes of their tensors; run by path, never imported.

    python -I pickle_process.py < {"paths": […], "memory": bytes}    then one {"file": 0, "name": "embed.weight"} a line

It answers the first line with one line of JSON, {"tensors": [{name: [dtype, shape]}, …]} or {"error": "…"},
and each further one with the bytes of that tensor. Files are opened with `weights_only`, which runs nothing of what is
in them. Whatever is wrong ends this process alone: it can write no file, start no core, take no more memory than it was
given, and it dies with the one that started it.
"""

import ctypes
import json
import os
import re
import resource
import signal
import sys
from typing import IO, Any

import torch
from torch import Tensor

_PR_SET_PDEATHSIG, _MADV_DONTNEED, _PAGE = 1, 4, 4096
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")


def main() -> None:
    """Answer until the other side has no more questions."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints is no answer
    libc = ctypes.CDLL(None)
    if sys.platform == "linux":
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    request = json.loads(sys.stdin.buffer.readline())
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_AS)  # it can be lowered only
    memory = request["memory"] + _taken()
    memory = memory if most == resource.RLIM_INFINITY else min(memory, most)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    try:
        opened = [_opened(path) for path in request["paths"]]
    except BaseException as error:
        answers.write(json.dumps({"error": _reason(error)}).encode() + b"\n")
        return
    listed = [{n: [str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in file.items()} for file in opened]
    answers.write(json.dumps({"tensors": listed}).encode() + b"\n")
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        tensor = opened[asked["file"]][asked["name"]]
        _send(answers, tensor)
        _forget(libc, tensor)


def _taken() -> int:
    """Bytes of address space that Python and torch take already."""
    try:
        with open("/proc/self/statm") as sizes:
            return int(sizes.read().split()[0]) * resource.getpagesize()
    except OSError:  # a system without it
        return 8 * 10**9


def _opened(path: str) -> dict[str, Tensor]:
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    if not isinstance(found, dict):
        raise TypeError(f"holds {type(found).__name__}; expected a state dict, tensors by name")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise TypeError(f"holds {type(value).__name__} under {name!r}; expected a state dict, tensors by name")
        if not name.isprintable() or len(name) > 512:
            raise TypeError(f"names a tensor {name[:80]!r}; expected at most 512 characters that print")
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise TypeError(f"{name} is {value.layout} on {value.device}; expected a plain tensor")
        if value.nbytes > value.untyped_storage().nbytes():
            raise TypeError(f"{name} repeats its values to {tuple(value.shape)}; expected a plain tensor")
    return {name: value.detach() for name, value in found.items()}


def _reason(error: BaseException) -> str:
    """One line: what is wrong, without the library's advice to switch the protection off."""
    if code := _REFUSED.search(str(error)):
        return f"holds code ({code[1]}), which is never run; expected plain tensors"
    if (
        isinstance(error, MemoryError)
        or "can't allocate memory" in str(error)
        or "Cannot allocate memory" in str(error)
    ):
        return "needs more memory than its size explains"
    text = " ".join(str(error).split())
    text = re.sub(r"^Weights only load failed.*?WeightsUnpickler error: ", "", text)
    text = re.split(r" Check the documentation|Please file an issue|\. ", text)[0][:200]
    return text if isinstance(error, TypeError) else f"cannot be read as tensors: {text or type(error).__name__}"


def _send(answers: IO[bytes], tensor: Tensor) -> None:
    view = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    while view:
        view = view[answers.write(view[: 1 << 26]) :]


def _forget(libc: Any, tensor: Tensor) -> None:
    """Give the pages of a mapped tensor back; they are read again from the file if they are asked for again."""
    storage = tensor.untyped_storage()
    begin = -(-storage.data_ptr() // _PAGE) * _PAGE
    end = (storage.data_ptr() + storage.nbytes()) // _PAGE * _PAGE
    if end > begin and _is_mapped(begin):
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)


def _is_mapped(address: int) -> bool:
    """Whether an address lies in a file's pages: those alone come back by themselves."""
    try:
        with open("/proc/self/maps") as maps:
            for line in maps:
                place, _, _, _, inode = line.split(maxsplit=5)[:5]
                low, high = (int(part, 16) for part in place.split("-"))
                if low <= address < high:
                    return inode != "0"
    except (OSError, ValueError):
        return False
    return False


if __name__ == "__main__":
    main()
