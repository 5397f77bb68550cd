"""A trace holds the steps that were asked for and changes nothing of the training."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from stores import tiny_plan, tiny_run, tiny_store

from megalodon.profiling.trace import StepTrace


def steps_in(path: Path) -> set[str]:
    events = json.loads(path.read_text())["traceEvents"]
    return {event["name"] for event in events if event.get("name", "").startswith("step ")}


def test_the_trace_holds_its_steps_and_training_stays_bitwise_the_same(tmp_path: Path) -> None:
    store, plan = tiny_store(tmp_path / "store"), tiny_plan(train={"max_steps": 4})
    trace = StepTrace(tmp_path / "profile", 2, 3)
    tiny_run(store, tmp_path / "plain", plan)
    tiny_run(store, tmp_path / "traced", plan, around=trace.around)
    chrome, table = trace.written
    assert steps_in(chrome) == {"step 2", "step 3"}
    assert "aten::" in table.read_text()
    assert [path.name for path in trace.written] == ["steps-2-3.json", "steps-2-3.txt"]
    plain, traced = (
        load_file(next((tmp_path / name / "checkpoints/step-00000004/tensors").iterdir()))
        for name in ("plain", "traced")
    )
    assert plain.keys() == traced.keys()
    assert all(value.equal(traced[name]) for name, value in plain.items())


def test_a_run_that_stops_early_leaves_what_it_recorded(tmp_path: Path) -> None:
    trace = StepTrace(tmp_path / "profile", 2, 9)
    plan = tiny_plan(train={"max_steps": 3})
    tiny_run(tiny_store(tmp_path / "store"), tmp_path / "run", plan, around=trace.around)
    assert not trace.written
    trace.close()
    assert steps_in(trace.written[0]) == {"step 2", "step 3"}
    assert trace.written[0].name == "steps-2-3.json"


def test_no_step_no_file(tmp_path: Path) -> None:
    trace = StepTrace(tmp_path / "profile", 2, 3)
    with trace.around(1):
        pass
    trace.close()
    assert not trace.written
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize(("first", "last"), [(0, 2), (3, 2)])
def test_steps_that_cannot_be(first: int, last: int) -> None:
    with pytest.raises(ValueError, match="expected 1 <= first <= last"):
        StepTrace(Path("profile"), first, last)
