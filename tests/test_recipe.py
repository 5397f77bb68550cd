"""Recipes: every shipped one loads and has the size it states; layers, checks across sections, the resolved file."""

import re
from pathlib import Path

import pytest

from megalodon.config import InvalidRecipe, read_text
from megalodon.model.megalodon import Megalodon
from megalodon.recipe import FinetuneConfig, RunConfig, dump, json_schema, key_docs, load_recipe, parse_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
PARAMETERS = {
    "debug": 151_328,
    "quickstart": 1_170_304,
    "200m": 220_627_968,
    "1.3b": 1_342_832_640,
    "1.3b-pg19": 1_327_628_288,
    "7b": 7_385_817_088,
    "7b-llama": 6_738_415_616,
    "books-small": 39_639_040,
    "enwik8-12m": 12_098_112 + 2 * 4 * 384,  # the published 256 ids, and the tokenizer's four
    "enwik8-12m-llama": 10_818_432 + 2 * 4 * 384,
}
SMALL = """
name: small
data: {seq_len: 8, isolate: doc, sources: [{name: books, path: here}]}
train: {max_steps: 2, batch_tokens: 16}
"""


def load(name: str, *overrides: str) -> RunConfig:
    config = load_recipe([RECIPES / f"{name}.yaml"], overrides).config
    assert isinstance(config, RunConfig)
    return config


@pytest.fixture
def small(tmp_path):
    """Write a small recipe, with changes to its text, and load it."""

    def write(*overrides: str, text: str = SMALL, name: str = "small"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        return load_recipe([path], overrides)

    return write


def messages(error: pytest.ExceptionInfo[InvalidRecipe]) -> list[str]:
    return [str(problem) for problem in error.value.problems]


def test_the_shipped_recipes_are_those_of_the_documentation():
    pairs = ("quickstart", "books-tiny", "books-small", "200m", "1.3b", "7b", "enwik8-12m")
    partners = {f"{name}-llama" for name in pairs}
    assert set(NAMES) == set(PARAMETERS) | partners | {"books-tiny", "finetune-chat", "finetune-lora"}


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_loads_and_its_header_states_its_name_and_size(name):
    path = RECIPES / f"{name}.yaml"
    config = load_recipe([path]).config
    header = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert config.name == name
    assert header.startswith(f"# {name}: ") and "megalodon " in header
    if isinstance(config, RunConfig):
        assert f"{config.num_parameters():,}" in header
    for line in path.read_text().splitlines():
        assert len(re.findall(r"\b\w+: ", line.split("#")[0])) <= 1, f"more than one key on a line: {line}"


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_shipped_recipe_has_the_stated_parameters(name):
    assert load(name).num_parameters() == PARAMETERS[name]


def test_counting_parameters_agrees_with_the_built_model():
    config = load("debug")
    model = Megalodon(config.model_config_for(config.padded_vocab_size()))
    assert sum(parameter.numel() for parameter in model.parameters()) == config.num_parameters()


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("-llama")])
def test_a_baseline_matches_its_partner(name):
    baseline, partner = load(name), load(name.removesuffix("-llama"))
    if name not in ("7b-llama", "enwik8-12m-llama"):  # as published
        assert abs(baseline.num_parameters() / partner.num_parameters() - 1) < 0.006
    assert baseline.model.arch == "llama"
    for section in ("tokenizer", "data", "train", "eval"):
        assert getattr(baseline, section) == getattr(partner, section)
    assert baseline.optim == partner.optim.model_copy(update={"lr": baseline.optim.lr})  # each at its own rate


def test_books_tiny_fits_two_laptop_cores():
    config = load("books-tiny")
    assert 5e6 <= config.num_parameters() <= 8e6
    assert (config.data.seq_len, config.model.chunk_size, config.train.batch_tokens) == (4096, 512, 16384)


