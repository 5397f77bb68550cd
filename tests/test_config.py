"""The recipe loader with bad input: every error at once, with file, line and column, and the nearest name."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, Strict

from megalodon.config import (
    Amount,
    Bytes,
    Config,
    Count,
    InvalidRecipe,
    Share,
    count_name,
    merge,
    override,
    parse_count,
    parse_duration,
    read_layer,
    read_text,
    validate,
)
from megalodon.errors import RecipeError


class Optim(Config):
    lr: float = Field(1e-3, gt=0)
    """Rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Two numbers."""
    warmup: Amount = Amount(0.02, "share")
    """How long."""
    every: int | Literal["auto"] = "auto"
    """A union."""
    rows: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """A union with a bound."""


class Source(Config):
    name: str = Field(pattern="^[a-z]+$")
    """Letters."""
    path: Annotated[Path, Strict(False)] | None = None
    """Place."""
    hf: str | None = None
    """Name on the Hub."""
    weight: Share = 1.0
    """Weight."""


class Recipe(Config):
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """One of three."""
    tokens: Count = 0
    """Count."""
    sample: Bytes = 0
    """Size."""
    on: bool = False
    """A flag."""
    seq_len: int = 8
    """Underscores."""
    optim: Optim = Optim()
    """A section."""
    sources: tuple[Source, ...] = ()
    """A list of sections."""
    fields: dict[str, str] = Field(default_factory=dict)
    """A free mapping."""


ONE_OF = [("sources.*", ("path", "hf"))]


def read(text: str, *overrides: str) -> Recipe:
    return validate(override(read_text(text, "r.yaml"), overrides, Recipe, ONE_OF), Recipe)


def errors(text: str, *overrides: str) -> list[str]:
    with pytest.raises(InvalidRecipe) as error:
        read(text, *overrides)
    return [str(problem) for problem in error.value.problems]


def test_scalars_are_those_of_yaml_1_2():
    words = ["1e-4", "on", "12:30", "no", "010", "0x1F", "0o17", ".inf", "~", "", "True", "-3", "1_000", "-.5"]
    text = "".join(f"key{number}: {word}\n" for number, word in enumerate(words))
    values = list(read_text(text, "r.yaml").plain().values())
    assert values == [1e-4, "on", "12:30", "no", 10, 31, 15, float("inf"), None, None, True, -3, "1_000", -0.5]
    assert [type(value) for value in values[:5]] == [float, str, str, str, int]


def test_sequences_become_tuples_and_quantities_numbers():
    recipe = read("tokens: 1.5M\nsample: 2GiB\noptim: {betas: [0.8, 1], warmup: 1B tokens}\n")
    assert (recipe.tokens, recipe.sample, recipe.optim.betas) == (1_500_000, 2 << 30, (0.8, 1.0))
    assert recipe.optim.warmup == Amount(1e9, "tokens")
    assert read("tokens: 8Ki").tokens == 8192 and read("tokens: 7").tokens == 7


def test_amounts_become_steps_and_read_back():
    for text, steps in (("2%", 20), (0.5, 500), ("500 steps", 500), ("1k tokens", 100), ("1001 tokens", 101)):
        amount = Amount.parse(text)
        assert amount.steps(horizon=1000, batch_tokens=10) == steps
        assert Amount.parse(str(amount)) == amount
    assert read("sources: [{name: a, weight: 7%}]").sources[0].weight == 0.07
    assert parse_duration("20m") == 1200 and parse_duration(5) == 5


@pytest.mark.parametrize(
    "text",
    [
        "tokens: 10Q",
        "tokens: 1.0001k",
        "sample: 3 apples",
        "optim: {warmup: soon}",
        "optim: {warmup: 2}",
        "optim: {warmup: .nan}",
    ],
)
def test_quantities_that_are_none_are_refused(text):
    [message] = errors(text)
    assert "is not a" in message or "expected a" in message


@pytest.mark.parametrize(
    "text, said",
    [
        (f"tokens: {'9' * 320}B", f"tokens: `{'9' * 40}` is too large: expected at most {2**63 - 1}"),
        (f"tokens: {'9' * 320}", f"`{'9' * 40}` is too large: expected at most {2**63 - 1}"),
        (f"tokens: {'9' * 5000}", f"`{'9' * 40}` is not a value of type int"),
        (f"sources: [{{name: a, weight: {'9' * 320}%}}]", f"sources.a.weight: `{'9' * 40}` is too large"),
        ("optim: {lr: .inf}", "optim.lr: `inf`: must be a finite number"),
        ("optim: {lr: 1e999}", "optim.lr: `inf`: must be a finite number"),
        ("sources: [{name: a, weight: .nan}]", "sources.a.weight: `nan`: must be a finite number"),
    ],
)
def test_numbers_without_end_are_refused(text, said):
    [message] = errors(text)
    assert said in message


def test_an_unknown_key_stands_at_the_key_with_the_nearest_name_and_carets():
    with pytest.raises(InvalidRecipe) as error:
        read("optim:\n  beta: [0.9, 0.95]\n")
    [problem] = error.value.problems
    assert str(problem) == "r.yaml:2:3: optim.beta: unknown key; did you mean `betas`?"
    assert problem.place.excerpt() == "    2 |   beta: [0.9, 0.95]\n      |   ^^^^"
    assert error.value.hint == "megalodon recipes schema optim"
    assert error.value.exit_code == 2
    assert errors("lr: 1.0\n") == ["r.yaml:1:1: lr: unknown key; did you mean `optim.lr`?"]
    assert "known: name, path, hf, weight" in errors("sources: [{name: a, zzz: 1}]\n")[0]


def test_all_errors_are_reported_at_once_in_the_order_of_the_file():
    text = (
        "precision: fp16\non: yes\n"
        "optim:\n  lr: high\n  betas: [0.9]\n  every: soon\n"
        "sources:\n  - name: a\n    weight: x%\n  - path: p\n"
    )
    assert errors(text, "optim.warmp=2%") == [
        "r.yaml:1:12: precision: `fp16` is not one of auto, bf16, fp32",
        "r.yaml:2:5: on: expected true or false, got `yes`",
        "r.yaml:4:7: optim.lr: expected a number, got `high`",
        "r.yaml:5:10: optim.betas: expected 2 numbers, got 1",
        "r.yaml:6:10: optim.every: expected an integer | auto, got `soon`",
        "r.yaml:9:13: sources.a.weight: `x%` is not a share such as 0.02 or 2%",
        "r.yaml:10:5: sources.1.name: is required",
        "command line: optim.warmp=2%: unknown key; did you mean `warmup`?",
    ]


def test_a_number_out_of_range_says_so():
    assert errors("optim: {lr: -1}\n") == ["r.yaml:1:13: optim.lr: `-1`: must be greater than 0"]
    assert errors("optim: {rows: 0}\n") == ["r.yaml:1:15: optim.rows: `0`: must be greater than or equal to 1"]


def test_entries_of_a_list_are_spoken_of_one_by_one_in_their_order():
    assert errors("on: true\n", "sources=[1, 2]") == [
        "command line: sources=[1, 2]: sources.0: expected a section, got `1`",
        "command line: sources=[1, 2]: sources.1: expected a section, got `2`",
    ]


def test_text_that_does_not_fit_gets_the_words_of_its_help():
    [message] = errors("sources: [{name: a b}]\n")
    assert message == "r.yaml:1:18: sources.a b.name: `a b` does not fit; expected letters"


def test_a_required_value_that_the_command_line_takes_away_is_missed_there():
    text = "sources:\n  - name: a\n    hf: b\n"
    assert errors(text, "~sources.a.name") == ["command line: ~sources.a.name: sources.0.name: is required"]
    assert read(text, "~sources.a.weight").sources[0].hf == "b"


def test_a_key_given_twice_names_both_lines():
    assert errors("on: true\noptim:\n  lr: 1.0\n  lr: 2.0\non: false\n") == [
        "r.yaml:4:3: optim.lr: given twice, first in line 3; remove one of them",
        "r.yaml:5:1: on: given twice, first in line 1; remove one of them",
    ]


def test_text_that_is_no_recipe_is_refused_with_its_place(tmp_path):
    assert errors("on: [1\nb: 2\n")[0].startswith("r.yaml:2:2: not YAML: ")
    assert errors("- a\n- b\n") == ["r.yaml:1:1: expected `key: value` lines, got `[a, b]`"]
    assert errors("") == ["r.yaml:1:1: expected `key: value` lines, got `null`"]
    assert "recipes hold plain values, no tags" in errors("on: !!python/name:os.system x\n")[0]
    assert "a key must be a word" in errors("? [1, 2]\n: 3\n")[0]
    assert "not YAML" in errors("a: \x01\n")[0]
    assert errors("optim: &a\n  x: *a\n") == ["r.yaml:1:1: nested too deeply, or an alias stands inside itself"]
    assert errors('sources: [{name: a, path: "a\\0b"}]\n') == ["r.yaml:1:27: a NUL character cannot stand here"]
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(RecipeError, match=r"latin.yaml: not UTF-8: byte 9 is 0xe9"):
        read_layer(latin)
    with pytest.raises(RecipeError, match="cannot be read"):
        read_layer(tmp_path / "missing.yaml")


def test_overrides_reach_sections_lists_and_defaults():
    text = "seq_len: 4\nsources: [{name: books, path: null}, {name: web, hf: a/b}]\n"
    recipe = read(text, "optim.lr=1", "seq-len=16", "sources.books.path=x", "sources.1.weight=2%", "fields={a: b.c}")
    assert (recipe.optim.lr, recipe.seq_len, recipe.fields) == (1.0, 16, {"a": "b.c"})
    assert (recipe.sources[0].path, recipe.sources[1].weight) == (Path("x"), 0.02)
    assert read(text, "~seq-len").seq_len == 8
    assert read(text, "seq_len=1", "seq_len=2").seq_len == 2
    assert read(text, "sources.web.path=there").sources[1].hf is None


def test_bad_overrides_are_all_named():
    text = "sources: [{name: books}]\n"
    assert errors(text, "fast", "~zz", "sources.web.path=1", "on=[1") == [
        "command line: fast: expected key=value or ~key, such as optim.lr=1e-3",
        "command line: ~zz: zz: unknown key; known: precision, tokens, sample, on, seq_len, optim, sources, fields",
        "command line: sources.web.path=1: sources.web: no entry `web` in the list; entries: books",
        "command line: on=[1: not YAML: expected ',' or ']', but got '<stream end>'",
    ]
    assert errors("", "optim.betas=0.9") == ["r.yaml:1:1: expected `key: value` lines, got `null`"]
    assert errors("on: true\n", "optim.betas=0.9") == ["command line: optim.betas=0.9: expected 2 numbers, got 1"]


def test_the_later_layer_wins_per_key_and_lists_are_replaced():
    low = read_text("optim: {lr: 1.0, every: 3}\nsources: [{name: a}, {name: b}]\n", "low.yaml")
    high = read_text("optim: {lr: 2.0}\nsources: [{name: c}]\n", "high.yaml")
    merged = merge(low, high)
    recipe = validate(merged, Recipe)
    assert (recipe.optim.lr, recipe.optim.every, [s.name for s in recipe.sources]) == (2.0, 3, ["c"])
    places = [merged.find(path) for path in (["optim", "lr"], ["optim", "every"])]
    assert [node.place.source for node in places if node] == ["high.yaml", "low.yaml"]


def test_values_never_change():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().on = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("count", "name"), [(0, "0"), (1024, "1Ki"), (1 << 17, "128Ki"), (3 << 20, "3Mi"), (1000, "1,000")]
)
def test_counts_have_the_names_that_options_take(count, name):
    assert count_name(count) == name
    assert parse_count(name.replace(",", "")) == count
