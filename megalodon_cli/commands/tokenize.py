"""`megalodon tokenize`: text to tokens, and a look at what came out. Not here: how (megalodon/data)."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from megalodon.errors import InputError
from megalodon_cli import console, recipe_files, store_looks
from megalodon_cli.signals import ended_by_signals

if TYPE_CHECKING:
    from megalodon.data.ingest import CorpusConfig
    from megalodon.data.prepare import Prepared, Progress
    from megalodon.data.tokenizer import Tokenizer, TokenizerConfig

    Others = Mapping[str, Tokenizer]

FormatName = Literal["auto", "text", "jsonl", "parquet", "csv", "arrow"]
DocumentName = Literal["file", "line", "blank-line"]


def tokenize(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE [key=value …] | DIR]",
            help="A recipe with changes; or the token store to look at with --stats, --inspect and --verify.",
            autocompletion=recipe_files.complete,
        ),
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help="File, folder, glob, `-` or hf:ORG/NAME; repeatable.", rich_help_panel="Data"),
    ] = None,
    format: Annotated[
        FormatName, typer.Option(help="What the input is; auto goes by suffix.", rich_help_panel="Data")
    ] = "auto",
    field: Annotated[
        str, typer.Option(help="The column that holds the text (not for plain text).", rich_help_panel="Data")
    ] = "text",
    document: Annotated[
        DocumentName, typer.Option(help="What a document is in plain text.", rich_help_panel="Data")
    ] = "file",
    tokenizer: Annotated[
        str | None, typer.Option(help="`bytes`, a SentencePiece FILE.model, or hf:ORG/NAME.", rich_help_panel="Model")
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Train a SentencePiece tokenizer on the input.", rich_help_panel="Model")
    ] = False,
    vocab_size: Annotated[
        int | None, typer.Option(help="Ids of the trained tokenizer; 32000 if left out.", rich_help_panel="Model")
    ] = None,
    model_type: Annotated[
        Literal["bpe", "unigram"] | None,
        typer.Option(help="Algorithm of the trained tokenizer; bpe if left out.", rich_help_panel="Model"),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="T",
            help="Compare bytes per token with FILE.model or the store in a directory; repeatable.",
            rich_help_panel="Model",
        ),
    ] = None,
    valid: Annotated[
        str | None,
        typer.Option(
            help="Part of the documents kept for validation, such as 0.5% (which it is if left out).",
            rich_help_panel="Run",
        ),
    ] = None,
    dedup: Annotated[
        Literal["none", "exact"] | None,
        typer.Option(help="Drop documents whose text came before; none if left out.", rich_help_panel="Run"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            "-j",
            metavar="N",
            help="Processes that encode; all cores if left out. The store does not depend on it.",
            min=1,
            rich_help_panel="Run",
        ),
    ] = None,
    mem: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory that all processes together stay under, such as 500MB; 2GB if left out.",
            rich_help_panel="Run",
        ),
    ] = None,
    no_bos: Annotated[
        bool, typer.Option("--no-bos", help="Do not begin documents with BOS.", rich_help_panel="Run")
    ] = False,
    no_eos: Annotated[
        bool, typer.Option("--no-eos", help="Do not end documents with EOS.", rich_help_panel="Run")
    ] = False,
    on_error: Annotated[
        str | None,
        typer.Option(help="`fail` (if left out), or skip:N to tolerate N bad documents.", rich_help_panel="Run"),
    ] = None,
    out_dir: Annotated[
        str | None,
        typer.Option(
            "--out-dir", "--output-dir", "-o", metavar="DIR", help="Where the store goes.", rich_help_panel="Output"
        ),
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Show ledger and document lengths of DIR.", rich_help_panel="Output")
    ] = False,
    inspect: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Show the tokens of the first N documents of DIR.", min=1, rich_help_panel="Output"
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check sizes, hashes and ids of DIR.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Turn text into a token store: shards of tokens with a hashed manifest, a validation part, the tokenizer.

    What is there already and fits is kept; what does not fit is refused. Every document and token is accounted for.

    Examples:

        megalodon tokenize quickstart

        megalodon tokenize --input corpora/books --train --vocab-size 8192 -o data/books

        megalodon tokenize --input "corpus/*.jsonl.gz" --tokenizer bytes -j 8 --mem 4GB -o data/corpus

        megalodon tokenize --stats data/books
    """
    names, changes = recipe_files.split(arguments or [])
    named = {
        "--input": inputs,
        "-o": [out_dir],
        "--compare": compare,
        "--tokenizer": [tokenizer],
        "the recipe or DIR": arguments,
    }
    if empty := [what for what, values in named.items() if "" in (values or ())]:
        raise InputError(f"{empty[0]} is empty; expected a name")
    of_input = {
        **{"--tokenizer": tokenizer, "--train": train, "--vocab-size": vocab_size, "--model-type": model_type},
        **{"--format": format != "auto", "--field": field != "text", "--document": document != "file"},
    }
    looks = {"--stats": stats, "--inspect": inspect, "--verify": verify}
    if flag := next(iter(_given(looks)), None):
        building = {
            "--input": inputs,
            **of_input,
            "--compare": compare,
            "--valid": valid,
            "--dedup": dedup,
            "--no-bos": no_bos,
        }
        building |= {"--no-eos": no_eos, "--on-error": on_error, "-o": out_dir, "--workers": workers, "--mem": mem}
        directory = _looked_at(flag, inspect, names, [*_given(looks)[1:], *_given(building), *changes])
        if inspect:
            return store_looks.show_documents(directory, inspect)
        return store_looks.show_stats(directory) if stats else store_looks.show_check(directory)
    common = _common(valid, dedup, no_bos, no_eos, on_error)
    effort, others = _Effort(workers, _memory(mem)), _compared(compare or [])
    if inputs:
        if names or changes:
            raise InputError(f"--input and the recipe `{(names + changes)[0]}` are both given; expected one of them")
        if out_dir is None:
            raise InputError("no directory for the store; give -o DIR")
        chosen = _tokenizer_config(tokenizer, train, vocab_size, model_type)
        reading = {"format": format, "field": field, "document": document}
        with ended_by_signals(), _Stdin() as stdin:
            sources = _sources(inputs, reading, stdin)
            return _run(_corpus({**common, "sources": sources}), chosen, Path(out_dir), effort, others)
    if not names:
        raise InputError("nothing to do; give a RECIPE, or --input PATH with -o DIR", hint="megalodon tokenize --help")
    if wrong := _given(of_input):
        raise InputError(f"{wrong[0]} belongs to --input; with a recipe change its keys, such as tokenizer.kind=bytes")
    with ended_by_signals():
        _from_recipe(names, [*_as_changes(common), *changes], Path(out_dir) if out_dir else None, effort, others)


