"""`python render.py SECONDS BYTES`: renders chat templates that come on its standard input, in transformers' environment.

A program of its own, run by templates.py. A template is somebody else's program: it runs in Jinja's sandbox, and may use
SECONDS of a core, after which this process ends, and BYTES of memory. Requests and answers are JSON, each after its length.
"""

import json
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

LENGTH_BYTES = 4


def main(seconds: float, num_bytes: int) -> None:
    for limit, value in ((resource.RLIMIT_DATA, num_bytes), (resource.RLIMIT_FSIZE, 0)):
        resource.setrlimit(limit, (value, value))
    source, target = sys.stdin.buffer, sys.stdout.buffer
    write_message(target, b"{}")  # it has started
    while data := read_message(source):
        signal.setitimer(signal.ITIMER_PROF, seconds)  # nobody handles its signal, which therefore ends this process
        try:
            answer = json.dumps(answer_to(json.loads(data)))
        except MemoryError:
            answer = json.dumps({"error": f"it takes more than {num_bytes >> 20} MB"})
        signal.setitimer(signal.ITIMER_PROF, 0)
        write_message(target, answer.encode())


def read_message(source: BinaryIO) -> bytes:
    """Empty at the end."""
    return source.read(int.from_bytes(source.read(LENGTH_BYTES)))


def write_message(target: BinaryIO, data: bytes) -> None:
    target.write(len(data).to_bytes(LENGTH_BYTES) + data)
    target.flush()


def answer_to(request: dict[str, Any]) -> dict[str, Any]:
    """The `text`, or the `error` and, if the template does not compile, its `line`."""
    try:
        template = compiled(request["template"])
        return {"text": "" if request["variables"] is None else render(template, request["variables"], request["max_chars"])}
    except MemoryError:
        raise
    except Exception as error:  # Jinja's own errors, the limits of Python's compiler, whatever a template raises
        line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else None
        return {"error": str(error)[:1000] or type(error).__name__, "line": line}


def render(template: jinja2.Template, variables: dict[str, Any], max_chars: int | None = None) -> str:
    """Raises TemplateError for more than `max_chars` characters, and whatever the template raises."""
    pieces, room = [], sys.maxsize if max_chars is None else max_chars
    for piece in template.generate(**variables):
        pieces.append(piece)
        room -= len(piece)
        if room < 0:
            raise jinja2.TemplateError(f"it makes a text of more than {max_chars} characters")
    return "".join(pieces)


def raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Like transformers, in this order of arguments. Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


class GenerationBlock(Extension):
    """{% generation %} ... {% endgeneration %} marks what a model learns to write. The text itself stays as it is."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@lru_cache(maxsize=8)
def compiled(template: str) -> jinja2.Template:
    """`template` in the environment that transformers gives published templates."""
    extensions = ["jinja2.ext.loopcontrols", GenerationBlock]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    environment.filters["tojson"] = to_json
    return environment.from_string(template)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
