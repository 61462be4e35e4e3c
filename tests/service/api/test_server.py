"""Loading, draining and exiting over a fake engine, and a real `banded serve` over a tiny checkpoint."""

import asyncio
import json
import logging
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from service.api.app import create_app
from service.api.server import Server, handling_hangup, serve
from service.engine.engine import STOP_SECONDS
from tests.conformance import contract
from tests.model.checkpoint.checkpoints import tiny
from tests.service.api.helpers import served
from tests.service.api.listening import listening, statuses
from tests.service.engine.fakes import FakeEngine
from tests.service.helpers import run, settings_of, until
from tests.serving import PATIENCE, banded_serve


@contract("errors", "503", "while loading")
@contract("health", "ready", "503 while loading, as everything but liveness")
def test_while_it_loads_a_server_says_so() -> None:
    async def test() -> None:
        fake, go = FakeEngine(), threading.Event()

        def load() -> FastAPI:
            assert go.wait(20)
            return create_app(served(fake), fake.metrics, settings_of())

        origin = "https://page.example"
        server = Server(load, settings_of(port=0, drain_timeout=1, cors_origins=(origin,), root_path="/llm"))
        status = asyncio.create_task(serve(server))
        await until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            for path in ("/health/live", "/health/live/", "/llm/health/live"):
                assert (await client.get(path)).json() == {"status": "live"}
            for path in ("/health/ready", "/health", "/ping", "/v1/models", "/metrics", "/nope", "/llm/v1/models"):
                answer = await client.get(path, headers={"origin": origin})
                assert answer.status_code == 503
                assert answer.json()["error"] == {
                    "message": "the model is still loading",
                    "type": "server_error",
                    "param": None,
                    "code": "unavailable",
                }
                assert answer.headers["retry-after"] == "1"
                assert answer.headers["x-request-id"].startswith("req_")
                # Without these a browser tells its page nothing but "Failed to fetch".
                assert answer.headers["access-control-allow-origin"] == origin
                assert "x-request-id" in answer.headers["access-control-expose-headers"]
            asking = {"origin": origin, "access-control-request-method": "POST"}
            preflight = await client.options("/v1/completions", headers=asking)
            assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, origin)
            go.set()
            await until(lambda: server.engine is not None)
            assert (await client.get("/health/ready")).json() == {"status": "ready"}
            server.handle_exit(signal.SIGTERM, None)
            assert await status == 0

    run(test)


def test_what_can_not_be_loaded_ends_the_server_with_its_error() -> None:
    def load() -> FastAPI:
        raise ValueError("no such weights")

    with pytest.raises(ValueError, match="no such weights"):
        asyncio.run(serve(Server(load, settings_of(port=0, drain_timeout=1))))


def test_a_signal_while_loading_ends_the_server_at_once() -> None:
    async def test() -> None:
        go = threading.Event()
        server = Server(lambda: go.wait(20) and FastAPI(), settings_of(port=0))  # type: ignore[arg-type, return-value]
        status = asyncio.create_task(serve(server))
        await until(lambda: server.is_loading)
        server.handle_exit(signal.SIGTERM, None)
        assert await status == 143
        assert server.is_loading
        go.set()

    run(test)


@contract("errors", "503", "while draining; running requests finish")
def test_a_signal_lets_requests_finish_and_refuses_new_ones() -> None:
    async def test() -> None:
        async with listening() as running:
            assert (await running.client.get("/health/ready")).status_code == 200
            last = asyncio.create_task(running.complete(max_tokens=200))
            await until(lambda: bool(running.fake.scheduler.running))
            running.signal()
            await asyncio.sleep(0.01)
            refused = await running.complete(stream=True)
            assert refused.status_code == 503
            assert refused.json()["error"]["message"] == "the server is shutting down"
            assert (await running.client.get("/health/ready")).status_code == 503
            assert (await running.client.get("/health/live")).status_code == 200
            assert not last.done()
            assert (await last).json()["usage"]["completion_tokens"] == 200
            assert await running.status == 0

    run(test)


def test_a_delay_of_the_event_loop_and_open_connections_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.api.server.LAG_SECONDS", 1.0)

    async def test() -> None:
        async with listening() as running:

            def lag() -> float:
                return running.fake.metric("event_loop_lag_seconds")

            await asyncio.sleep(2.5)  # delays while it started are forgotten
            before = lag()
            time.sleep(0.7)  # noqa: ASYNC251
            assert lag() > 0.5, "while nothing else has run"
            await asyncio.sleep(1.0)
            assert 0.5 < lag() < 0.7 + before + 0.1
            assert (await running.client.get("/health/live")).status_code == 200
            assert running.fake.metric("connections") == 1
            await until(lambda: lag() < 0.5)

    run(test)


