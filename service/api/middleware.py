"""Pure ASGI middleware: who is asking, how much they may ask for, and what every response carries."""

import hashlib
import hmac
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import APIError, api_error
from service.api.limits import KeyLimits, LimitError
from service.engine.metrics import Metrics
from service.engine.request import shown
from service.settings import Settings, read_key

HEALTH = ("/health", "/health/live", "/health/ready", "/ping")
# Headers that a script of another origin may read.
EXPOSED_HEADERS = (
    "x-request-id",
    "openai-processing-ms",
    "openai-version",
    "retry-after",
    *(f"x-ratelimit-{what}-{unit}" for unit in ("requests", "tokens") for what in ("limit", "remaining", "reset")),
)
SANE_ID = re.compile(r"[!-~]{1,128}")
# OpenAI's version of its API that the routes follow.
API_VERSION = "2020-10-01"


class HTTPMiddleware:
    """Hands HTTP requests to `handle`; any other connection goes straight to the application."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self.handle if scope["type"] == "http" else self._app)(scope, receive, send)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError


class IdentifyRequests(HTTPMiddleware):
    """Gives every request an id, and every response that id and the time until it began.

    A client's own id is kept if it is printable and short. Routes find the id in request.state.request_id.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
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


class FindPath(HTTPMiddleware):
    """Finds routes below `root_path`, which a proxy may have removed or not, and ignores slashes at the end of a path."""

    def __init__(self, app: ASGIApp, root_path: str):
        super().__init__(app)
        self._root_path = root_path

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path.startswith(self._root_path + "/"):
            path = path.removeprefix(self._root_path)
        path = "/" + path.strip("/")
        await self._app({**scope, "root_path": self._root_path, "path": self._root_path + path}, receive, send)


def route_path(scope: Scope) -> str:
    """The path of a request below the server's root path."""
    return str(scope["path"]).removeprefix(scope["root_path"])


class AnswerHead(HTTPMiddleware):
    """Answers HEAD like GET, without the body."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        # The server looks into its own scope to see that no body will come, so the application gets a copy.
        await self._app({**scope, "method": "GET"}, receive, without_body)


class CountResponses(HTTPMiddleware):
    """Counts responses by route and status, errors and unknown routes included."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        super().__init__(app)
        self._metrics = metrics

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                # The route's pattern, never the client's path: paths are unbounded.
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.http_responses(route, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counting)


class RequireKey(HTTPMiddleware):
    """Refuses a request without one of `keys` as its bearer token, except to `open_paths`.

    Keys are stored as hashes, and every one is compared in constant time. The hash that matched is in
    scope["state"]["key"], and whose key it is in scope["state"]["owner"].
    """

    def __init__(self, app: ASGIApp, keys: tuple[str, ...], open_paths: tuple[str, ...]):
        super().__init__(app)
        self._owners = {digest(secret): owner for owner, secret in map(read_key, keys)}
        self._with_names = [digest(key) for key in keys if ":" in key]
        self._open_paths = open_paths

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if route_path(scope) not in self._open_paths:
            kind, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
            key = digest(token.strip())
            matches = [hmac.compare_digest(key, known) for known in self._owners]
            if kind.lower() != "bearer" or not any(matches):
                message, headers = "missing or wrong API key in the Authorization header", {"www-authenticate": "Bearer"}
                if any(hmac.compare_digest(key, known) for known in self._with_names):  # a key until keys had names
                    message = "the API key in the Authorization header has a name: send only what comes after the colon"
                await APIError(401, message, code="invalid_api_key", headers=headers).response(scope, receive, send)
                return
            scope["state"] |= {"key": key, "owner": self._owners[key]}
        await self._app(scope, receive, send)


class LimitRates(HTTPMiddleware):
    """Charges every POST below /v1/ to its key. Each response to a key says what the key has left.

    Only routes know the number of tokens, so they charge those to request.state.limits. Without a key it allows everything.
    """

    def __init__(self, app: ASGIApp, keys: tuple[str, ...], limit_requests: int, limit_tokens: int):
        super().__init__(app)
        self._limits = {digest(read_key(key)[1]): KeyLimits(limit_requests, limit_tokens) for key in keys}
        self._unlimited = KeyLimits(0, 0)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        limits = scope["state"]["limits"] = self._limits.get(scope["state"].get("key"), self._unlimited)

        async def telling(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(limits.headers())
            await send(message)

        if scope["method"] == "POST" and route_path(scope).startswith("/v1/"):
            try:
                limits.charge(1, "requests")
            except LimitError as error:
                await api_error(error).response(scope, receive, telling)
                return
        await self._app(scope, receive, telling)


class CheckBody(HTTPMiddleware):
    """Answers a compressed body with a 415 and one of more than `max_bytes` with a 413.

    A declared length is checked before anything is read, any other once that many bytes have come. The server then
    discards the rest, so that a client that reads only after sending everything still gets the answer.
    """

    def __init__(self, app: ASGIApp, max_bytes: int):
        super().__init__(app)
        self._max_bytes = max_bytes

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        coding = headers.get("content-encoding", "identity")
        if coding.lower() != "identity":
            message = f"'content-encoding': is '{shown(coding)}', but this server reads bodies that are not compressed only"
            await APIError(415, message, headers={"accept-encoding": "identity"}).response(scope, receive, send)
            return
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            message = f"the body is {declared} bytes, this server's limit is {self._max_bytes}"
            # A client that waits for "100 Continue" may never send the body; its next request would be read as the body.
            close = {"connection": "close"} if "expect" in headers else None
            await APIError(413, message, code="body_too_large", headers=close).response(scope, receive, send)
            return
        received = 0

        async def counting() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                # FastAPI's body parser re-raises HTTPException and swallows everything else; see errors.install.
                raise HTTPException(413, f"the body is longer than this server's limit of {self._max_bytes} bytes")
            return message

        await self._app(scope, counting, send)


class AnswerFaults(HTTPMiddleware):
    """Answers every exception that errors.install leaves: a refused request with its own error, anything else with a 500.

    Starlette would do so outside all middleware: the response would not be counted, and the exception would be raised
    again for the server to log a second time.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
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
            await api_error(error).response(scope, receive, send)


def allow_origins(settings: Settings) -> list[Middleware]:
    """The middleware by which pages of other origins may read the answers, if there are any."""
    if not settings.cors_origins:
        return []
    cors = Middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origins,
        allow_methods=("GET", "HEAD", "POST", "DELETE"),
        allow_headers=("*",),
        expose_headers=EXPOSED_HEADERS,
    )
    return [cors]


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
