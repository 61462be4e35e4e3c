"""Pure ASGI middleware: who is asking, how much they may ask for, and what every response carries."""

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable
from functools import lru_cache

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.bodies import SHORT_BODY, Room
from service.api.errors import APIError, api_error
from service.api.gate import BODY_SECONDS
from service.api.limits import KeyLimits, LimitError
from service.engine.metrics import Metrics
from service.engine.request import shown
from service.engine.workers import current_client
from service.settings import Settings, address, is_loopback, read_key

LIVENESS = "/health/live"
HEALTH = ("/health", LIVENESS, "/health/ready", "/ping")
# Headers that a script of another origin may read.
EXPOSED_HEADERS = (
    "x-request-id",
    "openai-processing-ms",
    "openai-version",
    "retry-after",
    *(f"x-ratelimit-{what}-{unit}" for unit in ("requests", "tokens") for what in ("limit", "remaining", "reset")),
)
# The Host header: a name or an address, and perhaps a port.
HOST = re.compile(r"(?:\[(?P<ipv6>[\da-f:.]+)\]|(?P<name>[^\s:/?#@\[\]]+))(?::(?P<port>\d+))?", re.IGNORECASE)
# By which containers reach what listens on their host's loopback. No site can have them: .internal is nobody's.
CONTAINER_HOSTS = ("host.docker.internal", "gateway.docker.internal", "host.containers.internal")
SANE_ID = re.compile(r"[!-~]{1,128}")
SLOWEST = 2**15  # bytes a second at which a large body may come, after the first BODY_SECONDS
RETRY_SECONDS = "5"  # after which there may be room for a large body: one is worked on for about as long
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


class RefuseSites(HTTPMiddleware):
    """Refuses what the page of another site may have sent from a browser, to a server that asks for no key.

    Such a page can post a form anywhere, and the browser tells its origin. It can also have its own name resolve to
    127.0.0.1 (DNS rebinding). Then its origin looks like the server's, but the Host header has a name that is not.
    """

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...], origins: tuple[str, ...]):
        """`hosts` are names of the server besides loopback's, `origins` those whose pages may use it; * allows any."""
        super().__init__(app)
        self._hosts = frozenset(host.lower() for host in hosts)
        self._origins = frozenset(origins)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        hosts, origins = [], []
        for name, value in scope["headers"]:
            if name == b"host" and value:  # a browser always says one
                hosts.append(value.decode("latin-1"))
            elif name == b"origin":
                origins.append(value.decode("latin-1"))
        here = (scope.get("server") or ("",))[0]
        for host in hosts:
            if not self._is_own(host, here):
                message = f"'{shown(host)}' is no name of this server: if it should be, add it to BANDED_ALLOWED_HOSTS"
                await APIError(403, message, code="unknown_host").response(scope, receive, send)
                return
        for origin in origins:
            if not self._allows(origin, hosts):
                message = f"pages of '{shown(origin)}' may not use this server: if they should, see BANDED_CORS_ORIGINS"
                await APIError(403, message, code="unknown_origin").response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_own(self, host: str, here: str) -> bool:
        """Whether a Host header names this server. `here` is the address that it was reached at, which probes may name."""
        name, _ = split_host(host)
        is_known = "*" in self._hosts or name in self._hosts or (name == here != "")
        return is_known or is_this_machine(name) or is_local(name)

    def _allows(self, origin: str, hosts: list[str]) -> bool:
        if "*" in self._origins or origin in self._origins:
            return True
        site = origin.partition("://")[2]
        name, port = split_host(site)
        if name in self._hosts or site in [host.lower() for host in hosts]:
            return True
        # localhost:8000 and 127.0.0.1:8000 are the same server, and localhost:3000 is another.
        return is_this_machine(name) and any(
            is_this_machine(other) and other_port == port for other, other_port in map(split_host, hosts)
        )


@lru_cache(maxsize=64)
def split_host(host: str) -> tuple[str, str]:
    """The name or address in a Host header, in lower case, and the port; empty where there is none."""
    found = HOST.fullmatch(host.strip())
    if not found:
        return "", ""
    return (found["ipv6"] or found["name"]).lower().removesuffix("."), found["port"] or ""


