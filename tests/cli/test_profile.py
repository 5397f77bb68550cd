"""`megalodon profile`: tables, files and exit codes. Not here: the numbers themselves (tests/profiling)."""

import csv
import json
from pathlib import Path

import pytest
from small_runs import pretrain
from typer.testing import CliRunner, Result

from megalodon.profiling import meter
from megalodon_cli.app import app

ONE = ["--shapes", '{"rms_norm": [{"L": 16}]}']
"""One small op: a fraction of a second."""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(meter, "matmul_rate", lambda *_: 1e11)
    monkeypatch.setattr(meter, "copy_rate", lambda *_: 1e10)
    monkeypatch.setattr("megalodon_kernels.dispatch.INTERPRETED", False)


def profile(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["profile", *arguments])


def test_kernels_are_a_table_under_a_header() -> None:
    done = profile("debug", "-p", "16", "-r", "1", "--explain")
    assert done.exit_code == 0, done.output
    first, rates, _, title, head, *rows = done.stdout.splitlines()
    assert first.startswith("profile debug on cpu ") and "torch 2." in first and "threads" in first
    assert rates.startswith("measured here: matrix product 100 GFLOP/s in fp32, copy 10.0 GB/s")
    assert title == "kernels"
    assert all(text in head for text in ("op", "pass", "median ± spread, ms", "% of step", "error, 16 tokens"))
    cema = rows[0].split()
    assert cema[:6] == ["cema", "forward", "B1", "L16", "D64", "N16"] and "portable" in cema
    assert "what binds each row" in done.stdout and "cema forward B1 L16 D64 N16: bound by" in done.stdout
    assert "on a CPU the portable path is timed" in done.stderr
    assert "cema forward" in done.stderr  # progress


def test_every_section_prints(tmp_path: Path) -> None:
    assert pretrain("--stop-at-step", "1").exit_code == 0  # makes the store of `debug`
    line = ["--what", "layers,prefill,decode,train,data", "-p", "16", "-n", "2", "-d", "0,1Mi", "-r", "1"]
    done = profile("debug", *line, "-q")
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    for text in (
        "layers",
        "mega.cema",
        "prefill",
        "decode",
        "depth 1,048,576 tokens 2",
        "train",
        "optimizer",
        "loader",
    ):
        assert text in done.stdout
    assert "decode, 2 tokens: tokens/s over depth" in done.stdout and "1,048,576 │" in done.stdout


def test_the_document_and_the_file_are_one() -> None:
    done = profile("debug", *ONE, "-r", "1", "-o", "a.json", "--json")
    assert done.exit_code == 0, done.output
    shown, written = json.loads(done.stdout), json.loads(Path("a.json").read_text())
    assert (shown["schema"], shown["ok"], written["schema"]) == ("megalodon/profile/1", True, "megalodon/profile/1")
    assert shown["result"] == written["result"]
    assert {"device", "threads", "torch", "triton", "python", "commit"} <= shown["result"]["header"].keys()
    assert [row["what"] for row in shown["result"]["rows"]] == ["forward", "backward"]


def test_markdown_and_csv() -> None:
    assert profile("debug", *ONE, "-r", "1", "-o", "a.md").exit_code == 0
    text = Path("a.md").read_text()
    assert "### kernels" in text and "| rms_norm | forward | B1 L16 D64 |" in text and "bound by" in text
    assert profile("debug", *ONE, "-r", "1", "-o", "a.csv").exit_code == 0
    forward, backward = csv.DictReader(Path("a.csv").read_text().splitlines())
    assert (forward["name"], forward["shape"], backward["what"]) == ("rms_norm", "B1 L16 D64", "backward")
    assert float(forward["ms"]) > 0 and forward["tokens_per_s"] == ""


def faster(path: str, factor: float) -> None:
    """Make a stored measurement faster than it was."""
    document = json.loads(Path(path).read_text())
    for row in document["result"]["rows"]:
        row["ms"] /= factor
    Path(path).write_text(json.dumps(document))