class _Effort(NamedTuple):
    """How many processes work, and how much memory they have; None is left to the library."""

    workers: int | None
    mem: int | None


def _memory(text: str | None) -> int | None:
    from megalodon.config import parse_bytes

    try:
        return None if text is None else int(str(parse_bytes(text)))
    except ValueError as error:
        raise InputError(f"--mem: {error}") from None


def _given(options: Mapping[str, object]) -> list[str]:
    """Return the options that stand on the command line."""
    return [flag for flag, value in options.items() if value is not None and value is not False]


def _looked_at(flag: str, inspect: int | None, names: Sequence[str], other: Sequence[str]) -> Path:
    """Return the one token store to look at. Raises: InputError for none, and for all that is of no use there."""
    if stray := [*other, *names[1:]]:
        came = f"`{stray[0]}` is of no use there"
    elif not names:
        came = "none is given"
    else:
        return Path(names[0])
    example = f"{flag} {inspect}" if flag == "--inspect" else flag
    raise InputError(f"{flag} looks at one token store, and {came}; expected `megalodon tokenize {example} DIR`")


def _common(valid: str | None, dedup: str | None, no_bos: bool, no_eos: bool, on_error: str | None) -> dict[str, Any]:
    """The options that mean the same with and without a recipe, as keys of its data section."""
    keys: dict[str, Any] = {}
    if valid is not None:
        keys["valid"] = {"fraction": valid if valid.strip().endswith("%") else _number(valid)}
    if dedup is not None:
        keys["dedup"] = dedup
    if no_bos:
        keys["bos"] = False
    if no_eos:
        keys["eos"] = False
    if on_error is not None:
        keys["on_error"] = on_error
    return keys


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--valid is `{text}`; expected a share such as 0.005 or 0.5%") from None


