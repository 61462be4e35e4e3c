"""What clients and proxies send on a connection, byte by byte: offers to upgrade, HTTP/1.0, and long silence."""

import asyncio
import json
import random
import time
from collections.abc import Sequence

import pytest

from tests.conformance import contract
from tests.service.api.listening import Running, listening
from tests.service.helpers import run, settings_of

BODY = json.dumps({"model": "fake", "prompt": "a", "max_tokens": 3}).encode()
STREAM = json.dumps({"model": "fake", "prompt": "a", "max_tokens": 3, "stream": True}).encode()
# As the JDK's HttpClient and curl --http2 send it.
H2C = (
    ("Connection", "Upgrade, HTTP2-Settings"),
    ("Upgrade", "h2c"),
    ("HTTP2-Settings", "AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA"),
)


def post(body: bytes, *headers: tuple[str, str], version: str = "1.1", path: str = "/v1/completions") -> bytes:
    given = (("Host", "x"), ("Content-Type", "application/json"), ("Content-Length", str(len(body))), *headers)
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
            get = b"GET /health HTTP/1.1\r\nHost: x\r\n" + offer + b"\r\n"
            chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            chunked = head + b"Transfer-Encoding: chunked\r\n" + offer + b"\r\n" + chunks
            answers = await exchange(running, [get + chunked + get], 3)
            assert [answer.status_line for answer in answers] == ["HTTP/1.1 200 OK"] * 3

    run(test)


def test_connect_is_refused() -> None:
    async def test() -> None:
        async with listening() as running:
            for target in ("example.com:443", "/v1/completions"):
                reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
                writer.write(f"CONNECT {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                answer = await read_answer(reader)
                assert answer.status_line == "HTTP/1.1 400 Bad Request"
                assert answer.body == b"CONNECT is not supported."
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