def test_a_slowdown_ends_with_6_and_the_rows() -> None:
    line = ["debug", *ONE, "-r", "1"]
    assert profile(*line, "-o", "a.json").exit_code == 0
    faster("a.json", 1000)
    done = profile(*line, "--baseline", "a.json", "-o", "b.json")
    assert done.exit_code == 6
    assert "error: 2 of 2 rows are more than 10% slower than a.json: kernels rms_norm" in done.stderr
    assert "against a.json, at most 10% slower" in done.stdout and done.stdout.count("kernels rms_norm") == 2
    assert len(json.loads(Path("b.json").read_text())["result"]["changes"]) == 2
    assert profile(*line, "--baseline", "a.json", "--fail-over", "10000000%").exit_code == 0
    shown = json.loads(profile(*line, "--baseline", "a.json", "--json").stdout)
    assert (shown["ok"], shown["exit_code"]) == (False, 6) and "2 of 2 rows" in shown["error"]["message"]


def test_a_baseline_of_another_machine_or_none_in_common_ends_with_2() -> None:
    assert profile("debug", *ONE, "-r", "1", "-o", "a.json").exit_code == 0
    other = ["--shapes", '{"layer_norm": [{"L": 8}]}', "-r", "1", "--baseline", "a.json"]
    done = profile("debug", *other, "-o", "b.json")
    assert done.exit_code == 2
    assert (
        "error: the baseline a.json has no row in common with this; measure the same, such as kernels rms"
        in done.stderr
    )
    assert json.loads(Path("b.json").read_text())["result"]["rows"]  # what was measured is not lost
    text = Path("a.json").read_text()
    Path("a.json").write_text(text.replace(json.loads(text)["result"]["header"]["device"], "NVIDIA A100"))
    done = profile("debug", *ONE, "--baseline", "a.json")
    assert done.exit_code == 2 and done.stdout == ""
    assert "error: a.json was measured on NVIDIA A100, this is " in done.stderr and "not comparable" in done.stderr


def test_rows_without_a_counterpart_are_counted() -> None:
    assert profile("debug", *ONE, "-r", "1", "-o", "a.json").exit_code == 0
    faster("a.json", 1e-3)  # whatever is measured now is no slowdown
    more = ["--shapes", '{"rms_norm": [{"L": 16}, {"L": 8}]}', "-r", "1"]
    done = profile("debug", *more, "--baseline", "a.json")
    assert done.exit_code == 0, done.output
    assert "note: 2 rows are not compared: either a.json or this has no such row" in done.stderr


def test_the_trace_and_the_plot_are_written() -> None:
    pytest.importorskip("matplotlib")
    line = ["debug", "--what", "decode", "-n", "1", "-d", "0,64", "-r", "1"]
    done = profile(*line, "--trace", "t.json", "--plot", "p.svg")
    assert done.exit_code == 0, done.output
    assert any(e["name"] == "decode at depth 64" for e in json.loads(Path("t.json").read_text())["traceEvents"])
    assert "<svg" in Path("p.svg").read_text()
    done = profile("debug", *ONE, "-r", "1", "--plot", "none.png")
    assert done.exit_code == 0 and "nothing to draw" in done.stderr and not Path("none.png").exists()
    assert "written" not in done.stderr


def test_a_checkpoint_is_measured_with_its_weights() -> None:
    assert pretrain().exit_code == 0
    done = profile("runs/debug", "--what", "decode", "-n", "1", "-d", "0", "-r", "1")
    assert done.exit_code == 0, done.output
    assert "profile runs/debug/model on cpu" in done.stdout
    done = profile("runs/debug", "--what", "data")
    assert done.exit_code == 2 and "runs/debug/model is a checkpoint; expected a recipe" in done.stderr


def test_without_a_model_the_one_taken_is_named() -> None:
    done = profile(*ONE, "-r", "1")
    assert done.exit_code == 0 and "the model of the recipe quickstart" in done.stderr