def test_an_idle_server_ends_at_once() -> None:
    async def test() -> None:
        async with listening() as running:
            started = time.monotonic()
            running.signal()
            assert await running.status == 0
            assert time.monotonic() - started < 2

    run(test)


def test_what_outlasts_the_drain_ends_in_an_error() -> None:
    async def test() -> None:
        async with listening(drain_timeout=0.1) as running:
            requests = [asyncio.create_task(running.complete(max_tokens=200, stream=stream)) for stream in (False, True)]
            await until(lambda: len(running.fake.runner.steps) > 2)
            running.signal()
            whole, stream = await asyncio.gather(*requests)
            message = "the server shut down before the request was finished"
            assert (whole.status_code, whole.json()["error"]["message"]) == (503, message)
            assert stream.status_code == 200
            *_, error, done, end = stream.text.split("\n\n")
            assert json.loads(error.removeprefix("data: "))["error"]["message"] == message
            assert (done, end) == ("data: [DONE]", "")
            assert await running.status == 0

    run(test)


def test_a_second_signal_does_not_wait() -> None:
    async def test() -> None:
        async with listening() as running:
            running.fake.runner.gate.clear()
            hanging = asyncio.create_task(running.complete())
            await until(lambda: bool(running.fake.scheduler.running))
            running.signal()
            await asyncio.sleep(0.05)
            assert not running.status.done()
            started = time.monotonic()
            running.signal()
            assert await running.status == 1, "a step hangs"
            assert time.monotonic() - started < STOP_SECONDS + 2
            assert running.fake.engine.hangs
            assert (await hanging).status_code == 503

    run(test)


def test_a_failed_engine_ends_the_server_with_an_error() -> None:
    async def test() -> None:
        async with listening() as running:

            def fault(step: object) -> None:
                raise RuntimeError("device on fire")

            running.fake.runner.fault = fault
            assert (await running.complete()).status_code == 500
            with suppress(httpx.ReadError):  # the server may have closed the connection already
                assert (await running.client.get("/health/ready")).status_code == 503
            assert await running.status == 1

    run(test)


