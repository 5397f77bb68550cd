"""gpu_check.py on a machine without a GPU: what it records, its exit status, its layer, its peers, what it needs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import LOGITS, OP, OP_BF16, assert_close
from torch import Tensor

import gpu_check
from gpu_peers import PEERS
from megalodon.model.megalodon import Megalodon, ModelConfig
from megalodon_kernels.costs import COSTS, Draw, Sizes
from megalodon_kernels.measuring import floats

CPU = torch.device("cpu")
NOT_NEEDED = ("pydantic", "datasets", "typer", "rich", "yaml", "safetensors", "sentencepiece", "megalodon")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these are the paths of a machine without a GPU")


def run(*arguments: str) -> int:
    return gpu_check.main(arguments)


def document(folder: str | Path = "gpu-check") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "gpu-check.json").read_text())
    return found


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_it_needs_torch_and_triton_alone(repository: Path, tmp_path: Path) -> None:
    """In a process where whatever else the project depends on cannot be imported."""
    script = repository / "kernels" / "gpu_check.py"
    code = [
        "import runpy, sys",
        f"sys.modules.update(dict.fromkeys({NOT_NEEDED}))",  # None: an import raises
        f"sys.path[0] = {str(script.parent)!r}",
        f"sys.argv = ['gpu_check.py', '--only', 'rms_norm', '--out', {str(tmp_path / 'out')!r}]",
        f"runpy.run_path({str(script)!r}, run_name='__main__')",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert document(tmp_path / "out")["parity"]


def test_without_a_gpu_the_small_shapes_run_and_the_rest_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--only", "rms_norm", "--only", "swiglu", "--out", "a") == 0
    found = document("a")
    assert set(found) == {"header", "constants", "parity", "timing", "system", "skipped", "errors"}
    assert {(e["op"], e["backend"], e["dtype"], e["metric"]) for e in found["parity"]} == {
        (op, "triton", dtype, metric)
        for op in ("rms_norm", "swiglu")
        for dtype in ("fp32", "bf16")
        for metric in ("forward", "backward")
    }
    assert all(0 < e["value"] <= e["tol"] and e["ok"] for e in found["parity"])
    assert found["timing"] == found["errors"] == []
    assert {e["op"] for e in found["skipped"] if e["kind"] == "timing"} == {"rms_norm", "swiglu"}
    assert {e["reason"] for e in found["skipped"]} == {"there is no GPU"}
    assert found["header"]["device_type"] == "cpu" and found["header"]["date"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("no GPU: only the small shapes of the parity, in Triton's interpreter")
    assert lines[-1] == "passed: written to a/gpu-check.json"
    assert next(line for line in lines if line.startswith("rms_norm")).split()[:4] == [
        "rms_norm",
        "forward",
        "triton",
        "4/4",
    ]


def test_ops_with_documents_are_checked_for_leaks() -> None:
    assert run("--only", "timestep_norm") == 0
    (leak,) = [e for e in document()["parity"] if e["case"] == "NaN in one document"]
    assert (leak["value"], leak["tol"], leak["ok"]) == (0, 0, True)


def test_a_wrong_result_and_one_that_raises_are_recorded_and_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    from megalodon_kernels import norm

    right = norm.IMPLEMENTATIONS["triton"]
    monkeypatch.setitem(norm.IMPLEMENTATIONS, "triton", lambda *args: 1.001 * right(*args))
    assert run("--only", "rms_norm") == 1
    assert not any(e["ok"] for e in document()["parity"] if (e["dtype"], e["metric"]) == ("fp32", "forward"))

    def broken(x: Tensor, *args: Any) -> Tensor:
        if x.dtype == torch.bfloat16:
            raise RuntimeError("no such instruction\nin line 3")
        return right(x, *args)

    monkeypatch.setitem(norm.IMPLEMENTATIONS, "triton", broken)
    assert run("--only", "rms_norm") == 1
    found = document()
    assert [e["error"] for e in found["errors"]] == ["RuntimeError: no such instruction"]
    assert {e["dtype"] for e in found["parity"]} == {"fp32"} and all(e["ok"] for e in found["parity"])


def test_a_document_that_leaks_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from megalodon_kernels import timestep_norm as op

    right = dict(sys.modules[op.__module__].IMPLEMENTATIONS)
    implementations = sys.modules[op.__module__].IMPLEMENTATIONS
    for name in implementations.keys() - {"reference"}:
        # without its starts, the op carries the statistics of one document into the next
        def forgetful(
            x: Tensor, w: Tensor, b: Tensor, groups: int, state: Any, starts: Any, *rest: Any, name=name
        ) -> Any:
            return right[name](x, w, b, groups, state, None, *rest)

        monkeypatch.setitem(implementations, name, forgetful)
    assert run("--only", "timestep_norm") == 1
    (leak,) = [e for e in document()["parity"] if e["case"] == "NaN in one document"]
    assert leak["value"] > 0 and not leak["ok"]


def test_what_the_budget_does_not_suffice_for_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--only", "rms_norm", "--budget", "0") == 1  # nothing was checked, so nothing passed
    found = document()
    assert found["parity"] == [] and {e["kind"] for e in found["skipped"]} == {"parity", "timing", "system"}
    assert "the budget of phase parity is used up" in found["skipped"][0]["reason"]
    assert "FAILED" in capsys.readouterr().out


def test_the_file_is_whole_after_every_entry(tmp_path: Path) -> None:
    record = gpu_check.Record(tmp_path, 100)
    for number in range(2):
        record.attempt("system", {"what": number}, lambda: [{"ms": float("nan")}])
        assert [e["ms"] for e in document(tmp_path)["system"]] == (number + 1) * ["nan"]


def older(path: Path, timing: list[dict[str, Any]], **header: str) -> None:
    here = gpu_check.machine(CPU) | header
    path.write_text(json.dumps({"header": here, "timing": timing}))


def test_an_older_run_of_another_machine_or_a_damaged_file_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    older(Path("old.json"), [], device="NVIDIA A100")
    assert run("--only", "rms_norm", "--against", "old.json") == 2
    assert "old.json was measured on NVIDIA A100: not comparable" in capsys.readouterr().out
    for content in ("{", "[]", '{"timing": [{}]}'):
        Path("old.json").write_text(content)
        with pytest.raises(SystemExit, match="2"):
            run("--only", "rms_norm", "--against", "old.json")
    older(Path("old.json"), [])
    assert run("--only", "rms_norm", "--against", "old.json") == 0


def test_a_slowdown_of_more_than_a_tenth_is_named() -> None:
    def entry(op: str, ms: float) -> dict[str, Any]:
        return {"op": op, "pass": "forward", "shape": {"B": 1, "L": 8}, "config": "bf16", "ms": ms}

    old = {"timing": [entry("cema", 1.0), entry("swiglu", 1.0), entry("gone", 1.0)]}
    new = {"timing": [entry("cema", 1.2), entry("swiglu", 1.05), entry("new", 9.0)]}
    assert gpu_check._slower(new, old) == ["cema forward B1 L8 bf16: 1 -> 1.2 ms (+20%)"]


SIZES = Sizes(B=2, L=37, D=24, H=2, Z=12, V=36, F=29, N=3, G=4, C=10, vocab_size=53)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_layer_is_the_models_block(dtype: torch.dtype) -> None:
    """The same weights, all of them random; outputs and the gradient of every parameter."""
    s = SIZES
    config = ModelConfig(
        num_layers=1, model_dim=s.D, num_heads=s.H, z_dim=s.Z, value_dim=s.V, ffn_hidden_dim=s.F, cema_ndim=s.N,
        norm_num_groups=s.G, chunk_size=s.C, swiglu=True, vocab_size=s.vocab_size,
    )  # fmt: skip
    model = Megalodon(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    block, seen = model.layers[0], []
    block.register_forward_hook(lambda _, args, result: seen.append((args[0], result[0])))
    model.hidden(torch.randint(s.vocab_size, (s.B, s.L)))
    x, expected = seen[0]
    x = x.detach()
    weights = {n: p.detach().requires_grad_() for n, p in block.named_parameters()}
    actual = gpu_check.layer(x, weights, s, rope_base=config.rotary_base, eps=config.norm_eps)
    assert (actual - expected).abs().max() <= LOGITS[dtype]
    dy = torch.randn_like(expected)
    gradients = torch.autograd.grad((actual * dy).sum(), list(weights.values()))
    wanted = torch.autograd.grad((expected * dy).sum(), [p for _, p in block.named_parameters()])
    for (name, _), a, e in zip(weights.items(), gradients, wanted, strict=True):
        assert_close(a, e, 10 * OP[dtype], name)
    drawn = gpu_check._layer_weights(s, Draw(torch.float32, CPU))
    assert {n: p.shape for n, p in drawn.items()} == {n: p.shape for n, p in weights.items()}


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_computes_what_the_op_does(name: str) -> None:
    """In bfloat16, the dtype of the timings; a whole number of chunks, values in whole slices."""
    sizes = Sizes(B=2, L=30, D=24, H=2, Z=12, V=36, F=29, N=3, G=4, C=10)
    forward, leaves = PEERS[name](sizes, CPU)
    expected = next(floats(COSTS[name].op(**COSTS[name].inputs(sizes, Draw(torch.bfloat16, CPU)))))
    actual = forward()
    actual = actual.transpose(1, 2).reshape(expected.shape) if name == "chunk_attention" else actual
    assert_close(actual, expected, OP_BF16)
    assert all(leaf.requires_grad for leaf in leaves)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The phases of a GPU on this CPU, small: what they record is right, though not how long it took."""
    small = Sizes(B=1, L=32, D=128, H=2, Z=12, V=36, F=29, N=3, G=4, C=8, vocab_size=53)
    monkeypatch.setattr(gpu_check, "HAS_GPU", True)
    monkeypatch.setattr(gpu_check, "WIDTH", small)
    monkeypatch.setattr(gpu_check, "NARROW", {"D": 24, "V": 24})
    monkeypatch.setattr(gpu_check, "TOKENS", (64, 32))
    monkeypatch.setattr(gpu_check, "_compile_all", lambda *_: None)
    monkeypatch.setattr(gpu_check, "_backend", lambda cost: "portable")  # the interpreter would take minutes
    for name, value in (("matmul_rate", 1e11), ("copy_rate", 1e10)):
        monkeypatch.setattr(gpu_check, name, lambda *_, value=value: value)
    real = gpu_check.timed
    monkeypatch.setattr(gpu_check, "timed", lambda call, device: real(call, device, 1, 0.0))
    monkeypatch.setattr(gpu_check, "_graphed", lambda call: 0.001)
    monkeypatch.setattr(torch, "compile", lambda function, fullgraph: function)
    for name in ("reset_peak_memory_stats", "empty_cache", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 7)


