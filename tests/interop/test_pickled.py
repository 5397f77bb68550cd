"""`.pth` files: tensors come out whole, code never runs, and whatever is wrong is one line."""

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import run, save, save_released

from megalodon.errors import CheckpointError
from megalodon.interop import pickled
from megalodon.interop.pickled import PickledFiles


class Touch:
    """A pickle of it runs a command when it is opened freely."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.path}'",)


def test_tensors_of_every_kind_come_out_whole(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.randn(300, 200),
        "half": torch.randn(7).bfloat16(),
        "turned": torch.randn(4, 6).T,
        "part": torch.randn(10)[2:5],
        "count": torch.tensor(5),
        "none": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }
    torch.save(tensors, tmp_path / "new.pth")
    torch.save({"old": torch.arange(3.0)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with PickledFiles([tmp_path / "new.pth", tmp_path / "old.pth"]) as files:
        assert [list(forms) for forms in files.forms] == [list(tensors), ["old"]]
        for _ in range(2):  # pages that were given back are read again
            for name, tensor in tensors.items():
                found = files.read(0, name)
                assert torch.equal(found, tensor) and found.dtype == tensor.dtype, name
        assert torch.equal(files.read(1, "old"), torch.arange(3.0))


@pytest.mark.parametrize("form", ["torch.save", "bare pickle"])
def test_a_payload_is_refused_and_never_run(tmp_path: Path, form: str) -> None:
    ran = tmp_path / "ran"
    assert pickle.loads(pickle.dumps(Touch(tmp_path / "works"))) == 0 and (tmp_path / "works").exists(), "it is real"
    config = save(tmp_path / "m").config.model_dump()
    save_released(tmp_path / "r", config, {"rope.freqs": torch.zeros(3)}, 1)
    if form == "torch.save":
        torch.save({"embed.weight": torch.zeros(3), "x": Touch(ran)}, tmp_path / "r/consolidated.pth")
    else:
        (tmp_path / "r/consolidated.pth").write_bytes(pickle.dumps({"x": Touch(ran)}, protocol=2))
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError) as caught:
        run(tmp_path / "r", tmp_path / "out")
    assert "holds code (posix.system), which is never run" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before and not ran.exists()


def test_no_variable_loosens_the_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "json.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    torch.save({"x": Touch(tmp_path / "ran")}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"holds code \(posix\.system\)"), PickledFiles([tmp_path / "x.pth"]):
        pass
    assert not (tmp_path / "ran").exists() and not (tmp_path / "imported").exists()


def cut(path: Path) -> None:
    torch.save({"x": torch.randn(1000)}, path)
    os.truncate(path, 2000)


BAD: dict[str, tuple[Any, str]] = {
    "a list": (lambda p: torch.save([1], p), r"holds list; expected a state dict, tensors by name"),
    "a number": (lambda p: torch.save({"x": 3}, p), r"holds int under 'x'; expected a state dict"),
    "sparse": (lambda p: torch.save({"x": torch.eye(3).to_sparse()}, p), r"x is torch\.sparse_coo on cpu; expected a"),
    "complex": (
        lambda p: torch.save({"x": torch.zeros(2, dtype=torch.complex64)}, p),
        r"x is complex64; expected a pl",
    ),
    "repeated": (
        lambda p: torch.save({"x": torch.zeros(1).expand(10**6, 10**6)}, p),
        r"x repeats its values to \(1000000",
    ),
    "a forged line": (
        lambda p: torch.save({"x\nerror: y": torch.ones(1)}, p),
        r"names a tensor 'x\\nerror: y'; expected",
    ),
    "noise": (lambda p: p.write_bytes(b"\x93" * 500), r"cannot be read as tensors: "),
    "empty": (lambda p: p.write_bytes(b""), r"cannot be read as tensors: EOFError"),
    "cut off": (cut, r"cannot be read as tensors: PytorchStreamReader failed"),
    "missing": (lambda p: None, r"x\.pth is missing"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_state_dict_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    write, said = BAD[kind]
    write(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=said) as caught, PickledFiles([tmp_path / "x.pth"]):
        pass
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_that_is_silent_is_given_up_and_one_that_dies_is_named(tmp_path: Path) -> None:
    torch.save({"x": torch.randn(3)}, tmp_path / "x.pth")
    with PickledFiles([tmp_path / "x.pth"], seconds=20) as files:
        pid, files._seconds = files._process.pid, 0.3
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(CheckpointError, match=r"nothing came of it for 0\.3 s; it was given up"):
            files.read(0, "x")
    assert not alive(pid)
    with PickledFiles([tmp_path / "x.pth"]) as files:
        os.kill(files._process.pid, signal.SIGKILL)
        with pytest.raises(CheckpointError, match=r"the process that reads it ended \(signal 9\)"):
            files.read(0, "x")


def test_it_can_write_nothing_and_has_little_memory(tmp_path: Path) -> None:
    torch.save({"x": torch.randn(3)}, tmp_path / "x.pth")
    with PickledFiles([tmp_path / "x.pth"]) as files:
        place = Path(f"/proc/{files._process.pid}")
        limits = (place / "limits").read_text().splitlines()
        taken = int((place / "statm").read_text().split()[0]) * resource.getpagesize()
    found = {line[:25].strip(): line[25:].split()[0] for line in limits}
    assert found["Max file size"] == found["Max core file size"] == "0"
    rest = int(found["Max address space"]) - taken
    assert 0.9 * pickled._BESIDE_FILES < rest < pickled._BESIDE_FILES + 10**6


def test_it_keeps_to_a_lower_limit_of_the_one_that_started_it(tmp_path: Path) -> None:
    torch.save({"x": torch.randn(3)}, tmp_path / "x.pth")
    script = Path(pickled.__file__).with_name("pickle_process.py")
    command = ["bash", "-c", 'ulimit -v 7000000; exec "$@"', "bash", sys.executable, "-I", str(script)]
    asked = json.dumps({"paths": [str(tmp_path / "x.pth")], "memory": 10**12})
    done = subprocess.run(command, input=asked + "\n", capture_output=True, text=True)
    assert done.stdout == '{"tensors": [{"x": ["float32", [3]]}]}\n', done.stderr


def test_it_dies_with_the_one_that_started_it(tmp_path: Path) -> None:
    torch.save({"x": torch.randn(3)}, tmp_path / "x.pth")
    program = (
        "import sys, time; from pathlib import Path; from megalodon.interop.pickled import PickledFiles\n"
        f"with PickledFiles([Path({str(tmp_path / 'x.pth')!r})]) as files: print(files._process.pid, flush=True)\n"
        "    ; time.sleep(60)".replace("\n    ;", ";")
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    watchdog = threading.Timer(60, parent.kill)
    watchdog.start()
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    parent.wait()
    watchdog.cancel()
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)
    parent.stdout.close()
