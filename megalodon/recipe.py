"""Recipes: what a run consists of, composed of the configuration of every part; the top of the library.

    resolved = load_recipe([Path("recipes/200m.yaml")], ["optim.lr=1e-3"])
    resolved.config.data.seq_len            a frozen RunConfig (or FinetuneConfig)
    resolved.origins["optim.lr"]            "command line"
    dump(resolved)                          the whole recipe as YAML, each value with its origin as a comment

Not here: how YAML is read and errors get their place (megalodon/config.py), which recipes are shipped (recipes/).
"""

import json
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import pydantic
from pydantic import Field, Strict, model_validator

from megalodon.checkpoint.store import CheckpointConfig
from megalodon.config import (
    NAME,
    Config,
    Count,
    Impossible,
    InvalidRecipe,
    Node,
    OneOf,
    Place,
    Problem,
    check_alternatives,
    keys,
    merge,
    override,
    read_layer,
    read_text,
    show,
    suggest,
    type_name,
    validate,
)
from megalodon.data.ingest import DataConfig, ValidConfig
from megalodon.data.tokenizer import TokenizerConfig
from megalodon.errors import RecipeError
from megalodon.evaluation.perplexity import EvalConfig
from megalodon.model.adapters import LoraConfig
from megalodon.model.architectures import LanguageModelConfig
from megalodon.model.llama import LlamaConfig
from megalodon.model.megalodon import PRESETS, ModelConfig
from megalodon.parallel.layout import ParallelConfig
from megalodon.training.metrics import LogConfig
from megalodon.training.optim import OptimConfig
from megalodon.training.plan import TrainConfig

SCHEMA: Final = 1
"""The version of the recipe format that this code reads."""

ONE_OF: OneOf = (
    ("train", ("max_tokens", "max_steps", "max_epochs")),
    ("optim", ("lr", "lr_factor")),
    ("data.sources.*", ("path", "hf")),
    ("data.sources.*", ("hf", "builtin")),
    ("data.valid", ("fraction", "path")),
)