def test_the_7b_recipe_is_the_papers_run():
    config = load("7b")
    assert (config.model.chunk_size, config.model.rope_base) == (4096, 100_000)
    assert (config.optim.lr, config.optim.betas, config.optim.weight_decay) == (3.5e-4, (0.9, 0.95), 0.1)
    assert config.optim.warmup.steps(10**6, 1) == 2500
    assert (config.train.batch_tokens, config.data.isolate, config.parallel.cp) == (4_194_304, "none", 2)


@pytest.mark.parametrize("name", NAMES)
def test_a_resolved_recipe_reads_back_as_itself(name):
    resolved = load_recipe([RECIPES / f"{name}.yaml"])
    for origins in (True, False):
        assert parse_recipe(dump(resolved, origins), "recipe.yaml") == resolved.config


def test_every_value_knows_where_it_comes_from(small):
    resolved = small("optim.lr=1e-3", text=SMALL + "model: {preset: mega200M, num_layers: 3}\n")
    origins = resolved.origins
    assert origins["train.max_steps"].endswith("small.yaml:4")
    assert origins["optim.lr"] == "command line"
    assert origins["optim.eps"] == "default"
    assert origins["model.z_dim"] == "preset mega200M"
    assert origins["model.num_layers"].endswith("small.yaml:5")
    assert origins["data.sources.books.path"].endswith("small.yaml:3")
    assert resolved.changes == (("optim.lr", "0.0006", "0.001"),)


def test_a_preset_sets_what_is_not_given(small):
    config = small(text=SMALL + "model: {preset: mega200M, num_layers: 3}\n").config
    assert (config.model.num_layers, config.model.z_dim, config.model.ffn_hidden_dim) == (3, 256, 2560)


def test_of_several_recipes_the_later_wins_and_a_base_comes_first(tmp_path):
    (tmp_path / "low.yaml").write_text(SMALL + "optim: {lr: 1e-3, eps: 1e-7}\n")
    (tmp_path / "mid.yaml").write_text("base: low\nname: mid\noptim: {lr: 2e-3}\n")
    (tmp_path / "top.yaml").write_text("train: {max_tokens: 64}\ndata: {sources: [{name: web, hf: a/b}]}\n")
    config = load_recipe([tmp_path / "mid.yaml", tmp_path / "top.yaml"]).config
    assert (config.name, config.optim.lr, config.optim.eps) == ("mid", 2e-3, 1e-7)
    assert (config.train.max_steps, config.train.max_tokens) == (None, 64)
    assert [source.name for source in config.data.sources] == ["web"]


def test_a_recipe_cannot_be_its_own_base(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b\n")
    (tmp_path / "b.yaml").write_text("base: a\n")
    with pytest.raises(InvalidRecipe, match=r"b.yaml:1:7: base: a recipe cannot be its own base: a -> b -> a"):
        load_recipe([tmp_path / "a.yaml"])


def test_two_horizons_in_one_layer_are_an_error_and_a_later_one_replaces(small):
    with pytest.raises(InvalidRecipe, match=r"small.yaml:4:23: train.max_tokens: give one of max_steps and max_tokens"):
        small(text=SMALL.replace("max_steps: 2,", "max_steps: 2, max_tokens: 32,"))
    with pytest.raises(InvalidRecipe, match="give one of max_tokens and max_epochs"):
        small("train.max_tokens=32", "train.max_epochs=1")
    assert small("train.max_epochs=1").config.train.max_steps is None
    with pytest.raises(InvalidRecipe, match="expected one of max_tokens, max_steps, max_epochs, got none"):
        small("~train.max_steps")


def test_impossible_numbers_name_all_parties(small):
    with pytest.raises(InvalidRecipe) as error:
        small("train.batch_tokens=100", "parallel.dp_replicate=3", "parallel.cp=2", "model.chunk_size=3")
    seq_len, batch = messages(error)
    assert seq_len.endswith(
        "small.yaml:3:17: data.seq_len 8 is not a multiple of parallel.cp 2 x model.chunk_size 3 = 6; nearest: 12"
    )
    assert batch == (
        "command line: train.batch_tokens=100: train.batch_tokens 100 is not a multiple of data.seq_len 8"
        " x 3 data-parallel ranks = 24; nearest: 96, 120"
    )


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ("data.isolate=doc", "block needs data.isolate none, as documents give every batch shapes of its own"),
        ("train.recompute=attention", "block compiles nothing under train.recompute attention; expected none"),
    ],
)
def test_whole_blocks_are_compiled_only_where_shapes_repeat_and_nothing_is_recomputed(small, other, reason):
    alone = "train.compile=block", "data.isolate=none"
    assert small(*alone).config.train.compile == "block"
    with pytest.raises(InvalidRecipe) as error:
        small(*alone, other)
    (message,) = messages(error)
    assert message.startswith(f"command line: train.compile=block: {reason}")


