"""metrics.jsonl continues as if a run had never stopped; speed is counted as its docstring says."""

import math
import os
import stat
from pathlib import Path

import pytest
import torch
from factories import tiny_config

from megalodon.training.metrics import MetricsLog, matmul_peak


def rows(last: int) -> list[dict[str, object]]:
    found: list[dict[str, object]] = [{"kind": "eval", "step": 0}]
    for step in range(1, last + 1):
        found.append({"kind": "train", "step": step, "loss": 1 / step})
        if step % 2 == 0:
            found.append({"kind": "eval", "step": step})
    return found


def written(path: Path, last: int) -> MetricsLog:
    log = MetricsLog(path)
    log.open_at(0, False)
    for row in rows(last):
        log.write(row)
    log.close()
    return log


def test_resuming_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    log = written(tmp_path / "metrics.jsonl", 9)
    log.open_at(4, True)
    log.close()
    assert log.rows() == rows(4)


def test_an_evaluation_of_the_checkpoints_step_that_it_does_not_know_is_forgotten(tmp_path: Path) -> None:
    log = written(tmp_path / "metrics.jsonl", 9)
    log.open_at(4, False)
    log.close()
    assert log.rows() == rows(4)[:-1]


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = written(path, 5)
    path.write_text(path.read_text()[:-9])
    assert log.rows() == rows(5)[:-1]


def test_the_name_of_the_file_is_forced_to_the_disk_with_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, told, replace, sync = written(tmp_path / "metrics.jsonl", 3), list[str](), os.replace, os.fsync

    def replaced(old: Path, new: Path) -> None:
        told.append("named")
        replace(old, new)

    def synced(descriptor: int) -> None:
        told.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "rows")
        sync(descriptor)

    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(os, "fsync", synced)
    log.open_at(2, True)
    log.close()
    assert told == ["rows", "named", "directory"]


def test_a_line_ends_where_it_was_ended_whatever_a_sample_holds(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.open_at(0, False)
    sample = {"kind": "sample", "step": 1, "prompt": "\u2028", "text": "a\u0085b\u2029c\rd\x0ce\x1cf\n"}
    wrote = [sample, {"kind": "train", "step": 2}, {"kind": "train", "step": 3}]
    for row in wrote:
        log.write(row)
    assert log.rows() == wrote
    log.open_at(3, True)  # what a resumed run and a rollback do
    log.close()
    assert log.rows() == wrote


def test_values_that_are_not_finite_become_null(tmp_path: Path) -> None:
    log = written(tmp_path / "metrics.jsonl", 0)
    log.open_at(0, False)
    log.write({"kind": "train", "step": 1, "loss": math.nan, "more": {"1": math.inf}})
    log.close()
    assert log.rows() == [{"kind": "train", "step": 1, "loss": None, "more": {"1": None}}]


def test_a_matrix_product_takes_time() -> None:
    assert 1e7 < matmul_peak(torch.device("cpu"), torch.float32, 0.02) < 1e15


def test_flops_count_matrices_attention_and_averages() -> None:
    config = tiny_config()
    c, matrices = config, config.num_parameters() - 53 * 24
    keys = (c.chunk_size + 1) / 2
    layer = 6 * keys * (c.z_dim + c.value_dim) + 36 * c.model_dim * c.cema_ndim
    assert config.flops_per_token(1000) == 6 * matrices + 2 * layer
    assert config.flops_per_token(4) < config.flops_per_token(10) == config.flops_per_token(1000)
    assert tiny_config(share_emb=True).flops_per_token(1000) == config.flops_per_token(1000)