class ModelSection(ModelConfig):
    """The `model:` section: sizes of the model; its vocabulary comes from the tokenizer."""

    arch: Literal["megalodon", "llama"] = "megalodon"
    """megalodon, or llama: the baseline with full attention."""
    preset: str | None = None
    """Name of a released model whose sizes hold where none are given: mega200M, mega1.3B, …"""
    init_from: str | None = None
    """CKPT whose weights start the run."""
    lora: LoraConfig | None = None
    """Low-rank adapters; null trains all weights."""
    vocab_size: int = Field(1, exclude=True)
    """Not a key of a recipe: `model_config_for` fills it in."""
    output_size: int = Field(-1, exclude=True)
    """Not a key of a recipe: always the vocabulary."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if own := [name for name in ("vocab_size", "output_size") if name in given]:
            raise Impossible((own[0], "unknown key; the tokenizer decides it, see `tokenizer.vocab_size`"))
        preset = given.get("preset")
        if isinstance(preset, str) and preset not in PRESETS:
            near = suggest(preset, PRESETS)
            raise Impossible(
                (
                    "preset",
                    f"no preset `{preset}`; " + (f"did you mean `{near}`?" if near else f"known: {', '.join(PRESETS)}"),
                )
            )
        return {**PRESETS.get(preset or "", {}), **given}

    def _problems(self) -> list[str]:
        return [] if self.arch == "llama" else super()._problems()  # it does not heed most of the sizes

    @model_validator(mode="after")
    def _llama_fits(self) -> Self:
        if self.arch == "llama" and self.model_dim % (2 * self.num_heads):
            raise Impossible(
                ("num_heads", f"model_dim {self.model_dim} is not a multiple of 2 x num_heads {self.num_heads}")
            )
        if self.arch == "llama" and self.has_dropout:
            raise Impossible(("dropout", "not available with arch llama; expected 0 for every dropout"))
        return self


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


class RunConfig(Config):
    """A pretraining recipe."""

    schema_version: Literal[1] = Field(SCHEMA, alias="schema")
    """Version of the recipe format."""
    kind: Literal["pretrain"] = "pretrain"
    """What the recipe is for: pretrain | finetune."""
    name: str = Field(pattern=NAME)
    """Letters, digits and . _ -, a letter or digit first; the run directory is runs/<name>."""
    model: ModelSection = ModelSection()
    """Sizes and options of the model."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """How text becomes numbers."""
    data: DataConfig
    """Which text, and how it is cut into sequences."""
    train: TrainConfig
    """How long, in what steps, in which numbers."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and learning rate."""
    eval: EvalConfig = EvalConfig()
    """Validation during training."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """What is kept on disk, and how often."""
    log: LogConfig = LogConfig()
    """What is logged, and how often."""
    parallel: ParallelConfig = ParallelConfig()
    """How the work is spread over devices."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        faults = [*_horizon_faults(self.train), *_batch_faults(self), *_compile_faults(self)]
        faults += _source_faults(self.data.sources)
        if faults:
            raise Impossible(*faults)
        return self

    def padded_vocab_size(self) -> int:
        """Return the embedding rows that the tokenizer section asks for, rounded up to `tokenizer.pad_to`."""
        tokenizer = self.tokenizer
        size = 256 + 4 + tokenizer.reserve if tokenizer.kind == "bytes" else tokenizer.vocab_size
        return _round_up(size, tokenizer.pad_to)

    def model_config_for(self, vocab_size: int) -> LanguageModelConfig:
        """Return the model's configuration for a tokenizer of `vocab_size` ids, rounded up to `tokenizer.pad_to`."""
        rows, model = _round_up(vocab_size, self.tokenizer.pad_to), self.model
        if model.arch == "megalodon":
            return ModelConfig(**{**model.model_dump(include=set(ModelConfig.model_fields)), "vocab_size": rows})
        return LlamaConfig(
            num_layers=model.num_layers,
            model_dim=model.model_dim,
            num_heads=model.num_heads,
            ffn_hidden_dim=model.ffn_hidden_dim,
            rope_base=model.rotary_base,
            norm_eps=model.norm_eps,
            share_emb=model.share_emb,
            vocab_size=rows,
            max_positions=self.data.seq_len,
        )

    def num_parameters(self) -> int:
        """Return the parameters of the model that the recipe describes, without building it."""
        return self.model_config_for(self.padded_vocab_size()).num_parameters()

    def unset(self) -> Iterator[str]:
        """Yield the dotted keys that must be set before work starts."""
        for source in self.data.sources:
            if source.path is None and source.hf is None and source.builtin is None:
                yield f"data.sources.{source.name}.path"


