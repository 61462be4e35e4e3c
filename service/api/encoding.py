"""JSON as it goes out, on a single line for every reader."""

from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from service.engine.workers import Slices

# Line breaks of Unicode that JSON leaves as they are. Older SDKs and line readers cut a stream's lines there.
LINE_BREAKS = {char.encode(): f"\\u{ord(char):04x}".encode() for char in "\x85\u2028\u2029"}
PIECE = 2**16  # bytes of a large answer that are written at a time


def on_one_line(json: bytes) -> bytes:
    """`json`, with its line breaks escaped. They can only be inside strings."""
    for char, escape in LINE_BREAKS.items():
        json = json.replace(char, escape)
    return json


def in_pieces(answer: BaseModel, **contents: Iterable[bytes]) -> list[bytes]:
    """The JSON of `answer`, on one line, with the contents of fields that are empty lists or strings in it.

    They are joined as they are: what an array holds comes with its commas.
    """
    pieces, rest = [], on_one_line(answer.model_dump_json().encode())
    for name, content in contents.items():
        empty = b'"%b":""' if getattr(answer, name) == "" else b'"%b":[]'
        before, found, rest = rest.partition(empty % name.encode())  # in a string its quotes would have backslashes
        assert found, f"no empty {name} in the answer"
        pieces += [before + found[:-1], *map(on_one_line, content)]
        rest = found[-1:] + rest
    return [*pieces, rest]


class PiecesResponse(Response):
    """JSON that goes out piece by piece, as fast as the client reads."""

    media_type = "application/json"

    def __init__(self, pieces: Sequence[bytes]):
        self._size = sum(map(len, pieces))
        super().__init__(headers={"content-length": str(self._size)})
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if self._size <= PIECE:  # most answers
            await send({"type": "http.response.body", "body": b"".join(self._pieces)})
            return
        slices = Slices()
        for piece in self._pieces:
            for start in range(0, len(piece), PIECE):
                await send({"type": "http.response.body", "body": piece[start : start + PIECE], "more_body": True})
                await slices.rest()
        await send({"type": "http.response.body", "body": b""})


class LineResponse(JSONResponse):
    """A response on one line."""

    def render(self, content: Any) -> bytes:
        return on_one_line(super().render(content))
