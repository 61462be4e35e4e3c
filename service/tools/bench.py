"""Measures a completions server over real HTTP: a fixed number of streams, random prompts, the time of every event.

`banded bench` runs this module from the command line; tests/bench compares Banded with other servers by it. Client and
server share the cores of one machine. While a load runs, the client therefore only records bytes and times; it parses
them afterwards.
"""

import asyncio
import csv
import io
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple, TextIO, cast
from urllib.parse import urlsplit

# Nearly every vocabulary has all of these ids, and its special tokens are not among them.
TOKENS = range(1000, 40000)
# How tokens are drawn: fields of a request, all of which are sent, since servers have defaults of their own.
WHOLE: Mapping[str, float] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
GREEDY: Mapping[str, float] = {**WHOLE, "temperature": 0.0}
CONNECT_SECONDS = 10.0
POLL_SECONDS = 0.02
STOP_SECONDS = 30.0


class BenchError(ValueError):
    """The server does not answer as a completions server should: a failing server has no throughput."""


class Workload(NamedTuple):
    """What to ask for: `requests` streams of `prompt` + `output` tokens, `streams` of them at a time."""

    streams: int
    requests: int
    prompt: int = 128
    output: int = 128
    sampling: Mapping[str, float] = WHOLE  # fields of each request

    @property
    def drawn(self) -> str:
        """How tokens are drawn, in words."""
        if not self.sampling.get("temperature", 1.0):
            return "greedy"
        given = (f"{name} {value:g}" for name, value in self.sampling.items() if value != WHOLE.get(name))
        return ", ".join(given) or "temperature 1"


class Stream(NamedTuple):
    """One answer: when its request was sent, and when each event with a choice arrived."""

    sent: float
    events: list[float]
    cached: int  # prompt tokens that the server reports as cached

    @property
    def first_token(self) -> float:
        return self.events[0] - self.sent


class Result(NamedTuple):
    """The streams of a load. Times are in seconds."""

    load: Workload
    seconds: float
    streams: list[Stream]

    @property
    def tokens_per_second(self) -> float:
        """Output tokens of all streams over the whole time, prompts included."""
        return len(self.streams) * self.load.output / self.seconds

    @property
    def first_token(self) -> list[float]:
        return sorted(stream.first_token for stream in self.streams)

    @property
    def gaps(self) -> list[float]:
        """Times between the events of a stream. A server that sends several tokens in an event looks too slow here."""
        return sorted(later - earlier for stream in self.streams for earlier, later in pairwise(stream.events))


def percentile(ordered: list[float], share: float) -> float:
    """NaN if there are no values."""
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else math.nan


def run_async(main: Coroutine[Any, Any, Result]) -> Result:
    """asyncio.run, on uvloop if it is installed: the client then takes less of the cores."""
    try:
        import uvloop
    except ModuleNotFoundError:
        return asyncio.run(main)
    return uvloop.run(main)


def random_prompts(load: Workload, seed: int | str) -> list[list[int]]:
    rng = random.Random(seed)
    return [rng.choices(TOKENS, k=load.prompt) for _ in range(load.requests)]


def measure(url: str, model: str, load: Workload, *, seed: int | str = 0) -> Result:
    """Put `load` on a server. Equal seeds give equal prompts, which the server may have cached.

    Raises BenchError if no server answers, or if a stream fails or ends early.
    """
    return run_async(keep(url, model, load, random_prompts(load, seed)))


async def keep(url: str, model: str, load: Workload, prompts: list[list[int]]) -> Result:
    """Send `prompts`, `load.streams` at a time."""
    waiting = [request(url, model, prompt, load.output, load.sampling) for prompt in reversed(prompts)]
    done: list[Answer] = []

    async def work() -> None:
        while waiting:
            done.append(await exchange(url, waiting.pop()))

    started = time.perf_counter()
    workers = [asyncio.create_task(work()) for _ in range(load.streams)]
    try:
        await asyncio.gather(*workers)
    finally:  # one failure ends the measurement of all
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    seconds = time.perf_counter() - started
    return Result(load, seconds, [read_stream(url, answer, load.output) for answer in done])


