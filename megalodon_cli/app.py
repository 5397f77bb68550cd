"""The command line: every command by name, the options that hold everywhere, and errors as one line and an exit code.

Not here: what a command does (commands/), what it prints with (console.py).
"""

import errno
import os
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from megalodon.errors import EnvironmentFault, InputError
from megalodon_cli import console, crash, variables
from megalodon_cli.commands.convert import convert
from megalodon_cli.commands.doctor import doctor
from megalodon_cli.commands.evaluate import evaluate
from megalodon_cli.commands.finetune import finetune
from megalodon_cli.commands.generate import generate
from megalodon_cli.commands.pretrain import pretrain
from megalodon_cli.commands.profile import profile
from megalodon_cli.commands.recipes import recipes
from megalodon_cli.commands.runs import runs
from megalodon_cli.commands.tokenize import tokenize

EXIT_CODES = """[bold]Exit codes[/bold]

 0  all that was asked is done

 1  the run failed

 2  your input; nothing was started

 3  the environment: a missing extra, device, disk space or network

 4  out of memory

 5  numerical failure: the guard gave up

 6  a check says no

75  stopped early with a verified checkpoint; the same command continues

130, 143  interrupted twice, or before the first step"""

JSON = {"tokenize", "pretrain", "finetune", "convert", "generate", "evaluate", "recipes", "runs", "profile", "doctor"}
"""Commands whose result is also a JSON document."""
FULL = {errno.ENOSPC, errno.EDQUOT}
"""What the system says of a disk that takes no more."""
UNFIT = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENOENT, errno.EEXIST}
UNFIT |= {errno.EACCES, errno.EPERM, errno.EROFS}
"""What the system says of a path that cannot be what was asked of it."""
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
"""Variables that keep the libraries of the Hugging Face Hub from the network."""
COMMANDS = (
    "tokenize",
    "pretrain",
    "finetune",
    "convert",
    "generate",
    "evaluate",
    "recipes",
    "runs",
    "profile",
    "doctor",
)
TAKES_KEYS = {"tokenize", "pretrain", "finetune", "recipes"}
"""Commands that take recipe keys, also in the form `--optim.lr 1e-3`."""
EXAMPLES = {
    "train.max_steps": "2000",
    "train.max_tokens": "2M",
    "model.init_from": "runs/mine",
    "data.sources.0.path": "chats.jsonl",
}
"""Values of keys that have short names."""
PATHS = {"model.init_from", "data.sources.0.path"}
"""Those that hold any text, quoted so that YAML takes it for nothing else."""


def _command(arguments: Sequence[str]) -> str:
    """Return the name of the command in a line; empty if there is none."""
    return next((text for text in arguments if text in COMMANDS), "")


def _quoted(text: str) -> str:
    """Return a text as YAML reads it in double quotes, whatever is in it: bytes of a path that are no text, too."""
    plain = (c if c.isascii() and c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text)
    return f'"{"".join(plain)}"'


