"""Options from the environment: `MEGALODON_DEVICE=cpu` is `--device cpu`, below what stands on the command line.

Every option of every command has one, shown in its help; a repeatable option takes one value. Options that are short
names of recipe keys have none: what is in a recipe never comes from the environment, so the saved recipe explains the
run. Not here: what an option means.
"""

import os
import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from typing import Any

from megalodon_cli import console

PREFIX = "MEGALODON_"
KEYS = {"max-steps": "train.max_steps", "max-tokens": "train.max_tokens", "init-from": "model.init_from"}
SHORT = {"pretrain": KEYS, "finetune": {**KEYS, "data": "data.sources.0.path"}}
"""Command -> its options that are short names of recipe keys."""
_NONE = {"help", "version", "install_completion", "show_completion"}


def listen(command: Any, keys: Collection[str] = ()) -> None:
    """Give every option of a command its variable.

    Args:
        keys: options that are short names of recipe keys; they get none.
    """
    for param in command.params:
        option = next((text for text in param.opts if text.startswith("--")), None)
        if param.param_type_name != "option" or option is None or param.name in _NONE or param.envvar:
            continue
        if option.removeprefix("--") not in keys:
            param.envvar = PREFIX + option.removeprefix("--").replace("-", "_").upper()
            param.value_from_envvar = _reader(param, option)


def _reader(param: Any, option: str) -> Any:
    """Return what the parser calls when the option is not on the command line."""

    def value(context: Any) -> Any:
        if context.parent is not None and param in context.find_root().command.params:
            return None  # an option that holds everywhere: read when the line began
        text = param.resolve_envvar_value(context)
        if text is None:
            return None
        console.settings().variables[option] = param.envvar
        return [text] if param.multiple else text

    return value


def named(message: str) -> str:
    """Return a message that speaks of variables where the value of an option came from one."""
    message = re.sub(r" \(env var: ['`]\w+['`]\)", "", message)
    for option, variable in console.settings().variables.items():
        field = option.removeprefix("--").replace("-", "_")  # how the library calls what the option fills
        message = re.sub(rf"(?<![\w-])(-\w/)?{option}(?![\w-])|^{field}(?=\b)", variable, message)
    return message


def warn_of_unknown(commands: Iterable[Any]) -> None:
    """Warn of variables that look like options and are none."""
    known = sorted({str(param.envvar) for command in commands for param in command.params if param.envvar})
    keys = {PREFIX + name.replace("-", "_").upper(): name for name in KEYS}
    for variable in sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known):
        if variable in keys:
            option = keys[variable]
            console.warning(f"{variable} is ignored: recipe keys never come from the environment; give --{option}")
        else:
            near = get_close_matches(variable.removeprefix(PREFIX), [k.removeprefix(PREFIX) for k in known], 1)
            meant = f"did you mean {PREFIX}{near[0]}?" if near else "`megalodon COMMAND --help` shows the variables"
            console.warning(f"{variable}: no option has this variable; {meant}")
