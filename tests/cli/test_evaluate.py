"""`megalodon evaluate`: tables and documents that agree, files beside the run, every bad input as one line."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from byte_texts import TOKENIZER, byte_model, text, write
from small_runs import pretrain
from typer.main import get_command
from typer.testing import CliRunner

from megalodon.checkpoint.tensors import save_model
from megalodon_cli.app import app

TEXTS = [text(400), text(300, 1), *(text(20, seed) for seed in range(2, 6))]
META = {"tokenizer_sha256": TOKENIZER.sha256, "bos": True}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with two models of random weights, a run and its data, and texts."""
    place = tmp_path_factory.mktemp("evaluate")
    for seed, name in enumerate("ab"):
        save_model(byte_model(torch.float32, seed), place / name, TOKENIZER.save, META)
    write(place / "texts", *TEXTS)
    (place / "blank").write_text(" \n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert pretrain("--max-steps", "2").exit_code == 0
    return place


@pytest.fixture
def place(workplace, monkeypatch) -> Path:
    monkeypatch.chdir(workplace)
    return workplace


def run(*arguments: object):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def document(*arguments: object) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["result"]


def refused(result, *words: str, code: int = 2) -> None:
    """One line that names the problem, nothing on stdout."""
    assert result.exit_code == code, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    for word in words:
        assert word in errors[0]
    assert result.stdout == ""


def test_a_model_taken_out_of_its_run_knows_how_documents_ended(place, tmp_path):
    assert pretrain("--max-steps", "1", "data.eos=false", "data.dir=no-eos", "-o", "runs/no-eos").exit_code == 0
    shutil.copytree("runs/no-eos/model", tmp_path / "alone")
    found = document(tmp_path / "alone", "--data", "texts", "--output-path", tmp_path / "out")["models"][0]["quick"]
    assert found["tokens"] == sum(len(given.encode()) for given in TEXTS)


def test_quick_prints_a_table_and_saves_json_and_markdown(place, tmp_path):
    result = run("a", "--data", "texts", "--output-path", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "norm_stats cumulative · fp32 on cpu · texts" in result.stdout
    assert "0 tokens truncated" in result.stdout
    saved, report = sorted((tmp_path / "out").iterdir())
    whole = json.loads(saved.read_text())
    assert whole["schema"] == "megalodon/evaluate/1"
    found = whole["result"]["models"][0]["quick"]
    size = sum(len(given.encode()) for given in TEXTS)
    assert (found["tokens"], found["bytes"], found["documents"]) == (size + len(TEXTS), size, len(TEXTS))
    assert found["tokens_read"] == found["tokens"] + found["documents"]
    assert f"{found['loss']['value']:.4f} ± {found['loss']['error']:.4f}" in result.stdout
    assert f"| {found['loss']['value']:.4f} ± " in report.read_text()
    assert report.read_text().startswith("# evaluate quick · norm_stats cumulative")
    assert found["bits_per_byte"]["value"] == pytest.approx(
        found["loss"]["value"] * found["tokens"] / math.log(2) / size, rel=1e-9
    )


def test_a_run_is_scored_on_its_validation_part_and_keeps_the_results(place):
    found = document("debug")
    assert found["data"]["name"] == "data/debug/valid"
    assert found["models"][0]["seq_len"] == 37
    manifest = json.loads(Path("data/debug/valid/manifest.json").read_text())
    assert found["models"][0]["quick"]["tokens_read"] == manifest["tokens"]
    assert found["models"][0]["quick"]["bytes"] == manifest["text_bytes"]
    again = document("debug")
    assert again["models"] == found["models"]
    saved = [json.loads(path.read_text())["result"] for path in Path("runs/debug/evals").glob("*.json")]
    assert found in saved and again in saved
    assert not list(Path("runs/debug/evals").glob(".tmp*"))


def test_the_policy_changes_the_numbers_and_stands_in_the_header(place, tmp_path):
    (tmp_path / "t.txt").write_text(text(40))
    asked = ["a", "--data", tmp_path / "t.txt", "--norm-stats"]
    cumulative, window = (document(*asked, policy) for policy in ("cumulative", "window"))
    assert window["norm_stats"] == "window"
    losses = [found["models"][0]["quick"]["loss"]["value"] for found in (cumulative, window)]
    assert losses[0] != losses[1]
    assert "norm_stats window" in run(*asked, "window").stdout


def test_context_prints_losses_gains_and_words_and_draws_them(place, tmp_path):
    asked = ["--suite", "context", "--data", "texts", "--lengths", "8,64,300", "--target", "32", "--windows", "5"]
    asked[3] = str(Path("texts").resolve())
    result = run("a", *asked, "--plot", tmp_path / "c.svg", "--output-path", tmp_path)
    assert result.exit_code == 0, result.stderr
    whole = json.loads(next(tmp_path.glob("context-*.json")).read_text())["result"]
    found = whole["models"][0]["context"]
    assert [row["context"] for row in found["lengths"]] == [0, 8, 64, 300]
    assert (found["windows"], found["scored_tokens"]) == (5, 160)
    for row in found["lengths"]:
        assert f"{row['loss']['value']:.4f}" in result.stdout
        assert row["bits_per_byte"] == pytest.approx(row["loss"]["value"] / math.log(2), rel=1e-9)  # a byte a token
    assert "tokens back" in result.stdout or "helps beyond chance" in result.stdout
    picture = (tmp_path / "c.svg").read_text()
    assert picture.startswith("<?xml") and "<!-- texts · norm_stats" in picture  # not where it lies on this machine
    batched = document("a", *asked, "--batch-size", "1")["models"][0]["context"]
    for one, other in zip(batched["lengths"], found["lengths"], strict=True):
        assert one["loss"]["value"] == pytest.approx(other["loss"]["value"], rel=1e-5)


def test_models_are_compared_on_the_same_text(place, tmp_path):
    asked = ["a", "b", "--data", "texts", "--plot", tmp_path / "p.png", "--output-path", tmp_path]
    result = run(*asked)
    assert result.exit_code == 0, result.stderr
    found = json.loads(next(tmp_path.glob("*.json")).read_text())["result"]
    bits = [model["quick"]["bits_per_byte"]["value"] for model in found["models"]]
    [own] = found["comparisons"]
    assert (own["model"], own["against"]) == ("b", "a")
    change = own["bits_per_byte"]
    assert change["value"] == pytest.approx(bits[1] - bits[0], rel=1e-9)
    assert change["low"] <= change["value"] <= change["high"]
    assert "bits/byte less that of a, paired" in result.stdout
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert document("a", "--compare", "b", "--data", "texts")["comparisons"] == found["comparisons"]
    windows = document("a", "b", "--data", "texts", "--suite", "context", "--lengths", "64", "--target", "32")
    losses = [[row["loss"]["value"] for row in model["context"]["lengths"]] for model in windows["models"]]
    paired = [row["loss"]["value"] for row in windows["comparisons"][0]["lengths"]]
    assert paired == pytest.approx([b - a for a, b in zip(*losses, strict=True)])


def test_a_run_is_compared_with_its_baseline(place):
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    assert pretrain("model.arch=llama", "-o", "runs/llama", "--max-steps", "2").exit_code == 0
    asked = ["--suite", "long", "--lengths", "500", "--target", "20", "--concatenate", "--limit", "1"]
    found = document("debug", "llama", *asked)
    quick, context = found["comparisons"]
    assert (quick["model"], quick["against"], quick["drawn"]) == ("llama", "debug", "blocks of 4,096 bytes")
    assert [row["context"] for row in context["lengths"]] == [0, 500]
    assert {len(model["recall"]["cells"]) for model in found["models"]} == {16}


def test_lengths_beside_the_grid_of_chunks_are_noted(place):
    asked = ["a", "--suite", "context", "--data", "texts", "--target", "32", "--lengths"]
    assert "not all --lengths are multiples of the chunk of a, 10 tokens" in run(*asked, "8,64").stderr
    assert "multiples of the chunk" not in run(*asked, "20,100").stderr


def test_the_text_of_one_run_may_stand_in_the_training_data_of_another_model(place):
    result = run("debug", "a")
    assert result.exit_code == 0, result.stderr
    assert "the text is the validation part of debug; a was trained on other data" in result.stderr


def test_fewer_windows_than_asked_for_are_a_note(place):
    result = run("a", "--suite", "context", "--data", "texts", "--lengths", "64", "--target", "1Ki")
    assert result.exit_code == 0
    assert "the text holds 2 such windows, fewer than --windows 32" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a"], ["a is in no run, so it has no validation part; expected --data FILE|DIR"]),
        (["a", "--data", "none.txt"], ["--data: none.txt does not exist"]),
        (["a", "a", "--data", "texts"], ["a is given twice"]),
        (
            ["a", "--suite", "context", "--data", "texts", "--lengths", "64Ki"],
            ["--lengths 64Ki: the longest document has"],
        ),
        (["a", "--data", "texts", "--batch-size", "0"], ["--batch-size: 0 is too small"]),
        (["a", "--data", "texts", "--plot", "x.pdf"], ["x.pdf: expected a name ending in .png or .svg"]),
        (["a", "--data", "texts", "--output-path", "texts/00.txt"], ["texts/00.txt is a file; expected a folder"]),
        (["a", "--data", "texts", "--output-path", "texts/00.txt/x"], ["texts/00.txt is a file; expected a folder"]),
        (["a", "--data", "texts", "--batch-size", "2,8"], ["--batch-size 2,8: expected one number"]),
        (["a", "--data", "texts", "--target", "32,64"], ["--target 32,64: expected one number"]),
        (["a", "--data", "texts", "--recall", "passkey"], ["--recall does nothing in --suite quick; expected --suite"]),
        (["a", "--data", "texts", "--limit", "3"], ["--limit does nothing in --suite quick"]),
        (["a", "--qa", "q", "--plot", "x.png"], ["--plot does nothing in --suite qa; expected --suite quick or"]),
        (["a", "--tasks", "q", "--data", "texts"], ["--data does nothing in --suite harness"]),
        (["a", "--suite", "recall", "--recall", "needle", "--data", "blank"], ["blank holds no text"]),
        (["a", "--data", "texts", "--suite", "fast"], ["fast"]),
        (["a", "--data", "texts", "--device", "tpu"], ["--device tpu"]),
    ],
)
def test_a_bad_request_is_one_line(place, arguments, words):
    refused(run(*arguments), *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"x", "one.txt holds 1 token of text; expected at least 2"),
        (b"", "one.txt holds 0 tokens of text"),
        (b"\x00\x01\xff\xfe", "one.txt:1: not UTF-8 (byte 0xff at offset 2)"),
    ],
)
def test_text_that_cannot_be_scored_is_one_line_and_nothing_is_written(place, tmp_path, content, words):
    (tmp_path / "one.txt").write_bytes(content)
    refused(run("a", "--data", tmp_path / "one.txt", "--output-path", tmp_path / "out"), words)
    assert not (tmp_path / "out").exists()


