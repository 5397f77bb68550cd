"""The health checks: a sound machine passes, and each kind of damage is found and named."""

import importlib.metadata

import pytest
import torch

from megalodon.profiling import health


def test_this_machine_passes_and_every_line_is_there():
    found = {check.name: check for check in health.checks()}
    assert {"python", "torch", "cpu", "bf16", "tokenizer", "disk", "memory"} <= found.keys()
    assert {f"op {name}" for name in health.OPS} <= found.keys()
    # Disk and memory depend on what else runs here; the rest must be good wherever the tests run.
    assert [c for c in found.values() if c.ok is False and c.name not in ("disk", "memory")] == []
    assert "12 cases forward and backward" in found["op cema"].detail
    for name in ("rms_norm", "layer_norm", "swiglu", "qk_rope", "linear_cross_entropy"):
        assert "3 cases forward and backward" in found[f"op {name}"].detail


def test_ops_run_on_one_thread_and_the_rest_on_all(monkeypatch):
    before, seen = torch.get_num_threads(), []

    def op(name):
        seen.append(torch.get_num_threads())
        raise RuntimeError("broken")

    monkeypatch.setattr(health, "_op", op)
    try:
        torch.set_num_threads(3)
        with pytest.raises(RuntimeError, match="broken"):
            health.checks()
        assert (seen, torch.get_num_threads()) == ([1], 3)
    finally:
        torch.set_num_threads(before)


def test_an_op_that_is_wrong_is_found(monkeypatch):
    right = health.OPS["cema"]

    def wrong(*args, backend, **kwargs):
        y, h = right(*args, backend=backend, **kwargs)
        return (y if backend == "reference" else y * 1.01), h

    monkeypatch.setitem(health.OPS, "cema", wrong)
    check = health._op("cema")
    assert check.ok is False
    assert "L1" in check.detail
    assert check.fix


def test_a_wrong_gradient_alone_is_found(monkeypatch):
    right = health.OPS["chunk_attention"]

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.01

    def wrong(q, *, backend, **kwargs):
        return right(q if backend == "reference" else Wrong.apply(q), backend=backend, **kwargs)

    monkeypatch.setitem(health.OPS, "chunk_attention", wrong)
    check = health._op("chunk_attention")
    assert check.ok is False
    assert "gradient of q" in check.detail


def test_not_a_number_is_found(monkeypatch):
    right = health.OPS["cema"]

    def wrong(*args, backend, **kwargs):
        y, h = right(*args, backend=backend, **kwargs)
        return y, h if backend == "reference" else h * float("nan")

    monkeypatch.setitem(health.OPS, "cema", wrong)
    assert health._op("cema").ok is False


@pytest.mark.parametrize(
    ("found", "wanted", "good"),
    [
        ("2.13.0+cpu", "2.13", True),
        ("2.9.1", "2.13", False),
        ("5.2.0", "4", True),
        ("0.2.0", "0.2.1", False),
        ("3.6", "3.6", True),
    ],
)
def test_versions_are_compared_as_numbers(monkeypatch, found, wanted, good):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)
    check = health._version("thing", wanted)
    assert check.ok is good
    assert found in check.detail
    assert (check.fix is None) is good


def test_a_missing_package_is_a_fault_but_triton_is_not(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert health._version("numpy", "2").ok is False
    assert health._version("triton", "3.6").ok is None


def test_the_supported_table_is_that_of_the_package(monkeypatch):
    declared = ["torch>=2.13", "ruff>=0.12; extra == 'dev'", "winonly>=1; platform_system == 'Windows'", "numpy>=2"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: declared)
    monkeypatch.setattr(health.platform, "system", lambda: "Linux")
    assert health.supported() == {"torch": "2.13", "numpy": "2"}


def test_an_uninstalled_package_says_how_to_install(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    check = list(health._versions())[-1]
    assert (check.ok, check.detail) == (False, "not installed")
    assert "pip install" in check.fix and "megalodon " not in check.fix


def test_a_full_disk_and_little_memory_are_faults(monkeypatch):
    monkeypatch.setattr(health, "MIN_FREE_DISK", 10**18)
    monkeypatch.setattr(health, "MIN_FREE_MEMORY", 10**18)
    assert health._disk().ok is False
    assert health._memory().ok in (False, None)
