"""Pure ASGI middleware: who asks, how much they may ask for, and what every response carries."""

import hashlib
import hmac
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import APIError, api_error
from service.api.limits import LimitError, RateLimits
from service.engine.metrics import Metrics

HEALTH = ("/health/live", "/health/ready")
SANE_ID = re.compile(r"[!-~]{1,128}")
# OpenAI's version of its API that the routes follow.
API_VERSION = "2020-10-01"


class IdentifyRequests:
    """Names every request and says in every response which it answers, and how long the client waited for its start.

    The id is the client's if it sent one that is printable and short; routes find it in request.state.request_id.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if SANE_ID.fullmatch(given) else f"req_{secrets.token_hex(16)}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def identifying(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["openai-processing-ms"] = str(round((time.monotonic() - started) * 1000))
                headers["openai-version"] = API_VERSION
            await send(message)

        await self._app(scope, receive, identifying)


class AnswerHead:
    """Answers HEAD as GET is answered, without the body."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        # A copy, because the server looks into its own to see that no body will come.
        await self._app({**scope, "method": "GET"}, receive, without_body)


class CountResponses:
    """Counts responses by route and status, errors and unknown routes included."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                # The route's pattern, never the client's path: paths are unbounded.
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.http_response(route, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counting)


class RequireKey:
    """Lets a request pass whose bearer token is one of `keys`; `open_paths` need none.

    Keys are kept as hashes and all of them compared in constant time. The hash that matched is in scope["state"]["key"].
    """

    def __init__(self, app: ASGIApp, keys: tuple[str, ...], open_paths: tuple[str, ...]):
        self._app = app
        self._digests = [digest(key) for key in keys]
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._open_paths:
            key = self._key(scope)
            if key is None:
                error = APIError(
                    401,
                    "missing or wrong API key in the Authorization header",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
                await answer(error)(scope, receive, send)
                return
            scope["state"]["key"] = key
        await self._app(scope, receive, send)

    def _key(self, scope: Scope) -> bytes | None:
        kind, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        given = digest(token.strip())
        matches = [hmac.compare_digest(given, known) for known in self._digests]
        return given if kind.lower() == "bearer" and any(matches) else None


class LimitRates:
    """Charges a POST below /v1/ to its key, and says in every response to a key what that may still ask for.

    Tokens are charged by the routes, which alone know them: they find the key's KeyLimits in request.state.limits, or None.
    """

    def __init__(self, app: ASGIApp, limits: RateLimits):
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        key = scope["state"].get("key")
        limits = scope["state"]["limits"] = self._limits.of(key) if key else None
        if limits is None:
            await self._app(scope, receive, send)
            return

        async def telling(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(limits.headers())
            await send(message)

        if scope["method"] == "POST" and scope["path"].startswith("/v1/"):
            try:
                limits.charge_request()
            except LimitError as error:
                await answer(api_error(error))(scope, receive, telling)
                return
        await self._app(scope, receive, telling)


class LimitBody:
    """Answers a body of more than `max_bytes` with a 413: before it is read where its length is declared, otherwise when
    so much has come. The server then reads past the rest, so that a client that sends first and listens later gets it."""

    def __init__(self, app: ASGIApp, max_bytes: int):
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            message = f"the body is {declared} bytes, this server's limit is {self._max_bytes}"
            # Who waits for "100 Continue" may never send the body: the next request would be taken for it.
            close = {"connection": "close"} if "expect" in headers else None
            await answer(APIError(413, message, code="body_too_large", headers=close))(scope, receive, send)
            return
        received = 0

        async def counting() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                # The one kind of exception that comes through whoever parses the body; see errors.install.
                raise HTTPException(413, f"the body is longer than this server's limit of {self._max_bytes} bytes")
            return message

        await self._app(scope, counting, send)


class AnswerFaults:
    """Answers an exception that has no handler with a 500.

    Starlette's own place for that is outside all middleware, where the response would not be counted, and it raises the
    exception once more for the server to log again.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception as error:
            if started:
                raise
            await answer(api_error(error))(scope, receive, send)


def answer(error: APIError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