def _horizon_faults(train: TrainConfig) -> Iterator[tuple[str, str]]:
    given = [name for name in ("max_tokens", "max_steps", "max_epochs") if getattr(train, name) is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        yield "train", f"expected one of max_tokens, max_steps, max_epochs, got {got}"


def _batch_faults(config: RunConfig) -> Iterator[tuple[str, str]]:
    batch, seq_len, parallel = config.train.batch_tokens, config.data.seq_len, config.parallel
    ranks = parallel.dp_replicate * (1 if parallel.dp_shard == "all" else parallel.dp_shard)
    whole = seq_len * ranks
    if batch % whole:
        low, high = batch // whole * whole, _round_up(batch, whole)
        shared = f" x {ranks} data-parallel ranks = {whole:,}" if ranks > 1 else ""
        nearest = f"{low:,}, {high:,}" if low else f"{high:,}"
        message = f"train.batch_tokens {batch} is not a multiple of data.seq_len {seq_len}{shared}; nearest: {nearest}"
        yield "train.batch_tokens", message
    piece = parallel.cp * config.model.chunk_size
    if parallel.cp > 1 and seq_len % piece:
        parties = f"parallel.cp {parallel.cp} x model.chunk_size {config.model.chunk_size} = {piece:,}"
        yield (
            "data.seq_len",
            f"data.seq_len {seq_len} is not a multiple of {parties}; nearest: {_round_up(seq_len, piece):,}",
        )


def _compile_faults(config: RunConfig) -> Iterator[tuple[str, str]]:
    if config.train.compile != "block":
        return
    if config.data.isolate == "doc":
        reason = "documents give every batch shapes of its own, each compiled for minutes"
        yield "train.compile", f"block needs data.isolate none, as {reason}; or train.compile true"
    if (what := config.train.recompute) != "none":
        yield (
            "train.compile",
            f"block compiles nothing under train.recompute {what}; expected none, or train.compile true",
        )


def _source_faults(sources: Sequence[object]) -> Iterator[tuple[str, str]]:
    if not sources:
        yield "data.sources", "expected at least one source"


class FinetuneModel(Config):
    """The `model:` section of a finetuning recipe; the architecture is that of the checkpoint."""

    init_from: str | None = None
    """CKPT that is tuned; required."""
    lora: LoraConfig | None = None
    """Low-rank adapters; null trains all weights."""


class FinetuneSource(Config):
    """Examples of one kind."""

    name: str
    """How the source is spoken of, in overrides too."""
    path: Annotated[Path, Strict(False)] | None = None
    """A JSONL file or a folder of them."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text"] = "auto"
    """How an example is laid out."""


class FinetuneData(Config):
    """Which examples, and what of them is trained on."""

    sources: tuple[FinetuneSource, ...]
    """Where the examples come from."""
    fields: dict[str, str | dict[str, str]] = Field(default_factory=dict)
    """Your column names, such as {prompt: question, completion: answer}; dots go inside; roles: {bot: assistant}."""
    chat_template: str = "inherit"
    """inherit | plain | chatml | FILE.jinja."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which turns have a loss: all of the assistant, its last one, or every token."""
    seq_len: Count | Literal["inherit"] = "inherit"
    """Tokens of a sequence; inherit = as in pretraining."""
    packing: Literal["first-fit", "none"] = "first-fit"
    """How examples share a sequence."""
    isolate: Literal["doc", "none"]
    """doc: CEMA, norms and attention restart at each example; none: they do not. No default."""
    over_length: Literal["error", "drop", "truncate-start", "truncate-end", "split"]
    """What happens to an example longer than seq_len; split is for text only. No default."""
    valid: ValidConfig = ValidConfig()
    """Which examples are kept for validation."""


class FinetuneOptim(OptimConfig):
    """Optimizer and learning rate."""

    lr_factor: float | None = Field(None, gt=0)
    """The peak rate as a part of the checkpoint's own peak; the later of lr and lr_factor holds."""


class FinetuneConfig(Config):
    """A finetuning recipe: what is left out comes from the checkpoint's own recipe, then from the defaults."""

    schema_version: Literal[1] = Field(SCHEMA, alias="schema")
    """Version of the recipe format."""
    kind: Literal["finetune"]
    """What the recipe is for: pretrain | finetune."""
    name: str = Field(pattern=NAME)
    """Letters, digits and . _ -, a letter or digit first; the run directory is runs/<name>."""
    model: FinetuneModel = FinetuneModel()
    """Which model is tuned, and how."""
    tokenizer: Literal["inherit"] = "inherit"
    """The tokenizer is that of the checkpoint."""
    data: FinetuneData
    """Which examples, and what of them is trained on."""
    train: TrainConfig
    """How long, in what steps, in which numbers."""
    optim: FinetuneOptim = FinetuneOptim()
    """Optimizer and learning rate."""
    eval: EvalConfig = EvalConfig()
    """Validation while tuning."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """What is kept on disk, and how often."""
    log: LogConfig = LogConfig()
    """What is logged, and how often."""
    parallel: ParallelConfig = ParallelConfig()
    """How the work is spread over devices."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        faults = [*_horizon_faults(self.train), *_source_faults(self.data.sources)]
        if faults:
            raise Impossible(*faults)
        return self

    def unset(self) -> Iterator[str]:
        """Yield the dotted keys that must be set before work starts."""
        if self.model.init_from is None:
            yield "model.init_from"
        yield from (f"data.sources.{source.name}.path" for source in self.data.sources if source.path is None)


KINDS: dict[str, type[RunConfig] | type[FinetuneConfig]] = {"pretrain": RunConfig, "finetune": FinetuneConfig}


@dataclass(frozen=True)
class Resolved:
    """A recipe with all its layers merged, and where each of its values came from."""

    config: RunConfig | FinetuneConfig
    tree: Node
    """What was written, with places; values left at their default are not in it."""
    origins: dict[str, str]
    """Dotted key -> `file:line`, `command line`, `preset NAME` or `default`, in the order of the recipe."""
    changes: tuple[tuple[str, str, str], ...] = ()
    """(dotted key, value without the command line, value with it), where these differ."""

    def require_complete(self) -> None:
        """Check that nothing required is unset. Raises: InvalidRecipe naming each unset key and what belongs there."""
        problems = []
        for key in self.config.unset():
            node = self.tree.find(key.split("."))
            comment = re.search(r"#\s*required:?\s*(.+)", node.place.text) if node else None
            problems.append(
                Problem(Place(self.config.name), "", f"{key} is required" + (f": {comment[1]}" if comment else ""))
            )
        if problems:
            missing = " ".join(f"{key}=…" for key in self.config.unset())
            raise InvalidRecipe(problems, f"megalodon {self.config.kind} {self.config.name} {missing}")

    def pretraining(self) -> RunConfig:
        """Return the configuration of a pretraining run. Raises: RecipeError for a recipe of another kind."""
        if not isinstance(self.config, RunConfig):
            raise RecipeError(f"{self.config.name}: kind is {self.config.kind}, expected pretrain")
        return self.config

    def finetuning(self) -> FinetuneConfig:
        """Return the configuration of a finetuning run. Raises: RecipeError for a recipe of another kind."""
        if not isinstance(self.config, FinetuneConfig):
            raise RecipeError(f"{self.config.name}: kind is {self.config.kind}, expected finetune")
        return self.config


Find = Callable[[str], Path]


def _layers(path: Path, find: Find, above: tuple[Path, ...] = ()) -> Iterator[Node]:
    """Yield a recipe's bases, then the recipe itself, without its key `base`."""
    layer = read_layer(path)
    assert isinstance(layer.value, dict)  # read_layer refuses anything else
    entries = dict(layer.value)
    base = entries.pop("base", None)
    names = base.plain() if base else None
    for name in names if isinstance(names, tuple) else () if names is None else (names,):
        assert base is not None
        if not isinstance(name, str):
            raise InvalidRecipe([Problem(base.place, "base", f"expected recipe names, got `{show(names)}`")])
        target = find(name)
        if target.resolve() in {p.resolve() for p in (*above, path)}:
            chain = " -> ".join(p.stem for p in (*above, path, target))
            raise InvalidRecipe([Problem(base.place, "base", f"a recipe cannot be its own base: {chain}")])
        yield from _layers(target, find, (*above, path))
    yield replace(layer, value=entries)


def _check_schema(tree: Node) -> None:
    schema = tree.child("schema")
    if schema and isinstance(schema.value, int) and schema.value > SCHEMA:
        text = f"the recipe has schema {schema.value}, this version reads schema {SCHEMA}; update megalodon-lm"
        raise InvalidRecipe([Problem(schema.place, "schema", text)])


def _class_of(tree: Node) -> type[RunConfig] | type[FinetuneConfig]:
    kind = tree.child("kind")
    name = kind.value if kind else "pretrain"
    if not isinstance(name, str) or name not in KINDS:
        assert kind is not None
        raise InvalidRecipe([Problem(kind.place, "kind", f"`{show(kind.plain())}` is not one of {', '.join(KINDS)}")])
    return KINDS[name]


def load_recipe(paths: Sequence[Path], overrides: Sequence[str] = (), find: Find | None = None) -> Resolved:
    """Read recipes, left to right, lay the command line's changes over them, and check the whole.

    Args:
        paths:     recipe files; of several the later wins per key.
        overrides: `key=value` or `~key`.
        find:      name in `base:` -> file; None looks beside the first recipe.
    Raises:
        InvalidRecipe: with every error and its place.   RecipeError: a file cannot be read.
    """
    find = find or (
        lambda name: Path(name) if "/" in name or name.endswith(".yaml") else paths[0].parent / f"{name}.yaml"
    )
    layers = [layer for path in paths for layer in _layers(path, find)]
    for layer in layers:
        _check_schema(layer)
        check_alternatives(layer, ONE_OF)
    written = layers[0]
    for layer in layers[1:]:
        written = merge(written, layer, ONE_OF)
    cls = _class_of(written)
    tree = override(written, overrides, cls, ONE_OF)
    config = validate(tree, cls)
    changes: list[tuple[str, str, str]] = []
    if overrides:
        before = dict(_leaves(_values_of(written, cls)))
        after = dict(_leaves(_plain(config)))
        changes = [
            (key, show(before.get(key)), show(after.get(key)))
            for key in {**before, **after}
            if before.get(key) != after.get(key)
        ]
    return Resolved(config, tree, _origins(config, tree), tuple(changes))


def _values_of(written: Node, cls: type[RunConfig] | type[FinetuneConfig]) -> dict[str, Any]:
    """Return the values of a recipe; only what was written, where that alone is not valid."""
    try:
        return _plain(validate(written, cls))
    except InvalidRecipe:
        return dict(written.plain())


def parse_recipe(text: str, source: str) -> RunConfig | FinetuneConfig:
    """Read a recipe from text, as in a run's `recipe.yaml`. Raises: InvalidRecipe with every error and its place."""
    tree = read_text(text, source)
    _check_schema(tree)
    return validate(tree, _class_of(tree))


def _plain(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json", by_alias=True)


def leaves(config: Config) -> Iterator[tuple[str, str]]:
    """Yield every dotted key of a configuration with its value as a recipe writes it."""
    yield from ((key, _scalar(value)) for key, value in _leaves(_plain(config)))


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of everything that is not a section; entries of a list by their name."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}".lstrip("."))
    elif isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{prefix}.{item.get('name', number)}")
    else:
        yield prefix, value


def _origins(config: RunConfig | FinetuneConfig, tree: Node) -> dict[str, str]:
    preset = config.model.preset if isinstance(config, RunConfig) else None
    origins = {}
    for key, _ in _leaves(_plain(config)):
        node = tree.find(key.split("."))
        section, _, name = key.rpartition(".")
        if node:
            origins[key] = f"{node.place.source}:{node.place.line}" if node.place.line else "command line"
        elif preset and section == "model" and name in PRESETS[preset]:
            origins[key] = f"preset {preset}"
        else:
            origins[key] = "default"
    return origins


def _scalar(value: Any) -> str:
    """Write a value on one line so that reading it back gives the same."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_scalar(key)}: {_scalar(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_scalar(item) for item in value) + "]"
    if not isinstance(value, str):
        return show(value)
    plain = re.fullmatch(r"[\w./%@][\w./%@ -]*", value) and value == value.strip() and not value.isdigit()
    same = plain and read_text(f"key: {value}", "").plain()["key"] == value
    return value if same else json.dumps(value, ensure_ascii=False)


def _lines(
    value: dict[str, Any], origins: dict[str, str], indent: str = "", prefix: str = ""
) -> Iterator[tuple[str, str]]:
    for key, item in value.items():
        dotted = f"{prefix}{key}"
        if isinstance(item, dict) and item:
            yield f"{indent}{key}:", ""
            yield from _lines(item, origins, indent + "  ", f"{dotted}.")
        elif isinstance(item, list) and any(isinstance(entry, dict) for entry in item):
            yield f"{indent}{key}:", ""
            for number, entry in enumerate(item):
                entry = {"name": entry["name"], **entry} if "name" in entry else entry
                inner = list(_lines(entry, origins, indent + "    ", f"{dotted}.{entry.get('name', number)}."))
                yield from ((f"{indent}  - {t.strip()}" if n == 0 else t, o) for n, (t, o) in enumerate(inner))
        else:
            yield f"{indent}{key}: {_scalar(item)}", origins.get(dotted, "")


def dump(resolved: Resolved, origins: bool = True) -> str:
    """Return the whole recipe as YAML, one key on a line, each with its origin as a comment."""
    lines = list(_lines(_plain(resolved.config), resolved.origins))
    width = min(60, max(len(text) for text, _ in lines)) + 2
    return "".join(f"{text.ljust(width)}# {origin}\n" if origins and origin else f"{text}\n" for text, origin in lines)


class KeyDoc(typing.NamedTuple):
    """One key of a recipe: what may stand there and what it means."""

    key: str
    type: str
    default: str
    help: str


def key_docs(kind: str = "pretrain") -> list[KeyDoc]:
    """Return every key of a recipe of this kind, in the order of the recipe."""
    docs = []
    for key, field in keys(KINDS[kind]):
        if field.is_required():
            default = "required"
        else:
            value = field.get_default(call_default_factory=True)
            default = "" if isinstance(value, pydantic.BaseModel) else show(value)
        docs.append(
            KeyDoc(
                key, type_name(field.annotation, field.metadata), default, " ".join((field.description or "").split())
            )
        )
    return docs


def json_schema(kind: str = "pretrain") -> dict[str, Any]:
    """Return the JSON schema of a recipe of this kind, for editors."""
    return KINDS[kind].model_json_schema(by_alias=True)
