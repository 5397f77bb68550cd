"""Every command of docs/tutorial.md runs as it stands there, with runs of two steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WRAPPER = """\
#!/bin/sh
case $1 in
pretrain) exec {python} -m megalodon_cli "$@" train.max_steps=2 eval.tokens=2000 ;;
finetune) exec {python} -m megalodon_cli "$@" train.max_steps=2 eval.tokens=2000 ;;
esac
exec {python} -m megalodon_cli "$@"
"""
"""Stands before the real command on the path: the page's own options, and a horizon of two steps."""


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path) -> None:
    short = tmp_path / "bin"
    short.mkdir()
    (short / "megalodon").write_text(WRAPPER.format(python=sys.executable))
    (short / "megalodon").chmod(0o755)
    folder = tmp_path / "a folder"
    done = subprocess.run(
        [sys.executable, "benchmarks/tutorial.py", "--folder", str(folder), "--first-on-path", str(short)],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "runs/chat/model/chat_template.jinja").exists()
    assert (folder / "talk.mega").stat().st_size < 1 << 20
    assert "user: What does quantize of decimal do?" in done.stdout