def _as_changes(common: dict[str, Any]) -> list[str]:
    flat = {**common, **{"valid.fraction": common["valid"]["fraction"]}} if "valid" in common else common
    shown = {True: "true", False: "false"}
    return [
        f"data.{key}={shown[value] if isinstance(value, bool) else value}"
        for key, value in flat.items()
        if not isinstance(value, dict)
    ]


def _corpus(values: dict[str, Any]) -> "CorpusConfig":
    """Return what the options say of the text; how a source is read has options of its own. Raises: InputError."""
    from megalodon.data.ingest import CorpusConfig

    own = {"format": "--format", "field": "--field", "document": "--document"}
    with _named(lambda keys: own.get(keys[-1], "--input") if keys[0] == "sources" else f"--{keys[0]}"):
        return CorpusConfig.model_validate(values)


@contextlib.contextmanager
def _named(option: Callable[[list[str]], str]) -> Iterator[None]:
    """Turn the first value that does not fit into an InputError that names its option, found by its keys."""
    import pydantic

    try:
        yield
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] != "value_error":
            message = f"`{str(first['input'])[:80]}`: {message[:1].lower()}{message[1:]}"
        name = option([str(key) for key in first["loc"]] or ["input"]).replace("_", "-")
        raise InputError(f"{name}: {message}") from None


def _tokenizer_config(
    tokenizer: str | None, train: bool, vocab_size: int | None, model_type: Literal["bpe", "unigram"] | None
) -> "TokenizerConfig":
    from megalodon.data.tokenizer import TokenizerConfig

    if train == (tokenizer is not None):
        came = "both --tokenizer and --train are given" if train else "no tokenizer"
        ways = "--tokenizer bytes, FILE.model or hf:ORG/NAME, or --train --vocab-size N"
        raise InputError(f"{came}; give {ways}")
    if not train and (vocab_size is not None or model_type is not None):
        raise InputError("--vocab-size and --model-type are for a tokenizer that is trained; add --train or drop them")
    if tokenizer is not None:
        return TokenizerConfig(kind="bytes") if tokenizer == "bytes" else TokenizerConfig(path=tokenizer)
    given = {"vocab_size": vocab_size, "model_type": model_type}
    with _named(lambda keys: f"--{keys[0]}"):
        return TokenizerConfig.model_validate({key: value for key, value in given.items() if value is not None})


class _Stdin:
    """Holds what came on stdin in a temporary file while it is needed: text is read more than once."""

    def __enter__(self) -> "_Stdin":
        import tempfile

        self._folder = tempfile.TemporaryDirectory(prefix="megalodon-")
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def spool(self) -> Path:
        """Copy stdin to a file named `stdin` and return its path."""
        import shutil

        path = Path(self._folder.name) / "stdin"
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        return path


def _sources(inputs: Sequence[str], reading: dict[str, str], stdin: _Stdin) -> tuple[dict[str, Any], ...]:
    """Return one source for each --input, named after its last part."""
    import re

    if inputs.count("-") > 1:
        raise InputError("--input - is given twice; stdin can be read once")
    sources: list[dict[str, Any]] = []
    for text in inputs:
        base = "stdin" if text == "-" else Path(text.removeprefix("hf:")).stem
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", base).strip("-") or "input"
        taken = [source["name"] for source in sources]
        unique = (
            name if name not in taken else next(f"{name}-{n}" for n in range(2, 10**6) if f"{name}-{n}" not in taken)
        )
        entry: dict[str, Any] = {"name": unique, **reading}
        if text == "-":
            entry |= {"path": stdin.spool(), "format": "text" if reading["format"] == "auto" else reading["format"]}
        elif text.startswith("hf:"):
            entry |= {"hf": text.removeprefix("hf:")}
        else:
            entry |= {"path": Path(text)}
        sources.append(entry)
    return tuple(sources)


def _from_recipe(names: list[str], changes: list[str], out_dir: Path | None, effort: _Effort, others: "Others") -> None:
    from megalodon.recipe import RunConfig

    config = recipe_files.load(names, changes).config
    if not isinstance(config, RunConfig):
        raise InputError(f"{names[-1]} is a {config.kind} recipe; expected one of kind pretrain")
    _run(config.data, config.tokenizer, out_dir or config.data.dir or Path("data") / config.name, effort, others)