def test_a_client_that_closes_its_connection_frees_its_slots(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with listening() as running:
            async with running.client.stream(
                "POST", "/v1/completions", json={"model": "fake", "stream": True, "n": 2, "max_tokens": 250}
            ) as answer:
                await anext(answer.aiter_lines())
            with pytest.raises(httpx.ReadTimeout):
                await running.client.post("/v1/completions", json={"model": "fake", "max_tokens": 250}, timeout=0.1)
            await until(lambda: running.fake.scheduler.idle)
            assert running.fake.metric("requests_total", outcome="abort") == 3
            assert running.fake.scheduler.cache.check_integrity() == []

    run(test)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_wrong_methods_and_half_requests_leave_the_connection_usable() -> None:
    async def test() -> None:
        async with listening() as running:
            for path, status in (("/v1/models", 200), ("/v1/completions", 405), ("/nope", 404)):
                head = await running.client.head(path)
                assert (head.status_code, head.content) == (status, b"")
                assert int(head.headers["content-length"]) > 0
            assert (await running.client.post("/v1/completions", content=b"x" * 4_000_000)).status_code == 400
            assert (await running.complete(max_tokens=1)).status_code == 200
            _, writer = await asyncio.open_connection(running.client.base_url.host, running.client.base_url.port)
            writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{")
            await writer.drain()
            writer.close()
            assert (await running.complete(max_tokens=1)).status_code == 200

    run(test)


POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
GET = b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n"
BODY = b"x" * 200_000  # more than the server buffers before the application reads


def test_a_body_too_large_does_not_hang_the_connection() -> None:
    async def test() -> None:
        async with listening(max_body_bytes=100_000) as running:
            declared = POST + b"content-length: 200000\r\n\r\n"
            # The body is refused before it comes. When it comes, the server discards it and answers the next request.
            assert await statuses(running, (declared, 1), (BODY, 1), (GET, 2)) == [413, 200]
            assert await statuses(running, (declared + BODY + GET, 2)) == [413, 200]
            chunk = b"30d40\r\n" + BODY + b"\r\n"
            chunked = POST + b"transfer-encoding: chunked\r\n\r\n"
            assert await statuses(running, (chunked + chunk, 1), (chunk + b"0\r\n\r\n", 1), (GET, 2)) == [413, 200]
            # A client that is told not to send its body sends another request instead, which must not be taken for the body.
            waiting = POST + b"content-length: 200000\r\nexpect: 100-continue\r\n\r\n"
            assert await statuses(running, (waiting, 1), closes=True) == [413]
            assert (await running.client.post("/v1/completions", content=BODY)).status_code == 413
            assert (await running.complete(max_tokens=1)).status_code == 200

    run(test)


def test_a_hangup_drains_unless_the_process_ignores_it() -> None:
    def handler(number: int, frame: object) -> None: ...

    before = signal.getsignal(signal.SIGHUP)
    try:
        for given, taken in ((signal.SIG_DFL, handler), (signal.SIG_IGN, signal.SIG_IGN)):  # nohup ignores it
            signal.signal(signal.SIGHUP, given)
            with handling_hangup(handler):
                assert signal.getsignal(signal.SIGHUP) is taken
            assert signal.getsignal(signal.SIGHUP) is given
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_port_in_use_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeEngine()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = Server(lambda: create_app(served(fake), fake.metrics, settings_of()), settings_of(port=port))
        with pytest.raises(SystemExit) as exit_:
            asyncio.run(serve(server))
    assert exit_.value.code != 0
    assert "address already in use" in caplog.text


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("banded", tmp_path_factory.mktemp("model"), vocab_size=50257, n_positions=2048, n_layer=2)


def next_data(lines: Iterator[str]) -> str:
    return next(line for line in lines if line).removeprefix("data: ")


def streamed(url: str, max_tokens: int) -> Any:
    body = {"model": "banded", "prompt": "Once", "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
    return httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60)


def running_requests(url: str) -> float:
    metrics = httpx.get(f"{url}/metrics").text
    found = re.search(r"^banded_requests_running\S* (\S+)$", metrics, re.MULTILINE)
    assert found
    return float(found[1])


def test_banded_serve_from_start_to_drain(checkpoint: Path, tmp_path: Path) -> None:
    with banded_serve(checkpoint, tmp_path / "log") as server:
        assert httpx.get(f"{server.url}/health/ready").status_code == 200

        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["banded"]
            fields: dict[str, Any] = {"model": "banded", "prompt": "Once upon", "max_tokens": 12, "temperature": 0}
            whole = client.completions.create(**fields)
            assert whole.usage is not None
            assert whole.usage.completion_tokens == 12 or whole.choices[0].finish_reason == "stop"
            chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
            assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
            assert chunks[-1].usage == whole.usage
            with pytest.raises(openai.NotFoundError, match="the model 'other' does not exist"):
                client.completions.create(model="other", prompt="a")
            with pytest.raises(openai.BadRequestError, match="'n': input should be"):
                client.completions.create(model="banded", prompt="a", n=0)

        # The runner can compute whatever the API lets through.
        body = {"model": "banded", "prompt": "a", "max_tokens": 2, "top_k": 2**63 - 1, "top_p": 0, "n": 2}
        for extreme in ({"seed": -(2**63), "temperature": 1e-300}, {"seed": 2**63 - 1, "temperature": 1e-40}, {"top_k": -1}):
            assert httpx.post(f"{server.url}/v1/completions", json=body | extreme).status_code == 200

        with streamed(server.url, 2000) as answer:
            assert answer.status_code == 200
            lines = answer.iter_lines()
            first = [json.loads(next_data(lines))["choices"][0] for _ in range(3)]
            assert all(choice["text"] and choice["finish_reason"] is None for choice in first)
            assert running_requests(server.url) == 1  # far from done when the first tokens arrive
        deadline = time.monotonic() + PATIENCE
        while running_requests(server.url):  # the client has left
            assert time.monotonic() < deadline
            time.sleep(0.02)

        with streamed(server.url, 400) as answer:
            lines = answer.iter_lines()
            assert json.loads(next_data(lines))["choices"][0]["text"]
            server.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + PATIENCE
            while (refused := httpx.post(f"{server.url}/v1/completions", json={"model": "banded"})).status_code != 503:
                assert time.monotonic() < deadline
            assert refused.json()["error"]["message"] == "the server is shutting down"
            *_, last, done = [line.removeprefix("data: ") for line in lines if line]
            assert json.loads(last)["choices"][0]["finish_reason"] == "length"
            assert done == "[DONE]"
        assert server.ended() == 0
    log = (tmp_path / "log").read_text()
    assert "ERROR" not in log
    assert "Traceback" not in log


def test_a_second_signal_ends_streams_at_once_and_in_good_order(checkpoint: Path, tmp_path: Path) -> None:
    with banded_serve(checkpoint, tmp_path / "log") as server, streamed(server.url, 2000) as answer:
        lines = answer.iter_lines()
        next_data(lines)
        server.process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        assert server.process.poll() is None
        started = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        *_, error, done = [line.removeprefix("data: ") for line in lines if line]
        assert json.loads(error)["error"]["message"] == "the server shut down before the request was finished"
        assert done == "[DONE]"
        assert server.ended() == 0
        assert time.monotonic() - started < 5
    assert "Traceback" not in (tmp_path / "log").read_text()
