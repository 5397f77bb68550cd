"""Which backend runs: `choose` is a pure function of the call; what it takes is said once."""

import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from megalodon_kernels import KernelError, dispatch, use_backend
from megalodon_kernels.dispatch import Card, assume, choose

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _nothing_reported_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_reported", set())


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    has = SimpleNamespace(shared_memory_per_block_optin=227 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: has)
    yield


def test_auto_is_portable_on_a_cpu_even_where_the_interpreter_would_run() -> None:
    assert choose("cema", "auto", CPU, torch.float32) == "portable"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_is_triton_on_a_gpu(hopper: None, dtype: torch.dtype) -> None:
    assert choose("cema", "auto", CUDA, dtype) == "triton"


def test_auto_is_portable_where_the_kernels_do_not_fit(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose("cema", "auto", CUDA, torch.float64) == "portable"
    assert choose("cema", "auto", CUDA, torch.float32, "N is 40, expected at most 32") == "portable"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose("cema", "auto", CUDA, torch.float32) == "portable"


def test_a_backend_by_name_is_taken_as_it_is(hopper: None) -> None:
    for name in ("reference", "portable", "triton"):
        assert choose("cema", name, CUDA, torch.bfloat16) == name


@pytest.mark.parametrize(
    ("device", "dtype", "unfit", "message"),
    [
        (CUDA, torch.float64, None, "the dtype is torch.float64, expected float32 or bfloat16"),
        (CUDA, torch.float16, None, "the dtype is torch.float16, expected float32 or bfloat16"),
        (CUDA, torch.float32, "N is 40, expected at most 32", "N is 40, expected at most 32"),
        (CPU, torch.float32, "N is 40, expected at most 32", "N is 40, expected at most 32"),
    ],
)
def test_triton_by_name_runs_or_says_why_not(
    hopper: None, device: torch.device, dtype: torch.dtype, unfit: str | None, message: str
) -> None:
    with pytest.raises(KernelError, match=f"cema: backend triton cannot run: {message}; use backend auto or portable"):
        choose("cema", "triton", device, dtype, unfit)


def test_triton_by_name_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(KernelError, match="the device is cpu, expected cuda"):
        choose("cema", "triton", CPU, torch.float32)


def test_a_gpu_with_little_shared_memory_is_portable_by_auto_and_named_by_name(hopper: None) -> None:
    assert choose("cema", "auto", CUDA, torch.float32, shared_memory=227 << 10) == "triton"
    assert choose("cema", "auto", CUDA, torch.float32, shared_memory=228 << 10) == "portable"
    with pytest.raises(KernelError, match="its kernels take 228 KiB of shared memory, the device has 227"):
        choose("cema", "triton", CUDA, torch.float32, shared_memory=228 << 10)


def test_without_triton_auto_is_portable_and_the_name_an_error(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "TRITON_IS_HERE", False)
    assert choose("cema", "auto", CUDA, torch.float32) == "portable"
    with pytest.raises(KernelError, match="Triton is not installed"):
        choose("cema", "triton", CUDA, torch.float32)


def test_an_old_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(KernelError, match=r"compute capability 7\.5, expected 8\.0 or above"):
        choose("cema", "triton", CUDA, torch.float32)


def test_a_gpu_that_is_assumed_is_chosen_for_as_if_it_were_here(hopper: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "megalodon_kernels"), assume(Card((9, 0), 99 << 10)):
        assert choose("cema", "auto", CPU, torch.float32, shared_memory=99 << 10) == "triton"
        assert choose("cema", "auto", CPU, torch.float32, shared_memory=100 << 10) == "portable"
        with pytest.raises(KernelError, match="100 KiB of shared memory, the device has 99"):
            choose("cema", "triton", CPU, torch.float32, shared_memory=100 << 10)
        with assume(Card((7, 0), 99 << 10)), pytest.raises(KernelError, match=r"capability 7\.0, expected 8"):
            choose("cema", "triton", CPU, torch.float32)
    assert not caplog.records
    assert choose("cema", "auto", CPU, torch.float32) == "portable"


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(KernelError, match="backend is 'cuda'; expected one of auto, reference, portable, triton"):
        choose("cema", "cuda", CPU, torch.float32)


def test_the_choice_of_auto_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "megalodon_kernels"):
        for _ in range(3):
            choose("cema", "auto", CPU, torch.float32)
    assert [record.getMessage() for record in caplog.records] == ["cema: backend portable on cpu"]


def test_use_backend_speaks_for_auto_alone_and_ends() -> None:
    with use_backend("reference"):
        assert choose("cema", "auto", CPU, torch.float32) == "reference"
        assert choose("cema", "portable", CPU, torch.float32) == "portable"
    assert choose("cema", "auto", CPU, torch.float32) == "portable"
