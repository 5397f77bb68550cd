"""Recipe name -> file, in a wheel and in a checkout; and the recipe itself, for the commands.

    find("quickstart")                            the file of a shipped recipe
    find("my/books.yaml")                         a file: the name holds a separator or ends in .yaml
    load(["200m", "fast.yaml"], ["optim.lr=1e-3"])    a resolved recipe; `base:` may name shipped recipes too

Not here: how recipes are read and checked (megalodon/recipe.py). Importing this loads no torch: completion needs names.
"""

import difflib
import os.path
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from megalodon.errors import RecipeError

if TYPE_CHECKING:
    from megalodon.config import Node
    from megalodon.recipe import Resolved


def folder() -> Path:
    """Return the folder of the shipped recipes: inside the wheel, or beside the package in a checkout."""
    here = Path(__file__).parent
    return next((path for path in (here / "_recipes", here.parent / "recipes") if path.is_dir()), here / "_recipes")


def names() -> list[str]:
    """Return the names of the shipped recipes, sorted."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def purpose(path: Path) -> str:
    """Return what a recipe says it is for: its first line, without the name."""
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").partition(": ")[2].strip()


def complete(incomplete: str, ctx: typer.Context | None = None) -> list[str]:
    """Return the shipped recipes that begin so, after one of them the keys too, for shell completion."""
    given = (ctx.params.get("arguments") or ctx.params.get("recipe")) if ctx else None
    known = [*names(), *(f"{key}=" for key in _keys())] if given else names()
    return [text for text in known if text.startswith(incomplete)]


def _keys() -> list[str]:
    """Every key that a shipped recipe sets; those that none sets would cost an import of torch."""
    from megalodon.config import read_layer

    def below(node: "Node", prefix: str = "") -> Iterator[str]:
        for key, item in node.value.items() if isinstance(node.value, dict) else ():
            yield from below(item, f"{prefix}{key}.") if isinstance(item.value, dict) else (prefix + key,)

    return sorted({key for path in folder().glob("*.yaml") for key in below(read_layer(path))})


def find(name: str) -> Path:
    """Return the file of a recipe, given a shipped name or a path. Raises: RecipeError with the nearest name."""
    if "/" in name or "\\" in name or name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise RecipeError(
                f"no file `{name}`; a shipped recipe is named without folder and ending", "megalodon recipes ls"
            )
        return Path(name)
    if name not in names():  # an empty one too
        near = difflib.get_close_matches(name.lower(), names(), 1, 0.6)
        meant = f"did you mean {near[0]}?" if near else "a file is written with its ending, such as my.yaml"
        raise RecipeError(f"no recipe {name or '``'}; {meant}", "megalodon recipes ls")
    return folder() / f"{name}.yaml"


def load(recipes: Sequence[str], overrides: Sequence[str] = ()) -> "Resolved":
    """Read recipes by name or path, the later over the earlier, and the command line's changes over both.

    Raises: InvalidRecipe with every error and its place; RecipeError for no recipe, or one that does not exist.
    """
    if not recipes:
        raise RecipeError("no recipe; expected a shipped name or a file ending in .yaml", "megalodon recipes ls")
    from megalodon.recipe import load_recipe

    return load_recipe([find(name) for name in recipes], overrides, find)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell recipes from changes: `200m optim.lr=1e-3 ~train.seed` -> (["200m"], ["optim.lr=1e-3", "~train.seed"]).

    No key holds a `/`, so `runs/lr=1/recipe.yaml` is a recipe; so is a file that is there.
    """
    marked = [text for text in arguments if "=" in text or text.startswith("~")]
    changes = [text for text in marked if "/" not in text.partition("=")[0] and not os.path.isfile(text)]
    return [text for text in arguments if text not in changes], changes
