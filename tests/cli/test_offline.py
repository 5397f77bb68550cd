"""`--offline`: whatever needs the network is refused before anything is tried, whoever would have fetched it."""

import os
import socket
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from megalodon_cli import console
from megalodon_cli.app import OFFLINE, Shell, app, everywhere

HUB = "data.sources=[{name: web, hf: org/text, field: text}]"


@pytest.fixture(autouse=True)
def _no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "create_connection", connect)


@pytest.mark.parametrize(
    "line",
    [
        ["--offline", "pretrain", "debug", HUB],
        ["pretrain", "debug", HUB, "--offline"],
        ["tokenize", "debug", HUB, "--offline"],
        ["tokenize", "--input", "hf:org/text", "--tokenizer", "bytes", "-o", "out", "--offline"],
    ],
)
def test_a_name_on_the_hub_is_refused_and_nothing_is_left(line: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 3, done.output
    assert "hf:org/text needs the network, and --offline forbids it" in done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_libraries_of_the_hub_are_told_while_the_command_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OFFLINE[0], raising=False)
    shell, seen = typer.Typer(cls=Shell), []
    shell.callback()(everywhere)

    @shell.command()
    def look() -> None:
        seen.append(([os.environ.get(name) for name in OFFLINE], console.settings().offline))

    CliRunner().invoke(shell, ["look", "--offline"])
    CliRunner().invoke(shell, ["look"])
    assert seen == [(["1", "1"], True), ([None, os.environ.get(OFFLINE[1])], False)]
    assert OFFLINE[0] not in os.environ