@lru_cache(maxsize=64)
def is_this_machine(name: str) -> bool:
    """Whether a name leads to this machine wherever it is looked up, so that no site can have it."""
    found = address(name)
    return is_loopback(name) or name in CONTAINER_HOSTS or (found is not None and found.is_unspecified)


def is_local(name: str) -> bool:
    """Whether a name has no dot. Proxies and containers have such names, and no site of the internet has."""
    return name != "" and "." not in name and address(name) is None


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


class AnswerLiveness(HTTPMiddleware):
    """Answers GET /health/live. FastAPI would take ten times as long to find and call its route, and anybody may ask."""

    route = Route(LIVENESS, JSONResponse({"status": "live"}))

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if route_path(scope) == LIVENESS and scope["method"] == "GET":
            scope["route"] = self.route
            await self.route.app(scope, receive, send)
        else:
            await self._app(scope, receive, send)


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
    """Charges every POST to its key. Each response to a key says what the key has left.

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

        if scope["method"] == "POST":
            try:
                limits.charge(1, "requests")
            except LimitError as error:
                await api_error(error).response(scope, receive, telling)
                return
        await self._app(scope, receive, telling)


class CheckBody(HTTPMiddleware):
    """Answers a compressed body with a 415, and one that is longer than its route takes with a 413.

    A large body that finds no room is a 503, and one that takes room and comes too slowly a 408.

    A declared length is checked before anything is read, any other once that many bytes have come. The server then
    discards the rest, so that a client that reads only after sending everything still gets the answer.
    """

    def __init__(self, app: ASGIApp, max_bytes_of: Callable[[str], int], room: Room):
        """`max_bytes_of(path)` is how long the body of a request for a path may be. A large one without `room` is a 503."""
        super().__init__(app)
        self._max_bytes_of = max_bytes_of
        self._room = room

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, max_bytes = Headers(scope=scope), self._max_bytes_of(route_path(scope))
        coding = headers.get("content-encoding", "identity")
        if coding.lower() != "identity":
            message = f"'content-encoding': is '{shown(coding)}', but this server reads bodies that are not compressed only"
            await APIError(415, message, headers={"accept-encoding": "identity"}).response(scope, receive, send)
            return
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > max_bytes:
            message = f"the body is {declared} bytes, this server's limit is {max_bytes}"
            # A client that waits for "100 Continue" may never send the body; its next request would be read as the body.
            close = {"connection": "close"} if "expect" in headers else None
            await APIError(413, message, code="body_too_large", headers=close).response(scope, receive, send)
            return
        length, received, taken, has_more = int(declared) if declared.isdecimal() else 0, 0, 0, True
        owner, key = (scope["state"].get(name) for name in ("owner", "key"))
        client = owner or key or (scope.get("client") or ("",))[0]  # the keys of a name share, as they do slots
        current_client.set(client)
        started = asyncio.get_running_loop().time()

        def take(size: int) -> None:
            nonlocal taken
            if size > max(taken, SHORT_BODY):
                if not self._room.take(client, size - taken):
                    detail = f"there is no room for a body of {size} bytes next to those that the server works on: try again"
                    close = {"connection": "close"} if "expect" in headers else {}
                    raise HTTPException(503, detail, {"retry-after": RETRY_SECONDS} | close)
                taken = size

        async def counting() -> Message:
            nonlocal received, has_more
            take(length)
            # What holds room must come. Afterwards the application waits for the client to leave, as long as it likes.
            deadline = started + BODY_SECONDS + taken / SLOWEST if taken and has_more else None
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(408, f"the body came more slowly than {SLOWEST} bytes a second") from error
            received, has_more = received + len(message.get("body", b"")), message.get("more_body", False)
            if received > max_bytes:
                # FastAPI's body parser re-raises HTTPException and swallows everything else; see errors.install.
                raise HTTPException(413, f"the body is longer than this server's limit of {max_bytes} bytes")
            take(received)
            return message

        try:
            await self._app(scope, counting, send)
        finally:
            self._room.give_back(client, taken)


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


def refuse_sites(settings: Settings) -> list[Middleware]:
    """The middleware against pages of other sites, where no key is asked for or the server's names are set."""
    if settings.allowed_hosts or (is_loopback(settings.host) and not settings.api_keys):
        return [Middleware(RefuseSites, hosts=settings.allowed_hosts, origins=settings.cors_origins)]
    return []


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
