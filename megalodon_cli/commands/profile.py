"""`megalodon profile`: where time and memory go on this machine.

Not here: measuring (megalodon/profiling/timing.py), what the options mean (profile_request.py), tables and files
(profile_screen.py).
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from megalodon_cli import checkpoints, console, recipe_files


def _complete(incomplete: str) -> list[str]:
    return [*recipe_files.complete(incomplete), *checkpoints.complete(incomplete)]


Model = Annotated[
    str | None,
    typer.Argument(
        metavar="CKPT|RECIPE",
        help="A recipe, whose model gets random weights, or a model directory or run; left out: quickstart on a CPU, "
        "200m on a GPU.",
        autocompletion=_complete,
    ),
]
What = Annotated[
    str,
    typer.Option(metavar="LIST", help="Of kernels, layers, prefill, decode, train and data.", rich_help_panel="Run"),
]
Lengths = Annotated[
    str | None,
    typer.Option(
        "--lengths",
        "-p",
        metavar="LIST",
        help="Tokens, such as 512,32Ki or 512-32Ki*2; left out: 2Ki for kernels, else the recipe's window.",
        rich_help_panel="Run",
    ),
]
NewTokens = Annotated[
    str, typer.Option("--new-tokens", "-n", metavar="LIST", help="Tokens that decode writes.", rich_help_panel="Run")
]
Depths = Annotated[
    str,
    typer.Option(
        "--depths", "-d", metavar="LIST", help="Tokens read before prefill and decode.", rich_help_panel="Run"
    ),
]
Shapes = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help="Shapes for kernels, or a file of them: a list for every op, or op -> list.",
        rich_help_panel="Run",
    ),
]
Repeats = Annotated[
    int, typer.Option("--repeats", "-r", min=1, help="Samples of each measurement.", rich_help_panel="Run")
]
Backend = Annotated[str, typer.Option(help="auto, triton, portable or reference.", rich_help_panel="Run")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel="Run")]
Dtype = Annotated[str, typer.Option(help="auto (the recipe's), fp32, bf16 or fp64.", rich_help_panel="Run")]
BaselineFile = Annotated[
    Path | None, typer.Option(metavar="F.json", help="An older measurement to compare with.", rich_help_panel="Output")
]
FailOver = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE",
        help="Slowdown over the baseline that ends with 6; 10% if left out.",
        rich_help_panel="Output",
    ),
]
Explain = Annotated[bool, typer.Option("--explain", help="Say in words what binds each row.", rich_help_panel="Output")]
Trace = Annotated[
    Path | None, typer.Option(metavar="F.json", help="Also write a Chrome trace.", rich_help_panel="Output")
]
Plot = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Also draw speed over depth as .png or .svg.", rich_help_panel="Output"),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="FILE", help="Also write to F.json, F.md or F.csv.", rich_help_panel="Output"),
]


def profile(
    model: Model = None,
    what: What = "kernels",
    lengths: Lengths = None,
    new_tokens: NewTokens = "128",
    depths: Depths = "0,4Ki,64Ki,1Mi",
    shapes: Shapes = None,
    repeats: Repeats = 5,
    backend: Backend = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    baseline: BaselineFile = None,
    fail_over: FailOver = None,
    explain: Explain = False,
    trace: Trace = None,
    plot: Plot = None,
    out: Out = None,
) -> None:
    """Measure the ops, layers, training, prefill, decoding or data of a model on this machine.

    Each op is compared with its plain reference in the row of its time; rates are shares of those measured here.
    Numbers take lists and ranges: 512-32Ki*2 is 512, 1Ki, 2Ki … 32Ki. A depth is reached by a made-up state.

    Examples:

        megalodon profile debug -p 256 --explain

        megalodon profile debug --what decode,prefill -n 16 -d 0,1Mi -r 2

        megalodon profile debug --what train -r 2 -o train.json
    """
    if trace:  # the profiler of PyTorch reads it when it is loaded; without it, it writes lines of its own
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from megalodon.profiling.timing import profile as measure
    from megalodon_cli import profile_request, profile_screen

    profile_request.check_files(baseline=baseline, out=out, trace=trace, plot=plot)
    with console.Progress() as live:
        request, name = profile_request.read(
            model, what, lengths, new_tokens, depths, shapes, repeats, backend, device, dtype, trace, live.update
        )
        before = profile_request.baseline(baseline, fail_over, request.device)
        report = measure(request)
    found = before.compare(report.rows) if before else None
    profile_screen.show(name, report, explain=explain)
    document = report.document()
    if found:
        document["changes"] = profile_screen.show_changes(found)
    # before the verdict: a slowdown leaves its rows behind
    for path in profile_screen.write_files(name, report, document, out, plot):
        console.info(f"written: {path}")
    if trace:
        console.info(f"written: {trace}")
    if found:
        found.check()
    console.document("profile", document)
