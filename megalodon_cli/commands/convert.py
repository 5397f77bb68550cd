"""`megalodon convert`: a model from one form into another, proven equal; or a look at what a directory holds.

Not here: which directory SRC is (conversion_source.py), reading, writing and proof (megalodon/interop).
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from megalodon.errors import CheckFailed, InputError
from megalodon_cli import checkpoints, console, conversion_source
from megalodon_cli.signals import ended_by_signals

if TYPE_CHECKING:
    from megalodon.interop.conversion import Conversion, Options
    from megalodon.interop.sources import Source

FORMATS = ("native", "hf", "ref")
INT4_GROUP = 64
SHARD_SIZE = "2GB"


def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="A run, RUN@1200, RUN@best, a model, an adapter, a released checkpoint."),
    ],
    target: Annotated[
        Path | None, typer.Argument(metavar="DST", help="The directory that is written.", show_default=False)
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="native|hf|ref",
            help="Ours, Hugging Face transformers, or the released implementation.",
            rich_help_panel="Output",
        ),
    ] = "native",
    dtype: Annotated[
        Literal["keep", "fp32", "bf16"],
        typer.Option("--dtype", help="Of the matrices; norms and CEMA stay float32.", rich_help_panel="Output"),
    ] = "keep",
    shard_size: Annotated[
        str, typer.Option("--shard-size", metavar="SIZE", help="Of the largest file.", rich_help_panel="Output")
    ] = SHARD_SIZE,
    quantize: Annotated[
        Literal["int8", "int4"] | None,
        typer.Option("--quantize", help="Hold the matrices as small integers.", rich_help_panel="Output"),
    ] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Leave the proof out; the result says so.", rich_help_panel="Output")
    ] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the base with the adapter merged.", rich_help_panel="Model")
    ] = False,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="CKPT", help="The base of an adapter, if it is not where it was.", rich_help_panel="Model"
        ),
    ] = None,
    inspect: Annotated[
        bool, typer.Option("--inspect", help="Only show what SRC holds, and what does not fit.", rich_help_panel="Run")
    ] = False,
) -> None:
    """Write a model in another form, and prove that it is still the same one.

    Examples:

        megalodon convert quickstart quickstart-hf --to hf

        megalodon convert runs/finetune-lora/adapter runs/finetune-lora/model --merge

        megalodon convert --inspect quickstart --json
    """
    if to not in FORMATS:
        known = f"expected one of {', '.join(FORMATS)}"
        raise InputError(
            f"--to {to}: " + ("GGUF has no Megalodon architecture; use --to hf" if to == "gguf" else known)
        )
    base_directory = base and checkpoints.model_directory(str(base))
    if inspect:
        if target is not None:
            raise InputError(f"--inspect writes nothing, but DST is {target}; expected SRC alone")
        given = {"--to": to != "native", "--dtype": dtype != "keep", "--shard-size": shard_size != SHARD_SIZE}
        given |= {"--quantize": quantize is not None, "--no-verify": no_verify, "--merge": merge}
        if unheeded := [option for option, there in given.items() if there]:
            raise InputError(f"{unheeded[0]} does nothing with --inspect, which writes nothing; leave it out")
        with conversion_source.open_given(source, base_directory, verify=False) as found:
            _show(found)
        return
    if target is None:
        raise InputError(f"{source}: DST is missing; expected megalodon convert SRC DST, or --inspect SRC")
    options = _options(to, dtype, shard_size, quantize, verify=not no_verify)
    _check_target(target)
    with ended_by_signals(), conversion_source.open_given(source, base_directory) as found:
        _check_source(found, target, merge=merge, base=base)
        _convert(found, target, options)


def _options(to: Any, dtype: Any, shard_size: str, quantize: Any, *, verify: bool) -> "Options":
    from megalodon.config import parse_bytes
    from megalodon.interop.conversion import Options
    from megalodon.model.quantised import Quantisation

    try:
        size = int(str(parse_bytes(shard_size)))
    except ValueError as error:
        raise InputError(f"--shard-size: {error}") from None
    if size < 1:
        raise InputError(f"--shard-size {shard_size}: expected at least a byte")
    held = None if quantize is None else Quantisation(kind=quantize, group_size=INT4_GROUP)
    return Options(to, dtype, size, held, verify)


def _check_target(target: Path) -> None:
    """Raises: InputError: DST is taken, or would lie in something that is no directory."""
    if os.path.lexists(target) and (target.is_symlink() or not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} already exists; choose another directory or remove it")
    above = next(place for place in target.absolute().parents if place.exists())
    if not above.is_dir():
        raise InputError(f"{target}: {above} is no directory; choose another place")


def _check_source(source: "Source", target: Path, *, merge: bool, base: Path | None) -> None:
    """Raises: InputError: DST lies inside SRC, or an adapter and --merge do not come together."""
    from megalodon.interop.sources import ADAPTER

    if source.kind == ADAPTER and not merge:
        raise InputError(f"{source.path} is an adapter; expected --merge, which writes it and its base as one model")
    if source.kind != ADAPTER and (merge or base is not None):
        option = "--merge" if merge else "--base"
        raise InputError(f"{option}: {source.path} is a {source.kind}; expected an adapter, such as RUN/adapter")
    if source.path.resolve() in target.resolve().parents:
        raise InputError(f"{target} lies inside {source.path}, which is only read; choose a place beside it")


def _convert(source: "Source", target: Path, options: "Options") -> None:
    from megalodon.checkpoint.store import read_json
    from megalodon.interop.conversion import convert as write

    console.info(f"{source.path}: {source.kind}, {source.config.num_parameters():,} parameters")
    with console.Progress() as live:
        done = write(source, target, options, lambda text: live.update(text, keep=False))
    info = read_json(target / "megalodon.json")
    console.result(f"{target}: {console.amount(done.num_bytes, ' ', 'G')}B of weights, {_how(source, options)}")
    console.result(f"  parity: {_parity(done)}")
    for remark in done.remarks:
        console.note(remark)
    for line in _next(target, options):
        console.result(f"  {line}")
    console.document(
        "convert",
        {
            "model": str(target),
            "kind": source.kind,
            "to": options.to,
            **({} if source.adapted is None else source.info["merged_from"]),
            "weights_sha256": info["weights_sha256"],
            "bytes": done.num_bytes,
            "parity": None if done.parity is None else done.parity.row(),
            "remarks": done.remarks,
        },
    )


def _how(source: "Source", options: "Options") -> str:
    if source.adapted is not None:
        merged = source.info["merged_from"]
        return f"{merged['base'][:8]} with adapter {merged['adapter'][:8]} merged"
    if options.quantisation is not None:
        return f"matrices as {options.quantisation.kind}"
    return f"--to {options.to}" + ("" if options.dtype == "keep" else f", {options.dtype}")


def _parity(done: "Conversion") -> str:
    found = done.parity
    if found is None:
        return "not checked (--no-verify)"
    if not found.tokens:
        return "every tensor equal bit by bit; too large to be run as a whole"
    if not found.largest:
        return f"equal bit by bit, {found.tokens:,} tokens"
    return (
        f"largest logit difference {found.largest:.3g} (logits to {found.scale:.3g}), top-1 agreement "
        f"{found.agreement:.2%} of {found.tokens:,} tokens, first layer that differs {found.first_layer}"
    )


def _next(target: Path, options: "Options") -> list[str]:
    """The lines that load the result."""
    if options.to == "ref":
        return [f'next: megalodon.reloading.reload_model("."), with the released code, from inside {target}']
    lines = [f"next: megalodon generate {target} -p TEXT"]
    if options.to == "hf":
        lines.append(f'AutoModelForCausalLM.from_pretrained("{target}", trust_remote_code=True)')
        lines.append(f'AutoTokenizer.from_pretrained("{target}")')
    return lines


def _show(source: "Source") -> None:
    """Print what a source holds. Raises: CheckFailed if its tensors do not fit its configuration."""
    from megalodon.interop.conversion import describe

    found = describe(source)
    console.result(f"{found['path']}: {found['kind']}")
    options = ", ".join(f"{key} {value}" for key, value in found["config"].items())
    console.result(f"  config     {options}")
    if found["quantisation"]:
        console.result(f"  quantised  {found['quantisation']['kind']}")
    console.result(f"  beside     {', '.join(found['beside']) or 'no tokenizer of ours'}")
    values = ", ".join(f"{count:,} {dtype}" for dtype, count in found["values"].items())
    console.result(f"  tensors    {found['num_tensors']:,}, {found['bytes']:,} bytes: {values}")
    console.result(f"  parameters {found['parameters']:,}")
    console.table([["name", "shape", "dtype"]] + [[t["name"], str(t["shape"]), t["dtype"]] for t in found["tensors"]])
    for kind in ("missing", "unexpected", "mismatched"):
        console.result(f"  {kind:10} {', '.join(found[kind]) or 'none'}")
    console.document("convert", found)
    wrong = sum(len(found[kind]) for kind in ("missing", "unexpected", "mismatched"))
    if wrong:
        if console.wants_json():  # the document says it
            raise typer.Exit(CheckFailed.exit_code)
        raise CheckFailed(f"{source.path}: {wrong} tensors do not fit its configuration")