def test_what_a_later_part_cannot_do_is_refused_before_an_earlier_one_is_measured(place, monkeypatch):
    monkeypatch.setattr("megalodon.evaluation.scoring.score", lambda *_: pytest.fail("it was measured"))
    asked = ["a", "--suite", "long", "--data", "texts", "--recall", "passkey", "--limit", "1"]
    refused(run(*asked, "--lengths", "512Ki"), "--lengths 512Ki: the longest document has")
    refused(run(*asked, "--lengths", "60", "--target", "8"), "--lengths 60: too short")


def test_a_folder_that_may_not_be_written_to_is_refused_first(place, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    monkeypatch.setattr("megalodon.evaluation.scoring.score", lambda *_: pytest.fail("it was measured"))
    result = run("a", "--data", "texts", "--output-path", tmp_path / "out")
    refused(result, f"{tmp_path} may not be written to", code=3)


def test_a_needle_without_validation_text_is_hidden_in_made_up_sentences(place, monkeypatch):
    asked = ["debug", "--suite", "recall", "--lengths", "400", "--limit", "1", "--recall"]
    monkeypatch.setattr("megalodon.data.prepare.VALID", "elsewhere")
    result = run(*asked, "needle", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["result"]["data"] is None
    assert "needle is hidden in made-up sentences: runs/debug was validated on data/debug/elsewhere" in result.stderr
    assert "made-up" not in run(*asked, "passkey").stderr
    refused(run("debug"), "was validated on data/debug/elsewhere, which is not there")


def test_ctrl_c_ends_with_130_and_leaves_nothing(place, tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megalodon_cli.evaluation_request.Meter.at", interrupted)
    result = run("a", "--data", "texts", "--output-path", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (130, "")
    assert not (tmp_path / "out").exists()


def test_ckpt_completes_to_finished_runs(place):
    [argument] = [param for param in get_command(app).commands["evaluate"].params if param.name == "models"]
    assert [item.value for item in argument.shell_complete(None, "de")] == ["debug"]


def test_the_examples_of_the_help_run_as_printed(place):
    Path("README.md").write_text(text(200))
    shown = [line.strip(" │") for line in CliRunner().invoke(app, ["evaluate", "--help"]).stdout.splitlines()]
    examples = [line.split()[2:] for line in shown if line.startswith("megalodon evaluate ")]
    assert len(examples) >= 3
    for arguments in examples:
        result = run(*arguments)
        assert result.exit_code == 0, (arguments, result.stderr)


def test_long_is_quick_and_context_and_recall(place, tmp_path):
    asked = [
        "--suite",
        "long",
        "--data",
        "texts",
        "--lengths",
        "300,700",
        "--target",
        "32",
        "--windows",
        "3",
        "--limit",
    ]
    result = run("a", *asked, 1, "--recall", "needle,copy", "--output-path", tmp_path, "--plot", tmp_path / "p.png")
    assert result.exit_code == 0, result.stderr
    [model] = json.loads(next(tmp_path.glob("long-*.json")).read_text())["result"]["models"]
    assert {"quick", "context", "recall"} < model.keys()
    cells = model["recall"]["cells"]
    assert {(cell["task"], cell["length"], cell["depth"]) for cell in cells} == {
        (task, length, depth) for task in ("needle", "copy") for length in (300, 700) for depth in (0.1, 0.5, 0.9)
    }
    assert all(cell["length"] - 130 < cell["prompt_tokens"] < cell["length"] for cell in cells)
    assert "recall is reported, not promised" in result.stdout
    assert (tmp_path / "p.png").is_file()


def test_recall_needs_no_text_and_logs_its_samples(place, tmp_path):
    asked = ["--suite", "recall", "--recall", "associative,listops", "--lengths", "200", "--limit", "2", "--seed"]
    result = run("a", *asked, 4, "--log-samples", "--output-path", tmp_path)
    assert result.exit_code == 0, result.stderr
    rows = [json.loads(line) for line in next(tmp_path.glob("*-samples.jsonl")).read_text().splitlines()]
    assert [(row["model"], row["task"]) for row in rows] == [("a", "associative")] * 6 + [("a", "listops")] * 2
    assert all(1 <= row["rank"] <= 10 and row["answer"][1:].isdigit() for row in rows)
    found = document("a", *asked, 4)
    assert found["data"] is None
    cells = found["models"][0]["recall"]["cells"]
    assert sum(cell["first"]["value"] * cell["samples"] for cell in cells) == sum(row["rank"] == 1 for row in rows)
    assert document("a", *asked, 5)["models"][0]["recall"] != found["models"][0]["recall"]


def test_questions_of_a_file_are_answered(place, tmp_path):
    rows = [{"q": f"{'ab' * n}?", "a": "#### 7"} for n in range(1, 5)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["--qa", tmp_path / "q.jsonl", "--fields", "q,a", "--extract", r"#### (\d+)", "-n", "3"]
    result = run("a", *asked, "--log-samples", "--output-path", tmp_path)
    assert result.exit_code == 0, result.stderr
    [found] = [model["qa"] for model in document("a", *asked)["models"]]
    assert (found["questions"], found["without_answer"], found["exact"]["value"]) == (4, 4, 0)
    logged = [json.loads(line) for line in next(tmp_path.glob("qa-*-samples.jsonl")).read_text().splitlines()]
    assert [row["prompt"] for row in logged] == [row["q"] for row in rows]
    assert document("a", *asked, "--limit", "2")["models"][0]["qa"]["questions"] == 2


TASK = """
task: vowels
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["a", "e"]
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


def write_task(folder: Path) -> Path:
    """A folder with a task over a file."""
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps({"question": f"{n}:", "label": n % 2}) + "\n" for n in range(6)))
    (folder / "vowels.yaml").write_text(TASK.format(data=data, cache=folder / "cache"))
    return folder


def test_local_tasks_run_offline_by_file_and_by_name(place, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    write_task(tmp_path)
    result = run(
        "a", "b", "--tasks", tmp_path / "vowels.yaml", "--offline", "--fail-on-truncation", "--batch-size", "2"
    )
    assert result.exit_code == 0, result.stderr
    assert "vowels  acc" in result.stdout
    found = document("a", "b", "--tasks", "vowels", "--include-path", tmp_path, "--limit", "4")
    assert found["suite"] == "harness"
    assert (found["truncated_tokens"], found["cutting_tasks"]) == (0, [])
    for model in found["models"]:
        [row] = model["harness"]["rows"]
        assert (row["task"], row["metric"], row["samples"]) == ("vowels", "acc", 4)
        assert 0 <= row["value"] <= 1
    refused(run("a", "--tasks", "helaswag", "--include-path", tmp_path), "no task `helaswag`; did you mean hellaswag")


def test_a_task_that_cuts_by_itself_is_named_and_fails_when_asked(place, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    from lm_eval.api.task import ConfigurableTask

    write_task(tmp_path)
    monkeypatch.setattr(ConfigurableTask, "PRUNE_MAX_TOKENS", 4096, raising=False)
    asked = ["a", "--tasks", tmp_path / "vowels.yaml"]
    assert "task vowels drops or cuts long examples by itself" in run(*asked).stderr
    result = run(*asked, "--fail-on-truncation", "--output-path", tmp_path / "out")
    assert result.exit_code == 6
    assert "0 tokens were truncated; tasks that cut or drop long examples by themselves: vowels" in result.stderr
    assert len(list((tmp_path / "out").glob("harness-*"))) == 2


def test_data_on_the_hub_is_refused_offline(place, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    from datasets import exceptions

    def none(*_: object, **__: object) -> None:
        raise exceptions.DatasetNotFoundError("Dataset 'org/none' doesn't exist on the Hub or cannot be accessed")

    monkeypatch.setattr("datasets.load_dataset", none)
    (tmp_path / "far.yaml").write_text(
        TASK.replace("json", "org/none").format(data="x", cache="y").replace("vowels", "far")
    )
    result = run("a", "--tasks", "far", "--include-path", tmp_path, "--offline")
    refused(result, "far need org/none, which needs the network, and --offline forbids it", code=3)
    (tmp_path / "all.yaml").write_text("group: all_far\ntask: [far]\n")
    for asked in (
        ["far", "--include-path", tmp_path],
        ["all_far", "--include-path", tmp_path],
        [tmp_path / "far.yaml"],
    ):
        result = run("a", "--tasks", *asked)
        assert result.exit_code == 3, result.stderr
        assert "lm-eval may fetch from the Hugging Face Hub: org/none" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "x", "--qa", "q"], ["--tasks means --suite harness, and something else is asked for too"]),
        (["--tasks", "x", "--suite", "quick"], ["--tasks means --suite harness"]),
        (["--suite", "qa"], ["--suite qa: expected --qa FILE too"]),
        (["--suite", "recall", "--recall", "pass"], ["--recall: no task `pass`; did you mean passkey?"]),
        (["--suite", "recall", "--lengths", "20"], ["--lengths 20: too short"]),
        (["--suite", "recall", "--lengths", "500T"], ["--lengths 500,000,000,000,000: a prompt takes", "GiB are free"]),
        (["--qa", "none.jsonl"], ["none.jsonl: cannot be read"]),
        (["--qa", "a/config.json", "--fields", "q"], ["--fields q: expected two names"]),
        (["--suite", "recall", "--log-samples"], ["--log-samples: a is in no run; expected --output-path DIR too"]),
    ],
)
def test_options_that_do_not_fit_are_one_line(place, arguments, words):
    refused(run("a", *arguments), *words)


def test_a_missing_extra_is_named(place, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(run("a", "--tasks", "x"), "lm-eval tasks need the extra [eval]: pip install 'megalodon-lm[eval]'", code=3)