def _run(
    data: "CorpusConfig", tokenizer: "TokenizerConfig", directory: Path, effort: _Effort, others: "Others"
) -> None:
    """Build or open the store, with progress, and print its ledger."""
    from megalodon.data.prepare import prepare_store

    given = {key: value for key, value in effort._asdict().items() if value is not None}
    with console.Progress() as live, _continued(directory):
        shown = _Shown(live)
        prepared = prepare_store(
            data, tokenizer, directory, shown.update, console.settings().offline, tell=console.info, **given
        )
    for note in prepared.notes:
        console.info(note)
    if prepared.up_to_date:
        console.note(f"{directory} is up to date ({prepared.train.fingerprint[:8]})")
    for line in prepared.ledger.lines():
        console.result(line)
    if not prepared.up_to_date:
        console.result(
            f"store      {directory} ({prepared.train.fingerprint[:8]}, vocabulary {prepared.train.vocab_size:,})"
        )
    if not prepared.ledger.valid:
        console.note("no document was kept for validation; raise --valid, or train with data.valid.path")
    trained = tokenizer.kind == "sentencepiece" and tokenizer.path is None and not prepared.up_to_date
    ratios = _ratios(prepared, others) if others or trained else {}
    console.document("tokenize", store_looks.summary(directory, prepared) | {"bytes_per_token": ratios})


def _compared(names: Sequence[str]) -> "Others":
    """Return the tokenizers to compare with, by name; plain bytes are always among what is shown."""
    from megalodon.data.prepare import TOKENIZER
    from megalodon.data.tokenizer import load_tokenizer

    folders = {name: Path(name) / TOKENIZER for name in names if name != "bytes"}
    return {name: load_tokenizer(folder if folder.is_dir() else Path(name)) for name, folder in folders.items()}


def _ratios(prepared: "Prepared", others: "Others") -> dict[str, float]:
    """Print and return the bytes of held-out text that a token of each tokenizer stands for."""
    from megalodon.data.prepare import held_out
    from megalodon.data.tokenizer import bytes_per_token

    texts = held_out(prepared)
    if not texts:
        return {}
    found = {"this": bytes_per_token(prepared.tokenizer, texts), "bytes": 1.0}
    found |= {name: bytes_per_token(other, texts) for name, other in others.items()}
    size = sum(len(text.encode()) for text in texts)
    shown = ", ".join(f"{name} {ratio:.2f}" for name, ratio in found.items())
    console.result(f"held out   {size:,} bytes, bytes/token: {shown}")
    return found


@contextlib.contextmanager
def _continued(directory: Path) -> Iterator[None]:
    """Say after a signal, and after too many rejects, that what is done is kept, if it is."""
    from megalodon.data.journal import work_path

    try:
        yield
    except BaseException:
        if (work := work_path(directory)).exists():
            console.note(f"what is done is kept in {work}; the same command continues")
        raise


class _Shown:
    """Shows progress: twice a second on a terminal, every ten seconds elsewhere."""

    def __init__(self, live: console.Progress) -> None:
        self._live, self._stage, self._last = live, "", 0.0
        self._every = 0.5 if sys.stderr.isatty() else 10.0
        self._first: Progress | None = None

    def update(self, report: "Progress") -> None:
        """Show a report, if it is time; the first and the last of a stage always."""
        import time

        now = time.perf_counter()
        if report.stage != self._stage:
            self._stage, self._began, self._first = report.stage, now, report
        elif now - self._last < self._every and report.bytes != report.total_bytes:
            return
        self._last = now
        self._live.update(self._line(report, max(now - self._began, 1e-9)))

    def _line(self, report: "Progress", seconds: float) -> str:
        if report.stage == "tokenizer" or self._first is None:
            return f"training the tokenizer on up to {report.total_bytes or 0:,} bytes"
        speed = (report.bytes - self._first.bytes) / seconds
        tokens = (report.tokens - self._first.tokens) / seconds
        rest = max(0, report.total_bytes - report.bytes) / speed if report.total_bytes and speed else 0
        return (
            f"{report.documents:,} documents, {report.bytes / 1e6:,.1f} MB, {report.tokens:,} tokens, "
            f"{speed / 1e6:.1f} MB/s, {console.amount(tokens)} tokens/s" + (f", {rest:.0f} s left" if rest else "")
        )
