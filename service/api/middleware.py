"""Pure ASGI middleware: API keys, the count of responses and the answer to what went wrong."""

import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import APIError, api_error
from service.metrics import Metrics

HEALTH = ("/health/live", "/health/ready")


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
            known = api_error(error)
            await JSONResponse(known.body, known.status)(scope, receive, send)


class RequireKey:
    """Lets a request pass whose bearer token is one of `keys`; health routes pass always.

    Keys are kept as hashes and all of them compared in constant time.
    """

    def __init__(self, app: ASGIApp, keys: tuple[str, ...], open_paths: tuple[str, ...] = HEALTH):
        self._app = app
        self._digests = [digest(key) for key in keys]
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._open_paths and not self._allowed(scope):
            error = APIError(401, "missing or wrong API key in the Authorization header", code="invalid_api_key")
            response = JSONResponse(error.body, error.status, {"www-authenticate": "Bearer"})
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        kind, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        given = digest(token.strip())
        matches = [hmac.compare_digest(given, known) for known in self._digests]
        return kind.lower() == "bearer" and any(matches)


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
