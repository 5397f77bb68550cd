"""`megalodon doctor`: a line for each check, a fix for each broken one, exit code 3 when something is broken."""

import json

import pytest
from typer.testing import CliRunner

from megalodon.profiling import health
from megalodon_cli.app import app


@pytest.fixture
def found(monkeypatch, tmp_path):
    """Checks that take no time; the list may be changed."""
    checks = [health.Check("ops", True, "agree"), health.Check("gpu", None, "none here")]
    monkeypatch.setattr(health, "checks", lambda: checks)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    return checks


def test_a_healthy_machine_ends_with_0(found, tmp_path):
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    ops, gpu, write, name = result.stdout.splitlines()
    assert ops.startswith("✓ ops") and gpu.startswith("– gpu")
    assert write.startswith("✓ write access") and str(tmp_path) in write
    assert name.startswith("– name on PATH")
    shown = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert [check["ok"] for check in shown["result"]] == [True, None, True, None]


def test_something_broken_ends_with_3_and_its_fix(found):
    found.append(health.Check("disk", False, "1 MB free", "free some space"))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 3
    assert "✗ disk" in result.stdout and "free some space" in result.stdout
    assert result.stderr == "error: 1 of 5 checks failed: disk\n"
    failed = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout.splitlines()[-1])
    assert (failed["ok"], failed["exit_code"]) == (False, 3)


def test_another_projects_command_of_our_name_is_noticed(found, tmp_path):
    other = tmp_path / "megalodon"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 3 and "another project's command comes first" in result.stdout
