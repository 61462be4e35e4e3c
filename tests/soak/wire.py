"""A client that costs little: HTTP/1.1 over asyncio's streams, for one request after the other on a connection."""

import asyncio
import contextlib
import json
import socket
import struct
from typing import Any, NamedTuple

# Bytes of an answer that are read at once.
BLOCK = 1 << 16


class Request(NamedTuple):
    method: str
    path: str
    body: bytes = b""
    key: str = ""
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def head(self) -> bytes:
        lines = [f"{self.method} {self.path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(self.body)}"]
        lines += [f"Content-Type: {self.content_type}"] * bool(self.body)
        lines += [f"Authorization: Bearer {self.key}"] * bool(self.key)
        lines += [f"{name}: {value}" for name, value in self.headers]
        return "\r\n".join([*lines, "", ""]).encode()


def post(path: str, body: Any, key: str) -> Request:
    return Request("POST", path, json.dumps(body).encode(), key)


class Answer(NamedTuple):
    status: int
    content_type: str
    body: bytes

    @property
    def is_stream(self) -> bool:
        return self.content_type.startswith("text/event-stream")


class BrokenAnswerError(Exception):
    """The server ended the connection inside an answer, or ahead of it."""


class Connection:
    """One connection to the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, port: int, *, receive_bytes: int = 0) -> "Connection":
        """`receive_bytes`: of the socket's buffer, for a client that is to feel slow to the server."""
        channel = socket.socket()
        channel.setblocking(False)
        if receive_bytes:
            channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        try:
            await asyncio.get_running_loop().sock_connect(channel, ("127.0.0.1", port))
        except OSError:
            channel.close()
            raise
        return cls(*await asyncio.open_connection(sock=channel))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def ask(self, request: Request) -> Answer:
        await self.send(request.head + request.body)
        return await self.answer()

    async def answer(self) -> Answer:
        """Read an answer. Raises BrokenAnswerError."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
            lines = head.decode("latin-1").split("\r\n")
            fields = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
            if fields.get("transfer-encoding") == "chunked":
                body = await self._chunks()
            else:
                body = await self.reader.readexactly(int(fields.get("content-length", 0)))
            return Answer(int(lines[0].split(" ", 2)[1]), fields.get("content-type", ""), body)
        except (asyncio.IncompleteReadError, OSError, ValueError, IndexError) as error:
            raise BrokenAnswerError(f"{type(error).__name__}: {error}") from error

    async def _chunks(self) -> bytes:
        parts = []
        while size := int((await self.reader.readuntil(b"\r\n"))[:-2], 16):
            parts.append(await self.reader.readexactly(size))
            await self.reader.readexactly(2)
        await self.reader.readuntil(b"\r\n")
        return b"".join(parts)

    def leave(self, *, resets: bool = False) -> None:
        """Close the connection; with `resets` the server's next write fails at once."""
        if resets and (channel := self.writer.get_extra_info("socket")):
            with contextlib.suppress(OSError):  # the server has closed it meanwhile
                channel.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()
