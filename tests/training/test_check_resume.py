"""The check compares bits, counts what it compared, and finds a difference wherever it is."""

from pathlib import Path

import pytest
import torch
from factories import tiny_config
from stores import BYTES_TABLE, NUM_CLASSES, SEQ_LEN, tiny_plan, tiny_store

from megalodon.data.loader import Loader
from megalodon.errors import InputError
from megalodon.training.check_resume import ResumeCheck, check_resume, first_difference
from megalodon.training.loop import Run, Trainer


def check(directory: Path, steps: int = 4, **how: object) -> ResumeCheck | None:
    store = tiny_store(directory / "store")
    (directory / "scratch").mkdir()
    run = Run(directory, NUM_CLASSES, BYTES_TABLE, **how)  # type: ignore[arg-type]
    loader = Loader(store, SEQ_LEN, "doc", 1)
    config = tiny_config(dropout=0.1)
    plan = tiny_plan(train={"micro_batch": 2})
    return check_resume(config, loader, plan, run, steps=steps, scratch=directory / "scratch")


def test_equal_runs_are_found_equal_and_everything_is_counted(tmp_path: Path) -> None:
    found = check(tmp_path)
    assert found is not None and found.difference is None
    parameters = tiny_config().num_parameters()
    assert (found.steps, found.half, found.compared["losses"]) == (4, 2, 4)
    assert found.compared["weights"] >= parameters and found.compared["moments"] >= 2 * parameters
    assert found.compared["data position"] > 3 and found.compared["other state"] > 3


LOST = {
    "weights": ("model.layers.0.mega.wv.bias", "step 3: loss is "),
    "exp_avg": ("optim.exp_avg.layers.0.mega.wv.bias", "weights: model.layers.0.mega.wv.bias[2] is "),
}


@pytest.mark.parametrize("what", LOST)
def test_one_element_that_a_checkpoint_loses_is_named(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resume = Trainer.resume

    def forgetful(trainer: Trainer) -> None:
        resume(trainer)
        if trainer.step:
            bias = trainer.model.get_parameter("layers.0.mega.wv.bias")
            place = bias.data if what == "weights" else trainer.optimizer.state[bias]["exp_avg"]
            place.reshape(-1)[2] += 0.5

    monkeypatch.setattr(Trainer, "resume", forgetful)
    found = check(tmp_path)
    assert found is not None and found.difference is not None
    assert " without a stop, " in found.difference and found.difference.endswith(" resumed")
    assert found.difference.startswith(("step 3: ", "step 4: ")) or LOST[what][1] in found.difference


def test_a_stop_ends_the_check(tmp_path: Path) -> None:
    assert check(tmp_path, stop=lambda: "SIGINT") is None


@pytest.mark.parametrize("steps", [0, 1, 8])
def test_steps_that_the_run_does_not_have_are_refused(steps: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"a check of {steps} steps; expected 2 to 7"):
        check(tmp_path, steps)


def test_bits_are_compared_and_not_values() -> None:
    zero, nan = torch.zeros(2, 3), torch.full((2, 3), torch.nan)
    assert first_difference(zero, zero.clone()) is first_difference(nan, nan.clone()) is None
    negative = zero.clone()
    negative[1, 2] = -0.0
    assert first_difference(zero, negative) == (1, 2)
    assert first_difference(torch.tensor(1.0), torch.tensor(2.0)) == ()
    assert first_difference(torch.ones(3, dtype=torch.bfloat16), torch.ones(3)) == (0,)
