"""`megalodon evaluate`: how good a model is, and how far back it uses text.

Not here: what is measured (megalodon/evaluation), what the options mean (evaluation_request.py), models and text
(evaluation_models.py), tables and files (evaluation_screen.py).
"""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from megalodon_cli import checkpoints, console, joining, launch, reading, training_options

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
    Literal["quick", "context", "recall", "long", "harness", "qa"] | None,
    typer.Option(
        help="quick: loss, bits per byte and per word. context: the same windows after more and more context. recall: "
        "passkey and its kin. long: all three. harness and qa are implied by --tasks and --qa. quick if left out.",
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
    str | None,
    typer.Option(
        metavar="LIST",
        help="Tokens of context, of recall's prompts and of tasks that take lengths, such as 1Ki,4Ki or 1Ki-64Ki*4; "
        "1Ki,4Ki,16Ki if left out.",
        rich_help_panel="Run",
    ),
]
Target = Annotated[
    str, typer.Option(metavar="N", help="Tokens of a window that is scored after its context.", rich_help_panel="Run")
]
Windows = Annotated[int, typer.Option(min=1, help="Windows, taken evenly from the documents.", rich_help_panel="Run")]
RecallTasks = Annotated[
    str | None,
    typer.Option(
        "--recall",
        metavar="LIST",
        help="Of passkey, needle, multikey, associative, copy, listops; all if left out.",
        rich_help_panel="Run",
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="Tasks of lm-eval by name, or YAML files; a name may fetch its data from the Hugging Face Hub.",
        rich_help_panel="Data",
    ),
]
IncludePath = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="A folder with more tasks for --tasks.", rich_help_panel="Data"),
]
Fewshot = Annotated[
    int | None, typer.Option("--num-fewshot", min=0, help="Examples before each question.", rich_help_panel="Run")
]
Limit = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Questions of a task or a file; of recall, at each length and depth. All of them; 10 of recall.",
        rich_help_panel="Run",
    ),
]
ChatTemplate = Annotated[
    bool,
    typer.Option("--apply-chat-template", help="Ask tasks as conversations.", rich_help_panel="Run"),
]
Qa = Annotated[
    Path | None, typer.Option("--qa", metavar="FILE", help="Questions, as JSON lines.", rich_help_panel="Data")
]
Fields = Annotated[
    str, typer.Option(metavar="Q,A", help="Fields of --qa: question and answer.", rich_help_panel="Data")
]
Extract = Annotated[
    str | None,
    typer.Option(metavar="REGEX", help="Takes the answer out of what was written for --qa.", rich_help_panel="Run"),
]
NewTokens = Annotated[
    int,
    typer.Option("--max-new-tokens", "--max-tokens", "-n", min=1, help="Of an answer to --qa.", rich_help_panel="Run"),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="Text that ends an answer to --qa; may be repeated.", rich_help_panel="Run"),
]
Raw = Annotated[bool, typer.Option("--raw", help="Ask --qa without chat template.", rich_help_panel="Run")]
NormStats = Annotated[
    Literal["cumulative", "window"],
    typer.Option(help="Norm statistics over all that was read, or over the last chunks.", rich_help_panel="Run"),
]
BatchSize = Annotated[
    str,
    typer.Option(metavar="N", help="Windows or questions side by side; auto: 4, on a GPU 16.", rich_help_panel="Run"),
]
Seed = Annotated[int, typer.Option(min=0, help="Of recall's prompts and of few-shot examples.", rich_help_panel="Run")]
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
LogSamples = Annotated[
    bool,
    typer.Option("--log-samples", help="Keep every question with its answer, as JSON lines.", rich_help_panel="Output"),
]
FailOnTruncation = Annotated[
    bool,
    typer.Option("--fail-on-truncation", help="End with 6 if any text was cut.", rich_help_panel="Output"),
]


def evaluate(
    models: Models = None,
    compare: Compare = None,
    suite: SuiteName = None,
    data: Data = None,
    concatenate: Concatenate = False,
    lengths: Lengths = None,
    target: Target = "4Ki",
    windows: Windows = 32,
    recall: RecallTasks = None,
    tasks: Tasks = None,
    include_path: IncludePath = None,
    num_fewshot: Fewshot = None,
    limit: Limit = None,
    apply_chat_template: ChatTemplate = False,
    qa: Qa = None,
    fields: Fields = "question,answer",
    extract: Extract = None,
    max_new_tokens: NewTokens = 64,
    stop: Stop = None,
    raw: Raw = False,
    norm_stats: NormStats = "cumulative",
    batch_size: BatchSize = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    gpus: training_options.ReadingGpus = None,
    dtype: Dtype = "auto",
    plot: Plot = None,
    output_path: OutputPath = None,
    log_samples: LogSamples = False,
    fail_on_truncation: FailOnTruncation = False,
) -> None:
    """Score a model on held-out text, document by document, each token once; or on tasks and questions.

    Several models are scored on the same text, and each is compared with the first, paired.
    State is carried to the end of a document of any length; text is never cut. Values have standard errors, differences
    95 % intervals. Results are a table on stdout, and JSON with a Markdown report in RUN/evals or --output-path.

    Examples:

        megalodon evaluate debug

        megalodon evaluate debug --data README.md --json

        megalodon evaluate debug --suite context --lengths 32,256 --target 64

        megalodon evaluate debug --suite recall --lengths 512 --limit 1
    """
    if tasks is not None:  # bars of the harness would run through ours; read when tqdm is imported
        os.environ.setdefault("TQDM_DISABLE", "1")
    from megalodon_cli import evaluation_request, evaluation_screen

    options = evaluation_request.Options(
        models=models or (),
        compare=compare or (),
        suite=evaluation_request.suite_of(suite, tasks=tasks, qa=qa),
        data=data,
        concatenate=concatenate,
        lengths=lengths,
        target=target,
        windows=windows,
        recall=recall,
        tasks=tasks,
        include_path=include_path,
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=apply_chat_template,
        qa=qa,
        fields=fields,
        extract=extract,
        max_new_tokens=max_new_tokens,
        stop=stop or (),
        raw=raw,
        norm_stats=norm_stats,
        batch_size=batch_size,
        seed=seed,
        device=device,
        dtype=dtype,
        output_path=output_path,
        log_samples=log_samples,
        plot=plot,
    )
    if plot is not None:
        from megalodon_cli import figures

        figures.check(plot)
    launch.start_if_asked(gpus, device)
    if joining.is_helper():
        names = [*(list[str | None](options.models) or [None]), *options.compare]
        return reading.help_with([checkpoints.model_directory(name) for name in names], device)
    request = evaluation_request.read(options)
    with reading.shared([subject.writer.model for subject in request.subjects], device) as piece:
        evaluation = request.with_passes(piece).measured()
    evaluation_screen.show(evaluation.document)
    # before the verdict: what was cut leaves its rows behind
    for path in evaluation_screen.write_files(evaluation, request.folder, plot):
        console.info(f"written: {path}")
    if request.folder is None:
        console.note("nothing was saved: the model is in no run; --output-path DIR keeps results")
    if fail_on_truncation:
        evaluation.check_truncation()
    console.document("evaluate", evaluation.document)
