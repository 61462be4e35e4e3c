"""uvicorn with a start and an end: it listens while the model loads, drains on SIGTERM and exits if the engine fails.

While the model loads, the answer to everything but liveness is a 503.
"""

import asyncio
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AsyncExitStack
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.connection import Connection
from service.api.errors import APIError
from service.api.middleware import AnswerHead, FindPath, IdentifyRequests, allow_origins, route_path
from service.engine.engine import Engine, settle
from service.settings import Settings


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT and then finishes the running requests. A second signal ends them at once.

    It also listens while loading and draining: health checks then read 503, and clients get an error, not a closed port.
    """

    def __init__(self, load: Callable[[], FastAPI], settings: Settings):
        """`load` makes the application. It runs in a thread of its own."""
        super().__init__(
            uvicorn.Config(
                self,
                host=settings.host,
                port=settings.port,
                http=Connection,
                ws="none",
                lifespan="off",
                log_config=None,
                timeout_keep_alive=settings.keep_alive,
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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request to the application, or answer it while there is none."""
        await self._app(scope, receive, send)

    async def main_loop(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._tasks.append(asyncio.create_task(self._run_app()))
        await super().main_loop()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        await self._lifespan.aclose()

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
            *allow_origins(settings),
        ],
    )


async def answer_while_loading(scope: Scope, receive: Receive, send: Send) -> None:
    if route_path(scope) == "/health/live":
        await JSONResponse({"status": "live"})(scope, receive, send)
        return
    error = APIError(503, "the model is still loading", code="unavailable", headers={"retry-after": "1"})
    await error.response(scope, receive, send)


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
