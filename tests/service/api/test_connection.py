"""What clients and proxies send on a connection, byte by byte: offers to upgrade, HTTP/1.0, and long silence."""

import asyncio
import json
import logging
import random
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple
from unittest.mock import Mock

import pytest
import uvicorn
import uvloop
from uvicorn.server import ServerState

from service.api import connection, gate
from service.api.connection import Connection
from service.api.server import ACCEPTS_PER_TURN
from tests.conformance import contract
from tests.service.api.listening import Running, listening
from tests.service.helpers import run, settings_of, until

BODY = json.dumps({"model": "fake", "prompt": "a", "max_tokens": 3}).encode()
STREAM = json.dumps({"model": "fake", "prompt": "a", "max_tokens": 3, "stream": True}).encode()
# As the JDK's HttpClient and curl --http2 send it.
H2C = (
    ("Connection", "Upgrade, HTTP2-Settings"),
    ("Upgrade", "h2c"),
    ("HTTP2-Settings", "AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA"),
)


def post(body: bytes, *headers: tuple[str, str], version: str = "1.1", path: str = "/v1/completions") -> bytes:
    given = (("Host", "localhost"), ("Content-Type", "application/json"), ("Content-Length", str(len(body))), *headers)
    lines = [f"POST {path} HTTP/{version}", *(f"{name}: {value}" for name, value in given)]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Answer:
    """A response as it came: its status line, headers and body."""

    def __init__(self, head: bytes, body: bytes = b""):
        self.status_line, *lines = head.decode().split("\r\n")
        self.headers = dict(line.split(": ", 1) for line in lines)
        self.body = body


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """The next response; without a length its body ends with the connection."""
    answer = Answer((await reader.readuntil(b"\r\n\r\n"))[:-4])
    length = answer.headers.get("content-length")
    answer.body = await (reader.read() if length is None else reader.readexactly(int(length)))
    return answer


async def exchange(running: Running, parts: Sequence[bytes], count: int) -> list[Answer]:
    """Send the parts one after another, and read `count` responses."""
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    for part in parts:
        writer.write(part)
        await writer.drain()
        if len(parts) > 1:
            await asyncio.sleep(0)
    answers = [await read_answer(reader) for _ in range(count)]
    writer.close()
    return answers


@contract("connections", "upgrade", "an offer of h2c or any other protocol is ignored, as RFC 9110 says")
@pytest.mark.parametrize("offered", ["h2c", "h2c, websocket", "websocket", "TLS/1.0"])
def test_an_offer_to_upgrade_is_ignored(offered: str) -> None:
    async def test() -> None:
        async with listening() as running:
            request = post(BODY, *H2C[:1], ("Upgrade", offered), *H2C[2:])
            for parts in ([request], [request[:-10], request[-10:]], [bytes([byte]) for byte in request]):
                (answer,) = await exchange(running, parts, 1)
                assert answer.status_line == "HTTP/1.1 200 OK"
                assert json.loads(answer.body)["usage"]["completion_tokens"] == 3
            # The connection stays usable, for requests that were sent at once too.
            plain = post(BODY)
            answers = await exchange(running, [request + plain + request + plain], 4)
            assert [answer.status_line for answer in answers] == ["HTTP/1.1 200 OK"] * 4
            assert all("connection" not in answer.headers for answer in answers)

    run(test)


def test_the_rest_of_the_headers_is_kept() -> None:
    """Random spelling, order and cuts; what Connection says besides the upgrade still counts."""

    async def test() -> None:
        rng = random.Random(1)
        async with listening() as running:
            for turn in range(30):
                connection = ["Upgrade", "HTTP2-Settings", *(["close"] if turn % 2 else [])]
                rng.shuffle(connection)
                headers = [
                    ("Connection", rng.choice([", ", ","]).join(connection)),
                    *H2C[1:],
                    ("X-Request-Id", f"id-{turn}"),
                ]
                rng.shuffle(headers)
                spelled = [(rng.choice([name, name.lower(), name.upper()]), value) for name, value in headers]
                request = post(BODY, *spelled)
                cut = rng.randrange(1, len(request))
                (answer,) = await exchange(running, [request[:cut], request[cut:]], 1)
                assert answer.status_line == "HTTP/1.1 200 OK"
                assert answer.headers["x-request-id"] == f"id-{turn}"
                assert answer.headers.get("connection") == ("close" if turn % 2 else None)

    run(test)


def test_a_get_that_offers_an_upgrade_and_a_chunked_body() -> None:
    async def test() -> None:
        async with listening() as running:
            offer = "".join(f"{name}: {value}\r\n" for name, value in H2C).encode()
            get = b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + offer + b"\r\n"
            chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            chunked = head + b"Transfer-Encoding: chunked\r\n" + offer + b"\r\n" + chunks
            answers = await exchange(running, [get + chunked + get], 3)
            assert [answer.status_line for answer in answers] == ["HTTP/1.1 200 OK"] * 3

    run(test)


