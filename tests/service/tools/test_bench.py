"""`banded bench`: its requests, its counts, and its message for a server that does not answer as it should."""

import csv
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from service.cli import main
from service.tools import bench
from service.tools.bench import (
    Answer,
    BenchError,
    Program,
    Result,
    Stream,
    Workload,
    base_url,
    measure,
    read_stream,
    running,
)
from tests.model.checkpoint.checkpoints import tiny
from tests.serving import PATIENCE


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No settings and no key in the environment, and the signal handler as it was."""
    for name in [name for name in os.environ if name.startswith("BANDED_") or name == "OPENAI_API_KEY"]:
        monkeypatch.delenv(name)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def events(*chunks: dict[str, Any], done: bool = True) -> bytes:
    """Server-sent events."""
    lines = [json.dumps(chunk) for chunk in chunks] + ["[DONE]"] * done
    return "".join(f"data: {line}\n\n" for line in lines).encode()


def text(word: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": word}]}


def usage(tokens: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"completion_tokens": tokens, "prompt_tokens_details": {"cached_tokens": 5}}}


WHOLE = events(text("a"), text("b"), text("c"), usage(3))


class Answering:
    """A completions server that gives everybody the same answer and remembers what it was asked."""

    def __init__(self) -> None:
        self.status, self.answer, self.missing = 200, WHOLE, 0
        self.models: tuple[int, Any] = (200, {"data": [{"id": "parrot"}, {"id": "other"}]})
        self.seconds = 0.0
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.url = ""
        self._running = 0
        self.most_running = 0
        self._lock = threading.Lock()

    def handle(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, bytes]:
        self.keys.add(request.headers["Authorization"])
        if request.path == "/v1/models":
            return self.models[0], json.dumps(self.models[1]).encode()
        with self._lock:
            self.asked.append(json.loads(body))
            self._running += 1
            self.most_running = max(self.most_running, self._running)
        time.sleep(self.seconds)
        with self._lock:
            self._running -= 1
        return self.status, self.answer


@pytest.fixture
def server() -> Iterator[Answering]:
    answering = Answering()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"] or 0))
            status, content = answering.handle(self, body)
            self.send_response(status)
            self.send_header("content-length", str(len(content) + answering.missing))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = answer

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        answering.url = f"http://127.0.0.1:{listening.server_address[1]}"
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield answering
        listening.shutdown()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of `banded bench` when it ends with status 2."""
    assert main(["bench", *map(str, arguments)]) == 2
    return capsys.readouterr().err.removeprefix("banded: ").removesuffix("\n")


def test_times_are_those_of_the_events() -> None:
    streams = [Stream(10.0, [10.5, 10.7, 11.0], 0), Stream(10.0, [12.0, 12.1], 0)]
    result = Result(Workload(2, 2, 8, 3), 3.0, streams)
    assert result.tokens_per_second == 2 * 3 / 3.0
    assert result.first_token == pytest.approx([0.5, 2.0])
    assert result.gaps == pytest.approx([0.1, 0.2, 0.3])


def in_chunks(body: bytes) -> bytes:
    """An answer whose body is cut into chunks anywhere, as a proxy may do."""
    rng, chunks = random.Random(len(body)), list[bytes]()
    while body:
        size = rng.randint(1, 40)
        chunks.append(b"%x\r\n%b\r\n" % (len(body[:size]), body[:size]))
        body = body[size:]
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(chunks) + b"0\r\n\r\n"


def in_one_piece(body: bytes) -> bytes:
    """An answer that ends with the connection."""
    return b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body


@pytest.mark.parametrize("pad", [0, 20_000], ids=["short", "longer than a buffer"])
@pytest.mark.parametrize("chunked", [True, False])
def test_an_event_came_when_the_end_of_its_line_came(chunked: bool, pad: int) -> None:
    body = events(text("a"), text("b" + " " * pad), text("c"), usage(3))
    answer = in_chunks(body) if chunked else in_one_piece(body)
    by_byte = [(float(place), answer[place : place + 1]) for place in range(len(answer))]
    found = read_stream("http://h", Answer(-1.0, by_byte), 3)
    assert found.sent == -1
    assert [answer[int(time) : int(time) + 1] for time in found.events] == [b"\n"] * 3
    if not chunked:
        ends = [match.start() for match in re.finditer(rb"\n\n", answer)]
        assert found.events == ends[:3]
    for seed in range(5):
        rng, pieces, start = random.Random(seed), list[tuple[float, bytes]](), 0
        while start < len(answer):
            end = start + rng.choice([1, 10, 100, 10_000])
            pieces.append((float(min(end, len(answer)) - 1), answer[start:end]))
            start = end
        came = [next(at for at, _ in pieces if at >= time) for time in found.events]
        assert read_stream("http://h", Answer(-1.0, pieces), 3).events == came


