"""`megalodon finetune`: a model learns from examples, all of it or adapters beside it.

Not here: the step and its loop (megalodon/training/loop.py), examples (megalodon/data/examples.py), what is put
together (finetune_job.py), what stands around the training (training_command.py).
"""

from typing import Annotated, Literal

import typer

from megalodon.errors import InputError, RecipeError
from megalodon_cli import finetune_job, launch, recipe_files, training_command, training_options
from megalodon_cli.job import Asked


def finetune(
    arguments: training_options.Recipes,
    init_from: Annotated[
        str | None,
        typer.Option(
            metavar="CKPT",
            help="The model that is tuned, = model.init_from: a model directory, RUN, RUN@STEP or RUN@best.",
            rich_help_panel="Model",
        ),
    ] = None,
    method: Annotated[
        Literal["full", "lora"] | None,
        typer.Option(
            help="full trains all weights, lora adapters beside them; as the recipe says if left out.",
            rich_help_panel="Model",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Examples: JSON lines or a folder, = data.sources.0.path.", rich_help_panel="Data"
        ),
    ] = None,
    no_prepare: training_options.NoPrepare = False,
    device: training_options.Device = "auto",
    gpus: training_options.Gpus = None,
    resume: training_options.Resume = "auto",
    max_steps: training_options.MaxSteps = None,
    max_tokens: training_options.MaxTokens = None,
    max_time: training_options.MaxTime = None,
    stop_at_step: training_options.StopAtStep = None,
    profile: training_options.Profile = None,
    deterministic: training_options.Deterministic = False,
    allow_change: training_options.AllowChange = None,
    force_unlock: training_options.ForceUnlock = False,
    dry_run: training_options.DryRun = False,
    check_resume: training_options.CheckResume = None,
    out_dir: training_options.OutDir = None,
) -> None:
    """Tune a model on conversations or texts: all of its weights, or low-rank adapters.

    One example is shown before the first step, with what is trained on marked. The same command continues a stopped
    run where it was, bit by bit. Formats: messages, ShareGPT, Alpaca, prompt and completion, text; found out or named.

    Examples:

        megalodon finetune finetune-chat --init-from quickstart --data chats.jsonl

        megalodon finetune finetune-lora --init-from quickstart --data chats.jsonl model.lora.r=8

        megalodon finetune finetune-chat --init-from quickstart --data chats.jsonl --method lora --dry-run
    """
    names, changes = recipe_files.split(arguments)
    if not names:
        raise RecipeError("no recipe; expected a shipped name or a file ending in .yaml", "megalodon recipes ls")
    keys = {"model.init_from": init_from, "data.sources.0.path": data}
    keys |= {"train.max_steps": max_steps, "train.max_tokens": max_tokens}
    changes += training_options.keys_of(keys, deterministic)
    how = training_options.how(
        "finetune",
        max_time=max_time,
        stop_at_step=stop_at_step,
        profile=profile,
        force_unlock=force_unlock,
        dry_run=dry_run,
        check_resume=check_resume,
    )
    if method == "full":
        if lost := [change for change in changes if change.startswith("model.lora")]:
            raise InputError(f"--method full and {lost[0]} are both given; drop one of them")
        changes.append("model.lora=null")
    resolved = recipe_files.load(names, changes)
    if method == "lora" and resolved.finetuning().model.lora is None:
        resolved = recipe_files.load(names, ["model.lora={}", *changes])
    resolved.finetuning()
    launch.start_if_asked(gpus, device)
    asked = Asked(device, resume, out_dir, allow_change or (), no_prepare)
    with training_command.work(resolved, asked, how, finetune_job.prepare) as started:
        if started:
            from megalodon.training.loop import train

            started.end(train(*started.parts, started.run))