def spelled(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with `--optim.lr 1e-3` written as the change `optim.lr=1e-3`, `-c FILE` as the recipe FILE.

    `--optim.lr=1e-3`, `--config FILE` and `--config=FILE` are the same. So are, in training, the short names of keys:
    `--max-steps 9` becomes `train.max_steps=9`, in its place among the other changes.
    """
    command = _command(arguments)
    if command not in TAKES_KEYS:
        return list(arguments)
    short = variables.SHORT.get(command, {})
    shown: list[str] = []
    rest = iter(arguments)
    for text in rest:
        option, equals, given = text.partition("=")
        recipe = option in ("-c", "--config")
        key = short.get(option.removeprefix("--").replace("_", "-")) if option.startswith("--") else None
        if text == "--":
            return [*shown, text, *rest]
        if not recipe and not key and not (text.startswith("--") and "." in option):
            shown.append(text)
            continue
        value = given if equals else next(rest, None)
        if value is None or (key and not value):
            example, came = "my.yaml" if recipe else EXAMPLES.get(key or "", "1e-3"), ", got nothing" if key else ""
            raise InputError(f"command line: {option}: expected a value, such as {option} {example}{came}")
        name = key or option.removeprefix("--")
        shown.append(value if recipe else f"{name}={_quoted(value) if key in PATHS else value}")
    return shown


class Shell(TyperGroup):
    """A group of commands: shared options hold before and after a command's name, errors become messages."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command with the options that hold everywhere."""
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            have = {param.name for param in command.params}
            for param in self.params:
                fits = param.name != "json" or cmd_name in JSON or ctx.parent is not None
                if param.param_type_name == "option" and param.name in EVERYWHERE - have and fits:
                    param.expose_value = False  # its callback stores it; the command knows nothing of it
                    command.params.append(param)
            variables.listen(command, variables.SHORT.get(cmd_name, ()))
        return command

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read a command line; a group that is called alone prints its help."""
        if ctx.parent is None:
            variables.listen(self)
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command of a line. Raises: InputError with the nearest name."""
        if args and not args[0].startswith("-") and args[0] not in self.list_commands(ctx):
            near = get_close_matches(args[0], self.list_commands(ctx), 1)
            meant = f"did you mean {near[0]}?" if near else f"commands: {', '.join(self.list_commands(ctx))}"
            raise InputError(f"{args[0]}: no such command; {meant}", f"{ctx.command_path} --help")
        if ctx.parent is None and console.wants_json() and args[0] not in JSON:
            raise InputError(f"--json: {args[0]} prints no document; commands that do: {', '.join(sorted(JSON))}")
        if ctx.parent is None and not ctx.resilient_parsing and any(n.startswith(variables.PREFIX) for n in os.environ):
            variables.warn_of_unknown([self, *filter(None, map(partial(self.get_command, ctx), COMMANDS))])
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command line. Returns the exit code, or exits with it in standalone mode."""
        standalone = extra.pop("standalone_mode", True)
        if sys.stdin is None:  # closed by whoever started us
            sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  # to the end, as stdin is
        line = args[0] if args else extra.pop("args", None)
        given = list(sys.argv[1:] if line is None else line)
        console.configure(console.Settings(json="--json" in given and bool(JSON & set(given))))
        before = {name: os.environ.get(name) for name in ("NO_COLOR", "FORCE_COLOR", "TQDM_DISABLE", *OFFLINE)}
        try:
            code = self._guarded(given, extra)
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
        if standalone:
            sys.exit(code)
        return code

    def _guarded(self, given: list[str], extra: dict[str, Any]) -> int:
        """Run a command line and turn whatever happens into an exit code."""
        try:
            code = super().main(args=spelled(given), **{**extra, "prog_name": "megalodon"}, standalone_mode=False)
            console.finish()
            return code if isinstance(code, int) else 0
        except BrokenPipeError:
            return _closed_pipe()
        except KeyboardInterrupt:
            return 130
        except SystemExit as end:
            if isinstance(end.__context__, BrokenPipeError):  # typer's own answer to a closed pipe is exit 1
                return _closed_pipe()
            raise
        except Exception as error:  # the last line of defence: nothing above this would show the user a sentence
            if console.settings().debug:
                import traceback

                traceback.print_exc(file=sys.stderr)
            return explain(error, given)


def _closed_pipe() -> int:
    """Whoever read our output has enough: end quietly, also when Python flushes its streams at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def explain(error: Exception, given: Iterable[str] = ()) -> int:
    """Print an error as what came, what was expected, what to do. Returns its exit code."""
    console.finish()
    if isinstance(error, OSError) and error.errno in FULL:
        error = EnvironmentFault(f"{error.filename or 'disk'}: {(error.strerror or str(error)).lower()}")
    if isinstance(error, OSError) and error.errno in UNFIT and error.filename is not None:
        error = InputError(f"{os.fsdecode(error.filename)}: {(error.strerror or str(error)).lower()}")
    code = getattr(error, "exit_code", None)
    if not isinstance(code, int):
        message = crash.report(error, next((text for text in given if not text.startswith("-")), ""))
        console.failure({"kind": "internal", "message": message, "hint": None}, 1)
        return 1
    message, hint = str(error), getattr(error, "hint", None)
    problems = getattr(error, "problems", ())
    if isinstance(error, typer.TyperException):
        message, hint = _usage(error)
    message = variables.named(message)
    if code == 75:
        console.info(message)
    for problem in problems:
        console.error(str(problem), excerpt=problem.place.excerpt())
    if not problems and code != 75:
        console.error(message)
    if hint:
        console.hint(hint)
    if len(problems) > 1:
        sources = dict.fromkeys(str(problem.place.source).partition(": ")[0] for problem in problems)
        console.info(f"{len(problems)} errors in {', '.join(sources)}; nothing was started")
    place = problems[0].place if problems else None
    details = {"kind": type(error).__name__, "message": message, "file": place.source if place else None}
    details |= {"line": place.line if place else None, "column": place.column if place else None, "hint": hint}
    console.failure(details, code)
    return code


def _usage(error: Any) -> tuple[str, str | None]:
    """Return message and hint of a mistake on the command line."""
    context = getattr(error, "ctx", None)
    hint = f"{context.command_path} --help" if context else None
    option = getattr(error, "option_name", None)
    if option and hasattr(error, "possibilities"):
        near = get_close_matches(option, error.possibilities or [], 1, 0.5)
        return f"{option}: no such option" + (f"; did you mean {near[0]}?" if near else ""), None if near else hint
    message = " ".join(error.format_message().replace("Value error, ", "").split()).rstrip(".").replace("'", "`")
    return message[:1].lower() + message[1:], hint


def _take(param: typer.CallbackParam, value: Any) -> Any:
    """Store an option that holds everywhere. Raises: InputError for a log file that cannot be written."""
    if isinstance(value, Path):
        try:
            value.open("a").close()
        except OSError as error:
            raise InputError(
                f"--log-file {value}: cannot be written: {(error.strerror or str(error)).lower()}"
            ) from None
    if value not in (None, False) and param.name:
        setattr(console.settings(), param.name, value)
    if param.name == "color" and value in ("always", "never"):  # rich, which draws the help, listens to these
        os.environ["NO_COLOR" if value == "never" else "FORCE_COLOR"] = "1"
        os.environ.pop("FORCE_COLOR" if value == "never" else "NO_COLOR", None)
    if param.name == "offline" and value:  # the libraries of the Hub read these when they are imported
        os.environ.update(dict.fromkeys(OFFLINE, "1"))
    return value


def _version(value: bool) -> None:
    if value:
        import importlib.metadata

        console.result(f"megalodon {importlib.metadata.version('megalodon-lm')}")
        raise typer.Exit


EVERYWHERE = {"json", "quiet", "verbose", "debug", "log_file", "color", "offline", "version"}
PANEL = "Everywhere"

app = typer.Typer(
    cls=Shell,
    epilog=EXIT_CODES,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
)


@app.callback()
def everywhere(
    json: Annotated[
        bool,
        typer.Option(
            "--json",
            callback=_take,
            is_eager=True,
            rich_help_panel=PANEL,
            help="Print one JSON document (training: with --dry-run or --check-resume).",
        ),
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet", "-q", callback=_take, is_eager=True, rich_help_panel=PANEL, help="Hide progress and notes."
        ),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", callback=_take, is_eager=True, rich_help_panel=PANEL, help="Say more.")
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", callback=_take, is_eager=True, rich_help_panel=PANEL, help="Show the traceback of an error."
        ),
    ] = False,
    log_file: Annotated[
        Path | None,
        typer.Option(
            "--log-file",
            callback=_take,
            is_eager=True,
            metavar="FILE",
            rich_help_panel=PANEL,
            help="Also append messages to this file.",
        ),
    ] = None,
    color: Annotated[
        Literal["auto", "always", "never"] | None,
        typer.Option(
            "--color",
            callback=_take,
            is_eager=True,
            rich_help_panel=PANEL,
            help="Colours; auto, the default: on a terminal.",
        ),
    ] = None,
    offline: Annotated[
        bool,
        typer.Option(
            "--offline",
            callback=_take,
            is_eager=True,
            rich_help_panel=PANEL,
            help="Refuse whatever needs the network (exit 3).",
        ),
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, rich_help_panel=PANEL, help="Print the version."),
    ] = False,
) -> None:
    """Train, run and study Megalodon long-context language models.

    [bold]Start:[/bold] megalodon pretrain quickstart, then megalodon generate quickstart -p "def read_file(path):"
    """


app.command("tokenize", rich_help_panel="Data")(tokenize)
app.add_typer(recipes, cls=Shell, name="recipes", rich_help_panel="Data")
app.command("pretrain", rich_help_panel="Model")(pretrain)
app.command("finetune", rich_help_panel="Model")(finetune)
app.command("convert", rich_help_panel="Model")(convert)
app.command("generate", rich_help_panel="Run")(generate)
app.command("evaluate", rich_help_panel="Run")(evaluate)
app.add_typer(runs, cls=Shell, name="runs", rich_help_panel="Run")
app.command("profile", rich_help_panel="Run")(profile)
app.command("doctor", rich_help_panel="Run")(doctor)


def main() -> None:
    """Run the command line of this process."""
    app()
