"""Whose a run directory is: foreign files and other frozen values are refused with what came and what was there."""

from pathlib import Path

import pytest

from megalodon.errors import CheckpointError, InputError
from megalodon.training.run import check_directory, drop_unbegun, frozen_values, new_record, open_record

RECIPE = {
    "name": "x",
    "model": {"num_layers": 2},
    "data": {"dir": "data/x", "sources": ({"name": "a", "weight": 0.5},)},
    "train": {"seed": 1, "max_steps": 9, "seq_len_warmup": {"start": 8}},
    "optim": {"lr": 6e-4, "betas": (0.9, 0.95)},
    "log": {"every": 1},
}


def test_what_is_frozen_is_the_model_the_data_the_seed_and_the_optimizer() -> None:
    assert frozen_values(RECIPE) == {
        "model.num_layers": 2,
        "data.sources.a.name": "a",
        "data.sources.a.weight": 0.5,
        "train.seed": 1,
        "train.seq_len_warmup.start": 8,
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


def test_only_a_key_that_is_kept_for_life_may_be_allowed_to_change(tmp_path: Path) -> None:
    frozen = frozen_values(RECIPE)
    with pytest.raises(InputError, match=r"--allow-change optim\.lrr: did you mean optim\.lr\?"):
        open_record(tmp_path, frozen, ["optim.lrr"])
    with pytest.raises(InputError, match="--allow-change nonsense: expected a key that a run keeps for life"):
        open_record(tmp_path, frozen, ["nonsense"])
    new_record(tmp_path, frozen | {"data.sources.b.weight": 1}).update(status="stopped")
    assert open_record(tmp_path, frozen, ["data.sources.b.weight"]) is not None


def test_a_directory_of_a_run_that_never_began_goes_and_no_other(tmp_path: Path) -> None:
    for name, files in (("unbegun", ["lock.json"]), ("begun", ["lock.json", "run.json"]), ("empty", [])):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
        drop_unbegun(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun", "empty"]


def test_foreign_files_and_unwanted_runs_are_refused(tmp_path: Path) -> None:
    check_directory(tmp_path / "new")
    check_directory(tmp_path)
    (tmp_path / "lock.json").touch()
    check_directory(tmp_path)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match=r"no run.json.* holds thesis.tex; choose another -o"):
        check_directory(tmp_path)
    for below in ("", "run", "a/run"):
        with pytest.raises(CheckpointError, match=r"thesis\.tex is a file"):
            check_directory(tmp_path / "thesis.tex" / below)
    new_record(tmp_path, {}).update(status="stopped")
    check_directory(tmp_path)
    with pytest.raises(CheckpointError, match="holds a run"):
        check_directory(tmp_path, fresh=True)


def test_a_record_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"format": "megalodon/run/9"}')
    with pytest.raises(CheckpointError, match="megalodon/run/9; expected megalodon/run/1"):
        open_record(tmp_path, {})


def test_dropping_what_is_no_directory_hides_no_error(tmp_path: Path) -> None:
    """It runs while another error is on its way: a link stays, a folder that is gone is no fault."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "lock.json").touch()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    drop_unbegun(tmp_path / "link")
    drop_unbegun(tmp_path / "gone")
    assert (tmp_path / "disk").is_dir()