def test_percentiles() -> None:
    values = [float(i) for i in range(100)]
    assert [bench.percentile(values, share) for share in (0, 0.5, 0.99, 1)] == [0, 50, 99, 99]
    assert math.isnan(bench.percentile([], 0.5))


def test_a_load_is_what_was_asked_for(server: Answering, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.seconds = 0.05
    result = measure(server.url, "parrot", Workload(3, 8, prompt=17, output=3), seed=1)
    assert len(result.streams) == len(server.asked) == 8
    assert server.most_running == 3
    assert all(stream.first_token >= 0.05 and stream.cached == 5 and len(stream.events) == 3 for stream in result.streams)
    assert server.keys == {"Bearer secret"}
    prompts = [tuple(body.pop("prompt")) for body in server.asked]
    assert len(set(prompts)) == 8
    assert {len(prompt) for prompt in prompts} == {17}
    assert server.asked[0] == {
        "model": "parrot",
        "max_tokens": 3,
        "temperature": 1,
        "top_k": 0,
        "top_p": 1,
        "min_p": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    server.asked.clear()
    measure(server.url, "parrot", Workload(1, 8, prompt=17, output=3), seed=1)
    # Three requests at once may arrive in any order.
    assert {tuple(body["prompt"]) for body in server.asked} == set(prompts)


BAD_REQUEST = json.dumps({"error": {"message": "prompt is too long", "code": 400}}).encode()


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (400, BAD_REQUEST, "HTTP 400: prompt is too long"),
        (502, b"<html>bad gateway</html>\n", "HTTP 502: <html>bad gateway</html>"),
        (200, events(text("a"), {"error": {"message": "a step failed"}}), "error event: a step failed"),
        (200, events(text("a"), {"error": "broken"}), 'error event: {"error": "broken"}'),
        (200, events(text("a"), text("b"), usage(2)), "a stream ended with 2 of 3 tokens"),
        (200, events(text("a"), usage(3), done=False), "a stream ended with 3 of 3 tokens and without [DONE]"),
        (200, events(text("a"), text("b"), done=False), "a stream ended with 0 of 3 tokens and without [DONE]"),
        (200, events(usage(3)), "a stream ended with 3 of 3 tokens and no text"),
        (200, b"data: hello\n\n", "no event of a completion: hello"),
        (200, events({"object": "chat"}), 'no event of a completion: {"object": "chat"}'),
        (200, b"data: [1]\n\n", "no event of a completion: [1]"),
    ],
)
def test_answers_that_are_no_whole_stream(
    server: Answering, capsys: pytest.CaptureFixture[str], status: int, answer: bytes, message: str
) -> None:
    server.status, server.answer = status, answer
    line = refused(capsys, "--url", server.url, "--streams", 2, "--output", 3)
    assert line == f"{server.url}/v1/completions: {message}"


def test_a_stream_that_breaks_off(server: Answering, capsys: pytest.CaptureFixture[str]) -> None:
    server.missing = 100
    line = refused(capsys, "--url", server.url, "--model", "parrot", "--streams", 1, "--output", 3)
    assert line.startswith(f"{server.url}/v1/completions: the stream broke off: ")


@pytest.mark.parametrize("whole", [in_chunks(WHOLE), in_one_piece(WHOLE)], ids=["chunked", "closed at the end"])
def test_an_answer_that_ends_anywhere(whole: bytes) -> None:
    for end in range(whole.index(b"ONE]")):
        with pytest.raises(BenchError, match=r"^http://h/v1/completions: (the stream broke off|a stream ended|no event)"):
            read_stream("http://h", Answer(0.0, [(1.0, whole[:end])] if end else []), 3)


def test_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        for options in ((), ("--model", "parrot")):
            assert refused(capsys, "--url", url, *options).startswith(f"{url}: no server answers there: ")


def test_a_connection_that_takes_too_long(
    server: Answering, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "CONNECT_SECONDS", 0)
    line = refused(capsys, "--url", server.url, "--model", "parrot", "--streams", 1)
    assert line == f"{server.url}: no server answers there: TimeoutError"


def test_a_server_that_answers_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"

        def hang_up() -> None:
            taken, _ = listening.accept()
            taken.recv(1 << 16)
            taken.close()

        threading.Thread(target=hang_up, daemon=True).start()
        line = refused(capsys, "--url", url, "--model", "parrot", "--streams", 1)
    assert line == f"{url}/v1/completions: the stream broke off: Remote end closed connection without response"


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ((401, {"error": {"message": "no key"}}), "HTTP 401: no key"),
        ((200, {"data": []}), 'no list of models: {"data": []}'),
        ((200, ["parrot"]), 'no list of models: ["parrot"]'),
    ],
)
def test_a_server_that_names_no_model(
    server: Answering, capsys: pytest.CaptureFixture[str], models: tuple[int, Any], message: str
) -> None:
    server.models = models
    assert refused(capsys, "--url", server.url) == f"{server.url}/v1/models: {message}"


