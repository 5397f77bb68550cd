"""`megalodon generate`: a model continues a text. Not here: how (megalodon/inference)."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from megalodon.errors import InputError
from megalodon_cli import checkpoints, console, generation, joining, launch, reading, training_options
from megalodon_cli.prompts import read_prompt, read_system


def generate(
    context: typer.Context,
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="CKPT",
            help="A model directory, a run, or its name under runs/; the newest finished run if left out.",
            autocompletion=checkpoints.complete,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="The text to continue; `-` reads it from stdin.", rich_help_panel="Data"),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Read the prompt from a UTF-8 file.", rich_help_panel="Data")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Talk; on a terminal also without it if there is no prompt.", rich_help_panel="Data"
        ),
    ] = False,
    system: Annotated[
        str | None,
        typer.Option(
            "--system",
            metavar="TEXT|@FILE",
            help="What the model is told first; needs a chat template.",
            rich_help_panel="Data",
        ),
    ] = None,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Continue the text as it stands, without chat template.", rich_help_panel="Data"),
    ] = False,
    read: Annotated[
        list[Path] | None,
        typer.Option(
            "--read", metavar="FILE", help="Read this text first, of any size; may be repeated.", rich_help_panel="Data"
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--input",
            metavar="IN.jsonl",
            help="Answer a file of prompts: lines with prompt or messages.",
            rich_help_panel="Data",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="OUT.jsonl", help="Where the answers to --input go.", rich_help_panel="Data"),
    ] = None,
    go_on: Annotated[
        bool,
        typer.Option("--continue", help="Leave out what --output has answered already.", rich_help_panel="Data"),
    ] = False,
    state: Annotated[
        Path | None,
        typer.Option("--state", metavar="FILE", help="Go on with a saved session.", rich_help_panel="Session"),
    ] = None,
    save_state: Annotated[
        Path | None,
        typer.Option(
            "--save-state", metavar="FILE", help="Save the session, such as book.mega.", rich_help_panel="Session"
        ),
    ] = None,
    kv: Annotated[
        bool,
        typer.Option(
            "--kv", help="Save keys and values too: it goes on bit for bit, at once.", rich_help_panel="Session"
        ),
    ] = False,
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild", help="Read the transcript of --state again, with another model.", rich_help_panel="Session"
        ),
    ] = False,
    norm_stats: Annotated[
        Literal["cumulative", "window"] | None,
        typer.Option(
            "--norm-stats",
            help="Norm statistics over all that was read, or over the last chunks; cumulative, or as the session.",
            rich_help_panel="Session",
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", help="Answers to write, each with its own seed.", rich_help_panel="Run")
    ] = 1,
    gpus: training_options.ReadingGpus = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Lines of --input to answer together.", rich_help_panel="Run")
    ] = 16,
    max_new_tokens: Annotated[
        int,
        typer.Option("--max-new-tokens", "--max-tokens", "-n", help="Tokens to write at most.", rich_help_panel="Run"),
    ] = 256,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", help="Text that ends the answer; may be repeated.", rich_help_panel="Run"),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option("--temperature", "--temp", help="0 takes the most likely token.", rich_help_panel="Run"),
    ] = 0.8,
    top_k: Annotated[
        int, typer.Option("--top-k", help="Only the k most likely tokens; 0 = all.", rich_help_panel="Run")
    ] = 50,
    top_p: Annotated[
        float,
        typer.Option("--top-p", help="Only the likeliest tokens of this total probability.", rich_help_panel="Run"),
    ] = 0.95,
    min_p: Annotated[
        float,
        typer.Option("--min-p", help="Only tokens with this share of the highest probability.", rich_help_panel="Run"),
    ] = 0.0,
    repetition_penalty: Annotated[
        float,
        typer.Option("--repetition-penalty", help="Above 1 makes tokens of the context rarer.", rich_help_panel="Run"),
    ] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option("--seed", help="Same seed, same text; drawn and printed if left out.", rich_help_panel="Run"),
    ] = None,
) -> None:
    """Continue a text with a trained model, on the CPU, in constant memory at any length.

    The text goes to stdout as it is written, speed and seed to stderr.
    It ends at the model's end of text, at a --stop text, or after -n tokens.
    Without -p, -f, --read, --state and --input a pipe is read, and on a terminal a conversation begins.
    What was read and written can be kept in a small file and continued: --save-state, --state.

    Examples:

        megalodon generate quickstart -p 'def main():' -n 100 --temperature 0

        megalodon generate quickstart --read book.txt --save-state book.mega

        megalodon generate quickstart --state book.mega -p 'The end of it:'

        megalodon generate quickstart --input prompts.jsonl --output answers.jsonl

        echo 'It was a' | megalodon generate --seed 1 --json
    """
    import secrets

    from megalodon.inference.sampling import SamplingConfig
    from megalodon_cli.chat_screen import Chat, Interrupts, history_file

    files = generation.SessionFiles(state, save_state, kv, rebuild)
    seed = secrets.randbelow(2**31) if seed is None else seed
    sampling = SamplingConfig(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    for name, number in (("max_new_tokens", max_new_tokens), ("samples", samples), ("batch_size", batch_size)):
        if number < 1:
            raise InputError(f"{name} is {number}; expected at least 1")
    if stop and "" in stop:
        raise InputError("a stop string is empty; expected at least 1 character")
    system = read_system(system)
    if source is not None or output is not None or go_on:
        given = {"-p": prompt, "-f": file, "--read": read, "--state": state, "--save-state": save_state}
        _check_batch(source, output, [name for name, value in given.items() if value is not None], samples)
    files.check()
    chat = chat or (not (prompt is not None or file or read or state or source) and sys.stdin.isatty())
    if chat and (prompt is not None or file or source or console.wants_json()):
        raise InputError("--chat is given with -p, -f, --input or --json; expected --chat alone")
    if samples > 1 and (save_state or chat):
        raise InputError(f"--samples {samples}: several answers are neither saved nor talked to; expected --samples 1")

    if source is not None and gpus is not None:
        raise InputError(
            "--input and --gpus are given; short prompts are not cut, start a command for each part of the file"
        )
    launch.start_if_asked(gpus, "cpu")
    if joining.is_helper():
        return reading.help_with([checkpoints.model_directory(checkpoint)], "cpu")
    from megalodon.inference.batch_files import Defaults
    from megalodon.inference.session import Answering, GivenUp, load_writer
    from megalodon.inference.text_file import open_text

    if source is not None and output is not None:
        writer = load_writer(checkpoints.model_directory(checkpoint))
        stops, policy = tuple(stop or ()), norm_stats or "cumulative"
        defaults = Defaults(max_new_tokens, sampling, stops, system, raw, policy)
        generation.answer_file(writer, source, output, defaults, batch_size=batch_size, go_on=go_on)
        return
    text = read_prompt(prompt, file, needed=not (read or state or chat))
    texts = [open_text(path) for path in read or ()]
    directory = checkpoints.model_directory(checkpoint)
    writer = load_writer(directory)
    together = context.with_resource(reading.shared([writer.model], "cpu"))
    talk = generation.open_conversation(writer, files, norm_stats, system, raw=raw, piece=together)
    for each in texts:
        console.info(generation.read_text(talk, each))
    how, written, interrupts = Answering(sampling, max_new_tokens, tuple(stop or ())), None, Interrupts()
    if chat:
        screen = Chat(talk, how, generation.chat_files(raw), history_file())
        screen.run()
        if save_state:
            console.info(generation.save(screen.talk, save_state, kv=kv))
        return
    if samples > 1:
        written = generation.write_samples(talk, text, how, samples)
    elif text is not None or not save_state:
        # With a session to save a first Ctrl-C ends the answer alone; what was read is worth more than a moment.
        with interrupts.watched() if save_state else contextlib.nullcontext(), contextlib.suppress(GivenUp):
            shown, given_up = generation.Shown(), interrupts.given_up
            for piece in talk.go_on(how, given_up) if text is None else talk.ask(text, how, given_up):
                shown.show(piece)
            written = shown.written(talk)
    generation.report(talk, directory, how, written)
    if save_state and (talk.session.position or not interrupts.asked):
        console.info(generation.save(talk, save_state, kv=kv))
    if interrupts.asked:
        raise KeyboardInterrupt


def _check_batch(source: Path | None, output: Path | None, others: list[str], samples: int) -> None:
    """Raises: InputError for options that do not go with --input."""
    if source is None or output is None:
        raise InputError(
            f"{'--output and --continue go' if source is None else '--input goes'} with "
            f"{'--input IN.jsonl' if source is None else '--output OUT.jsonl'}; expected both --input and --output"
        )
    if others:
        raise InputError(f"--input and {others[0]} are given; a file of prompts goes alone")
    if samples > 1:
        raise InputError(f"--input and --samples {samples} are given; repeat a line for several answers to it")
