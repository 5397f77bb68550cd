"""`megalodon pretrain`: tokens to a model. Puts the parts of a recipe together, trains, says how it went.

Not here: the step and its loop (megalodon/training/loop.py), scores (megalodon/evaluation), tokens (megalodon/data),
what stands around the training (training_command.py).
"""

from typing import Annotated

import typer

from megalodon.errors import InputError, RecipeError
from megalodon_cli import launch, plan_screen, recipe_files, training_command, training_job, training_options
from megalodon_cli.job import Asked


def pretrain(
    arguments: training_options.Recipes,
    no_prepare: training_options.NoPrepare = False,
    device: training_options.PlannedDevice = "auto",
    gpus: training_options.Gpus = None,
    resume: training_options.Resume = "auto",
    init_from: Annotated[
        str | None,
        typer.Option(
            metavar="CKPT",
            help="Weights a new run begins with, = model.init_from: a model directory, RUN, RUN@STEP or RUN@best.",
            rich_help_panel="Run",
        ),
    ] = None,
    max_steps: training_options.MaxSteps = None,
    max_tokens: training_options.MaxTokens = None,
    max_time: training_options.MaxTime = None,
    stop_at_step: training_options.StopAtStep = None,
    profile: training_options.Profile = None,
    deterministic: training_options.Deterministic = False,
    allow_change: training_options.AllowChange = None,
    force_unlock: training_options.ForceUnlock = False,
    plan: training_options.Planned = False,
    dry_run: training_options.DryRun = False,
    check_resume: training_options.CheckResume = None,
    out_dir: training_options.OutDir = None,
) -> None:
    """Train a model from a recipe; text that is not tokenised yet is tokenised first.

    The same command continues a stopped run where it was, bit by bit. Ctrl-C finishes the step, saves and ends with 75.

    Examples:

        megalodon pretrain debug

        megalodon pretrain debug optim.lr=1e-3 -o runs/debug-slow

        megalodon pretrain 7b --plan --gpus 256 --device h100

        megalodon pretrain debug --gpus 2 -o runs/debug-two
    """
    names, changes = recipe_files.split(arguments)
    if not names:
        raise RecipeError("no recipe; expected a shipped name or a file ending in .yaml", "megalodon recipes ls")
    keys = {"model.init_from": init_from, "train.max_steps": max_steps, "train.max_tokens": max_tokens}
    changes += training_options.keys_of(keys, deterministic)
    if plan:
        checks = {"--dry-run": dry_run, "--check-resume": check_resume, "--profile": profile, "--max-time": max_time}
        training_options.only("--plan", {**checks, "--stop-at-step": stop_at_step})
        plan_screen.show(recipe_files.load(names, changes), gpus, device)
        return
    how = training_options.how(
        "pretrain",
        max_time=max_time,
        stop_at_step=stop_at_step,
        profile=profile,
        force_unlock=force_unlock,
        dry_run=dry_run,
        check_resume=check_resume,
    )
    if resume not in ("auto", "never") and any(change.startswith("model.init_from=") for change in changes):
        raise InputError("--resume STEP_DIR and --init-from are both given; a step has its own weights, drop one")
    resolved = recipe_files.load(names, changes)
    resolved.pretraining()
    launch.start_if_asked(gpus, device)
    asked = Asked(device, resume, out_dir, allow_change or (), no_prepare)
    with training_command.work(resolved, asked, how, training_job.prepare) as started:
        if started:
            from megalodon.training.loop import train

            started.end(train(*started.parts, started.run))
