"""`megalodon generate`: a model continues a text. Not here: how (megalodon/inference)."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megalodon.errors import InputError
from megalodon_cli import checkpoints, console

if TYPE_CHECKING:
    from megalodon.inference.sampling import SamplingConfig
    from megalodon.inference.session import Writer


def generate(
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
    Without -p and -f a pipe is read.

    Examples:

        megalodon generate runs/quickstart -p 'def main():'

        megalodon generate quickstart -f prompt.txt -n 100 --temperature 0

        echo 'It was a' | megalodon generate --seed 1 --json
    """
    import secrets

    from megalodon.inference.sampling import SamplingConfig
    from megalodon.inference.session import load_writer

    seed = secrets.randbelow(2**31) if seed is None else seed
    sampling = SamplingConfig(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    if stop and "" in stop:
        raise InputError("a stop string is empty; expected at least 1 character")
    text = _prompt(prompt, file)
    directory = checkpoints.model_directory(checkpoint)
    _write(load_writer(directory), directory, text, max_new_tokens, sampling, stop or [])


def _prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from -p, -f or stdin, byte for byte. Raises: InputError."""
    if prompt is not None and file is not None:
        raise InputError("both -p and -f are given; expected one prompt")
    if file is None and prompt is None and sys.stdin.isatty():
        raise InputError("no prompt; give -p TEXT, -f FILE or a pipe")
    typed = prompt is not None and prompt != "-"
    if typed and not any("\udc80" <= c <= "\udcff" for c in str(prompt)):
        return str(prompt)
    try:
        if typed:  # bytes that the locale cannot read came as halves of pairs
            content = str(prompt).encode("utf-8", "surrogateescape")
        else:
            content = sys.stdin.buffer.read() if file is None else file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: {(error.strerror or str(error)).lower()}; expected a file with the prompt") from None
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        source, byte = "-p" if typed else "stdin" if file is None else file, content[error.start]
        raise InputError(
            f"{source}: byte {error.start:,} is 0x{byte:02x}, which is not UTF-8; convert the prompt to UTF-8"
        ) from None


def _write(
    writer: "Writer", directory: Path, prompt: str, max_new_tokens: int, sampling: "SamplingConfig", stop: list[str]
) -> None:
    """Stream the continuation, then say what it cost."""
    from megalodon.inference.sampling import allowed_ids
    from megalodon.inference.session import Session, generate, prompt_tokens
    from megalodon.inference.stream import TokenStream

    model, tokenizer, bos, _ = writer
    ids = prompt_tokens(tokenizer, prompt, bos=bos)
    allowed = allowed_ids(tokenizer, model.config.num_outputs)
    session, stream, pieces, moments = Session(model), TokenStream(tokenizer, stop), [], [time.perf_counter()]
    for token in generate(session, ids, max_new_tokens, sampling, [tokenizer.eos_id], allowed):
        moments.append(time.perf_counter())
        pieces.append(stream.push(token))
        console.write(pieces[-1])
        if stream.stopped:
            break
    pieces.append(stream.flush())
    text = "".join(pieces)
    console.write(pieces[-1] if text.endswith("\n") else pieces[-1] + "\n")
    count, first = len(moments) - 1, moments[min(1, len(moments) - 1)] - moments[0]
    speed = (count - 1) / (moments[-1] - moments[1]) if count > 1 else count / max(first, 1e-9)
    size = session.state.num_bytes()
    console.info(
        f"{count:,} tokens, {speed:.1f} tok/s, first token {first:.2f} s, context {session.position:,}, "
        f"state {_size(size)} (constant), seed {sampling.seed}"
    )
    ended = stream.stopped or count < max_new_tokens
    console.document(
        "generate",
        {
            "model": str(directory),
            "text": text,
            "finish_reason": "stop" if ended else "length",
            "prompt_tokens": len(ids),
            "new_tokens": count,
            "truncated_tokens": 0,
            "context": session.position,
            "state_bytes": size,
            "tokens_per_second": round(speed, 2),
            "first_token_seconds": round(first, 4),
            "sampling": vars(sampling),
            "norm_stats": "cumulative",
        },
    )


def _size(count: int) -> str:
    """Bytes as kB, MB or GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
