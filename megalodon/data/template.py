"""A chat template at work: Jinja in a sandbox, and for templates that are not ours in a process with limits.

    text = Renderer(source, "mine").render({"messages": [...], "add_generation_prompt": True})

Templates are foreign code that comes with a model. The sandbox keeps them from attributes and calls; a process of its
own keeps a loop, a recursion or a string of gigabytes from harming this one. That process is this file, run as a
program: it may import jinja2 and the standard library alone. Not here: what becomes of the text (chat.py).
"""

import contextlib
import datetime
import json
import select
import subprocess
import sys
import weakref
from collections.abc import Mapping
from typing import IO, Any

GENERATION_BEGIN, GENERATION_END = "\ufdd2", "\ufdd3"
"""Stand around what `{% generation %}` encloses; noncharacters, which the caller escapes in what people wrote."""
MAX_SOURCE = 1 << 16
"""Characters of a template."""
SECONDS = 5.0
"""Time that a template may take for one conversation."""
_MEMORY = 1 << 30
_LEAST_TEXT = 1 << 20
_GROWTH = 64
"""The text may be so many times as long as what was given, and a megabyte in any case."""


class TemplateError(Exception):
    """A template does not parse, raises, or exceeds a limit; the message is one line without the template's name."""


def environment() -> Any:
    """The sandbox: what transformers offers its templates, so that those written for it run here."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %} … {% endgeneration %}`: what the model is to write."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 reads a plain set)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (
                nodes.Output([nodes.TemplateData(mark)]).set_lineno(line) for mark in (GENERATION_BEGIN, GENERATION_END)
            )
            return [begin, *body, end]

    def fail(message: str) -> str:
        raise jinja2.TemplateError(message)

    # As in transformers, which ends of lines templates are written for.
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    made.globals["raise_exception"] = fail
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made


class Compiled:
    """A template ready to run, in this process.

    Raises: TemplateError if it does not parse.
    """

    def __init__(self, source: str) -> None:
        import jinja2

        try:
            self._template = environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"line {error.lineno}: {_line(error)}") from None

    def render(self, values: Mapping[str, Any]) -> str:
        """The text. Raises: TemplateError."""
        most = max(_LEAST_TEXT, _GROWTH * len(json.dumps(values)))
        pieces, size = [], 0
        try:
            for piece in self._template.generate(**values):
                pieces.append(piece)
                size += len(piece)
                if size > most:
                    raise TemplateError(f"wrote more than {most:,} characters for one conversation")
        except TemplateError:
            raise
        except MemoryError:
            raise TemplateError(f"needs more than {_MEMORY >> 20:,} MiB of memory") from None
        except Exception as error:  # whatever foreign code raises
            raise TemplateError(_line(error)) from None
        return "".join(pieces)


def _line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


class Renderer:
    """A template that renders in this process if it is trusted, else in one of its own with limits.

    Args:
        source: of the template.
        trusted: whether it is one of ours.
    """

    def __init__(self, source: str, *, trusted: bool) -> None:
        self._source = source
        self._here = Compiled(source) if trusted else None
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, values: Mapping[str, Any]) -> str:
        """The text of a conversation. Raises: TemplateError."""
        if self._here is not None:
            return self._here.render(values)
        answer = self._ask(json.dumps(values).encode())
        if "error" in answer:
            raise TemplateError(str(answer["error"]))
        return str(answer["text"])

    def _ask(self, question: bytes) -> dict[str, Any]:
        process = self._process or self._start()
        assert process.stdin and process.stdout
        try:
            process.stdin.write(b"%d\n" % len(question) + question)
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], SECONDS)
            line = process.stdout.readline() if ready else None
        except BrokenPipeError:
            line = b""
        except BaseException:  # Ctrl-C between question and answer: the next question must not get this answer
            self._stop()
            raise
        if not line:
            self._stop()
            said = f"took longer than {SECONDS:g} s for one conversation" if line is None else "ended its process"
            raise TemplateError(f"{said}; expected a template that ends, in bounded memory")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: the folder of this file, whose modules have names of their own, is not put on the path.
        program = [sys.executable, "-P", __file__]
        pipe = subprocess.PIPE
        # In a session of its own a Ctrl-C of the terminal does not reach it.
        self._process = subprocess.Popen(
            program, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True
        )
        weakref.finalize(self, _end, self._process)
        self._ask(json.dumps(self._source).encode())  # how long Python takes to start is not the template's fault
        return self._process

    def _stop(self) -> None:
        if self._process is not None:
            _end(self._process)
            self._process = None


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def _serve(questions: IO[bytes], answers: IO[bytes]) -> None:
    """Read the template, then values, each with its length; answer each with a line of JSON."""
    compiled, fault = None, None
    while size := questions.readline():
        given = json.loads(questions.read(int(size)))
        answer: dict[str, Any] = {}
        try:
            if compiled is None and fault is None:
                compiled = Compiled(given)
            elif compiled is not None:
                answer["text"] = compiled.render(given)
        except TemplateError as error:
            answer["error"] = fault = str(error)
        if compiled is None:
            answer = {"error": fault}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _limit() -> None:
    """Bound the memory of this process, where the system can."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))


if __name__ == "__main__":
    import jinja2.ext
    import jinja2.sandbox  # noqa: F401  (before memory is short)

    _limit()
    _serve(sys.stdin.buffer, sys.stdout.buffer)
