"""How large a body may be, and how a large one is read: in a worker thread, so that the event loop keeps running."""

import json
import re
from collections import Counter
from collections.abc import Callable, Coroutine, Hashable
from email.message import Message
from itertools import count
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from service.engine.workers import LARGE_AT_ONCE, off_the_loop, rest
from service.settings import Settings

T = TypeVar("T")
V = TypeVar("V")

# Bytes of a body that is read on the event loop, in a few milliseconds at most.
SHORT_BODY = 2**14
# Bytes of a body whose text goes into a single context. The longest tokens fill 2048 positions with 256 KiB.
CONTEXT_BYTES = 2**20
# Routes that take many texts, and texts longer than a context.
TEXT_ROUTES = re.compile(r"/v1/completions|/v1/engines/.*/completions|/v1/score|/tokenize|/detokenize")
FILES_ROUTE = "/v1/files"
# Arrays and objects of a body: each takes up to forty times as much memory as its two characters.
MAX_CONTAINERS = 2**17
CALLS = 64  # from the parser into Python between two rests
PIECE = 2**18  # characters that a single call of the interpreter's C code goes through
# Ids up to here are the same objects in all prompts. Each would take 32 bytes more.
SHARED_INTS = tuple(range(2**16))
IN_STRING = re.compile(r'(?:[^"\\]++|\\.)*+', re.DOTALL)


def max_bytes_of(path: str, settings: Settings) -> int:
    """How long the body of a request for `path` may be."""
    if path == FILES_ROUTE:
        return settings.max_body_bytes
    return min(settings.max_body_bytes, settings.max_text_bytes if TEXT_ROUTES.fullmatch(path) else CONTEXT_BYTES)


class Room:
    """Bytes of large bodies, which are held until they are answered. Belongs to the event loop."""

    def __init__(self, max_body_bytes: int):
        """A client alone may have as many of the largest bodies as are worked on at a time. All have twice that."""
        self._free = 2 * LARGE_AT_ONCE * max_body_bytes
        self._held: Counter[Hashable] = Counter()

    def take(self, client: Hashable, size: int) -> bool:
        """Hold `size` more bytes, unless the client would then have more than it leaves free to others."""
        if self._held[client] + size > self._free - size:
            return False
        self._free -= size
        self._held[client] += size
        return True

    def give_back(self, client: Hashable, size: int) -> None:
        self._free += size
        self._held[client] -= size
        if not self._held[client]:
            del self._held[client]


class BodyRoute(APIRoute):
    """Reads and checks a large JSON body in a worker thread. FastAPI would do both on the event loop."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        read = self.body_field.field_info.annotation if self.body_field else None

        async def handle_read(request: Request) -> Response:
            if read is not None and is_json(request.headers.get("content-type", "")):
                body = await request.body()
                if len(body) > SHORT_BODY:
                    # FastAPI finds the result there instead of reading the body itself.
                    request._json = await off_the_loop(len(body), lambda: parsed(body, read))
            return await handle(request)

        return handle_read


def is_json(content_type: str) -> bool:
    message = Message()
    message["content-type"] = content_type
    kind = message.get_content_type()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def parsed(body: bytes, model: Any) -> Any:
    """`body` as an instance of `model`. Raises what FastAPI raises for a body that is not."""
    try:
        value = load_json(body)
    except json.JSONDecodeError as error:
        fault = {"type": "json_invalid", "loc": ("body", error.pos), "ctx": {"error": error.msg}}
        raise RequestValidationError([fault]) from error
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "unreadable") from error
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise RequestValidationError([{**first, "loc": ("body", *first["loc"])}]) from error


def load_json(body: bytes) -> Any:
    """The value of a JSON text, in steps between which other threads run.

    Raises HTTPException 413 for more arrays and objects than any request needs, and what json.loads raises.
    """
    text = body.decode(json.detect_encoding(body), "surrogatepass")
    # Most texts hold few brackets. Only where there are many, those inside strings are told from the others.
    if text.count("[") + text.count("{") > MAX_CONTAINERS and num_containers(text) > MAX_CONTAINERS:
        raise HTTPException(413, f"the body holds more than {MAX_CONTAINERS} arrays and objects, as no request needs")
    # The parser is written in C and lets nobody run, unless it calls Python.
    return json.loads(
        text, parse_int=resting(whole_number), parse_float=resting(float), object_hook=resting(lambda value: value)
    )


def resting(function: Callable[[T], V]) -> Callable[[T], V]:
    """`function`, which rests now and then if it is called very often."""
    calls = count(1)

    def call(value: T) -> V:
        if next(calls) % CALLS == 0:
            rest()
        return function(value)

    return call


def num_containers(text: str) -> int:
    """How many arrays and objects a JSON text has; brackets inside strings don't count."""
    found = end = 0
    pause: Callable[[int], int] = resting(lambda place: place)
    while (start := text.find('"', pause(end))) >= 0:
        found += text.count("[", end, start) + text.count("{", end, start)
        end = start + 1
        while (
            (inside := IN_STRING.match(text, end, end + PIECE))
            and inside.end() > end
            and text[inside.end() : inside.end() + 1] != '"'
        ):
            end = inside.end()
        end = inside.end() + 1 if inside else end
    return found + text.count("[", end) + text.count("{", end)


def whole_number(digits: str) -> int:
    number = int(digits)
    return SHARED_INTS[number] if 0 <= number < len(SHARED_INTS) else number