def test_no_devices_and_no_name_are_refused_where_they_are_given(small):
    with pytest.raises(InvalidRecipe) as error:
        small("parallel.dp_shard=0", "train.max_epochs=.inf")
    assert messages(error) == [
        "command line: parallel.dp_shard=0: `0`: must be greater than or equal to 1",
        "command line: train.max_epochs=.inf: `inf`: must be a finite number",
    ]
    for change, said in (("~name", "name: is required"), ("name=a b", "`a b` does not fit; expected letters, digits")):
        with pytest.raises(InvalidRecipe) as error:
            small(change)
        assert messages(error)[0].startswith(f"command line: {change}: {said}")


def test_a_models_own_checks_stand_at_the_value_they_speak_of(small):
    with pytest.raises(InvalidRecipe) as error:
        small("model.num_heads=3")
    [message] = messages(error)
    assert message.startswith("command line: model.num_heads=3: ")
    assert "z_dim 256 is not a multiple of num_heads 3" in message


def test_the_vocabulary_is_not_a_key_of_the_model(small):
    with pytest.raises(InvalidRecipe, match=r"model.vocab_size=100: unknown key; the tokenizer decides it"):
        small("model.vocab_size=100")
    with pytest.raises(InvalidRecipe, match=r"model.preset=mega20M: no preset `mega20M`; did you mean `mega200M`\?"):
        small("model.preset=mega20M")


def test_required_values_may_be_unset_until_work_starts():
    resolved = load_recipe([RECIPES / "books-small-llama.yaml"])
    expected = "^books-small-llama: data.sources.books.path is required: a folder of .txt files, one book each$"
    with pytest.raises(InvalidRecipe, match=expected):
        resolved.require_complete()
    load_recipe([RECIPES / "books-small.yaml"], ["data.sources.books.path=here"]).require_complete()
    with pytest.raises(InvalidRecipe) as error:
        load_recipe([RECIPES / "finetune-lora.yaml"]).require_complete()
    assert len(error.value.problems) == 2


def test_a_newer_schema_is_refused_with_both_numbers(small):
    with pytest.raises(
        InvalidRecipe, match=r"small.yaml:5:9: schema: the recipe has schema 7, this version reads schema 1"
    ):
        small(text=SMALL + "schema: 7\n")


def test_kinds_are_told_apart(small):
    with pytest.raises(InvalidRecipe, match=r"kind: `distil` is not one of pretrain, finetune"):
        small(text=SMALL + "kind: distil\n")
    assert isinstance(load_recipe([RECIPES / "finetune-chat.yaml"]).config, FinetuneConfig)


def test_every_key_is_documented():
    for kind in ("pretrain", "finetune"):
        undocumented = [doc.key for doc in key_docs(kind) if not doc.help]
        assert not undocumented
        assert "optim" in json_schema(kind)["properties"]
    assert "model.vocab_size" not in [doc.key for doc in key_docs()]


def test_what_is_written_survives_quoting():
    resolved = load_recipe([RECIPES / "quickstart.yaml"], ['data.sources.stdlib.path="a: b # c"', "name=on"])
    again = read_text(dump(resolved), "x").plain()
    assert again["data"]["sources"][0]["path"] == "a: b # c"
    assert again["name"] == "on"
