"""uvicorn with a graceful end: SIGTERM drains, a failed engine ends the process with an error."""

import asyncio
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.engine import Engine


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT, then until the running requests have ended; a second signal ends them at once.

    While draining it still listens, so that health checks read 503 and clients get an error instead of a closed port.
    """

    def __init__(self, app: FastAPI, engine: Engine, *, host: str, port: int, drain_timeout: float):
        super().__init__(uvicorn.Config(app, host=host, port=port, log_config=None, timeout_graceful_shutdown=5))
        self._engine = engine
        self._drain_timeout = drain_timeout
        self._tasks: list[asyncio.Task[None]] = []
        self._signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    async def main_loop(self) -> None:
        self._tasks.append(asyncio.create_task(self._watch_engine()))
        await super().main_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._signals += 1
        if not self.started or self._signals > 2:
            self.should_exit = self.force_exit = True
            return
        seconds = self._drain_timeout if self._signals == 1 else 0.0
        self._loop.call_soon_threadsafe(lambda: self._tasks.append(asyncio.create_task(self._drain(seconds))))

    async def _drain(self, seconds: float) -> None:
        await self._engine.drain(seconds)
        self.should_exit = True

    async def _watch_engine(self) -> None:
        await self._engine.failed()
        self.should_exit = True


async def serve(server: Server, engine: Engine) -> int:
    """Serve until the end; the process's exit status."""
    await server.serve()
    await engine.stop()  # where a third signal has skipped the application's own shutdown
    return 1 if engine.has_failed or not server.started else 0