MISTAKES = {
    "a section": (["--what", "kernel"], 2, "--what: unknown `kernel`; did you mean kernels?"),
    "no section": (["--what", "kernels,"], 2, "--what: unknown ``; expected some of kernels, layers, prefill"),
    "a length": (["-p", "many"], 2, "-p/--lengths: `many` of `many`: expected numbers such as 512,32Ki"),
    "a range": (["-p", "512-1"], 2, "-p/--lengths: `512-1` of `512-1`: expected numbers"),
    "no new token": (["-n", "0"], 2, "-n/--new-tokens: 0 is too small"),
    "a depth": (["-d", "-1"], 2, "-d/--depths: `-1` of `-1`"),
    "repeats": (["-r", "0"], 2, "invalid value for `--repeats`"),
    "an op": (["--shapes", '{"cemma": [{}]}'], 2, "--shapes: no op `cemma`; did you mean cema?"),
    "shapes of nothing": ([*ONE, "--what", "train"], 2, "--shapes: only kernels take shapes; --what is train"),
    "a backend": (["--backend", "triron"], 2, "--backend: unknown `triron`; did you mean triton?"),
    "a backend without its device": (
        [*ONE, "--backend", "triton"],
        3,
        "rms_norm: backend triton cannot run: the device",
    ),
    "a device": (["--device", "tpu"], 2, "--device tpu: expected auto, cpu, cuda or cuda:N"),
    "a dtype": (["--dtype", "fp16"], 2, "--dtype fp16: expected auto, fp32, bf16, fp64"),
    "memory": (["-p", "1Ti"], 4, "kernels: cema at B 1 L 1099511627776 D 64 N 16 needs about"),
    "a limit alone": (["--fail-over", "5%"], 2, "--fail-over needs --baseline F.json"),
    "a limit": (["--baseline", "a.json", "--fail-over", "x"], 2, "--fail-over: `x` is not a share"),
    "an empty limit": (["--baseline", "a.json", "--fail-over", ""], 2, "--fail-over: `` is not a share"),
    "no baseline": (["--baseline", "a.json"], 2, "a.json: no such file or directory; expected what profile -o"),
    "an ending": (["-o", "a.txt"], 2, "a.txt: expected a name ending in .json or .md or .csv"),
    "a folder": (["-o", "no/a.md"], 2, "no/a.md: there is no folder no"),
    "a folder as a file": (["-o", "dir.json"], 2, "dir.json: cannot be written: is a directory"),
    "a folder as a trace": (["--trace", "dir.json"], 2, "dir.json: cannot be written: is a directory"),
    "a long name": (["-o", "x" * 300 + ".json"], 2, "x" * 300 + ".json: cannot be written: file name too long"),
    "one file twice": (["-o", "a.json", "--trace", "./a.json"], 2, "--trace a.json would replace the file of -o/--out"),
    "its own baseline": (
        ["--baseline", "a.json", "-o", "a.json"],
        2,
        "-o/--out a.json would replace the file of --baseline; expected two files",
    ),
    "no shapes": (["--shapes", "[]"], 2, "--shapes: the list is empty"),
    "a depth beyond 64 bits": (["-d", "9223372036854775807"], 2, "-d/--depths: 9223372036854775807 is too large"),
    "a CPU of several": (["--device", "cpu:1"], 2, "--device cpu:1: expected auto, cpu, cuda or cuda:N"),
    "a trace": (["--trace", "a.txt"], 2, "a.txt: expected a name ending in .json"),
    "a picture": (["--plot", "a.pdf"], 2, "a.pdf: expected a name ending in .png or .svg"),
    "no store": (["--what", "data"], 2, "--what data: data/debug holds no token store"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_measured(mistake: str) -> None:
    arguments, code, message = MISTAKES[mistake]
    Path("dir.json").mkdir()
    done = profile("debug", *arguments, "-q")
    assert done.exit_code == code, done.output
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(f"error: {message}"), done.stderr
    assert done.stdout == ""
    assert [path.name for path in Path().iterdir()] == ["dir.json"]
    shown = json.loads(profile("debug", *arguments, "--json").stdout)
    assert (shown["ok"], shown["exit_code"]) == (False, code)


def test_neither_a_checkpoint_nor_a_recipe() -> None:
    done = profile("qickstart")
    assert done.exit_code == 2 and "no such directory" in done.stderr and "did you mean quickstart?" in done.stderr
    done = profile("quickstart-llama")
    assert done.exit_code == 2 and "model.arch llama is not available in profile; expected megalodon" in done.stderr


def test_an_error_that_is_no_rounding_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    from megalodon_kernels import norm

    monkeypatch.setitem(norm.IMPLEMENTATIONS, "portable", lambda x, *_: x * 1.01)
    done = profile("debug", *ONE, "-r", "1")
    assert (
        done.exit_code == 0 and "warning: rms_norm forward B1 L16 D64: its error against the reference" in done.stderr
    )
