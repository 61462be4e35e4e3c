"""Server-sent events, and what happens when the client leaves before the end."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from prometheus_client import Counter
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.errors import api_error

log = logging.getLogger("banded.api")

T = TypeVar("T")

# nginx's status for a client that has left. Nobody receives it, but the response counter shows it.
CLIENT_CLOSED_REQUEST = 499
# For the OpenAPI document: with `stream` the answer is a stream of events.
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
# Proxies close a connection that stays silent, some of them after 30 s.
KEEP_ALIVE_SECONDS = 15.0


class ClientGoneError(Exception):
    """The client closed the connection, so nobody would read an answer."""


def event(body: str) -> bytes:
    """One event that carries a JSON text."""
    return f"data: {body}\n\n".encode()


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. If the client leaves first, `work` is cancelled and ClientGoneError raised.

    The body of the request must have been read: what `receive` gives next is then the disconnection.
    """

    async def disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return await working
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class EventStream(Response):
    """Sends `events` as they come, then [DONE]. After `keep_alive` silent seconds it sends a comment.

    The status goes out with the first event or comment. An exception before that becomes an ordinary error response;
    a later one becomes an error event, which is logged and counted in `errors`. However the stream ends, `events` is
    closed before this returns.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], errors: Counter, *, keep_alive: float = KEEP_ALIVE_SECONDS):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._errors = errors
        self._keep_alive = keep_alive
        self._sent: float | None = None  # when the last event or comment was, on the loop's clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._stream(send))
        except ClientGoneError:
            if self._sent is None:
                await Response(status_code=CLIENT_CLOSED_REQUEST)(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            # One task comments on the whole stream: a task for each event would cost as much as the event itself.
            commenting = asyncio.create_task(self._comment(send))
            try:
                async for body in events:
                    await self._send(send, body)
            except Exception as error:
                if self._sent is None:
                    raise
                self._errors.inc()
                known = api_error(error)
                # The response counter shows a 200, so only this line tells the operator.
                log.warning("a stream failed after its first byte, with what would be a %d: %s", known.status, known)
                await self._send(send, event(json.dumps(known.body)))
            finally:
                commenting.cancel()
                await asyncio.gather(commenting, return_exceptions=True)
            await self._send(send, DONE, more=False)

    async def _comment(self, send: Send) -> None:
        now = asyncio.get_running_loop().time
        silent_since = now()
        while True:
            await asyncio.sleep(silent_since + self._keep_alive - now())
            if self._sent is not None and self._sent > silent_since:
                silent_since = self._sent
            else:
                await self._send(send, KEEP_ALIVE)
                silent_since = now()

    async def _send(self, send: Send, body: bytes, *, more: bool = True) -> None:
        first, self._sent = self._sent is None, asyncio.get_running_loop().time()
        if first:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": body, "more_body": more})
