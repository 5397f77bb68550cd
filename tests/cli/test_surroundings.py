"""Surroundings that are not what one is used to: no home to write to, another encoding, odd names, no GPU. Each command
works or ends with one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import TINY

ODD = "Bücher und mehr ✓"
AROUND = {
    "an old locale": {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "latin-1 streams": {"PYTHONIOENCODING": "latin-1"},
    "a home that cannot be written": {"HOME": "/proc/1", "XDG_CACHE_HOME": "/proc/1", "XDG_CONFIG_HOME": "/proc/1"},
    "no network": {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"},
}


def run(folder: Path, *arguments: str, **around: str) -> "subprocess.CompletedProcess[bytes]":
    line = [sys.executable, "-m", "megalodon_cli", *arguments]
    return subprocess.run(line, cwd=folder, env=os.environ | around, capture_output=True, check=False, timeout=300)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / ODD
    (place / "texts").mkdir(parents=True)
    for number in range(12):
        (place / "texts" / f"Größe {number}.txt").write_text(f"Zeile {number}: äöü ✓ и так далее\n" * 9, "utf-8")
    return place


@pytest.mark.parametrize("name", AROUND)
def test_text_becomes_tokens_and_is_shown_whatever_surrounds_it(name: str, folder: Path) -> None:
    around = AROUND[name]
    line = ["tokenize", "--input", "texts", "--tokenizer", "bytes", "--valid", "20%", "-o", "Größen ✓"]
    done = run(folder, *line, **around)
    assert done.returncode == 0, done.stderr
    assert (folder / "Größen ✓/manifest.json").is_file()
    shown = run(folder, "tokenize", "--inspect", "1", "Größen ✓", **around)
    assert shown.returncode == 0 and b"Traceback" not in shown.stderr, shown.stderr


@pytest.mark.parametrize("name", ["an old locale", "a home that cannot be written"])
def test_a_run_goes_from_text_to_a_model_whatever_surrounds_it(name: str, folder: Path) -> None:
    source = "data.sources=[{name: own, path: texts}]"
    keys = [*TINY, source, "data.valid.fraction=0.3", "--max-steps", "1", "eval.samples.max_new_tokens=1"]
    done = run(folder, "pretrain", "debug", *keys, "-o", "Läufe ✓/eins", **AROUND[name])
    assert done.returncode == 0, done.stderr
    assert (folder / "Läufe ✓/eins/model/model.safetensors").is_file()
    assert "Läufe ✓" in (folder / "Läufe ✓/eins/command.txt").read_text("utf-8")


def test_names_that_are_not_there_are_one_line_in_any_encoding(folder: Path) -> None:
    for around in AROUND.values():
        done = run(folder, "runs", "show", "Läufe ✓", **around)
        assert done.returncode == 2
        assert done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") <= 2


def test_a_gpu_that_is_not_there_is_exit_3(folder: Path) -> None:
    done = run(folder, "pretrain", "debug", "--device", "cuda:0", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 3, done.stderr
    assert done.stderr == b"error: --device cuda:0: this machine has 0 CUDA devices\n"
    assert not (folder / "runs").exists()
