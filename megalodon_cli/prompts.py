"""What `megalodon generate` is to read, as text: -p, -f, stdin, a pipe, --system. Not here: large files (--read)."""

import sys
from pathlib import Path

from megalodon.errors import InputError


def read_prompt(prompt: str | None, file: Path | None, *, needed: bool) -> str | None:
    """Return the prompt from -p, -f or stdin, byte for byte; None if there is none and none is needed.

    Raises: InputError.
    """
    if prompt is not None and file is not None:
        raise InputError("both -p and -f are given; expected one prompt")
    if file is None and prompt is None and not needed:
        return None
    if prompt is not None and prompt != "-":
        return _typed("-p", prompt)
    if file is not None:
        return _decoded(str(file), read_bytes(file, "the prompt"), "the prompt")
    return _decoded("stdin", sys.stdin.buffer.read(), "the prompt")


def read_system(given: str | None) -> str | None:
    """Return the text of --system: itself, or the content of FILE after an @. Raises: InputError."""
    if given is None or not given.startswith("@"):
        return None if given is None else _typed("--system", given)
    path = Path(given[1:])
    return _decoded(str(path), read_bytes(path, "the system text"), "the system text")


def read_bytes(file: Path, what: str) -> bytes:
    """Return the content of a file. Raises: InputError that says what it was to hold."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: {(error.strerror or str(error)).lower()}; expected a file with {what}") from None


def _typed(option: str, text: str) -> str:
    """A text of the command line, whose bytes came as halves of pairs where the locale could not read them."""
    if not any("\udc80" <= character <= "\udcff" for character in text):
        return text
    return _decoded(option, text.encode("utf-8", "surrogateescape"), "the text")


def _decoded(source: str, content: bytes, what: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise InputError(
            f"{source}: byte {error.start:,} is 0x{byte:02x}, which is not UTF-8; convert {what} to UTF-8"
        ) from None
