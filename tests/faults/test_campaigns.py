"""Small versions of the campaigns of `make faults`, and of the report. Not here: the campaigns (benchmarks/faults)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def campaign(repository: Path, out: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Run sections of `make faults`. Returns the exit code and the sections of the report."""
    command = [sys.executable, "benchmarks/faults", "--out", str(out), "--seed", "7", *options]
    done = subprocess.run(command, cwd=repository, check=False, capture_output=True, text=True)
    path = out / "reliability.json"
    assert path.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(path.read_text())["sections"]


def test_1_a_killed_run_loses_no_acknowledged_step(repository: Path, tmp_path: Path) -> None:
    code, sections = campaign(repository, tmp_path, "--only", "A", "--kills", "3")
    assert (code, sections["A"]["faults"]) == (0, [])
    assert "| pass |" in (tmp_path / "reliability.md").read_text()


def test_31_33_a_killed_tokenize_ends_with_the_same_bytes(repository: Path, tmp_path: Path) -> None:
    code, sections = campaign(repository, tmp_path, "--only", "B", "--kills", "3")
    assert (code, sections["B"]["faults"]) == (0, [])


def test_4_a_power_loss_loses_no_acknowledged_step(repository: Path, tmp_path: Path) -> None:
    code, sections = campaign(repository, tmp_path, "--only", "C")
    assert (code, sections["C"]["faults"]) == (0, [])


def test_a_section_replaces_its_own_rows_only(repository: Path, tmp_path: Path) -> None:
    old = {"title": "before", "figures": [{"figure": "f", "value": 1, "limit": "= 0", "ok": False}], "seconds": 1}
    old |= {"date": "d", "commit": "c", "device": "x", "cores": 1, "versions": "v", "command": "old"}
    (tmp_path / "reliability.json").write_text(json.dumps({"format": 1, "sections": {"B": old}}))
    (tmp_path / "reliability.md").write_text(
        "Prose.\n<!-- figures -->\nx\n<!-- /figures -->\nMore.\n<!-- faults --><!-- /faults -->\n"
    )
    code, sections = campaign(repository, tmp_path, "--only", "A", "--kills", "1")
    assert code == 6  # what was measured before misses its limit
    assert sections["B"] == old and list(sections) == ["A", "B"]
    text = (tmp_path / "reliability.md").read_text()
    assert text.startswith("Prose.\n<!-- figures -->\n|") and "\n<!-- /figures -->\nMore.\n" in text
