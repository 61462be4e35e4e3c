"""A server that listens on a port of its own, over a fake engine, and clients that write bytes."""

import asyncio
import re
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

import httpx

from service.api.app import create_app
from service.api.server import Server, serve
from tests.service.api.helpers import served
from tests.service.engine.fakes import FakeEngine
from tests.service.helpers import settings_of, until
from tests.serving import PATIENCE


class Running(NamedTuple):
    """A server in this process, over a fake engine."""

    fake: FakeEngine
    server: Server
    client: httpx.AsyncClient
    status: asyncio.Task[int]
    port: int

    async def complete(self, **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/completions", json={"model": "fake", "prompt": "a"} | fields)

    def signal(self) -> None:
        self.server.handle_exit(signal.SIGTERM, None)


@asynccontextmanager
async def listening(*, drain_timeout: float = 20, **options: Any) -> AsyncIterator[Running]:
    fake = FakeEngine()
    fake.runner.fault = lambda step: time.sleep(0.002)
    app = create_app(served(fake), fake.metrics, settings_of(**options))
    server = Server(lambda: app, settings_of(port=0, drain_timeout=drain_timeout, **options))
    status = asyncio.create_task(serve(server))
    await until(lambda: server.engine is not None)
    port = server.servers[0].sockets[0].getsockname()[1]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
        yield Running(fake, server, client, status, port)
    fake.runner.gate.set()
    if not status.done():
        server.should_exit = True
        await status


STATUS = rb"HTTP/1.1 (\d+)"


async def statuses(running: Running, *turns: tuple[bytes, int], closes: bool = False) -> list[int]:
    """Write the bytes of each turn and wait until so many answers have come in all. Then check whether the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    text = b""
    async with asyncio.timeout(PATIENCE):
        for part, count in turns:
            writer.write(part)
            while len(re.findall(STATUS, text)) < count:
                chunk = await reader.read(65536)
                assert chunk, f"closed after {text!r}"
                text += chunk
        if closes:
            text += await reader.read()
    if not closes:
        with suppress(TimeoutError):
            async with asyncio.timeout(0.3):
                while chunk := await reader.read(65536):
                    text += chunk
        assert not reader.at_eof()
    writer.close()
    return [int(status) for status in re.findall(STATUS, text)]