@pytest.mark.usefixtures("stand_in")
def test_with_a_gpu_every_phase_has_its_entries(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("cema", "timestep_norm", "chunk_attention")
    assert run(*(f"--only={name}" for name in names)) == 0
    found = document()
    assert found["errors"] == found["skipped"] == []
    metrics = {(e["op"], e["metric"]) for e in found["parity"]}
    laws = ("forward", "backward", "values that leaked", "tensors that two runs differ in")
    assert metrics - {(op, "compiled against eager") for op in names} == {(op, law) for op in names for law in laws}
    assert [(e["op"], e["pass"]) for e in found["timing"]] == 5 * [
        (n, p) for n in names for p in ("forward", "backward")
    ]
    for entry in found["timing"]:
        floor = max(entry["flops"] / 1e8, entry["bytes"] / 1e7)
        assert entry["floor_ms"] == pytest.approx(floor) and entry["ratio"] == pytest.approx(entry["ms"] / floor)
        assert ("peer_ms" in entry) == (entry["op"] in PEERS) and entry["peak_bytes"] == 7
    assert [e["shape"]["L"] for e in found["system"]] == [64, 32]
    for entry in found["system"]:
        assert entry["over_llama"] == pytest.approx(entry["llama_ms"] / entry["ms"])
        assert entry["other_share"] == pytest.approx(1 - (entry["products_ms"] + entry["attention_ms"]) / entry["ms"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("cema")]
    assert [row[:2] for row in rows] == [["cema", "forward"], ["cema", "backward"]] and "met" in rows[0]
    Path("old.json").write_text(Path("gpu-check/gpu-check.json").read_text())
    old = document()
    for entry in old["timing"]:
        entry["ms"] /= 1e6
    Path("old.json").write_text(json.dumps(old))
    assert run("--only", "cema", "--against", "old.json") == 1
    assert "slower than old.json: cema forward B1 L64 D128 N3 bf16" in capsys.readouterr().out


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", ["qk_rope", "linear_cross_entropy"])
def test_the_loss_and_the_queries_are_checked_and_timed_too(name: str) -> None:
    """The loss, whose backward pass only scales; queries and keys, whose turn has no gradient."""
    assert run("--only", name) == 0
    found = document()
    assert found["errors"] == found["skipped"] == []
    width = {e["metric"] for e in found["parity"] if e["case"] == "D 128, L 4096"}
    assert width == {"forward", "backward", "tensors that two runs differ in"}
    timings = {(e["op"], e["pass"], e["shape"]["B"] * e["shape"]["L"]) for e in found["timing"]}
    assert timings == {(name, what, tokens) for what in ("forward", "backward") for tokens in (64, 32)}
    assert all(e["ms"] > 0 and e["floor_ms"] > 0 for e in found["timing"])


@pytest.mark.usefixtures("stand_in")
def test_a_peer_that_does_not_fit_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def huge(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 128 GiB")

    monkeypatch.setitem(gpu_check.PEERS, "cema", huge)
    assert run("--only", "cema") == 0
    assert {e["peer_error"] for e in document()["timing"]} == {"CUDA out of memory. Tried to allocate 128 GiB"}
