"""uvicorn with a start and an end: it listens while the model loads, drains on a signal and exits if the engine fails.

While the model loads, the answer to everything but liveness is a 503.
"""

import asyncio
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.connection import Connection, Reader
from service.api.errors import APIError
from service.api.gate import Gate, affordable
from service.api.middleware import (
    LIVENESS,
    AnswerHead,
    AnswerLiveness,
    FindPath,
    IdentifyRequests,
    allow_origins,
    refuse_sites,
)
from service.engine.engine import Engine
from service.engine.workers import settle
from service.settings import Settings

UNSENT_BYTES = 64 << 10  # of an answer that the kernel takes before the client has room for them
# A turn of the event loop accepts one connection from each descriptor of a listening socket, so there are so many: with one,
# a client waits for as many turns as others have connected ahead of it. A client alone pays for all: 20 us each on a Zen 3.
ACCEPTS_PER_TURN = 4
TICK_SECONDS = 0.1  # between two calls of on_tick, where nothing holds the event loop up
LAG_SECONDS = 30.0  # for which a delay of the event loop is told, at least


class Lag:
    """How long the event loop was held up. Delays shorter than a tick may go unseen."""

    def __init__(self) -> None:
        self._ticked = self._since = time.monotonic()
        self._recent = self._before = 0.0  # longest delay since `_since`, and in as long a time before

    def tick(self) -> None:
        """To be called every TICK_SECONDS."""
        now = time.monotonic()
        self._recent, self._ticked = max(self._recent, now - self._ticked - TICK_SECONDS), now
        if now - self._since > LAG_SECONDS:
            self._since, self._before, self._recent = now, self._recent, 0.0

    def longest(self) -> float:
        """Seconds of the longest delay in the last LAG_SECONDS, or in up to twice as long."""
        return max(self._before, self._recent, time.monotonic() - self._ticked - TICK_SECONDS)


class Server(uvicorn.Server):
    """Serves until SIGTERM, SIGINT or SIGHUP and then finishes the running requests. A second signal ends them at once.

    It also listens while loading and draining: health checks then read 503, and clients get an error, not a closed port.
    """

    def __init__(self, load: Callable[[], FastAPI], settings: Settings):
        """`load` makes the application. It runs in a thread of its own."""
        probes = {LIVENESS, settings.root_path + LIVENESS}
        self._gate = Gate(settings.max_connections, settings.keep_alive, probes)
        self._lag = Lag()
        protocol: Any = self._connection  # uvicorn calls what it takes for a class
        super().__init__(
            uvicorn.Config(
                self,
                host=settings.host,
                port=settings.port,
                http=protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                # Clients that read this, Node's among them, give an idle connection up before the server closes it.
                headers=[("keep-alive", f"timeout={settings.keep_alive}")],
                timeout_graceful_shutdown=5,
            )
        )
        self._app: ASGIApp = loading_app(settings)
        self.engine: Engine | None = None  # None until it is loaded
        self.is_loading = False
        self.load_error: Exception | None = None
        self._load = load
        self._lifespan = AsyncExitStack()
        self._drain_timeout = settings.drain_timeout
        self._tasks: list[asyncio.Task[None]] = []
        self._signals = 0

    def _connection(self, **options: Any) -> Reader:
        return Reader(Connection(self._gate, **options))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request to the application, or answer it while there is none."""
        await self._app(scope, receive, send)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._gate.limit = affordable(self._gate.limit)
        logging.getLogger("uvicorn.access").addFilter(without_query)
        await super().startup(sockets)
        loop, state = asyncio.get_running_loop(), {"server_state": self.server_state, "app_state": self.lifespan.state}
        accept = partial(self._connection, config=self.config, **state)
        for listener in [listener for server in self.servers for listener in server.sockets]:
            # Connections inherit it. The kernel would take megabytes of answers that nobody reads, and ask for more.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
            for _ in range(ACCEPTS_PER_TURN - 1):
                same = socket.socket(fileno=os.dup(listener.fileno()))
                self.servers.append(await loop.create_server(accept, sock=same, backlog=self.config.backlog))

    async def on_tick(self, counter: int) -> bool:
        self._lag.tick()
        self._gate.sweep()
        return await super().on_tick(counter)

    async def main_loop(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._tasks.append(asyncio.create_task(self._run_app()))
        await super().main_loop()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        await self._lifespan.aclose()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's, and SIGHUP: a terminal that closes must not cost the running requests their end."""
        with super().capture_signals(), handling_hangup(self.handle_exit):
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._signals += 1
        if self.engine is None or self._signals > 2:
            self.should_exit = self.force_exit = True
            return
        seconds = self._drain_timeout if self._signals == 1 else 0.0
        self._loop.call_soon_threadsafe(lambda: self._tasks.append(asyncio.create_task(self._drain(seconds))))

    async def _run_app(self) -> None:
        """Load the application and watch its engine. The server exits when either fails."""
        try:
            self.is_loading = True
            app = await in_daemon_thread(self._load)
            self.is_loading = False
            await self._lifespan.enter_async_context(app.router.lifespan_context(app))
            self.engine = app.state.shared.models.base.engine
            app.state.shared.metrics.connections.set_function(lambda: len(self._gate))
            self._lag = Lag()  # nobody waited for what held it up while the model was loaded
            app.state.shared.metrics.event_loop_lag.set_function(self._lag.longest)
            self._app = app
            await self.engine.failed()
        except Exception as error:
            self.is_loading = False
            self.load_error = error
        self.should_exit = True

    async def _drain(self, seconds: float) -> None:
        assert self.engine is not None
        await self.engine.drain(seconds)
        self.should_exit = True


def loading_app(settings: Settings) -> ASGIApp:
    """What answers while the model loads."""
    return Starlette(
        routes=[Mount("/", answer_while_loading)],
        middleware=[
            Middleware(IdentifyRequests),
            Middleware(AnswerHead),
            Middleware(FindPath, root_path=settings.root_path),
            *refuse_sites(settings),
            *allow_origins(settings),
            Middleware(AnswerLiveness),
        ],
    )


async def answer_while_loading(scope: Scope, receive: Receive, send: Send) -> None:
    error = APIError(503, "the model is still loading", code="unavailable", headers={"retry-after": "1"})
    await error.response(scope, receive, send)


@contextmanager
def handling_hangup(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Have `handler` called on SIGHUP, unless the process was started to ignore it, as nohup does."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGHUP, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def without_query(record: logging.LogRecord) -> bool:
    """A filter of uvicorn's access log: some clients put their key into the query string."""
    client, method, path, version, status = record.args  # type: ignore[misc]
    record.args = (client, method, str(path).partition("?")[0], version, status)
    return True


async def in_daemon_thread(load: Callable[[], FastAPI]) -> FastAPI:
    """The result of `load`. Unlike asyncio's own threads, this one does not keep a process alive that is told to exit."""
    loaded: Future[FastAPI] = Future()
    loaded.set_running_or_notify_cancel()  # from here on nobody but the thread ends it
    threading.Thread(target=settle, args=(loaded, load), name="load", daemon=True).start()
    return await asyncio.wrap_future(loaded)


async def serve(server: Server) -> int:
    """Serve until the end and return the process's exit status. Raises what loading raised."""
    await server.serve()
    if server.load_error:
        raise server.load_error
    if server.engine is None:  # a signal came before it was loaded
        return 128 + signal.SIGTERM
    await server.engine.stop()  # a third signal skips the application's own shutdown
    return 1 if server.engine.has_failed else 0
