"""Saves of several ranks that fail on one of them, in the background; a run directory that one does not see."""

import dataclasses
import errno
import os
from pathlib import Path
from typing import Any

import pytest
from rank_runs import LAYOUTS, STEPS, parts
from ranks import on_ranks
from stores import BYTES_TABLE, NUM_CLASSES, saved_tensors, tiny_store

from megalodon.checkpoint import store
from megalodon.checkpoint.store import steps_in
from megalodon.errors import EnvironmentFault
from megalodon.parallel.layout import Layout
from megalodon.training.loop import Run, Trainer


def broken(folder: str, layout: Layout, on_error: str, rank: int) -> tuple[str, list[str]]:
    """How a run ended for a rank when its first save, of step 2, fails on one of them; the warnings it gave."""
    config, loader, plan, ranks = parts(folder, layout, "doc", {})
    checkpoint = plan.checkpoint.model_copy(update={"on_error": on_error})
    told: list[str] = []
    about = Run(
        Path(folder), NUM_CLASSES, BYTES_TABLE, ranks=ranks,
        report=lambda row: told.append(row["text"]) if row["kind"] == "warning" else None,
    )  # fmt: skip
    real, calls = store.write_tensors, list[int]()

    def write(directory: Path, *rest: Any, **how: Any) -> Any:
        calls.append(1)
        if len(calls) == 1 and ranks.rank == rank:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory / "shard"))
        return real(directory, *rest, **how)

    store.write_tensors = write  # type: ignore[assignment]
    trainer = Trainer(config, loader, dataclasses.replace(plan, checkpoint=checkpoint), about)
    try:
        with trainer.saves_ended():
            trainer.resume()
            return trainer.run_to_the_end().status, told
    except EnvironmentFault as error:
        return str(error), told
    finally:
        store.write_tensors = real
        trainer.metrics.close()
        trainer.batches.close()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_save_that_fails_on_one_rank_fails_on_all_and_the_next_one_works(
    tmp_path: Path, on_error: str, rank: int
) -> None:
    tiny_store(tmp_path / "store")
    (tmp_path / "run").mkdir()
    found = on_ranks(2, broken, str(tmp_path / "run"), LAYOUTS["fsdp2"], on_error, rank)
    said = (
        f"step 2 could not be saved in {tmp_path / 'run/checkpoints'}: rank {rank}: [Errno 28] No space left on device"
    )
    checkpoints = tmp_path / "run/checkpoints"
    if on_error == "stop":
        assert all(status.startswith(said) for status, _ in found)
        assert steps_in(checkpoints) == []
    else:
        assert [status for status, _ in found] == ["finished"] * 2
        assert len(found[0][1]) == 1 and found[0][1][0].startswith(said)
        assert steps_in(checkpoints) == [STEPS]
        assert saved_tensors(tmp_path / "run", STEPS)
    assert [path.name for path in checkpoints.iterdir() if path.name.startswith(".")] == []


def elsewhere(folder: str, layout: Layout) -> str:
    """What is said where rank 1 sees nothing of what rank 0 writes."""
    config, loader, plan, ranks = parts(folder, layout, "doc", {})
    trainer = Trainer(config, loader, plan, Run(Path(folder), NUM_CLASSES, BYTES_TABLE, ranks=ranks))
    seen = Path.exists
    if ranks.rank == 1:
        Path.exists = lambda path: not path.name.startswith(".shared-") and seen(path)  # type: ignore[method-assign]
    try:
        trainer.resume()
    except EnvironmentFault as error:
        return str(error)
    finally:
        Path.exists = seen  # type: ignore[method-assign]
        trainer.batches.close()
    return "nothing"


def test_a_run_directory_that_is_not_shared_is_told_before_the_run_begins(tmp_path: Path) -> None:
    tiny_store(tmp_path / "store")
    (tmp_path / "run").mkdir()
    for said in on_ranks(2, elsewhere, str(tmp_path / "run"), LAYOUTS["fsdp2"]):
        assert said.startswith(f"rank 1 does not see {tmp_path / 'run'} as rank 0 does; expected a directory that all")
    assert list((tmp_path / "run").iterdir()) == []
