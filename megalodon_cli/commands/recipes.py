"""`megalodon recipes`: list, show, copy, check and compare recipes.

Not here: what a recipe may hold (megalodon/recipe.py).
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from megalodon.errors import InputError
from megalodon_cli import console, recipe_files

if TYPE_CHECKING:
    from megalodon.config import Problem
    from megalodon.recipe import Resolved

recipes = typer.Typer(help="List, show, copy, check and compare recipes.")

Name = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A shipped name, or a file ending in .yaml.", autocompletion=recipe_files.complete
    ),
]
Names = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE…", help="Shipped names, or files ending in .yaml.", autocompletion=recipe_files.complete
    ),
]
Kind = Literal["pretrain", "finetune"]


def _horizon(train: Any) -> str:
    if train.max_epochs is not None:
        return f"{train.max_epochs:g} epochs"
    return console.amount(train.max_tokens or train.max_steps * train.batch_tokens)


@recipes.command("ls")
def list_recipes() -> None:
    """List the shipped recipes: parameters, context and horizon in tokens, memory, whether it fits here, purpose.

    Memory is estimated for one device of this machine, its GPU if it has one, with one window a pass;
    `megalodon pretrain RECIPE --plan` says it in full, for any device.

    Examples:

        megalodon recipes ls

        megalodon recipes ls --json

        megalodon recipes ls | grep llama
    """
    from megalodon.profiling.devices import reserve
    from megalodon.profiling.estimate import least_memory
    from megalodon.recipe import RunConfig
    from megalodon.training.memory import available_memory
    from megalodon.training.plan import device_named

    device = device_named("auto")
    gpu, free = device.type == "cuda", available_memory(device)
    found = []
    for name in recipe_files.names():
        config = recipe_files.load([name]).config
        entry: dict[str, Any] = {"name": name, "kind": config.kind, "parameters": None, "seq_len": config.data.seq_len}
        entry |= {"memory": None, "fits_here": None}
        if isinstance(config, RunConfig):
            model = config.model_config_for(config.padded_vocab_size())
            entry["parameters"] = model.num_parameters()
            length = config.data.seq_len
            entry["memory"] = least_memory(
                model, config.train, config.optim, seq_len=length, gpu=gpu, reserve=reserve(gpu=gpu)
            )
            entry["fits_here"] = None if free is None else entry["memory"] <= free
        entry |= {"horizon": _horizon(config.train), "purpose": recipe_files.purpose(recipe_files.find(name))}
        found.append(entry)
    rows = [["recipe", "parameters", "context", "tokens", "memory", "fits here", "purpose"]]
    for entry in found:
        size = f"{entry['parameters']:,}" if entry["parameters"] else entry["kind"]
        rows.append(
            [
                entry["name"],
                size,
                str(entry["seq_len"]),
                entry["horizon"],
                f"{entry['memory'] / 2**30:,.1f} GiB" if entry["memory"] else "-",
                {True: "yes", False: "no", None: "-"}[entry["fits_here"]],
                re.split(r"[.;:]\s|, \d", entry["purpose"])[0],
            ]
        )
    console.table(rows, right=(1, 2, 3, 4))
    console.document("recipes-ls", found)


@recipes.command("show")
def show(
    recipe: Names,
    origin: Annotated[bool, typer.Option("--origin", help="Say behind each value where it comes from.")] = False,
) -> None:
    """Print a recipe as it would run, every value included; RECIPE… may be followed by key=value changes.

    Examples:

        megalodon recipes show quickstart

        megalodon recipes show 200m optim.lr=1e-3 --origin

        megalodon recipes show 7b-llama --json
    """
    from megalodon.recipe import dump

    names, changes = recipe_files.split(recipe)
    resolved = recipe_files.load(names, changes)
    console.result(dump(resolved, origins=origin).rstrip("\n"))
    shown = resolved.config.model_dump(mode="json", by_alias=True)
    console.document("recipes-show", {"recipe": shown, "origins": resolved.origins} if origin else {"recipe": shown})


@recipes.command("cp")
def copy(
    recipe: Name,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The new file, ending in .yaml.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Copy a recipe into a file of your own; its name, and with it its run folder, becomes that of the file.

    So does the data folder that the recipe names; a recipe that shares the data of its base keeps doing so.

    Examples:

        megalodon recipes cp quickstart mine.yaml

        megalodon recipes cp books-tiny long-books.yaml

        megalodon recipes cp 200m mine.yaml --force
    """
    from megalodon.config import NAME, read_text

    name = file.stem
    if file.suffix != ".yaml" or not re.fullmatch(NAME, name):
        example = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("._-") or "mine"
        rule = "letters, digits and . _ -, a letter or digit first, and .yaml"
        raise InputError(f"`{file}` cannot name a recipe; expected {rule}, such as {file.parent / example}.yaml")
    if file.exists() and not force:
        raise InputError(f"{file} is there already; --force replaces it")
    text = recipe_files.find(recipe).read_text(encoding="utf-8")
    # Digits are a number and `null` is nothing, unless quoted.
    plain = not name.isdigit() and read_text(f"name: {name}", "").plain()["name"] == name
    quoted = name if plain else f'"{name}"'
    text = re.sub(r"(?m)^name: .*$", f"name: {quoted}", text, count=1)
    text = re.sub(r"(?m)^  dir: data/\S+", f"  dir: data/{name}", text, count=1)
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {(error.strerror or str(error)).lower()}") from None
    console.info(
        f"copied {recipe} to {file}; next: megalodon recipes check {file if '/' in str(file) else f'./{file}'}"
    )
    console.document("recipes-cp", {"recipe": recipe, "file": str(file)})


