"""Whose a run directory is: foreign files and other frozen values are refused with what came and what was there."""

from pathlib import Path

import pytest

from megalodon.errors import CheckpointError
from megalodon.training.run import check_directory, frozen_values, new_record, open_record

RECIPE = {
    "name": "x",
    "model": {"num_layers": 2},
    "data": {"dir": "data/x", "sources": ({"name": "a", "weight": 0.5},)},
    "train": {"seed": 1, "max_steps": 9},
    "optim": {"lr": 6e-4, "betas": (0.9, 0.95)},
    "log": {"every": 1},
}


def test_what_is_frozen_is_the_model_the_data_the_seed_and_the_optimizer() -> None:
    assert frozen_values(RECIPE) == {
        "model.num_layers": 2,
        "data.sources.a.name": "a",
        "data.sources.a.weight": 0.5,
        "train.seed": 1,
        "optim.lr": 6e-4,
        "optim.betas": [0.9, 0.95],
    }


def test_another_value_is_refused_with_both_unless_it_is_allowed(tmp_path: Path) -> None:
    frozen = frozen_values(RECIPE)
    new_record(tmp_path, frozen).update(status="stopped")
    assert open_record(tmp_path, frozen) is not None
    other = frozen | {"optim.lr": 1e-3}
    with pytest.raises(CheckpointError, match=r"optim.lr is 0.0006 there, 0.001 here; .*--allow-change optim.lr"):
        open_record(tmp_path, other)
    assert open_record(tmp_path, other, ["optim.lr"]) is not None
    with pytest.raises(CheckpointError, match=r"optim.z is null there, 1 here"):
        open_record(tmp_path, frozen | {"optim.z": 1})


def test_foreign_files_and_unwanted_runs_are_refused(tmp_path: Path) -> None:
    check_directory(tmp_path / "new")
    check_directory(tmp_path)
    (tmp_path / "lock.json").touch()
    check_directory(tmp_path)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match=r"no run.json.* holds thesis.tex; choose another -o"):
        check_directory(tmp_path)
    with pytest.raises(CheckpointError, match="is a file"):
        check_directory(tmp_path / "thesis.tex")
    new_record(tmp_path, {}).update(status="stopped")
    check_directory(tmp_path)
    with pytest.raises(CheckpointError, match="holds a run"):
        check_directory(tmp_path, fresh=True)


def test_a_record_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"format": "megalodon/run/9"}')
    with pytest.raises(CheckpointError, match="megalodon/run/9; expected megalodon/run/1"):
        open_record(tmp_path, {})
