"""`megalodon runs`: what it reads from a run directory, and what it says when there is none."""

import json

import pytest
from typer.testing import CliRunner, Result

from megalodon.data.prepare import Ledger
from megalodon_cli.app import app
from megalodon_cli.curves import curve, overlay


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["runs", *arguments])


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with one run of four steps that a killed process left with a torn last line."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "runs" / "first"
    path.mkdir(parents=True)
    state = {"status": "stopped", "step": 4, "steps": 8, "unigram_bits_per_byte": 3.25, "next": ["megalodon doctor"]}
    (path / "run.json").write_text(json.dumps(state))
    rows = [
        {"kind": "train", "step": n, "loss": 5.0 - n, "lr": 1e-3, "grad_norm": 1.0, "tokens": 10} for n in range(1, 5)
    ]
    rows.insert(2, {"kind": "eval", "step": 2, "valid_loss": 2.5, "bits_per_byte": 1.75})
    rows.insert(0, {"kind": "train", "step": 0, "loss": None})
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"kind": "tra')
    return path


def test_ls_shows_status_step_losses_and_age(here):
    header, line = run("ls").stdout.splitlines()
    assert header.split() == ["run", "status", "step", "loss", "valid", "bits/byte", "tok/s", "age"]
    assert line.split()[:6] == ["first", "stopped", "4/8", "1.000", "2.500", "1.750"]
    [entry] = json.loads(run("ls", "--json").stdout)["result"]
    assert (entry["name"], entry["step"], entry["loss"], entry["bits_per_byte"]) == ("first", 4, 1.0, 1.75)


def test_show_prints_status_curve_scores_and_next_commands(here):
    for name in ("first", "runs/first", str(here)):
        text = run("show", name).stdout
        assert "stopped, step 4 of 8" in text
        assert "4.000 │█" in text and "step └ 1 to 4" in text
        assert "1.750" in text and "unigram model of the same tokens: 3.250 bits/byte" in text
        assert "next: megalodon doctor" in text
    result = json.loads(run("show", "first", "--json").stdout)["result"]
    assert result["train"] == [[1, 4.0], [2, 3.0], [3, 2.0], [4, 1.0]]


def test_a_directory_that_is_no_run_is_named_with_the_runs_there_are(here):
    result = run("show", "second")
    assert result.exit_code == 2
    assert result.stderr == "error: runs/second is not a run: no run.json; runs here: first\n"
    (here / "run.json").write_text("{")
    broken = run("show", "first")
    assert broken.exit_code == 2 and "runs/first/run.json: cannot be read" in broken.stderr


def test_one_broken_run_hides_no_other(here):
    broken = here.parent / "second"
    broken.mkdir()
    (broken / "run.json").write_text("{")
    result = run("ls")
    assert result.exit_code == 0
    assert {line.split()[0]: line.split()[1] for line in result.stdout.splitlines()[1:]} == {
        "first": "stopped",
        "second": "broken",
    }
    assert result.stderr.startswith("warning: runs/second/run.json: cannot be read")


def test_a_line_of_the_metrics_that_is_no_row_is_left_out(here):
    text = (here / "metrics.jsonl").read_text()
    sample = '{"kind": "sample", "text": "a\u2028b"}'  # which has a line's end of its own
    (here / "metrics.jsonl").write_bytes(f'3\n{sample}\n{text}xt": "caf'.encode() + b"\xc3")  # torn inside a letter
    line = run("ls").stdout.splitlines()[1]
    assert line.split()[:4] == ["first", "stopped", "4/8", "1.000"]


@pytest.mark.parametrize("section", ["dir: null", "seq_len: 8"])
def test_show_finds_the_ledger_of_a_recipe_without_a_data_folder(here, section):
    (here / "recipe.yaml").write_text(f"name: mine\ndata:\n  {section}\n")
    store = here.parents[1] / "data" / "mine"
    store.mkdir(parents=True)
    names = Ledger._fields
    (store / "manifest.json").write_text(json.dumps({"ledger": dict.fromkeys(names, 0) | {"read": 5, "kept": 5}}))
    assert "documents  read 5 = kept 5 + empty 0" in run("show", "first").stdout
    (store / "manifest.json").write_text(json.dumps({"ledger": dict.fromkeys(names, "x")}))
    damaged = run("show", "first")
    assert damaged.exit_code == 0 and "documents" not in damaged.stdout


def test_an_empty_name_is_refused(here):
    result = run("show", "")
    assert result.exit_code == 2 and result.stderr.startswith("error: RUN is empty; expected a run directory")


def test_no_runs_is_a_note_and_no_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("ls")
    assert (result.exit_code, result.stdout) == (0, "") and "start one with" in result.stderr


def test_the_curve_falls_where_the_loss_falls():
    lines = curve([(step, 10.0 - step) for step in range(10)], width=5, height=4)
    assert [line[:8].strip() for line in lines] == ["9.500", "", "", "1.500", "step"]
    heights = [sum(line[10:][column : column + 1].strip() != "" for line in lines[:-1]) for column in range(5)]
    assert heights == sorted(heights, reverse=True) and heights[0] == 4 and heights[-1] == 1
    assert curve([(1, float("nan"))], 5) == []
    assert curve([(3, 2.0)], 5, 2)[0].startswith("   2.000")


def test_curves_over_one_axis_keep_their_marks_and_meet_in_a_star():
    lines = overlay({"one": [(0, 2.0), (9, 1.0)], "two": [(0, 2.0), (9, 2.0)]}, width=10, height=3)
    assert lines[0] == "   2.000 │*        B" and lines[2] == "   1.000 │         A"
    assert lines[3] == "  tokens └ 0 to 9    A one  B two"
    assert overlay({"none": []}, 10) == []
