"""`megalodon convert`: an adapter merged into its base.

Not here: how (megalodon/checkpoint/adapter_files.py).
"""

from pathlib import Path
from typing import Annotated

import typer

from megalodon.errors import InputError
from megalodon_cli import checkpoints, console


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="An adapter directory, such as runs/chat/adapter.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The model directory that is written.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the base with the adapter merged.", rich_help_panel="Model")
    ] = False,
    base: Annotated[
        Path | None,
        typer.Option(metavar="CKPT", help="The base model, if it is not where it was.", rich_help_panel="Model"),
    ] = None,
) -> None:
    """Write an adapter and its base as one model, which needs neither of them.

    Examples:

        megalodon convert runs/finetune-lora/adapter runs/finetune-lora/model --merge

        megalodon convert runs/finetune-lora/adapter chat-model --merge --base runs/quickstart/model

        megalodon convert runs/finetune-lora/adapter chat-model --merge --json
    """
    from megalodon.checkpoint.adapter_files import is_adapter, merge_adapter
    from megalodon.checkpoint.tensors import read_model_info

    if not is_adapter(source):
        raise InputError(f"{source}: not an adapter directory (no adapter_config.json); expected RUN/adapter")
    if not merge:
        raise InputError(f"{source} is an adapter; expected --merge, which writes it and its base as one model")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} already exists; choose another directory or remove it")
    merge_adapter(source, target, base and checkpoints.model_directory(str(base)))
    info = read_model_info(target)
    console.result(
        f"{target}: {info['merged_from']['base'][:8]} with adapter {info['merged_from']['adapter'][:8]} merged"
    )
    console.result(f"  next: megalodon generate {target} -p TEXT")
    console.document("convert", {"model": str(target), **info["merged_from"], "weights_sha256": info["weights_sha256"]})