def request(url: str, model: str, prompt: list[int], output: int, sampling: Mapping[str, float] = WHOLE) -> bytes:
    """The bytes that ask for a stream of `output` tokens. The server closes the connection after its answer."""
    fields = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output,
        **sampling,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    parts, body = urlsplit(url), json.dumps(fields).encode()
    headers = {
        "Host": parts.netloc.rpartition("@")[2],
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **authorization(),
    }
    lines = [f"POST {parts.path}/v1/completions HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


def authorization() -> dict[str, str]:
    """The header for a server with keys: OPENAI_API_KEY holds one."""
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


class Answer(NamedTuple):
    """All that a connection received: its pieces, each with the time of its arrival."""

    sent: float
    pieces: list[tuple[float, bytes]]


class Exchange(asyncio.Protocol):
    """Records what arrives until the other side closes the connection, and does nothing else."""

    def __init__(self) -> None:
        self.pieces: list[tuple[float, bytes]] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002
        if not self.ended.done():
            self.ended.set_result(None)  # read_stream finds out whether the answer is complete


async def exchange(url: str, sending: bytes) -> Answer:
    """The answer to one request. Raises BenchError if nobody accepts the connection."""
    parts, sent = urlsplit(url), time.perf_counter()
    secure = parts.scheme == "https"
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            transport, protocol = await asyncio.get_running_loop().create_connection(
                Exchange, str(parts.hostname), parts.port or (443 if secure else 80), ssl=secure or None
            )
    except OSError as error:  # TimeoutError is one
        raise BenchError(f"{url}: no server answers there: {error.strerror or type(error).__name__}") from error
    try:
        transport.write(sending)
        await protocol.ended
    finally:
        transport.abort()
    return Answer(sent, protocol.pieces)


class Replay(io.RawIOBase):
    """Gives the pieces of an answer to a reader as a socket would. `time` is when the last piece read had arrived."""

    def __init__(self, pieces: list[tuple[float, bytes]]):
        self._pieces = iter(pieces)
        self._rest = b""
        self.time = math.nan

    def makefile(self, mode: str) -> io.BufferedReader:  # noqa: ARG002
        """HTTPResponse calls this on its socket."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self.time, self._rest = next(self._pieces, (self.time, b""))
        count = min(len(self._rest), len(buffer))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def read_stream(url: str, answer: Answer, output: int) -> Stream:
    """The stream in an answer. Raises BenchError if it is not a completion of `output` tokens."""
    route, replay = f"{url}/v1/completions", Replay(answer.pieces)
    try:
        response = HTTPResponse(cast(socket.socket, replay))
        response.begin()
        if response.status != 200:
            raise BenchError(f"{route}: HTTP {response.status}: {message(response.read().decode(errors='replace'))}")
        return read_events(route, response, replay, answer.sent, output)
    except (HTTPException, OSError) as error:
        raise BenchError(f"{route}: the stream broke off: {error or type(error).__name__}") from error


def read_events(route: str, response: HTTPResponse, replay: Replay, sent: float, output: int) -> Stream:
    times, usage, done = list[float](), dict[str, Any](), False
    for line in response:
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            done = True
        elif line.startswith(b"data:"):
            try:
                event = json.loads(data)
                if event.get("error"):
                    raise BenchError(f"{route}: error event: {message(data.decode())}")
                if event["choices"]:
                    times.append(replay.time)
                usage = event.get("usage") or usage
            except (json.JSONDecodeError, KeyError, AttributeError) as error:
                raise BenchError(f"{route}: no event of a completion: {data[:200].decode(errors='replace')}") from error
    if response.length:  # iterating over lines does not notice that bytes are missing
        raise IncompleteRead(b"", response.length)
    tokens = usage.get("completion_tokens", 0)
    if not done or tokens != output or not times:
        ended = " and without [DONE]" if not done else "" if times else " and no text"
        raise BenchError(f"{route}: a stream ended with {tokens} of {output} tokens{ended}")
    return Stream(sent, times, (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


def message(text: str) -> str:
    """The message of an error in OpenAI's shape, or the beginning of any other text."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text.strip()[:300]


def get(url: str, path: str) -> tuple[int, str]:
    """Status and body. Raises OSError or HTTPException if nobody answers."""
    parts = urlsplit(url)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    with closing(kind(parts.hostname or "", parts.port, timeout=CONNECT_SECONDS)) as connection:
        connection.request("GET", parts.path + path, headers=authorization())
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")


def base_url(url: str) -> str:
    """A server's address without the /v1 that clients of OpenAI's API append. Raises BenchError if it is none."""
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise BenchError(f"--url {url}: an address begins with http:// or https:// and names a host")
    return url.rstrip("/").removesuffix("/v1")


def served_model(url: str) -> str:
    """The first model that a server lists. Raises BenchError if it lists none."""
    try:
        status, text = get(url, "/v1/models")
    except (OSError, HTTPException) as error:
        raise BenchError(f"{url}: no server answers there: {getattr(error, 'strerror', None) or error}") from error
    if status != 200:
        raise BenchError(f"{url}/v1/models: HTTP {status}: {message(text)}")
    try:
        return str(json.loads(text)["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise BenchError(f"{url}/v1/models: no list of models: {text[:200]}") from error


class Program(NamedTuple):
    """A server to start: --port is appended to `command`, and the path `health` answers 200 once it is ready."""

    command: tuple[str, ...]
    health: str = "/health/ready"
    environment: tuple[tuple[str, str], ...] = ()


class RunningServer(NamedTuple):
    """A started program that is ready."""

    url: str
    process: subprocess.Popen[bytes]
    seconds: float  # from its start until it was ready


def banded(model: str | Path, *options: str) -> Program:
    """`banded serve` in this interpreter."""
    main = "import sys; from service.cli import main; sys.exit(main())"
    return Program((sys.executable, "-c", main, "serve", "--model", str(model), "--host", "127.0.0.1", *options))


@contextmanager
def running(program: Program, *, timeout: float = 120) -> Iterator[RunningServer]:
    """Start a program on a free port of this machine, and at the end stop it and all its processes.

    Raises BenchError, with the end of its log, if it exits or is not ready in time.
    """
    with tempfile.TemporaryFile("w+b") as log, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        taken.close()
        url, started = f"http://127.0.0.1:{port}", time.perf_counter()
        process = subprocess.Popen(
            [*program.command, "--port", str(port)],
            # A server with a data directory would resume its jobs during the measurement.
            env={name: value for name, value in os.environ.items() if name != "BANDED_DATA_DIR"} | dict(program.environment),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while not is_ready(url, program.health):
                if process.poll() is not None:
                    raise BenchError(f"the server ended with status {process.returncode} before it was ready: {tail(log)}")
                if time.perf_counter() - started > timeout:
                    raise BenchError(f"the server was not ready after {timeout:g} s: {tail(log)}")
                time.sleep(POLL_SECONDS)
            yield RunningServer(url, process, time.perf_counter() - started)
        finally:
            end(process)


def is_ready(url: str, path: str) -> bool:
    try:
        return get(url, path)[0] == 200
    except (OSError, HTTPException):
        return False


def tail(log: IO[bytes]) -> str:
    """The last non-empty lines."""
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()
    return "\n".join([line for line in lines if line.strip()][-8:])


def end(process: subprocess.Popen[bytes]) -> None:
    """Stop a server by SIGTERM, and after a while kill it and whatever it has started."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


COLUMNS = {
    "streams": "8",
    "requests": "9",
    "tokens/s": "9.1f",
    "TTFT p50 ms": "12.1f",
    "TTFT p99 ms": "12.1f",
    "gap p50 ms": "11.2f",
    "gap p99 ms": "11.2f",
}


def bench(url: str, model: str, loads: list[Workload], out: TextIO, rows: TextIO | None) -> None:
    """Print a table with a row for each load, as soon as it is measured. `rows`, if given, gets the same as CSV."""
    print(f"{url}, {model}: {loads[0].prompt} + {loads[0].output} tokens, {loads[0].drawn}, streaming", file=out)
    print(" ".join(f"{name:>{width.partition('.')[0]}}" for name, width in COLUMNS.items()), file=out, flush=True)
    writer = csv.writer(rows) if rows else None
    if writer:
        writer.writerow(("url", "model", "prompt", "output", "sampling", *COLUMNS))
    measure(url, model, loads[0]._replace(streams=1, requests=1, output=min(loads[0].output, 8)), seed="warm-up")
    for load in loads:
        result = measure(url, model, load, seed=f"{load} {time.time()}")
        times = [1e3 * percentile(values, share) for values in (result.first_token, result.gaps) for share in (0.5, 0.99)]
        row = (load.streams, load.requests, result.tokens_per_second, *times)
        print(" ".join(f"{value:{form}}" for value, form in zip(row, COLUMNS.values(), strict=True)), file=out, flush=True)
        if writer:
            writer.writerow((url, model, load.prompt, load.output, load.drawn, *(round(value, 3) for value in row)))
