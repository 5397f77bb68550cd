"""How a model runs changes nothing of what it computes: recomputed, compiled, stopped and resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from factories import random_starts, random_tokens, tiny_model
from stores import saved_tensors, tiny_plan, tiny_run, tiny_store
from tolerances import GRADIENTS, assert_close

from megalodon.errors import EnvironmentFault
from megalodon.model.loss import cross_entropy
from megalodon.model.megalodon import Megalodon
from megalodon.training import execution
from megalodon.training.activations import kept_by_part
from megalodon.training.execution import Compile, compile_model, deterministic, eager, keep_all, recompute

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTH = 41
DROPOUT = {"dropout": 0.2, "hidden_dropout": 0.1, "attention_dropout": 0.3}


def loss_of(model: Megalodon) -> torch.Tensor:
    tokens, starts = random_tokens(3, LENGTH), random_starts(3, LENGTH)
    torch.manual_seed(5)
    hidden, _ = model.train().hidden(tokens, starts=starts)
    return cross_entropy(hidden, model.output_weight, random_tokens(3, LENGTH, seed=1), 16)[0]


def gradients(model: Megalodon) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = loss_of(model)
    loss.backward()
    return {"loss": loss.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("what", ["attention", "block"])
def test_recomputed_gradients_are_the_kept_ones_bit_by_bit(what: Any) -> None:
    model = tiny_model(torch.float32, **DROPOUT)
    expected = gradients(model)
    recompute(model, what)
    found = gradients(model)
    assert expected.keys() == found.keys() and len(found) > 30
    assert all(expected[name].equal(found[name]) for name in expected)


def test_recomputation_keeps_far_fewer_bytes() -> None:
    model, kept = tiny_model(torch.float32), {}
    for what in ("none", "attention", "block"):
        recompute(model, what)  # type: ignore[arg-type]
        kept[what] = sum(kept_by_part(model, lambda: loss_of(model)).values())
        keep_all(model)
    assert kept["block"] < kept["attention"] < kept["none"]
    assert kept["block"] < 0.3 * kept["none"]
    assert sum(kept_by_part(model, lambda: loss_of(model)).values()) == kept["none"], "keep_all takes it back"


@pytest.mark.parametrize("what", ["attention", "block"])
def test_a_run_that_recomputes_ends_where_the_other_does(tmp_path: Path, what: str) -> None:
    store = tiny_store(tmp_path / "store")
    for name, chosen in (("kept", "none"), ("again", what)):
        plan = tiny_plan(train={"max_steps": 3, "recompute": chosen})
        tiny_run(store, tmp_path / name, plan, model={"dropout": 0.1})
    kept, again = (saved_tensors(tmp_path / name, 3) for name in ("kept", "again"))
    assert kept.keys() == again.keys()
    assert all(value.equal(again[key]) for key, value in kept.items())


def test_auto_leaves_a_cpu_alone_and_false_leaves_all_alone() -> None:
    model = tiny_model(torch.float32)
    assert compile_model(model, "auto", CPU) == "train.compile auto: not compiled, a step gains little by it on a CPU"
    assert compile_model(model, False, CUDA) is None
    assert all(part._compiled_call_impl is None for part in model.modules())


def test_without_a_compiler_true_is_refused_and_auto_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = "no C++ compiler was found (g++, or the one that CXX names)"
    monkeypatch.setattr(execution, "_missing_compiler", lambda device: missing)
    model = tiny_model(torch.float32)
    for wanted in (True, "block"):
        name = str(wanted).lower()
        with pytest.raises(EnvironmentFault, match=rf"train\.compile is {name}, but no C\+\+ compiler was found"):
            compile_model(model, wanted, CPU)
    assert compile_model(model, "auto", CUDA) == f"train.compile auto: not compiled, {missing}"
    assert all(part._compiled_call_impl is None for part in model.modules())


def test_a_compiler_that_torch_does_not_find_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    assert "no C++ compiler" in str(execution._missing_compiler(CPU))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wanted", [True, "block"])
def test_compiled_gradients_are_the_eager_ones_and_evaluation_is_eager(wanted: Compile) -> None:
    model = tiny_model(torch.float32, **DROPOUT)
    names, expected = list(model.state_dict()), gradients(model)
    tokens = [random_tokens(1, length) for length in (1, 5, 23)]
    with torch.no_grad():
        scores = [model.eval()(batch)[0] for batch in tokens]
    if wanted is True:
        recompute(model, "attention")  # compiled parts inside recomputed ones draw the same random numbers
    compile_model(model, wanted, CPU)
    found = gradients(model)
    for name, value in expected.items():
        assert_close(found[name], value, GRADIENTS[torch.float32], name)
    assert list(model.state_dict()) == names
    with eager(model), torch.no_grad():  # another shape each time: nothing is compiled, the result is bitwise the same
        assert all(torch.equal(model.eval()(batch)[0], score) for batch, score in zip(tokens, scores, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wanted", [True, "block"])
def test_compiled_is_eager_to_rounding_and_resumes_bit_by_bit(tmp_path: Path, wanted: Compile) -> None:
    store = tiny_store(tmp_path / "store")
    compiled = tiny_plan(train={"max_steps": 4, "compile": wanted}, checkpoint={"every": 2})
    tiny_run(store, tmp_path / "eager", tiny_plan(train={"max_steps": 4}))
    tiny_run(store, tmp_path / "whole", compiled)
    tiny_run(store, tmp_path / "stopped", compiled, stop_at_step=2)
    tiny_run(store, tmp_path / "stopped", compiled)
    eager, whole, stopped = (saved_tensors(tmp_path / name, 4) for name in ("eager", "whole", "stopped"))
    assert eager.keys() == whole.keys(), "names do not show that parts were compiled"
    assert all(value.equal(stopped[key]) for key, value in whole.items())
    # Of the moments most must agree closely: Adam turns the rounding of a gradient near zero into a step of full size.
    names = [name for name in eager if name.startswith("optim.exp_avg.")]
    moved = [float((whole[n] - eager[n]).norm() / eager[n].norm().clamp(min=1e-6)) for n in names]
    assert sorted(moved)[len(moved) // 2] < 1e-3


def test_determinism_is_a_matter_of_the_run_alone() -> None:
    def switches() -> tuple[bool, ...]:
        fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        warn = torch.is_deterministic_algorithms_warn_only_enabled()
        return torch.are_deterministic_algorithms_enabled(), warn, torch.backends.cudnn.deterministic, fill

    before = switches()
    with deterministic(True):
        assert switches() == (True, False, True, False)
        assert not torch.backends.cudnn.benchmark
    assert switches() == before
