"""What a stranger without a key can cost a server: each attack, and what others felt of it.

    python -m tests.attacks.before_the_key [--scale 0.1] [--only silent ...] [--url http://HOST:PORT --pid PID]

starts `banded serve` with a key for each attack, runs them at full size one after another, and prints the worst /health/live
next to that of three calm seconds before, the memory and the CPU time that it cost. It exits with 1 if one is over.
The attacks are on this machine's loopback only. They need 5100 file descriptors, and half a minute for each that waits.
"""

import argparse
import asyncio
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

from tests.attacks.table import last_line, run
from tests.serving import banded_serve

# What an attack may cost: seconds of the worst /health/live, bytes of memory, seconds of CPU.
LIVE, MEMORY, CPU = 0.1, 50 << 20, 2.0
PATIENCE = 45.0  # seconds after which a connection that the server should have ended counts as never ended
BLOCK = 1 << 16
KEY = "the-key"
GET = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


class Target(NamedTuple):
    host: str
    port: int


LEAVING = "two_answers_and_leave"

Attack = Callable[[Target, float], Coroutine[Any, Any, str]]


async def flood(target: Target, start: bytes, block: bytes, total: float, *, reads: bool = True) -> str:
    """Send `start`, and `block` again and again until `total` bytes are sent or the server has had enough. Its answer."""
    reader, writer = await asyncio.open_connection(target.host, target.port)
    reading = asyncio.create_task(answer(reader)) if reads else None
    sent = 0
    with suppress(OSError, TimeoutError):
        writer.write(start)
        while sent < total and not (reading and reading.done()):
            writer.write(block)
            async with asyncio.timeout(PATIENCE if reads else 3):
                await writer.drain()
            sent += len(block)
    if reading:
        await asyncio.wait([reading], timeout=2)
    outcome = (reading.result() if reading.done() else "still open") if reading else "not read"
    writer.transport.abort()
    if reading:
        await reading
    return f"{outcome} after {sent:,} bytes"


async def answer(reader: asyncio.StreamReader) -> str:
    """The status of what comes until the connection ends."""
    text = b""
    with suppress(OSError):
        while chunk := await reader.read(BLOCK):
            text = (text + chunk)[:BLOCK]
    return text.split(b" ", 2)[1].decode() if text.startswith(b"HTTP/1.1 ") else "no answer"


async def header_without_end(target: Target, scale: float) -> str:
    return await flood(target, GET[:-2] + b"x-a: ", b"a" * BLOCK, 315e6 * scale)