def test_a_table_and_the_same_as_csv(server: Answering, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "table.csv"
    options = ["--url", f"{server.url}/v1/", "--streams", "1", "2", "--prompt", "5", "--output", "3", "--csv", str(file)]
    assert main(["bench", *options, "--temperature", "0.5", "--top-p", "0.9"]) == 0
    title, header, *lines = capsys.readouterr().out.splitlines()
    assert title == f"{server.url}, parrot: 5 + 3 tokens, temperature 0.5, top_p 0.9, streaming"
    assert header.split("  ")[0].strip() == "streams"
    assert [line.split()[:2] for line in lines] == [["1", "3"], ["2", "4"]]
    assert [len(line) for line in lines] == [len(header)] * 2
    columns, *rows = file.read_text().splitlines()
    assert columns.startswith("url,model,prompt,output,sampling,streams,requests,tokens/s,TTFT p50 ms,")
    assert [row[:7] for row in csv.reader(rows)] == [
        [server.url, "parrot", "5", "3", "temperature 0.5, top_p 0.9", n, m] for n, m in (("1", "3"), ("2", "4"))
    ]
    assert len(server.asked) == 1 + 3 + 4  # one to warm up
    assert {(body["temperature"], body["top_k"], body["top_p"]) for body in server.asked} == {(0.5, 0, 0.9)}


def test_how_tokens_are_drawn_in_words() -> None:
    assert [Workload(1, 1, sampling=sampling).drawn for sampling in (bench.WHOLE, bench.GREEDY)] == [
        "temperature 1",
        "greedy",
    ]
    assert Workload(1, 1, sampling={**bench.WHOLE, "top_k": 40, "logprobs": 5}).drawn == "top_k 40, logprobs 5"


def test_a_server_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tiny("banded", tmp_path, vocab_size=50257)
    command = [
        "bench",
        "--model",
        str(directory),
        "--dtype",
        "float32",
        "--streams",
        "2",
        "--requests",
        "2",
        "--prompt",
        "8",
    ]
    assert main([*command, "--output", "4"]) == 0
    title, _, line = capsys.readouterr().out.splitlines()
    assert ", banded: 8 + 4 tokens" in title
    streams, requests, *figures = map(float, line.split())
    assert (streams, requests) == (2, 2)
    assert all(figure > 0 for figure in figures[:2])


def test_a_server_of_its_own_that_does_not_start(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "--model", "/nowhere")
    assert line.startswith("the server ended with status 2 before it was ready: ")
    assert "/nowhere: no such directory" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "localhost:8000"], "--url localhost:8000: an address begins with http:// or https:// and names a host"),
        (["--url", "http://"], "--url http://: an address begins with http:// or https:// and names a host"),
        (["--requests", "4", "--streams", "2", "8"], "--requests 4 can't keep 8 streams in flight"),
        (
            ["--url", "http://localhost", "--dtype", "float32"],
            "--dtype and --device say how a server is started; the one at --url runs already",
        ),
        (["--dtype", "float64"], "dtype: Input should be "),
        (["--csv", "/nowhere/table.csv"], "[Errno 2] No such file or directory: '/nowhere/table.csv'"),
    ],
)
def test_options_that_do_not_go_together(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert refused(capsys, *arguments).startswith(message)


@pytest.mark.parametrize("option", ["--streams", "--prompt", "--output", "--requests"])
def test_counts_begin_at_one(capsys: pytest.CaptureFixture[str], option: str) -> None:
    with pytest.raises(SystemExit):
        main(["bench", option, "0"])
    assert f"argument {option}: must be at least 1, got 0" in capsys.readouterr().err


def test_addresses() -> None:
    for url in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
        assert base_url(url) == "http://h:1"
    assert base_url("https://h/prefix/v1") == "https://h/prefix"


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


CHILD = "import subprocess, time; subprocess.Popen(['sleep', '60']); print('here I am', flush=True); "


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (CHILD + "time.sleep(60)", "the server was not ready after 1.5 s: here I am"),
        (CHILD + "raise SystemExit(3)", "the server ended with status 3 before it was ready: here I am"),
    ],
)
def test_a_program_that_never_gets_ready_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    started: list[int] = []
    popen = subprocess.Popen

    def remember(*args: Any, **options: Any) -> Any:
        process = popen(*args, **options)
        started.append(process.pid)
        return process

    monkeypatch.setattr(subprocess, "Popen", remember)
    with pytest.raises(BenchError, match=message), running(Program((sys.executable, "-c", script)), timeout=1.5):
        pass
    deadline = time.monotonic() + PATIENCE
    while alive(started[0]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