def test_connect_is_refused() -> None:
    async def test() -> None:
        async with listening() as running:
            for target in ("example.com:443", "/v1/completions"):
                reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
                writer.write(f"CONNECT {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                answer = await read_answer(reader)
                assert answer.status_line == "HTTP/1.1 400 Bad Request"
                assert json.loads(answer.body)["error"]["message"] == "CONNECT is not supported"
                assert await reader.read() == b""
                writer.close()

    run(test)


@contract("connections", "HTTP/1.0", "no chunks: a stream ends with the connection")
def test_a_client_of_http_1_0_gets_no_chunks() -> None:
    async def test() -> None:
        async with listening() as running:
            for headers in ((), (("Connection", "keep-alive"),)):
                (whole,) = await exchange(running, [post(BODY, *headers, version="1.0")], 1)
                assert "transfer-encoding" not in whole.headers
                assert whole.headers["connection"] == "close"
                assert json.loads(whole.body)["usage"]["completion_tokens"] == 3
                (streamed,) = await exchange(running, [post(STREAM, *headers, version="1.0")], 1)
                assert not {"transfer-encoding", "content-length"} & {*streamed.headers}
                assert streamed.headers["connection"] == "close"
                *events, done, end = streamed.body.split(b"\n\n")
                assert (done, end) == (b"data: [DONE]", b"")
                assert "".join(json.loads(event[6:])["choices"][0]["text"] for event in events)
            (streamed,) = await exchange(running, [post(STREAM, ("Connection", "close"))], 1)
            assert streamed.headers["transfer-encoding"] == "chunked"

    run(test)


@contract("connections", "keep-alive", "an idle connection stays open longer than proxies keep theirs")
def test_an_idle_connection_is_closed_after_the_setting() -> None:
    assert settings_of().keep_alive > 75

    async def test() -> None:
        async with listening(keep_alive=1) as running:
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
            for _ in range(2):
                writer.write(post(BODY))
                answer = await read_answer(reader)
                assert (answer.status_line, answer.headers["keep-alive"]) == ("HTTP/1.1 200 OK", "timeout=1")
                await asyncio.sleep(0.5)  # each request begins the wait anew
            idle = time.monotonic()
            assert await reader.read() == b""
            assert time.monotonic() - idle > 0.3
            writer.close()

    run(test)


def refused(answer: Answer) -> tuple[str, str]:
    """The status and the message of a refusal, after which the connection ends."""
    error = json.loads(answer.body)["error"]
    assert answer.headers["connection"] == "close"
    assert error["type"] == "invalid_request_error"
    return answer.status_line.removeprefix("HTTP/1.1 "), error["message"]


async def tried(running: Running, *parts: bytes) -> tuple[str, str]:
    """The refusal of what is sent, whose connection the server must end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    for part in parts:
        writer.write(part)
        await asyncio.sleep(0.005)
    answer = await read_answer(reader)
    assert await reader.read() == b""
    writer.close()
    return refused(answer)


GET = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n"
LINE = ("414 Request-URI Too Long", "the request line is longer than 16384 bytes")
FIELDS = (
    "431 Request Header Fields Too Large",
    "a header is too long, or there are too many: 100 of at most 16384 bytes may come",
)
HEAD = ("431 Request Header Fields Too Large", "the headers are longer than 65536 bytes")
CHUNKS = (
    "431 Request Header Fields Too Large",
    "the body's chunks have more lengths, extensions and trailers than content",
)


def line_of(size: int) -> bytes:
    return b"GET /%s HTTP/1.1\r\n\r\n" % (b"a" * (size - len("GET / HTTP/1.1")))


def head_of(size: int) -> bytes:
    """A head of so many bytes in large fields."""
    head = GET + b"".join(b"x-%d: %s\r\n" % (place, b"a" * 16_000) for place in range(4))
    return head + b"y: " + b"a" * (size - len(head) - len(b"y: \r\n\r\n")) + b"\r\n\r\n"


@contract(
    "connections", "bounds", "a request line of over 16 kB is a 414; over 64 kB of headers, or 100, or 16 kB in one: 431"
)
@pytest.mark.parametrize(
    ("largest", "too_large", "why"),
    [
        (line_of(16_384), line_of(16_385), LINE),
        (GET + b"x: " + b"a" * 16_383 + b"\r\n\r\n", GET + b"x: " + b"a" * 16_384 + b"\r\n\r\n", FIELDS),
        (GET + b"a: b\r\n" * 99 + b"\r\n", GET + b"a: b\r\n" * 100 + b"\r\n", FIELDS),
        (head_of(65_536), head_of(65_537), HEAD),
    ],
    ids=["line", "field", "fields", "head"],
)
def test_the_largest_head_is_answered_and_a_larger_one_refused(
    largest: bytes, too_large: bytes, why: tuple[str, str]
) -> None:
    async def test() -> None:
        async with listening() as running:
            for cut in (0, 1, 1000, len(largest) - 2):
                (answer,) = await exchange(running, [largest[:cut], largest[cut:]], 1)
                assert answer.status_line in ("HTTP/1.1 200 OK", "HTTP/1.1 404 Not Found")
                assert await tried(running, too_large[:cut], too_large[cut:]) == why

    run(test)


CHUNKED = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("start", "more", "why"),
    [
        (b"GET /", b"a", LINE),
        (b"GET", b" ", LINE),
        (GET + b"x: ", b"a", HEAD),
        (GET, b"a: b\r\n", FIELDS),
        (GET + b"Connection: upgrade\r\nUpgrade: ", b"a", HEAD),
        (b"", b"\r\n", LINE),
        (CHUNKED + b"1;", b"a", CHUNKS),
        (CHUNKED + b"0\r\nx: ", b"a", CHUNKS),
        (CHUNKED + b"0\r\n", b"a: b\r\n", FIELDS),
        (CHUNKED, b"1\r\na\r\n", CHUNKS),
    ],
    ids=["line", "spaces", "field", "fields", "upgrade", "blank", "extension", "trailer", "trailers", "chunks"],
)
def test_what_never_ends_is_refused_while_it_comes(start: bytes, more: bytes, why: tuple[str, str]) -> None:
    async def test() -> None:
        async with listening() as running:
            block = more * (8192 // len(more))
            assert await tried(running, start, *[block] * 16) == why

    run(test)


def test_a_body_may_come_in_small_chunks_and_with_trailers() -> None:
    async def test() -> None:
        async with listening() as running:
            chunks = b"".join(b"%x;note=1\r\n%s\r\n" % (1, BODY[place : place + 1]) for place in range(len(BODY)))
            trailers = b"0\r\nX-Request-Id: late\r\n\r\n"
            head = CHUNKED.replace(b"\r\n\r\n", b"\r\nContent-Type: application/json\r\n\r\n")
            answers = await exchange(running, [head + chunks + trailers + GET + b"\r\n"], 2)
            assert [answer.status_line for answer in answers] == ["HTTP/1.1 200 OK"] * 2
            assert answers[0].headers["x-request-id"].startswith("req_")

    run(test)


@contract("connections", "timeouts", "headers that take over 30 s, or a body that rests for 30 s, are a 408")
def test_who_sends_too_slowly_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (gate.HEAD_SECONDS, gate.BODY_SECONDS) == (30, 30)
    monkeypatch.setattr(gate, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.5)

    async def test() -> None:
        async with listening() as running:

            async def dripping(start: bytes, more: bytes) -> tuple[tuple[str, str], float]:
                """The refusal of what begins with `start` and goes on with `more`, and the seconds until it."""
                began = time.monotonic()
                reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
                writer.write(start)
                answering = asyncio.create_task(read_answer(reader))
                while not answering.done() and time.monotonic() < began + 2:
                    await asyncio.sleep(0.2)
                    writer.write(more)
                answer = await answering
                writer.transport.abort()
                return refused(answer), time.monotonic() - began

            late = "408 Request Timeout", "the request did not come in time"
            body = post(BODY)
            whole = exchange(running, [body], 1)
            for what, seconds in await asyncio.gather(dripping(b"", b""), dripping(GET + b"x: ", b"a")):
                assert what == late
                assert 0.4 < seconds < 1.5
            assert (await whole)[0].status_line == "HTTP/1.1 200 OK"
            assert await tried(running, body[:-1]) == ("408 Request Timeout", "the body did not come in time")
            assert await tried(running, CHUNKED + b"5\r\na") == ("408 Request Timeout", "the body did not come in time")
            # Each byte of a body is one more wait.
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
            for place in range(-5, 0):
                writer.write(body[:-5] if place == -5 else b"")
                await asyncio.sleep(0.25)
                writer.write(body[place:][:1])
            assert (await read_answer(reader)).status_line == "HTTP/1.1 200 OK"
            # After an answer blank lines begin no request, so that the connection is idle, and not late.
            writer.write(b"\r\n")
            await asyncio.sleep(0.8)
            writer.write(body)
            assert (await read_answer(reader)).status_line == "HTTP/1.1 200 OK"
            # An answer that has begun is not followed by another.
            writer.write(post(BODY, path="/nope")[:-1])
            assert (await read_answer(reader)).status_line == "HTTP/1.1 404 Not Found"
            assert await reader.read() == b""
            writer.close()

    run(test)


def test_what_holds_room_must_come_soon_and_is_asked_for_if_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.api.middleware.BODY_SECONDS", 0.3)
    monkeypatch.setattr("service.api.middleware.SLOWEST", 200_000)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n"

    async def test() -> None:
        async with listening(max_body_bytes=100_000) as running:
            reader, writer = await opened(running, head + b"\r\n")
            started = time.monotonic()
            answering = asyncio.create_task(read_answer(reader))
            while not answering.done() and time.monotonic() < started + 5:
                writer.write(b" ")
                await asyncio.sleep(0.05)
            error = json.loads((await answering).body)["error"]
            assert error["message"] == "the body came more slowly than 200000 bytes a second"
            assert 0.7 < time.monotonic() - started < 3, "100000 bytes have half a second and the 0.3 that all have"
            writer.close()
            monkeypatch.setattr("service.api.middleware.BODY_SECONDS", 30)
            holders = [await opened(running, head + b"\r\n") for _ in range(4)]
            await asyncio.sleep(0.3)
            (answer,) = await exchange(running, [head + b"Expect: 100-continue\r\n\r\n"], 1)
            assert (answer.status_line, answer.headers["connection"]) == ("HTTP/1.1 503 Service Unavailable", "close")
            for _, writer in holders:
                writer.close()

    run(test)


Opened = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def opened(running: Running, first: bytes = b"") -> Opened:
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    writer.write(first)
    return reader, writer


async def ends(connection: Opened) -> bytes:
    """What still comes on a connection that the server ends, perhaps by a reset."""
    with suppress(ConnectionError):
        return await connection[0].read()
    return b""


@contract(
    "connections", "limit", "of more than BANDED_MAX_CONNECTIONS those that wait for their client give way, else it is a 503"
)
def test_the_longest_wait_gives_way_to_a_new_connection_and_a_running_request_does_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gate, "SECONDS_BETWEEN_REPORTS", 0)

    async def test() -> None:
        async with listening(max_connections=4) as running:
            silent = [await opened(running) for _ in range(2)]
            idle = [await opened(running, GET + b"\r\n") for _ in range(2)]
            for reader, _ in idle:
                await read_answer(reader)
            running.fake.runner.gate.clear()
            busy = []
            for waiting in (*idle, *silent):  # the idle ones first, and the oldest of each kind
                busy.append(await opened(running, post(BODY)))
                assert await ends(waiting) == b""
                await until(lambda: busy_in(running) == len(busy))
            (refusal,) = await exchange(running, [b""], 1)
            assert (refusal.status_line, refusal.headers["retry-after"]) == ("HTTP/1.1 503 Service Unavailable", "1")
            assert json.loads(refusal.body)["error"]["message"] == "the server has too many connections"
            running.fake.runner.gate.set()
            for reader, _ in busy:
                assert (await read_answer(reader)).status_line == "HTTP/1.1 200 OK"
            await until(lambda: "1 x 503" in caplog.text)
            for _, writer in (*silent, *idle, *busy):
                writer.close()

    run(test)
    assert "gave way, waiting for another request" in caplog.text


def busy_in(running: Running) -> int:
    """The number of connections whose client waits for the server."""
    return sum(connection.wait is None for connection in running.server._gate._open)


def test_the_limit_of_open_files_is_raised_or_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limits = [(1024, 1_000_000)]
    monkeypatch.setattr("service.api.gate.resource.getrlimit", lambda which: limits[-1])
    monkeypatch.setattr("service.api.gate.resource.setrlimit", lambda which, limit: limits.append(limit))
    assert gate.affordable(4096) == 4096
    assert limits.pop() == (5120, 1_000_000)
    assert gate.affordable(100) == 100
    assert limits == [(1024, 1_000_000), (1124, 1_000_000)]
    assert caplog.text == ""
    limits.append((1024, 4096))
    assert gate.affordable(4096) == 3072
    assert "at most 3072 connections, not 4096: the system allows this process 4096 open files" in caplog.text


class Request(NamedTuple):
    """A request as bytes, and what the application should see of it."""

    text: bytes
    seen: tuple[str, str, bytes]


def requests_of(rng: random.Random) -> Iterator[Request]:
    """Random requests whose bodies hold what could be taken for the end of something."""
    for _ in range(rng.randrange(1, 6)):
        body = b"".join(
            rng.choice([b"\r\n\r\n", b"\r\n", b"\r", b"0\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"x"]) for _ in range(6)
        )
        method, path = rng.choice(["GET", "POST", "PUT"]), f"/{rng.randrange(100)}"
        head = b"\r\n" * rng.choice([0, 0, 1, 2]) + f"{method} {path} HTTP/1.1\r\nHost: a\r\n".encode()
        if rng.random() < 0.3:
            head += b"Connection: upgrade\r\nUpgrade: h2c\r\n"
        match rng.choice(["none", "length", "chunked"]):
            case "none":
                yield Request(head + b"\r\n", (method, path, b""))
            case "length":
                yield Request(head + b"Content-Length: %d\r\n\r\n" % len(body) + body, (method, path, body))
            case "chunked":
                cut = rng.randrange(1, len(body) + 1)
                chunks = b"".join(b"%x;a=b\r\n%s\r\n" % (len(part), part) for part in (body[:cut], body[cut:]) if part)
                end = b"0\r\n" + rng.choice([b"", b"X-Trailer: a\r\n", b"A: b\r\nC: d\r\n"]) + b"\r\n"
                yield Request(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + end, (method, path, body))


class Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.is_reading_ = True
        self.has_closed = False

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.has_closed

    def close(self) -> None:
        self.has_closed = True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def pause_reading(self) -> None:
        self.is_reading_ = False

    def resume_reading(self) -> None:
        self.is_reading_ = True


def connected(app: Any, hall: gate.Gate | None = None) -> tuple[Connection, Wire]:
    """A connection to an application, without a socket."""
    config = uvicorn.Config(app, lifespan="off", ws="none", log_config=None)
    config.load()
    hall = gate.Gate(10, 60) if hall is None else hall
    connection, wire = Connection(hall, config=config, server_state=ServerState(), app_state={}), Wire()
    connection.connection_made(wire)
    return connection, wire


@pytest.mark.parametrize("seed", range(60))
def test_requests_are_taken_apart_however_they_are_cut_and_run_one_at_a_time(seed: int) -> None:
    rng = random.Random(seed)
    requests = list(requests_of(rng))
    text = b"".join(request.text for request in requests)
    seen: list[tuple[str, str, bytes]] = []
    running = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal running
        running += 1
        assert running == 1
        body, more = b"", True
        while more:
            message = await receive()
            assert message["type"] == "http.request"
            body, more = body + message["body"], message["more_body"]
        seen.append((scope["method"], scope["path"], body))
        assert not {b"x-trailer", b"a", b"upgrade"} & {name for name, _ in scope["headers"]}
        for _ in range(rng.randrange(3)):
            await asyncio.sleep(0)
        running -= 1
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def test() -> None:
        connection, wire = connected(app)
        rest = text
        while rest:
            cut = rng.choice([1, 2, 3, rng.randrange(1, 200), len(rest)])
            connection.data_received(rest[:cut])
            rest = rest[cut:]
            for _ in range(rng.randrange(3)):
                await asyncio.sleep(0)
        await until(lambda: len(seen) == len(requests) and connection.wait == gate.Wait.IDLE)
        assert wire.written.count(b"HTTP/1.1 200") == len(requests)
        assert not wire.has_closed
        assert connection.held == 0
        connection.connection_lost(None)

    run(test)
    assert seen == [request.seen for request in requests]


def test_what_is_sent_ahead_waits_unparsed_and_reading_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_AHEAD", 65_536)
    monkeypatch.setattr(gate, "AHEAD_AT_ONCE", 1000)
    go = asyncio.Event()
    paths: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        paths.append(scope["path"])
        await receive()
        waiting = asyncio.ensure_future(receive())  # as every route watches for its client to leave
        await go.wait()
        waiting.cancel()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def test() -> None:
        client, wire = connected(app)
        request = b"GET /%d HTTP/1.1\r\n\r\n"
        text = b"".join(request % place for place in range(10_000))
        client.data_received(text[:60_000])
        await asyncio.sleep(0.01)
        assert (paths, wire.is_reading_) == (["/0"], True)
        client.data_received(text[60_000:])
        assert not wire.is_reading_, "even though the application waits for what comes"
        assert client.held == len(text) - len(request % 0)
        go.set()
        client.pause_writing()
        await asyncio.sleep(0.01)
        assert (paths, client.wait) == (["/0"], gate.Wait.UNREAD), "the answer is unwritten"
        client.resume_writing()
        await until(lambda: len(paths) == 10_000)
        assert paths == [f"/{place}" for place in range(10_000)]
        assert wire.is_reading_
        client.connection_lost(None)

    run(test)


def test_those_who_hold_most_give_way() -> None:
    async def test() -> None:
        hall = gate.Gate(10, 60)
        config = uvicorn.Config(lambda: None, lifespan="off", ws="none", log_config=None)
        config.load()
        wires = [Mock(is_closing=lambda: False, get_extra_info=lambda name: None) for _ in range(3)]
        guests = [Connection(hall, config=config, server_state=ServerState(), app_state={}) for _ in wires]
        for guest, wire in zip(guests, wires, strict=True):
            guest.connection_made(wire)
            guest.data_received(GET + b"x: " + b"a" * 10_000)
        each = len(GET) + 10_003
        assert hall._held == 3 * each
        hall.hold(guests[2], gate.MAX_HELD - 2 * each)
        assert not any(wire.abort.called for wire in wires)
        hall.hold(guests[1], each + 1)
        assert [wire.abort.called for wire in wires] == [False, False, True]
        assert hall._held == 2 * each + 1

    run(test)


def test_a_thousand_give_way_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hall = gate.Gate(2000, 60)
    guests = [Mock(wait=None, held=0) for _ in range(1500)]
    for guest in guests:
        hall.enter(guest)
        hall.hold(guest, 1000)
    silent = Mock(wait=None, held=0)
    hall.enter(silent)
    monkeypatch.setattr(gate, "MAX_HELD", 100_000)
    hall.hold(guests[0], 999)
    assert sum(guest.give_way.called for guest in guests) == 1425, "a quarter of the room is free again"
    assert hall._held == 74_999
    assert not silent.give_way.called


def test_a_client_that_leaves_while_its_connection_is_closed_is_no_fault() -> None:
    hall = gate.Gate(10, 60)
    guests = [Mock(wait=None, held=0) for _ in range(2)]
    here, there = socket.socketpair()
    for guest, descriptor in zip(guests, (-1, here.fileno()), strict=True):  # a closed socket has -1
        guest.descriptor.return_value = descriptor
        hall.enter(guest)
        hall.ignore(guest)
    there.close()
    hall.sweep()
    assert [guest.has_left.called for guest in guests] == [False, True]
    here.close()


def test_who_leaves_in_a_crowd_is_let_go_of_in_more_than_one_sweep() -> None:
    hall = gate.Gate(200, 60)
    pairs = [socket.socketpair() for _ in range(100)]
    guests = [Mock(wait=None, held=0) for _ in pairs]
    for guest, (here, there) in zip(guests, pairs, strict=True):
        guest.descriptor.return_value = here.fileno()
        guest.has_left.side_effect = partial(hall.leave, guest)
        hall.enter(guest)
        hall.ignore(guest)
        there.close()
    for so_far in (gate.MOST_AT_ONCE, 100):
        hall.sweep()
        assert sum(guest.has_left.called for guest in guests) == so_far
    for here, _ in pairs:
        here.close()


def test_a_crowd_that_leaves_is_closed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "CLOSE_TURN_SECONDS", 0.05)

    async def test() -> None:
        hall = gate.Gate(500, 60)
        pairs = [connected(None, hall) for _ in range(2 * gate.CLOSES_AT_ONCE + 1)]
        for client, _ in pairs:
            assert client.eof_received(), "the transport leaves it to the connection to close"
        pairs.pop(-2)[0].connection_lost(None)  # of those that wait
        await asyncio.sleep(0)
        assert sum(wire.has_closed for _, wire in pairs) == gate.CLOSES_AT_ONCE
        await until(lambda: all(wire.has_closed for _, wire in pairs))

    run(test)


def test_others_have_their_turn_however_long_a_request_takes_to_begin() -> None:
    work = 3 * gate.START_SECONDS  # of all that begin at once
    begun: list[float] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        begun.append(time.monotonic())
        time.sleep(work / gate.STARTS_AT_ONCE)  # noqa: ASYNC251 - as if this were a slow machine

    async def test() -> None:
        hall = gate.Gate(200, 60)
        for client in [connected(app, hall)[0] for _ in range(gate.STARTS_AFTER_REST + 3 * gate.STARTS_AT_ONCE)]:
            client.data_received(GET + b"\r\n")
        await until(lambda: len(begun) == gate.STARTS_AFTER_REST + 3 * gate.STARTS_AT_ONCE)

    run(test)
    later = begun[gate.STARTS_AFTER_REST :: gate.STARTS_AT_ONCE]
    assert all(b - a >= 0.99 * (work + gate.START_SECONDS) for a, b in pairwise(later)), later


def test_few_requests_begin_in_a_turn_of_the_event_loop_and_a_question_for_liveness_passes_them() -> None:
    begun: list[list[str]] = []  # in each turn

    async def app(scope: Any, receive: Any, send: Any) -> None:
        begun[-1].append(scope["path"])

    async def test() -> None:
        hall = gate.Gate(200, 60, {"/health/live"})
        clients = [connected(app, hall)[0] for _ in range(101)]
        for place, client in enumerate(clients[:-1]):
            client.data_received(b"GET /%d HTTP/1.1\r\n\r\n" % place)
        clients[3].connection_lost(None)  # of those that wait
        clients[40].connection_lost(None)
        clients[-1].data_received(b"GET /health/live HTTP/1.1\r\n\r\n")
        while sum(map(len, begun)) < 100:
            begun.append([])
            await asyncio.sleep(0)

    run(test)
    after_rest, *later = [len(paths) for paths in begun if paths]
    assert after_rest == gate.STARTS_AFTER_REST + 1
    assert max(later) <= gate.STARTS_AT_ONCE
    first, *others = [path for paths in begun for path in paths if path != "/health/live"]
    assert "/health/live" in next(paths for paths in begun if paths)
    assert [first, *others] == [f"/{place}" for place in range(100) if place != 40]


def test_a_question_for_liveness_passes_a_crowd_that_asks_for_it_again_and_again() -> None:
    begun: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        begun.append(scope["query_string"])

    async def test() -> None:
        hall = gate.Gate(500, 60, {"/health/live"})
        clients = [connected(app, hall)[0] for _ in range(201)]
        for client in clients[:100]:
            client.data_received(b"GET /health/live?crowd HTTP/1.1\r\n\r\n" * 2)
        clients[-1].data_received(b"GET /health/live?alone HTTP/1.1\r\n\r\n")
        for client in clients[100:-1]:  # newer ones
            client.data_received(b"GET /health/live?crowd HTTP/1.1\r\n\r\n" * 2)
        await until(lambda: b"alone" in begun)

    run(test)
    assert begun.index(b"alone") <= gate.STARTS_AFTER_REST


def test_long_heads_are_parsed_in_turns_and_short_ones_pass_them() -> None:
    begun: list[list[str]] = []  # in each turn

    async def app(scope: Any, receive: Any, send: Any) -> None:
        begun[-1].append(scope["path"])

    async def test() -> None:
        hall = gate.Gate(200, 60)
        clients = [connected(app, hall)[0] for _ in range(101)]
        for place, client in enumerate(clients[:-1]):
            client.data_received(b"GET /%d HTTP/1.1\r\nx: %s\r\n\r\n" % (place, b"a" * 10_000))
        assert hall._held > 80 * 10_000
        clients[50].connection_lost(None)
        clients[-1].data_received(b"GET /short HTTP/1.1\r\n\r\n")
        while sum(map(len, begun)) < 100:
            begun.append([])
            await asyncio.sleep(0)
        assert hall._held == 0

    run(test)
    assert max(map(len, begun)) == gate.HEADS_PER_TURN + 1
    paths = [path for paths in begun for path in paths]
    assert paths.index("/short") <= 2 * gate.HEADS_PER_TURN
    assert [path for path in paths if path != "/short"] == [f"/{place}" for place in range(100) if place != 50]


def parsed_at_once(clients: list[Connection], text: bytes) -> int:
    """How many of the clients' requests have been parsed when all have come."""
    before = [client.cycle for client in clients]
    for client in clients:
        client.data_received(text)
    return sum(client.cycle is not cycle for client, cycle in zip(clients, before, strict=True))


def test_what_is_a_long_head() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def test() -> None:
        long_head = b"GET / HTTP/1.1\r\nx: %s\r\n\r\n" % (b"a" * 10_000)
        hall = gate.Gate(200, 60)
        clients = [connected(app, hall)[0] for _ in range(50)]
        for _ in range(2):  # on a new connection, and after an answer
            assert parsed_at_once(clients, long_head) == gate.HEADS_PER_TURN
            await until(lambda: hall._held == 0 and all(client.wait == gate.Wait.IDLE for client in clients))
        await asyncio.sleep(8 * gate.START_SECONDS)  # as many may begin at once again
        with_body = b"POST / HTTP/1.1\r\nContent-Length: 100000\r\n\r\n" + b"a" * 100_000
        assert parsed_at_once(clients, with_body) == 50, "the body is none"
        assert hall._held == (50 - gate.STARTS_AFTER_REST) * 100_000, "of those whose turn is later"
        await until(lambda: all(client.wait == gate.Wait.IDLE for client in clients))
        # Each has one place in the line, however often it sends on.
        for client in clients:
            client.data_received(long_head[:5000])
        for _ in range(5):
            for client in clients:
                client.data_received(b"a")
        assert len(hall._long_heads._waiting) == 50 - gate.HEADS_PER_TURN

    run(test)


def test_who_has_left_keeps_no_place_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "AHEAD_SECONDS", 60)
    begun = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        begun.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def test() -> None:
        hall = gate.Gate(200, 60)
        clients = [connected(app, hall)[0] for _ in range(20)]
        for client in clients:
            client.data_received(b"GET / HTTP/1.1\r\n\r\nGET /ahead HTTP/1.1\r\n\r\n")
        await until(lambda: begun.count("/ahead") == gate.AHEAD_AT_ONCE)
        await until(lambda: len(hall._starts_ahead._waiting) == 20 - gate.AHEAD_AT_ONCE)
        for client in clients[::2]:
            client.connection_lost(None)
        for client in clients[1::2]:
            client.eof_received()
        assert not hall._starts_ahead._waiting

    run(test)


