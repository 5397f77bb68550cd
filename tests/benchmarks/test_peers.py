"""What `make bench` counts, compares and refuses, at small sizes. Not here: its figures, which a campaign measures."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cema
import decode
import page
import pictures
import results
import timing
from goals import goals
from megalodon.errors import InputError
from megalodon.model.megalodon import Megalodon
from megalodon.training.optim import is_matrix
from megalodon_kernels import cema as op
from sizes import SEVEN_B, SIZES, check_equal, llama_flops, num_linear, ours_flops
from timing import Ratio, Side


@pytest.fixture
def campaign(repository: Path) -> Any:
    """benchmarks/peers/__main__.py as a module."""
    spec = importlib.util.spec_from_file_location("peers_main", repository / "benchmarks/peers/__main__.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(campaign: Any, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmarks/peers", *options])
    code: int = campaign.main()
    return code


def measured(**about: Any) -> dict[str, Any]:
    """A document of one entry."""
    figures = [
        timing.figure("speed over Llama", [1.2, 1.25, 1.1], at_least=1.15),
        timing.figure("share of the peak", [0.5, 0.52, 0.48], at_least=0.55, unit="%"),
    ]
    rate = {**timing.spread([1700.0, 1800.0, 1650.0]), "unit": "tokens/s"}
    entry = {"run": "r", "seconds": 9.0, "turns": 5, "rates": {"ours": rate, "Llama": rate}, "figures": figures}
    origin = {"date": "r", "device": "D", "cores": 2, "threads": 2, "versions": "v", "commit": "abc", "command": "c"}
    return {"format": 1, "runs": {"r": origin}, "entries": {"train/8M/2048/eager": {**entry, **about}}}


@pytest.mark.parametrize("name", ["8M", "50M", "tiny"])
def test_parameters_and_linear_maps_are_those_of_the_model(name: str) -> None:
    with torch.device("meta"):
        model = Megalodon(SIZES[name].ours)
    matrices = [p for n, p in model.named_parameters() if is_matrix(n, p) and n != "embed.weight"]
    tables = sum(p.numel() for p in matrices)
    assert num_linear(SIZES[name].ours) == tables
    check_equal(model.num_parameters(), SIZES[name].llama.num_parameters(), name)


def test_sizes_of_known_llamas() -> None:
    assert SIZES["8M"].llama.num_parameters() == 7_875_840  # recipe books-tiny-llama
    assert SEVEN_B.llama.num_parameters() == 6_738_415_616  # Llama 2 7B


def test_models_of_unequal_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Llama has 100 parameters, ours 103; expected .* at most 2%"):
        check_equal(103, 100, "Llama")


@pytest.mark.parametrize("length", [32, 96])
def test_attention_counts_what_the_masks_leave(length: int) -> None:
    ours, llama = SIZES["tiny"].ours, SIZES["tiny"].llama
    causal = torch.ones(length, length).tril()
    same_chunk = torch.arange(length)[:, None] // ours.chunk_size == torch.arange(length) // ours.chunk_size
    cema = 3 * ours.num_layers * ours.model_dim * (64 + 8 * ours.cema_ndim)
    pairs = float((causal * same_chunk).sum())
    attention = 3 * ours.num_layers * 2 * (ours.z_dim + ours.value_dim) * pairs
    assert ours_flops(ours, length) * length == pytest.approx(length * (6 * num_linear(ours) + cema) + attention)
    attention = 3 * llama.num_layers * 2 * 2 * llama.model_dim * float(causal.sum())
    assert llama_flops(llama, length) * length == pytest.approx(length * 6 * llama.num_linear() + attention)


def test_the_pair_of_the_paper_has_its_ratio_of_operations() -> None:
    ratio = {length: llama_flops(SEVEN_B.llama, length) / ours_flops(SEVEN_B.ours, length) for length in (4096, 32_768)}
    assert ratio[32_768] == pytest.approx(1.39, abs=0.01)
    assert ratio[4096] == pytest.approx(0.91, abs=0.01)


def test_floors_of_a_gpu() -> None:
    found = {goal.name: goal.floor for goal in goals()}
    assert found["CEMA forward"] == pytest.approx(125e-6, rel=0.01)
    assert found["TimestepNorm forward"] == pytest.approx(187e-6, rel=0.01)
    assert found["attention forward"] == pytest.approx(1.566e-3, rel=0.01)


def test_the_convolution_by_fft_is_the_op() -> None:
    inputs = cema.draw(length=77, dim=6, states=5)
    y = cema.cema_by_fft(*inputs)
    expected, _ = op(*(value.detach() for value in inputs), backend="reference")
    assert (y - expected).abs().max() < cema.CLOSE * expected.square().mean().sqrt()
    cema.check_equal(inputs)


def test_the_convolution_runs_on_the_device_of_its_inputs() -> None:
    inputs = cema.Inputs(*(value.detach().to("meta") for value in cema.draw(length=9, dim=4, states=2)))
    assert cema.cema_by_fft(*inputs).device.type == "meta"


def test_a_wrong_convolution_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = lambda *inputs: cema.our_cema(*inputs) * (1 + 3 * cema.CLOSE)  # noqa: E731
    monkeypatch.setattr(cema, "cema_by_fft", wrong)
    with pytest.raises(ArithmeticError, match="cema: y by FFT differs by"):
        cema.check_equal(cema.draw(length=9, dim=3, states=2))


def test_saved_memory_counts_each_piece_once_and_no_input() -> None:
    x, w = torch.randn(7, 5, requires_grad=True), torch.randn(5, requires_grad=True)

    def forward() -> torch.Tensor:
        kept = (x * w).exp()  # saves x and w, which are given, and its result
        return kept[:3].square() + kept[:3].sin()  # views of the same memory

    assert cema.saved_bytes(forward, [x, w]) == 7 * 5 * 4


def test_sides_take_turns() -> None:
    order: list[str] = []
    sides = {name: Side(lambda name=name: order.append(name), 1.0) for name in "ab"}  # type: ignore[misc]
    rates = timing.take_turns(sides, 3, lambda line: None)
    assert order == ["a", "b", *"ab", *"ba", *"ab"]  # once unmeasured, then forwards, backwards, forwards
    assert [(name, len(values)) for name, values in rates.items()] == [("a", 3), ("b", 3)]


def test_a_ratio_is_formed_turn_by_turn() -> None:
    rates = {"a": [10.0, 20.0, 90.0], "b": [5.0, 20.0, 30.0]}  # ratio of the medians: 1, median of the ratios: 2
    found = Ratio("speed", "a", "b", at_least=2.0).figure(rates)
    assert (found["median"], found["low"], found["high"], found["reached"]) == (2.0, 1.0, 3.0, True)
    assert Ratio("share", "a", "b", at_least=2.0, scale=0.5).figure(rates)["reached"] is False
    assert Ratio("cost", "a", "b", at_most=1.9).figure(rates)["reached"] is False
    assert Ratio("cost", "a", "b").figure(rates)["reached"] is None


def test_the_page_has_every_figure_with_target_and_verdict() -> None:
    text = page.render(page._empty(), measured(), "page")
    assert "| `train/8M/2048/eager` | speed over Llama | 1.20 | 1.10, 1.25 | ≥ 1.15 | yes |" in text
    assert "| `train/8M/2048/eager` | share of the peak | 50 % | 48, 52 | ≥ 55 % | **no** |" in text
    assert "| `train/8M/2048/eager` | ours | 1,700 tokens/s | 1,650, 1,800 | 5 | 9 |" in text
    assert "| r | D, 2 cores, 2 threads; v | `abc` | `c` | train |" in text
    assert "## decode\n<!-- decode -->\nNot measured.\n" in text
    assert all(
        "prediction" in line for line in text.splitlines() if line.startswith(("| CEMA", "| speed over Llama 2"))
    )
    assert page.render(text, measured(), "page") == text


def test_the_page_says_what_failed_and_what_has_few_turns() -> None:
    failed = {"train/8M/2048/eager": {"run": "r", "seconds": 1.0, "error": "RuntimeError: no memory"}}
    text = page.render(page._empty(), {**measured(), "entries": failed}, "page")
    assert "| `train/8M/2048/eager` | **not measured: RuntimeError: no memory** |  |  |  | **no** |" in text
    assert "1.10, 1.25, 2 turns only" in page.render(page._empty(), measured(turns=2), "page")


def test_a_single_turn_is_named_and_a_counted_figure_has_none() -> None:
    one = Ratio("speed over Llama", "a", "b").figure({"a": [2.0], "b": [1.0]})
    counted = timing.constant("operations", 1.3, at_most=1.5)
    assert counted["reached"] is True
    document = measured(turns=1, figures=[one, counted])
    lines = page.section_lines(document["entries"])
    assert "| `train/8M/2048/eager` | speed over Llama | 2.00 | 1 turn only |  |  |" in lines
    assert "| `train/8M/2048/eager` | operations | 1.30 |  | ≤ 1.5 | yes |" in lines
    assert "| Training, 8 M, 2,048 tokens | Llama | 2.00 x | 1 turn only |" in page.readme_lines(document)


def test_entries_of_a_section_that_come_from_two_runs_are_told_apart() -> None:
    document = measured()
    entry = document["entries"]["train/8M/2048/eager"]
    document["entries"] |= {"train/8M/flat": {**entry, "run": "s"}, "cema/4096": entry}
    document["runs"]["s"] = {**document["runs"]["r"], "date": "s", "commit": "def"}
    first, second = page.origin_lines(document)[2:]
    assert "`abc`" in first and first.endswith("| train/8M/2048/eager, cema |")
    assert "`def`" in second and second.endswith("| train/8M/flat |")


def test_prose_stays_and_a_page_without_a_place_is_refused() -> None:
    text = page._empty().replace("## cema", "Words.\n## cema")
    assert "Words.\n## cema" in page.render(text, measured(), "page")
    with pytest.raises(InputError, match=r"page: <!-- train --> … <!-- /train --> is missing"):
        page.render("# Benchmarks", measured(), "page")


def test_readme_shows_what_was_measured() -> None:
    lines = page.readme_lines(measured())
    assert "| Training, 8 M, 2,048 tokens | Llama | 1.20 x | 1.10, 1.25 |" in lines
    assert lines[-3:] == ["On D, 2 cores, 2 threads; v.", "", f"![{page.PICTURES[1][1]}](docs/train_length.svg)"]
    assert not any("Decoding" in line for line in lines)


def test_page_and_readme_show_the_figures_that_are_kept(repository: Path) -> None:
    document = json.loads((repository / "docs/benchmarks.json").read_text())
    text = (repository / "docs/benchmarks.md").read_text()
    assert page.render(text, document, "page") == text
    readme = (repository / "README.md").read_text()
    assert page.between(readme, "speed", page.readme_lines(document), "README") == readme


def test_missed_targets_are_named_and_failed_entries_too() -> None:
    assert results.missed(measured()) == ["train/8M/2048/eager: share of the peak: 0.5, expected ≥ 55 %"]
    failed = {"train/8M/2048/eager": {"run": "r", "error": "RuntimeError: x"}}
    assert results.missed({"entries": failed}) == ["train/8M/2048/eager: RuntimeError: x"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "format list, expected 1"),
        ('{"format": 0}', "format 0, expected 1"),
        ('{"format": 1, "runs": {}}', "`runs` or `entries` is missing"),
        (
            '{"format": 1, "runs": {}, "entries": {"train/9M/1": {}}}',
            "entry train/9M/1 is not measured by this version",
        ),
        ('{"format": 1, "runs": {}, "entries": {"cema/4096": {"run": "r"}}}', "entry cema/4096 is incomplete"),
        ('{"format": 1, "runs": {"r": {"date": "r"}}, "entries": {}}', "run r is incomplete"),
    ],
)
def test_figures_that_cannot_be_used_are_one_line(
    campaign: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any, text: str, said: str
) -> None:
    (tmp_path / "benchmarks.json").write_text(text)
    assert run(campaign, monkeypatch, "--only", "cema", "--out", str(tmp_path)) == 2
    found = capsys.readouterr().err
    assert found.count("\n") == 1 and said in found and "delete it" in found
    assert (tmp_path / "benchmarks.json").read_text() == text


def test_a_missing_peer_is_one_line(
    campaign: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    assert run(campaign, monkeypatch, "--only", "cema,decode", "--out", str(tmp_path)) == 3
    found = capsys.readouterr().err
    assert (
        found.startswith("make bench: section decode needs transformers, which is not installed")
        and found.count("\n") == 1
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (
            ["--only", "train/8M/2048/egaer"],
            2,
            "--only train/8M/2048/egaer: no such entry; did you mean train/8M/2048/",
        ),
        (["--only", "xyz"], 2, "--only xyz: no such entry; expected some of train, jax, cema, decode, gpu, or train/"),
        (["--only", " ,"], 2, "--only ` ,` names no entry"),
        (["--only", "cema", "--out", "/dev/null/x"], 2, "/dev/null/x: not a directory; --out takes a folder that can"),
    ],
)
def test_what_cannot_be_measured_or_written_is_one_line(
    campaign: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: Any,
    options: list[str],
    code: int,
    said: str,
) -> None:
    assert run(campaign, monkeypatch, "--out", str(tmp_path), *options) == code
    found = capsys.readouterr().err
    assert found.startswith(f"make bench: {said}") and found.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_asked_for_and_not_there_is_no_success(
    campaign: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(campaign, monkeypatch, "--only", "gpu", "--out", str(tmp_path)) == 3
    assert "--only gpu: nothing of it can be measured here: there is no CUDA device" in capsys.readouterr().err


def test_a_smoke_test_never_writes_into_docs(
    campaign: Any, monkeypatch: pytest.MonkeyPatch, repository: Path, capsys: Any
) -> None:
    monkeypatch.chdir(repository)
    with pytest.raises(SystemExit) as ended:
        run(campaign, monkeypatch, "--smoke", "--out", "docs")
    assert ended.value.code == 2 and "give another folder with --out" in capsys.readouterr().err


FOUND = {"turns": 5, "rates": {}, "figures": [timing.figure("speed", [2.0, 2.5])]}
"""What the process of an entry hands back."""


def test_a_page_without_a_place_is_found_before_anything_is_measured(
    campaign: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "benchmarks.md").write_text("# Benchmarks")
    monkeypatch.setattr(campaign, "_apart", lambda *_: pytest.fail("measured"))
    assert run(campaign, monkeypatch, "--only", "cema", "--out", str(tmp_path)) == 2
    assert "<!-- train --> … <!-- /train --> is missing" in capsys.readouterr().err


def test_a_broken_off_campaign_keeps_what_was_done(
    campaign: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    def apart(key: str, given: Any) -> dict[str, Any]:
        if key == "decode/8M/0":
            raise KeyboardInterrupt
        return FOUND

    monkeypatch.setattr(campaign, "NEEDS", {})
    monkeypatch.setattr(campaign, "_apart", apart)
    assert run(campaign, monkeypatch, "--only", "cema,decode", "--out", str(tmp_path)) == 130
    assert capsys.readouterr().err == f"make bench: interrupted; {tmp_path} has the entries that were done\n"
    assert list(json.loads((tmp_path / "benchmarks.json").read_text())["entries"]) == ["cema/4096"]
    assert "| `cema/4096` | speed | 2.25 |" in (tmp_path / "benchmarks.md").read_text()
    assert not list(tmp_path.glob("*.tmp"))


def test_each_entry_has_the_commit_it_was_measured_at(
    campaign: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now = ["abc"]

    def apart(key: str, given: Any) -> dict[str, Any]:
        now[0] = "def" if key == "cema/4096" else now[0]
        return FOUND

    moments = iter(f"2026-01-01 00:00:{second:02} UTC" for second in range(60))
    origin = results.origin
    monkeypatch.setattr(results, "commit", lambda: now[0])
    monkeypatch.setattr(results, "origin", lambda *a, **b: {**origin(*a, **b), "date": next(moments)})
    monkeypatch.setattr(campaign, "NEEDS", {})
    monkeypatch.setattr(campaign, "_apart", apart)
    run(campaign, monkeypatch, "--only", "cema,decode/8M/0,decode/8M/flat", "--out", str(tmp_path))
    document = json.loads((tmp_path / "benchmarks.json").read_text())
    commits = {key: document["runs"][entry["run"]]["commit"] for key, entry in document["entries"].items()}
    assert commits == {"cema/4096": "abc", "decode/8M/0": "def", "decode/8M/flat": "def"}
    assert len(document["runs"]) == 2


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert results.commit() == "unknown"


def here(**about: Any) -> dict[str, Any]:
    """A document of one entry that was measured on this machine."""
    return {**measured(), "runs": {"r": {**results.origin("c"), **about}}}


@pytest.mark.parametrize(
    ("about", "options", "said"),
    [
        ({"device": "Abacus"}, ["--only", "cema"], "train/8M/2048/eager was measured on Abacus, "),
        ({"threads": 77}, ["--only", "cema"], "77 threads, this is "),
        ({}, ["--only", "cema", "--smoke"], "the figures of train/8M/2048/eager are of no smoke test"),
        ({"smoke": True}, ["--only", "cema"], "the figures of train/8M/2048/eager are of a smoke test"),
    ],
)
def test_figures_of_two_machines_or_of_a_smoke_test_are_not_mixed(
    campaign: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: Any,
    about: dict[str, Any],
    options: list[str],
    said: str,
) -> None:
    text = json.dumps(here(**about))
    (tmp_path / "benchmarks.json").write_text(text)
    monkeypatch.setattr(campaign, "_apart", lambda *_: pytest.fail("measured"))
    assert run(campaign, monkeypatch, *options, "--out", str(tmp_path)) == 2
    found = capsys.readouterr().err
    assert said in found and "measure everything, without --only" in found and found.count("\n") == 1
    assert (tmp_path / "benchmarks.json").read_text() == text


def test_what_is_measured_again_may_be_of_another_machine_and_a_gpu_of_its_own() -> None:
    document, origin = here(device="Abacus"), results.origin("c")
    results.check_alike(Path("x"), document, ["train/8M/2048/eager", "cema/4096"], origin)
    results.check_alike(Path("x"), document, ["gpu/cema/fft"], origin)


def test_entries_are_chosen_by_whole_parts_of_their_names(campaign: Any) -> None:
    keys = ["train/8M/2048/eager", "train/8M/2048/bf16", "train/8M/20480", "cema/4096"]
    chosen = [key for key in keys if campaign._belongs(key, "train/8M/2048")]
    assert chosen == keys[:2]


def test_a_run_keeps_what_was_measured_before(
    campaign: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, repository: Path
) -> None:
    (tmp_path / "benchmarks.json").write_text(json.dumps(here(smoke=True)))
    monkeypatch.setenv("PYTHONPATH", f"{repository}:{repository / 'kernels'}")
    assert run(campaign, monkeypatch, "--only", "cema", "--smoke", "--out", str(tmp_path)) == 6
    found = json.loads((tmp_path / "benchmarks.json").read_text())
    assert found["entries"]["train/8M/2048/eager"] == measured()["entries"]["train/8M/2048/eager"]
    entry = found["entries"]["cema/4096"]
    assert entry["turns"] == 1 and set(entry["rates"]) == {"ours", "FFT"}
    assert {figure["reached"] for figure in entry["figures"]} == {None}  # a smoke test has no targets
    assert found["runs"][entry["run"]]["smoke"] is True
    assert "`cema/4096` | speed over the FFT formulation" in (tmp_path / "benchmarks.md").read_text()


def test_a_state_moved_to_a_great_depth_is_that_of_its_place_in_the_chunk() -> None:
    model = Megalodon(SIZES["tiny"].ours).eval()
    chunk = SIZES["tiny"].ours.chunk_size
    for depth in (0, 5, chunk, 3 * chunk + 7, 1_000_003):
        session = decode.session_at(model, depth)
        assert session.position == depth
        assert session.state.layers[0].k.shape[1] == depth % chunk
        assert int(session.state.norm.count) == int(session.state.layers[0].norm.count) == depth
    near, far = decode.session_at(model, chunk + 7), decode.session_at(model, 99 * chunk + 7)
    torch.testing.assert_close(far.state.layers[0].cema, near.state.layers[0].cema, rtol=0, atol=0)
    assert torch.isfinite(far.step(3)).all()


def test_pictures_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    document = measured()
    for depth, rate in ((0, 600.0), (4096, 598.0)):
        rates = {"ours": {"median": rate}, "Llama": {"median": rate / (1 + depth)}}
        document["entries"][f"decode/8M/{depth}"] = {"rates": rates}
    assert pictures.decode_points(document)["Llama"] == {0: 600.0, 4096: 598.0 / 4097}
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        pictures.draw(tmp_path / name, document)
        found.append([path.read_bytes() for path in sorted((tmp_path / name).iterdir())])
    assert len(found[0]) == 2 and found[0] == found[1]
    assert all(b"<dc:date>" not in picture and len(picture) < 40_000 for picture in found[0])


def test_llama_has_the_parameters_that_are_counted_and_its_cache_is_cut_back() -> None:
    pytest.importorskip("transformers", reason="Hugging Face transformers is not installed (extra `bench`)")
    import hugging_face

    size = SIZES["tiny"]
    model = hugging_face.build(size.llama, size.ours.num_parameters()).eval()
    assert model.num_parameters() == size.llama.num_parameters()
    cache = hugging_face.filled_cache(model, 40)
    hugging_face.decode(model, cache, 3)
    assert cache.get_seq_length() == 43
    decode.llama_decoding(model, 40, 3)()