@recipes.command("check")
def check(recipe: Names) -> None:
    """Check recipes; every mistake is shown with file, line and column, and the command ends with exit code 2.

    Examples:

        megalodon recipes check quickstart

        megalodon recipes check mine.yaml optim.lr=1e-3

        megalodon recipes check 200m 1.3b 7b
    """
    from megalodon.config import InvalidRecipe
    from megalodon.recipe import RunConfig

    names, changes = recipe_files.split(recipe)
    if not names:
        recipe_files.load(names)  # which says so
    problems: list[Problem] = []
    hints, found = [], []
    for name in names:
        try:
            resolved = recipe_files.load([name], changes)
        except InvalidRecipe as error:
            problems += error.problems
            hints.append(error.hint)
            continue
        config = resolved.config
        size = config.num_parameters() if isinstance(config, RunConfig) else None
        unset = list(config.unset())
        found.append({"recipe": name, "kind": config.kind, "parameters": size, "unset": unset})
        open_keys = f"; to be set: {', '.join(unset)}" if unset else ""
        console.result(
            f"{console.mark('ok')} {name}: {config.kind}{f', {size:,} parameters' if size else ''}{open_keys}"
        )
    if problems:
        raise InvalidRecipe(problems, next((hint for hint in hints if hint), None))
    console.document("recipes-check", found)


@recipes.command("diff")
def diff(first: Name, second: Name) -> None:
    """Show the keys in which two recipes differ.

    Examples:

        megalodon recipes diff quickstart quickstart-llama

        megalodon recipes diff books-tiny mine.yaml

        megalodon recipes diff 200m 1.3b --json
    """
    left, right = _values(recipe_files.load([first])), _values(recipe_files.load([second]))
    changed = [key for key in {**left, **right} if left.get(key) != right.get(key)]
    rows = [["key", first, second]] + [[key, left.get(key, "-"), right.get(key, "-")] for key in changed]
    if changed:
        console.table(rows)
    else:
        console.result(f"{first} and {second} have the same values")
    entries = [{"key": key, "first": left.get(key), "second": right.get(key)} for key in changed]
    console.document("recipes-diff", entries)


def _values(resolved: "Resolved") -> dict[str, str]:
    from megalodon.recipe import leaves

    return dict(leaves(resolved.config))


@recipes.command("schema")
def schema(
    key: Annotated[str, typer.Argument(metavar="[KEY]", help="A section or a key, such as optim or optim.lr.")] = "",
    kind: Annotated[Kind, typer.Option("--kind", help="Of which recipes.")] = "pretrain",
) -> None:
    """Print every key of a recipe: what may stand there, its default, what it means; with --json as JSON schema.

    Examples:

        megalodon recipes schema

        megalodon recipes schema optim

        megalodon recipes schema --kind finetune --json
    """
    from megalodon.config import suggest
    from megalodon.recipe import json_schema, key_docs

    docs = key_docs(kind)
    wanted = key.replace("-", "_")
    shown = [doc for doc in docs if not wanted or doc.key == wanted or doc.key.startswith(wanted + ".")]
    if not shown:
        near = suggest(wanted, [doc.key for doc in docs])
        raise InputError(
            f"no key {key}; " + (f"did you mean {near}?" if near else "megalodon recipes schema lists all")
        )
    for doc in shown:
        console.result(f"{doc.key}: {doc.type}{f'  [{doc.default}]' if doc.default else ''}")
        console.result(f"    {doc.help}")
    console.document("recipes-schema", json_schema(kind))
