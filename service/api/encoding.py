"""JSON as it goes out, on a single line for every reader."""

from typing import Any

from starlette.responses import JSONResponse

# Line breaks of Unicode that JSON leaves as they are. Older SDKs and line readers cut a stream's lines there.
LINE_BREAKS = {char.encode(): f"\\u{ord(char):04x}".encode() for char in "\x85\u2028\u2029"}


def on_one_line(json: bytes) -> bytes:
    """`json`, with its line breaks escaped. They can only be inside strings."""
    for char, escape in LINE_BREAKS.items():
        json = json.replace(char, escape)
    return json


class LineResponse(JSONResponse):
    """A response on one line."""

    def render(self, content: Any) -> bytes:
        return on_one_line(super().render(content))