def test_requests_that_are_sent_ahead_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "AHEAD_SECONDS", 0.1)
    begun: Counter[float] = Counter()
    start = 0.0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        begun[round(asyncio.get_running_loop().time() - start, 1)] += scope["path"] == "/ahead"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def test() -> None:
        nonlocal start
        start = asyncio.get_running_loop().time()
        hall = gate.Gate(200, 60)
        for _ in range(10):
            connected(app, hall)[0].data_received(b"GET / HTTP/1.1\r\n\r\nGET /ahead HTTP/1.1\r\n\r\n")
        await asyncio.sleep(0.35)

    run(test)
    assert begun == {0.0: 4, 0.1: 4, 0.2: 2}


@contract("connections", "leaving", "a client that leaves is noticed, whatever it sent ahead of its answers")
@pytest.mark.parametrize("ahead", [0, 100_000, connection.MAX_AHEAD + 50_000])
@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_client_that_sends_ahead_and_leaves_frees_its_sequences(ahead: int, loop: Any) -> None:
    async def test() -> None:
        async with listening() as running:
            running.fake.runner.fault = lambda step: time.sleep(0.02)
            whole = post(json.dumps({"model": "fake", "prompt": "a", "max_tokens": 250}).encode())
            _, writer = await opened(running, whole * (2 + ahead // len(whole)))
            await until(lambda: bool(running.fake.scheduler.running))
            await asyncio.sleep(0.1)
            writer.transport.abort()
            left = time.monotonic()
            await until(lambda: running.fake.scheduler.idle and not running.server.server_state.connections)
            assert time.monotonic() - left < 2
            assert running.fake.metric("requests_total", outcome="abort") == 1

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(asyncio.wait_for(test(), 60))


def test_a_body_that_is_not_wanted_is_read_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_DISCARDED", 300_000)

    async def test() -> None:
        async with listening(api_keys=("key",)) as running:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
            (answer, live) = await exchange(running, [head % 200_000 + b"a" * 200_000 + GET + b"\r\n"], 2)
            assert (answer.status_line, live.status_line) == ("HTTP/1.1 401 Unauthorized", "HTTP/1.1 200 OK")
            reader, writer = await opened(running, head % 10**12)
            assert (await read_answer(reader)).status_line == "HTTP/1.1 401 Unauthorized"
            with suppress(ConnectionError):
                for _ in range(1000):
                    writer.write(b"a" * 65_536)
                    await writer.drain()
                    await asyncio.sleep(0)
                pytest.fail("64 MB were read")
            writer.transport.abort()

    run(test)


def test_bodies_that_nobody_wants_are_read_a_piece_at_a_time() -> None:
    pieces: list[int] = []  # read in each turn

    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async def test() -> None:
        hall = gate.Gate(200, 60)
        made = [connected(refuse, hall) for _ in range(50)]
        for client, _ in made:
            client.data_received(b"POST / HTTP/1.1\r\nContent-Length: 10000000\r\n\r\n")
        async with asyncio.timeout(20):
            while not all(client.cycle.response_complete for client, _ in made):
                await asyncio.sleep(0.001)
        read = 0
        while read < 200:
            pieces.append(0)
            for client, transport in made:
                if transport.is_reading_:
                    client.data_received(b"a" * connection.READ)
                    pieces[-1] += 1
            read += pieces[-1]
            await asyncio.sleep(0)

    run(test)
    first, *others = pieces  # each is read once before it is known to be of no use
    assert first == 50
    assert 0 < max(others) <= gate.DISCARDS_AT_ONCE


@pytest.mark.parametrize(
    "start", [GET + b"x: ", b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000000\r\n\r\n"]
)
def test_who_sends_much_before_it_reads_gets_its_answer(start: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_DISCARDED", 1_000_000)

    async def test() -> None:
        async with listening(api_keys=("key",)) as running:
            with socket.create_connection(("127.0.0.1", running.port)) as client:
                client.setblocking(False)
                loop = asyncio.get_running_loop()
                with suppress(TimeoutError):
                    await asyncio.wait_for(loop.sock_sendall(client, start + b"a" * 50_000_000), 0.5)
                answer = await loop.sock_recv(client, 1000)
                assert re.match(rb"HTTP/1.1 4(31|01) ", answer), answer[:50]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # it reads on as long as something comes
        runner.run(asyncio.wait_for(test(), 60))


def test_a_client_that_does_not_take_its_last_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "CLOSE_SECONDS", 0.3)

    async def test() -> None:
        async with listening() as running:
            client = socket.create_connection(("127.0.0.1", running.port))
            client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200)
            await asyncio.sleep(0.5)
            client.shutdown(socket.SHUT_WR)
            await until(lambda: not running.server.server_state.connections)
            client.close()

    run(test)


def test_the_access_log_names_no_query(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with listening() as running:
            for path in ("/health?api_key=secret", "/nope%3Fx?key=secret", "/health/live?api_key=secret"):
                await running.client.get(path)

    with caplog.at_level(logging.INFO, "uvicorn.access"):
        run(test)
    lines = [record.getMessage() for record in caplog.records if record.name == "uvicorn.access"]
    assert [line.partition(" - ")[2] for line in lines] == [
        '"GET /health HTTP/1.1" 200',
        '"GET /nope%3Fx HTTP/1.1" 404',
    ], "questions for liveness are not logged"
    assert "secret" not in caplog.text


def test_a_client_that_leaves_in_the_middle_of_a_body_is_no_fault_of_the_server(caplog: pytest.LogCaptureFixture) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"

    async def test() -> None:
        async with listening() as running:
            _, writer = await asyncio.open_connection("127.0.0.1", running.port)
            writer.write(head + b'{"prompt": ')
            await writer.drain()
            await asyncio.sleep(0.1)
            writer.close()
            await until(lambda: running.fake.metric("http_requests_total", route="/v1/completions", status="499") == 1)

    run(test)
    assert "unexpected error" not in caplog.text


@pytest.mark.parametrize("reads", [True, False])
def test_a_body_is_read_when_its_turn_has_come(reads: bool) -> None:
    """A crowd's bodies stay with the kernel until then, and what nobody asked for is gone after the answer."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while reads and (await receive())["more_body"]:
            pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def test() -> None:
        hall = gate.Gate(200, 60)
        for _ in range(gate.STARTS_AFTER_REST):
            connected(app, hall)[0].data_received(b"GET / HTTP/1.1\r\n\r\n")
        client, _ = connected(app, hall)
        assert len(client.get_buffer(-1)) == connection.READ
        client.data_received(b"POST / HTTP/1.1\r\nContent-Length: 100000\r\n\r\n" + b"a" * 50_000)
        assert client.held == 50_000
        assert client.flow.read_paused
        await until(lambda: client._has_started)
        assert client.held == 0
        assert not client.flow.read_paused
        assert len(client.get_buffer(-1)) > connection.READ
        if not reads:
            await until(lambda: client.cycle.response_complete)
            assert not client.cycle.body
        client.get_buffer(-1)[:50_000] = b"b" * 50_000
        client.buffer_updated(50_000)
        await until(lambda: client.wait == gate.Wait.IDLE)
        assert len(client.get_buffer(-1)) == connection.READ

    run(test)


def test_the_event_loop_reads_into_the_buffer_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    buffer_updated = Connection.buffer_updated

    def noting(client: Connection, nbytes: int) -> None:
        sizes.append(nbytes)
        buffer_updated(client, nbytes)

    monkeypatch.setattr(Connection, "buffer_updated", noting)

    async def test() -> None:
        async with listening() as running:
            answer = await running.client.post("/v1/completions", json={"model": "fake", "prompt": "a " * 100_000})
            assert answer.status_code == 400

    run(test)
    assert sum(sizes) > 200_000
    assert sizes[0] <= connection.READ


def test_a_turn_of_the_event_loop_accepts_many_connections() -> None:
    """uvloop accepts one in each turn and from each descriptor, so that a crowd would keep others waiting."""

    async def test() -> None:
        async with listening() as running:
            assert len(running.server.servers) == ACCEPTS_PER_TURN
            descriptors = {listener.fileno() for server in running.server.servers for listener in server.sockets}
            assert len(descriptors) == ACCEPTS_PER_TURN
            clients = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(3 * ACCEPTS_PER_TURN)]
            await until(lambda: len(running.server.server_state.connections) == len(clients))
            for client in clients:
                client.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", running.port))

    run(test)
