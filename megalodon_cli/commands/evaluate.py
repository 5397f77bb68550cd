"""`megalodon evaluate`: how good a model is, and how far back it uses text.

Not here: what is measured (megalodon/evaluation), models, text and files (evaluation.py).
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from megalodon_cli import checkpoints, console

Suite = Literal["quick", "context"]

Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CKPT…",
        help="Model directories, runs, or their names under runs/; the newest finished run if left out.",
        autocompletion=checkpoints.complete,
    ),
]
Compare = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CKPT",
        help="Another model on the same text; the first one is what all are compared with. May be repeated.",
        rich_help_panel="Data",
        autocompletion=checkpoints.complete,
    ),
]
SuiteName = Annotated[
    Suite,
    typer.Option(
        help="quick: loss, bits per byte and per word. context: the same windows after more and more context.",
        rich_help_panel="Run",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE|DIR", help="Text to score; left out: the validation part of the run.", rich_help_panel="Data"
    ),
]
Concatenate = Annotated[bool, typer.Option("--concatenate", help="All documents as one.", rich_help_panel="Data")]
Lengths = Annotated[
    str, typer.Option(metavar="LIST", help="Tokens of context, such as 1Ki,4Ki or 1Ki-64Ki*4.", rich_help_panel="Run")
]
Target = Annotated[
    str, typer.Option(metavar="N", help="Tokens of a window that is scored after its context.", rich_help_panel="Run")
]
Windows = Annotated[int, typer.Option(min=1, help="Windows, taken evenly from the documents.", rich_help_panel="Run")]
NormStats = Annotated[
    Literal["cumulative", "window"],
    typer.Option(help="Norm statistics over all that was read, or over the last chunks.", rich_help_panel="Run"),
]
BatchSize = Annotated[
    str, typer.Option(metavar="N", help="Windows read side by side; auto: 4, on a GPU 16.", rich_help_panel="Run")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel="Run")]
Dtype = Annotated[
    Literal["auto", "fp32", "bf16"],
    typer.Option(help="Of matrix products; auto: fp32, on a GPU bf16.", rich_help_panel="Run"),
]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw as .png or .svg.", rich_help_panel="Output")]
OutputPath = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where results go; left out: RUN/evals.", rich_help_panel="Output"),
]


def evaluate(
    models: Models = None,
    compare: Compare = None,
    suite: SuiteName = "quick",
    data: Data = None,
    concatenate: Concatenate = False,
    lengths: Lengths = "1Ki,4Ki,16Ki",
    target: Target = "4Ki",
    windows: Windows = 32,
    norm_stats: NormStats = "cumulative",
    batch_size: BatchSize = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    plot: Plot = None,
    output_path: OutputPath = None,
) -> None:
    """Score a model on held-out text, document by document, each token once.

    Several models are scored on the same text, and each is compared with the first, paired.
    State is carried to the end of a document of any length; text is never cut. Values have standard errors, differences
    95 % intervals. Results are a table on stdout, and JSON with a Markdown report in RUN/evals or --output-path.

    Examples:

        megalodon evaluate debug

        megalodon evaluate debug --data README.md --json

        megalodon evaluate debug --suite context --lengths 32,128,512 --target 64 --concatenate
    """
    from megalodon_cli import evaluation_request, evaluation_screen

    if plot is not None:
        from megalodon_cli import figures

        figures.check(plot)
    options = evaluation_request.Options(
        models=models or (),
        compare=compare or (),
        suite=suite,
        data=data,
        concatenate=concatenate,
        lengths=lengths,
        target=target,
        windows=windows,
        norm_stats=norm_stats,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        output_path=output_path,
    )
    request = evaluation_request.read(options)
    document = request.measured()
    evaluation_screen.show(document)
    for path in evaluation_screen.write_files(document, request.folder, plot):
        console.info(f"written: {path}")
    if request.folder is None:
        console.note("nothing was saved: the model is in no run; --output-path DIR keeps results")
    console.document("evaluate", document)