async def many_short_headers(target: Target, scale: float) -> str:
    return await flood(target, GET[:-2], b"a: b\r\n" * (BLOCK // 6), 52e6 * scale)


async def many_connections_with_headers(target: Target, scale: float) -> str:
    """1000 heads that stop just below the bound."""
    start = GET[:-2] + b"".join(b"x-%d: %s\r\n" % (place, b"a" * 640) for place in range(95))

    async def one() -> bool:
        reader, writer = await asyncio.open_connection(target.host, target.port)
        writer.write(start)
        try:
            async with asyncio.timeout(PATIENCE * scale + 1):
                await reader.read()
        except TimeoutError:
            return False
        except OSError:  # reset, because not all of the head had been read
            return True
        finally:
            writer.transport.abort()
        return True

    ended = await asyncio.gather(*(one() for _ in range(int(1000 * scale))))
    return f"{sum(ended)} of {len(ended)} ended by the server"


async def line_without_end(target: Target, scale: float) -> str:
    return await flood(target, b"GET /", b"a" * BLOCK, 105e6 * scale)


async def blank_lines(target: Target, scale: float) -> str:
    return await flood(target, b"", b"\r\n" * (BLOCK // 2), 52e6 * scale)


async def chunk_extension_without_end(target: Target, scale: float) -> str:
    return await flood(target, CHUNKED + b"1;", b"a" * BLOCK, 105e6 * scale)


async def trailer_without_end(target: Target, scale: float) -> str:
    return await flood(target, CHUNKED + b"0\r\nx-a: ", b"a" * BLOCK, 105e6 * scale)


async def tiny_chunks(target: Target, scale: float) -> str:
    return await flood(target, CHUNKED, b"1\r\na\r\n" * (BLOCK // 6), 52e6 * scale)


async def body_without_end(target: Target, scale: float) -> str:
    """After the answer, which is a 401."""
    return await flood(target, POST + b"Content-Length: 1000000000000\r\n\r\n", b"a" * BLOCK, 1e9 * scale)


async def bodies_at_once(target: Target, scale: float) -> str:
    """1000 connections that send a body of a quarter of a megabyte all at once, half of them in chunks."""
    body = b"a" * 250_000
    whole = POST + b"Content-Length: 250000\r\n\r\n" + body
    opened = await open_many(target, int(1000 * scale), b"")
    for place, (_, writer) in enumerate(opened):
        writer.write(whole if place % 2 else CHUNKED + b"3D090\r\n" + body + b"\r\n0\r\n\r\n")
    statuses = await asyncio.gather(
        *(asyncio.wait_for(reader.readline(), 20) for reader, _ in opened), return_exceptions=True
    )
    for _, writer in opened:
        writer.transport.abort()
    return f"{sum(b' 401 ' in status for status in statuses if isinstance(status, bytes))} of {len(opened)} got a 401"


async def upgrade_without_end(target: Target, scale: float) -> str:
    return await flood(target, GET[:-2] + b"Connection: upgrade\r\nUpgrade: ", b"a" * BLOCK, 105e6 * scale)


async def tunnel(target: Target, scale: float) -> str:
    return await flood(target, b"CONNECT a:1 HTTP/1.1\r\nHost: localhost\r\n\r\n", b"a" * BLOCK, 105e6 * scale)


async def pipelined(target: Target, scale: float) -> str:
    """A million requests of 38 bytes, whose answers nobody reads."""
    request = b"GET /health/live HTTP/1.1\r\nHost:a\r\n\r\n"
    return await flood(target, b"", request * 1000, len(request) * 1e6 * scale, reads=False)


async def pipelined_by_many(target: Target, scale: float) -> str:
    """1000 connections that each pipeline a third of a megabyte and read nothing."""
    ends = await asyncio.gather(*(pipelined(target, 0.01) for _ in range(int(1000 * scale))))
    return f"{len(ends)} connections, the last: {ends[-1] if ends else ''}"


async def open_many(target: Target, count: int, first: bytes) -> list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    found = []
    for _ in range(count):
        with suppress(OSError):
            found.append(await asyncio.open_connection(target.host, target.port))
            found[-1][1].write(first)
    return found


async def ended_by_the_server(opened: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]], seconds: float) -> str:
    async def one(reader: asyncio.StreamReader) -> str:
        try:
            async with asyncio.timeout(seconds):
                text = await reader.read()
            return text[9:12].decode() or "no answer"
        except TimeoutError:
            return "open"
        except OSError:
            return "reset"

    ends = await asyncio.gather(*(one(reader) for reader, _ in opened))
    for _, writer in opened:
        writer.transport.abort()
    return ", ".join(f"{ends.count(end)} {end}" for end in sorted({*ends})) or "none connected"


async def silent(target: Target, scale: float) -> str:
    """5000 connections that send nothing."""
    return await ended_by_the_server(await open_many(target, int(5000 * scale), b""), PATIENCE)


async def slow_heads(target: Target, scale: float) -> str:
    """1000 connections that send a byte of their head each second."""
    return await trickle(target, int(1000 * scale), GET[:-2] + b"x-a: ")


async def slow_bodies(target: Target, scale: float) -> str:
    """1000 connections that send a byte of their body each second. Their answer has come, a 401."""
    return await trickle(target, int(1000 * scale), POST + b"Content-Length: 100000\r\n\r\n")


async def slow_chunks(target: Target, scale: float) -> str:
    """1000 connections that send a byte of a chunk's length and extension each second."""
    return await trickle(target, int(1000 * scale), CHUNKED + b"1;")


async def trickle(target: Target, count: int, start: bytes) -> str:
    opened = await open_many(target, count, start)

    async def drip() -> None:
        while True:
            await asyncio.sleep(1)
            for _, writer in opened:
                if not writer.transport.is_closing():
                    writer.write(b"a")

    dripping = asyncio.create_task(drip())
    result = await ended_by_the_server(opened, PATIENCE)
    dripping.cancel()
    return result


async def idle(target: Target, scale: float) -> str:
    """5000 connections that have had an answer and stay."""
    opened = []
    for _ in range(int(5000 * scale)):
        opened += await open_many(target, 1, GET)
        await opened[-1][0].readuntil(b"}")
    await asyncio.sleep(10 * scale)
    kept = sum(not reader.at_eof() and not reader.exception() for reader, _ in opened)
    for _, writer in opened:
        writer.transport.abort()
    return f"{kept} of {len(opened)} still open"


async def half_closed(target: Target, scale: float) -> str:
    """1000 connections that pipeline, say that they are done, and read nothing."""
    opened = await open_many(target, int(1000 * scale), GET * 1000)
    for _, writer in opened:
        with suppress(OSError):
            writer.write_eof()
    await asyncio.sleep(5 * scale)
    for _, writer in opened:
        writer.transport.abort()
    return f"{len(opened)} connections"


ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
        header_without_end,
        many_short_headers,
        line_without_end,
        silent,
        slow_heads,
        slow_bodies,
        pipelined,
        idle,
        # Neighbours.
        many_connections_with_headers,
        blank_lines,
        chunk_extension_without_end,
        trailer_without_end,
        tiny_chunks,
        slow_chunks,
        body_without_end,
        bodies_at_once,
        upgrade_without_end,
        tunnel,
        pipelined_by_many,
        half_closed,
    )
}


async def leave(target: Target, clients: int, body: bytes, is_busy: Callable[[], Awaitable[bool]]) -> float:
    """Clients that pipeline two whole answers and leave: the seconds until nothing of theirs runs."""
    request = POST + b"Authorization: Bearer %s\r\nContent-Length: %d\r\n\r\n" % (KEY.encode(), len(body)) + body
    opened = await open_many(target, clients, request * 2)
    async with asyncio.timeout(60):
        while not await is_busy():
            await asyncio.sleep(0.05)
    await asyncio.sleep(1)
    for _, writer in opened:
        writer.close()
    left = time.monotonic()
    async with asyncio.timeout(120):
        while await is_busy():
            await asyncio.sleep(0.05)
    return time.monotonic() - left


async def get(target: Target, path: str) -> bytes:
    """The answer to a request with the key on a connection of its own. Raises OSError if there is none."""
    reader, writer = await asyncio.open_connection(target.host, target.port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n".encode())
        writer.write(b"Connection: close\r\n\r\n")
        text = await reader.read()
        if not text.startswith(b"HTTP/1.1 200"):
            raise ConnectionError(f"{path} answered {text[:40]!r}")
        return text
    finally:
        writer.transport.abort()


class Cost(NamedTuple):
    """What an attack cost the server and the others."""

    live: float  # seconds of the worst /health/live, infinite where one failed
    memory: int  # bytes
    cpu: float  # seconds


def spent(pid: int) -> tuple[int, float]:
    """Bytes of memory, and seconds of CPU time so far, of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    memory = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    return memory, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def watch(target: Target, pid: int, is_going_on: Callable[[], bool]) -> Cost:
    """Ask for /health/live, on a new connection each time, as long as something goes on."""
    before, cpu = spent(pid)
    worst, most = 0.0, before
    while is_going_on():
        asked = time.monotonic()
        try:
            async with asyncio.timeout(60):
                await get(target, "/health/live")
            worst = max(worst, time.monotonic() - asked)
        except (OSError, TimeoutError) as error:
            print(f"  /health/live failed: {type(error).__name__}: {error}")
            worst = float("inf")
        most = max(most, spent(pid)[0])
        await asyncio.sleep(0.05)
    return Cost(worst, most - before, spent(pid)[1] - cpu)


def begin(command: list[str], said: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=said)


async def measure(name: str, target: Target, pid: int, scale: float) -> bool:
    """Run an attack in a process of its own and print what it cost, less the CPU time that the watching takes."""
    started = time.monotonic()
    calm = await watch(target, pid, lambda: time.monotonic() < started + 3)
    command = [sys.executable, "-m", "tests.attacks.before_the_key", "--attack", name, "--scale", str(scale)]
    with tempfile.TemporaryFile() as said:
        started = time.monotonic()
        attacking = begin([*command, "--url", f"http://{target.host}:{target.port}"], said)
        felt = await watch(target, pid, lambda: attacking.poll() is None)
        ended = time.monotonic()
        after = await watch(target, pid, lambda: time.monotonic() < ended + 1)
        said.seek(0)
        outcome = said.read().decode().strip()
    live, memory = max(felt.live, after.live), max(felt.memory, after.memory)
    cpu = felt.cpu + after.cpu - calm.cpu / 3 * (time.monotonic() - started)
    over = live > LIVE or memory > MEMORY or cpu > CPU
    figures = f"{live * 1000:>9.0f}{calm.live * 1000:>6.0f}{memory / 2**20:>7.0f}{cpu:>8.2f}"
    print(f"{name:<32}{figures}  {'OVER: ' if over else ''}{outcome}", flush=True)
    return not over


async def measure_leaving(target: Target, model: str) -> bool:
    async def is_busy() -> bool:
        lines = (await get(target, "/metrics")).decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("banded_requests_running{")) > 0

    body = b'{"model": "%s", "prompt": "Once", "max_tokens": 2000, "ignore_eos": true}' % model.encode()
    seconds = await leave(target, 16, body, is_busy)
    print(f"{LEAVING:<32}{'':>30}  {'OVER: ' if seconds > 2 else ''}freed after {seconds:.2f} s")
    return seconds <= 2


def main() -> int:
    options = argparse.ArgumentParser()
    options.add_argument("--scale", type=float, default=1.0, help="share of the full size")
    options.add_argument("--only", nargs="+", choices=[*ATTACKS, LEAVING], default=[*ATTACKS, LEAVING])
    options.add_argument("--url", help="a server that runs already, with its --pid; otherwise each attack gets a new one")
    options.add_argument("--pid", type=int)
    options.add_argument("--model", default="demo")
    options.add_argument("--attack", choices=ATTACKS, help=argparse.SUPPRESS)  # as measure() calls itself
    args = options.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    if args.attack:
        os.nice(10)  # an attacker takes no processor from the server and from those who ask it
        print(asyncio.run(ATTACKS[args.attack](target_of(args.url), args.scale)))
        return 0
    print(f"{'attack':<32}{'live, ms':>9}{'calm':>6}{'+MB':>7}{'CPU, s':>8}  outcome")
    print(f"{'at most':<32}{LIVE * 1000:>9.0f}{'':>6}{MEMORY / 2**20:>7.0f}{CPU:>8.2f}", flush=True)
    missed = 0
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            url, pid = args.url, args.pid
            if not url:
                served = stack.enter_context(banded_serve(Path("demo"), Path(folder, "log"), BANDED_API_KEYS=KEY))
                url, pid = served.url, served.process.pid
            if name == LEAVING:
                missed += not asyncio.run(measure_leaving(target_of(url), args.model))
            else:
                missed += not asyncio.run(measure(name, target_of(url), pid, args.scale))
    print(last_line(len(args.only), missed))
    return int(missed > 0)


def target_of(url: str) -> Target:
    parts = urlsplit(url)
    return Target(str(parts.hostname), parts.port or 80)


if __name__ == "__main__":
    run(main)
