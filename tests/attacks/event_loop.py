"""`python -m tests.attacks.event_loop`: what one large request costs everybody else; exits with 1 where that is too much.

It serves the embedded model, sends one request after the other at full size, and measures from a process of its own how long
/health/live and a one-token completion take meanwhile, and by how much the server's resident memory grows at most. Requests
that run the model for long are left after PATIENCE seconds; `--text` leaves them out. `--only WORD` runs the cases whose
names hold the word, `--url` measures a server that runs already (its process id in `--pid`).
"""

import argparse
import http.client
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

# What a request may cost at most: seconds of /health/live and of another one's one-token completion, and bytes of memory.
MOST_LIVE, MOST_COMPLETION, MOST_MEMORY = 0.100, 0.300, 150 * 2**20
PATIENCE = 15.0  # seconds that a request gets
SIZE = 15_000_000  # bytes of a large body
TEXT = 4_190_000  # of the largest that a route of texts takes
JSON_HEADERS = {"content-type": "application/json"}
KV_BYTES = 2**28
SETTLE = 0.3  # seconds measured before and after each request


class Attack(NamedTuple):
    """A request, or so many `times` at once. `runs` the model for long: others' completions wait too and are not judged."""

    name: str
    path: str
    body: Callable[[], bytes]
    headers: dict[str, str] = JSON_HEADERS
    method: str = "POST"
    runs: bool = False
    times: int = 1
    most_memory: int = MOST_MEMORY


class Cost(NamedTuple):
    status: int  # 0: left before it was answered
    seconds: float
    live: float
    completion: float
    memory: int


def as_json(value: object) -> Callable[[], bytes]:
    return lambda: json.dumps(value).encode()


def repeated(before: str, item: str, after: str, *, count: int | None = None, separator: str = ",") -> Callable[[], bytes]:
    """A body of TEXT bytes, or of `count` items, between the two texts."""

    def body() -> bytes:
        number = count or TEXT // (len(item.encode()) + len(separator))
        return (before + (item + separator) * (number - 1) + item + after).encode()

    return body


def numbered(before: str, item: str, after: str, count: int) -> Callable[[], bytes]:
    return lambda: (before + ",".join(item.replace("#", str(i)) for i in range(count)) + after).encode()


def words(size: int) -> str:
    return ("the king said that " * (size // 19 + 1))[:size]


def letters(size: int) -> str:
    return "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=size))


BOUNDARY = "b"
MULTIPART = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


def multipart(*parts: tuple[str, bytes], repeat: int = 1) -> Callable[[], bytes]:
    """A form of the parts, each with the value of its content-disposition."""

    def body() -> bytes:
        each = b"".join(
            b"--b\r\ncontent-disposition: form-data; " + about.encode() + b"\r\n\r\n" + content + b"\r\n"
            for about, content in parts
        )
        return each * repeat + b"--b--\r\n"

    return body


def upload(content: Callable[[], bytes], name: str = "x.jsonl") -> Callable[[], bytes]:
    return lambda: multipart(('name="purpose"', b"fine-tune"), (f'name="file"; filename="{name}"', content()))()


def encoded(charset: str) -> dict[str, str]:
    return {"content-type": f"multipart/form-data; boundary={BOUNDARY}; charset={charset}"}


def completion(**fields: object) -> Callable[[], bytes]:
    return as_json({"max_tokens": 1, **fields})


def few_shot(**fields: object) -> Callable[[], bytes]:
    return completion(prompt="x", few_shot=fields)


COMPLETIONS, CHAT, SCORE, TOKENIZE, DETOKENIZE = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/score",
    "/tokenize",
    "/detokenize",
)
JOBS, FILES = "/v1/fine_tuning/jobs", "/v1/files"
EXAMPLE = {"input": "a", "output": "b"}
EMPTY = {"input": "", "output": ""}
SPECIAL = "<|endoftext|>"


def attacks() -> Iterator[Attack]:
    """The cases of the design's table first, then their neighbours."""
    yield Attack(
        "few_shot, separator 15 MB, n 6",
        COMPLETIONS,
        lambda: completion(prompt="x", n=6, few_shot={"separator": "x" * SIZE})(),
    )
    yield Attack(
        "few_shot, separator 1 MB, n 32",
        COMPLETIONS,
        lambda: completion(prompt="x", n=32, few_shot={"separator": " " * 1_000_000})(),
    )
    fields = [(f'name="{"n" * 10}{i}"', b"\xc3\xa4a" * 333_333) for i in range(4)]
    yield Attack("form, 4 fields 1 MB, punycode", FILES, multipart(*fields), encoded("punycode"))
    names = [(f'name="{letters(1_000_000)}{i}"', b"") for i in range(4)]
    yield Attack("form, 4 names 1 MB, punycode", FILES, multipart(*names), encoded("punycode"))
    part = '{"type":"text","text":"a"}'
    yield Attack(
        "chat, 300 k text parts",
        CHAT,
        repeated('{"max_tokens":1,"messages":[{"role":"user","content":[', part, "]}]}", count=300_000),
    )
    yield Attack("detokenize, 5 M ids", DETOKENIZE, repeated('{"tokens":[', "12", "]}", count=5_000_000))
    yield Attack(
        "few_shot, 2048 examples, separator 4 MB",
        COMPLETIONS,
        lambda: few_shot(examples=[EMPTY] * 2048, separator="x" * 4_000_000)(),
    )
    yield Attack(
        "tokenize, 15 MB of words, strings", TOKENIZE, lambda: as_json({"prompt": words(SIZE), "return_token_strs": True})()
    )
    yield Attack(
        "metadata, 15 MB nested",
        COMPLETIONS,
        repeated('{"max_tokens":1,"metadata":{"a":[', '{"a":[{}]}', "]}}", count=SIZE // 11),
    )
    stops = [letters(1023) + str(i) for i in range(4)]
    yield Attack("1000 choices, 4 stops of 1024", COMPLETIONS, completion(prompt=["a"] * 10, n=100, stop=stops), runs=True)
    yield Attack("prompt, 5 M ids", COMPLETIONS, repeated('{"prompt":[', "12", "]}", count=5_000_000))
    yield Attack("tokenize, one word 15 MB", TOKENIZE, lambda: as_json({"prompt": letters(SIZE)})())

    # Texts, as large as their routes take them.
    yield Attack(
        "tokenize, 4 MB of words, strings", TOKENIZE, lambda: as_json({"prompt": words(TEXT), "return_token_strs": True})()
    )
    yield Attack("tokenize, one word 4 MB", TOKENIZE, lambda: as_json({"prompt": letters(TEXT)})())
    yield Attack("metadata, 4 MB nested", COMPLETIONS, repeated('{"max_tokens":1,"metadata":{"a":[', '{"a":[{}]}', "]}}"))
    yield Attack(
        "metadata, 130 k objects", COMPLETIONS, repeated('{"max_tokens":1,"metadata":{"a":[', '{"":0}', "]}}", count=131_000)
    )
    yield Attack("tokenize, one word 1 MB", TOKENIZE, lambda: as_json({"prompt": letters(1_000_000)})())
    yield Attack("tokenize, 4 MB of spaces", TOKENIZE, lambda: as_json({"prompt": " " * TEXT})())
    yield Attack(
        "tokenize, 4 MB and an emoji",
        TOKENIZE,
        lambda: json.dumps({"prompt": words(TEXT) + "\U0001f600"}, ensure_ascii=False).encode(),
    )
    yield Attack(
        "tokenize, 4 MB of emoji",
        TOKENIZE,
        lambda: json.dumps({"prompt": "\U0001f600" * (TEXT // 4)}, ensure_ascii=False).encode(),
    )
    yield Attack(
        "tokenize, 4 MB of Chinese",
        TOKENIZE,
        lambda: json.dumps({"prompt": "天地玄黃，宇宙洪荒。" * (TEXT // 30)}, ensure_ascii=False).encode(),
    )
    yield Attack("tokenize, 4 MB of escapes", TOKENIZE, repeated('{"prompt":"', "\\u0041", '"}', separator=""))
    yield Attack("tokenize, 4 MB of special tokens", TOKENIZE, repeated('{"prompt":"', SPECIAL, '"}', separator=""))
    yield Attack(
        "tokenize, 4 MB of quotes", TOKENIZE, repeated('{"return_token_strs":true,"prompt":"', '\\"', '"}', separator="")
    )
    yield Attack(
        "tokenize, 4 MB of numbers", TOKENIZE, repeated('{"return_token_strs":true,"prompt":"', "12 ", '"}', separator="")
    )
    yield Attack(
        "tokenize, 2048 messages of 2 kB",
        TOKENIZE,
        lambda: as_json({"messages": [{"role": "user", "content": words(2000)}] * 2048})(),
    )
    yield Attack("prompt, 4 MB of words", COMPLETIONS, lambda: completion(prompt=words(TEXT))())
    yield Attack(
        "prompt, 4 MB and an emoji",
        COMPLETIONS,
        lambda: json.dumps({"prompt": letters(TEXT) + "\U0001f600"}, ensure_ascii=False).encode(),
    )
    yield Attack("prompt, 250 kB of letters", COMPLETIONS, lambda: completion(prompt=letters(250_000))())
    yield Attack(
        "prompt, 4 MB of words, truncated", COMPLETIONS, lambda: completion(prompt=words(TEXT), truncate_prompt_tokens=10)()
    )
    yield Attack(
        "prompt, one word 4 MB, truncated",
        COMPLETIONS,
        lambda: completion(prompt=letters(TEXT), truncate_prompt_tokens=10)(),
    )
    yield Attack("suffix of 4 MB", COMPLETIONS, lambda: completion(prompt="x", suffix=words(TEXT))())
    yield Attack("1024 prompts of 4 kB", COMPLETIONS, lambda: completion(prompt=[words(4_000)] * 1024)())
    yield Attack(
        "1024 prompts of 100 words",
        COMPLETIONS,
        lambda: completion(prompt=[str(i) + words(400) for i in range(1024)])(),
        runs=True,
    )
    yield Attack(
        "few_shot, 2048 examples of 2 kB",
        COMPLETIONS,
        lambda: few_shot(examples=[{"input": words(2000), "output": "x"}] * 2048)(),
    )
    yield Attack(
        "few_shot, 2048 examples of 120 B",
        COMPLETIONS,
        lambda: few_shot(examples=[{"input": "a " * 30, "output": " " * 60}] * 2048)(),
    )
    yield Attack(
        "few_shot, separator 250 kB, n 128",
        COMPLETIONS,
        lambda: completion(prompt="x", n=128, few_shot={"separator": " " * 250_000})(),
    )
    yield Attack(
        "few_shot, separator 200 kB, 100 examples",
        COMPLETIONS,
        lambda: few_shot(examples=[EXAMPLE] * 100, separator=" " * 200_000)(),
    )
    yield Attack("few_shot, instruction 4 MB", COMPLETIONS, lambda: few_shot(instruction=words(TEXT))())
    yield Attack(
        "chat, one message 1 MB", CHAT, lambda: as_json({"messages": [{"role": "user", "content": words(1_000_000)}]})()
    )
    yield Attack(
        "chat, one message 900 kB, truncated",
        CHAT,
        lambda: as_json(
            {"max_tokens": 1, "truncate_prompt_tokens": 9, "messages": [{"role": "user", "content": words(900_000)}]}
        )(),
    )
    yield Attack(
        "chat, 900 kB of special tokens",
        CHAT,
        lambda: as_json(
            {"max_tokens": 1, "truncate_prompt_tokens": 9, "messages": [{"role": "user", "content": SPECIAL * 70_000}]}
        )(),
    )
    yield Attack(
        "chat, 2048 messages of 400 B",
        CHAT,
        lambda: as_json({"max_tokens": 1, "messages": [{"role": "user", "content": words(400)}] * 2048})(),
    )
    yield Attack(
        "chat, 30 k text parts",
        CHAT,
        repeated('{"max_tokens":1,"messages":[{"role":"user","content":[', part, "]}]}", count=30_000),
    )
    yield Attack("chat, 10^5 messages", CHAT, repeated('{"messages":[', '{"role":"user"}', "]}", count=100_000))
    yield Attack(
        "chat, 20 k wrong messages", CHAT, repeated('{"messages":[', '{"role":1,"content":[1]}', "]}", count=20_000)
    )
    yield Attack(
        "score, 1024 continuations of 4 kB",
        SCORE,
        lambda: as_json({"prompt": "x", "continuations": [words(4_000)] * 1024})(),
    )
    yield Attack(
        "score, 1024 continuations of 100 ids",
        SCORE,
        as_json({"prompt": "x", "continuations": [[11] * 100] * 1024}),
        runs=True,
    )
    yield Attack("score, continuation of 1.3 M ids", SCORE, repeated('{"continuations":[[', "12", "]]}", count=1_300_000))
    yield Attack("score, 10^5 continuations", SCORE, repeated('{"continuations":[', '"a"', "]}", count=100_000))

    # Values.
    yield Attack(
        "prompt, 300 x 2047 ids",
        COMPLETIONS,
        lambda: completion(prompt=[[i * 40 + k % 40 for k in range(2047)] for i in range(1024)])(),
        runs=True,
    )
    yield Attack(
        "prompt, 600 k ids above the vocabulary", COMPLETIONS, repeated('{"prompt":[', "912345", "]}", count=600_000)
    )
    for name, item in {
        "empty arrays": "[]",
        "objects": '{"":0}',
        "empty strings": '""',
        "nulls": "null",
        "floats": "1.5",
        "whole floats": "1.0",
        "numbers of 4000 digits": "7" * 4000,
        "strings": '"abc"',
    }.items():
        yield Attack(f"prompt, 4 MB of {name}", COMPLETIONS, repeated('{"prompt":[', item, "]}"))
    yield Attack("detokenize, 680 k ids", DETOKENIZE, repeated('{"tokens":[', "12345", "]}", count=680_000))
    yield Attack("detokenize, 10^5 strings", DETOKENIZE, repeated('{"tokens":[', '"a"', "]}", count=100_000))
    yield Attack("a number of 4 MB", COMPLETIONS, lambda: b'{"max_tokens":' + b"7" * TEXT + b"}")
    yield Attack("nesting of 10^6", COMPLETIONS, lambda: b'{"metadata":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}")
    yield Attack("nesting of 900", COMPLETIONS, lambda: b'{"metadata":{"a":' + b"[" * 900 + b"]" * 900 + b"}}")
    yield Attack("300 k unknown fields", COMPLETIONS, numbered("{", '"f#":0', "}", 300_000))
    yield Attack("60 k unknown fields", COMPLETIONS, numbered("{", '"f#":0', "}", 60_000))
    yield Attack(
        "60 k unknown fields of a job",
        JOBS,
        numbered('{"model":"demo","training_file":"x","hyperparameters":{', '"f#":0', "}}", 60_000),
    )
    yield Attack("logit_bias, 130 k entries", COMPLETIONS, numbered('{"logit_bias":{', '"#":1', "}}", 130_000))
    yield Attack(
        "logit_bias, 50 k entries, n 128",
        COMPLETIONS,
        numbered('{"max_tokens":1,"n":128,"logit_bias":{', '"#":1', "}}", 50_000),
        runs=True,
    )
    yield Attack(
        "allowed_token_ids, 600 k",
        COMPLETIONS,
        repeated('{"max_tokens":1,"allowed_token_ids":[', "12345", "]}", count=600_000),
    )
    yield Attack(
        "allowed_token_ids, 50 k, n 128",
        COMPLETIONS,
        numbered('{"max_tokens":1,"n":128,"allowed_token_ids":[', "#", "]}", 50_000),
        runs=True,
    )
    yield Attack("stop_token_ids, 680 k", COMPLETIONS, repeated('{"stop_token_ids":[', "12", "]}", count=680_000))
    yield Attack(
        "stop_token_ids, 1024, 1000 prompts",
        COMPLETIONS,
        completion(prompt=["a"] * 1000, stop_token_ids=list(range(1024))),
        runs=True,
    )
    yield Attack("stop, 10^5 strings", COMPLETIONS, numbered('{"stop":[', '"s#"', "]}", 100_000))
    yield Attack("bad_words, 256 of 1024 letters", COMPLETIONS, lambda: completion(bad_words=[letters(1024)] * 256)())
    yield Attack("bad_words, 10^5", COMPLETIONS, numbered('{"bad_words":[', '"s#"', "]}", 100_000))
    yield Attack(
        "1000 choices of one long prompt", COMPLETIONS, completion(prompt=[[11] * 2000] * 8, n=125, logprobs=0), runs=True
    )
    yield Attack(
        "32 choices, echo and logprobs 20",
        COMPLETIONS,
        completion(prompt=[[11, 12] * 1000], n=32, echo=True, logprobs=20),
        runs=True,
    )
    yield Attack(
        "64 prompts, echo and logprobs 20",
        COMPLETIONS,
        completion(prompt=[[i, 12] * 1000 for i in range(64)], echo=True, logprobs=20, max_tokens=0),
        runs=True,
    )
    for field in ("model", "user", "prompt_cache_key", "modell"):
        yield Attack(f"{field} of 4 MB", COMPLETIONS, lambda field=field: completion(**{field: letters(TEXT)})())  # type: ignore[misc]
    yield Attack("training_file of 1 MB", JOBS, lambda: as_json({"model": "demo", "training_file": letters(1_000_000)})())
    yield Attack(
        "UTF-16, 4 MB of values",
        COMPLETIONS,
        lambda: ('{"metadata":{"a":"∢","b":[' + "[]," * (TEXT // 6) + "0]}}").encode("utf-16"),
    )
    yield Attack("one string that never ends", COMPLETIONS, lambda: b'{"a":"' + b'\\"' * (TEXT // 2) + b"\\")
    yield Attack("4 MB of opening quotes", COMPLETIONS, lambda: b'{"a":"' + b'"' * TEXT)
    yield Attack("4 MB of opening brackets", COMPLETIONS, lambda: b"[" * TEXT)
    yield Attack("4 MB of white space", COMPLETIONS, lambda: b" " * TEXT + b"{}")

    # Forms and files.
    for charset in (
        "undefined",
        "punycode",
        "unicode_escape",
        "raw_unicode_escape",
        "idna",
        "utf-7",
        "utf-16",
        "rot13",
        "zlib",
    ):
        yield Attack(
            f"form, charset {charset}", FILES, multipart(('name="purpose"', b"\\ud800" * 150_000)), encoded(charset)
        )
    yield Attack("form, 10^5 parts", FILES, multipart(('name="x"', b""), repeat=100_000))
    yield Attack(
        "form, 10^6 header bytes",
        FILES,
        lambda: b'--b\r\ncontent-disposition: form-data; name="x"\r\nx: ' + b"h" * 10**6 + b"\r\n\r\n\r\n--b--\r\n",
        MULTIPART,
    )
    yield Attack("form, 10^6 options", FILES, multipart(('name="x"' + '; a="b"' * 500, b"")), MULTIPART)
    line = '{"prompt": "the king said", "completion": " that"}\n'
    yield Attack("upload, 15 MB of lines", FILES, upload(lambda: (line * (SIZE // len(line))).encode()), MULTIPART)
    yield Attack(
        "upload, 15 MB of short lines", FILES, upload(lambda: b'{"prompt":"","completion":"a"}\n' * (SIZE // 31)), MULTIPART
    )
    yield Attack("upload, 15 MB of empty lines", FILES, upload(lambda: b"\n" * SIZE), MULTIPART)
    yield Attack(
        "upload, one line of 15 MB",
        FILES,
        upload(lambda: as_json({"prompt": words(SIZE), "completion": "a"})()),
        MULTIPART,
    )
    yield Attack(
        "upload, a word of 15 MB",
        FILES,
        upload(lambda: as_json({"prompt": letters(SIZE), "completion": "a"})()),
        MULTIPART,
    )
    yield Attack(
        "upload, one line of 15 MB of values",
        FILES,
        upload(lambda: b'{"prompt": [' + b"[]," * (SIZE // 3) + b"0]}"),
        MULTIPART,
    )
    yield Attack("upload, 15 MB of line ends", FILES, upload(lambda: b"\r" * SIZE), MULTIPART)
    yield Attack("upload, 15 MB of almost boundaries", FILES, upload(lambda: b"\r\n--" * (SIZE // 4)), MULTIPART)
    yield Attack("upload, 15 MB of wrong lines", FILES, upload(lambda: b"[]\n" * (SIZE // 3)), MULTIPART)
    # Four are taken, and copied once. Of each of the others what the kernel has is read, to see that it is too much.
    many = upload(lambda: b"x" * SIZE)
    yield Attack("200 uploads of 15 MB at once", FILES, many, MULTIPART, runs=True, times=200, most_memory=2**28)

    # What has no body.
    for path in ("/openapi.json", "/docs", "/metrics", "/v1/files", "/v1/models/" + "x" * 10_000):
        yield Attack(f"GET {path[:30]}", path, lambda: b"", {}, "GET")


class Probe:
    """Measures one server from a process of its own: `worst()` is the worst answer since the last call."""

    def __init__(self, url: str):
        command = [sys.executable, "-m", "tests.attacks.event_loop", "--probe", url]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def worst(self) -> tuple[float, float]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        live, one = self._process.stdout.readline().split()
        return float(live), float(one)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def run_probe(url: str) -> None:
    """Ask again and again, and print the worst times, in seconds, at each line that is read."""
    address = urlsplit(url).netloc
    one_token = json.dumps({"prompt": "Once", "max_tokens": 1, "cache_prompt": False})
    worst = {"live": 0.0, "one": 0.0}
    begun: dict[str, float] = {}

    def ask(name: str, method: str, path: str, body: str | None, pause: float) -> None:
        connection = http.client.HTTPConnection(address, timeout=120)
        while True:
            begun[name] = time.monotonic()
            connection.request(method, path, body, JSON_HEADERS)
            response = connection.getresponse()
            response.read()
            assert response.status == 200, response.status
            worst[name] = max(worst[name], time.monotonic() - begun.pop(name))
            time.sleep(pause)

    threading.Thread(target=ask, args=("live", "GET", "/health/live", None, 0.003), daemon=True).start()
    threading.Thread(target=ask, args=("one", "POST", COMPLETIONS, one_token, 0.03), daemon=True).start()
    for _ in sys.stdin:
        now = time.monotonic()
        times = [max(worst[name], now - begun.get(name, now)) for name in worst]
        worst.update(live=0.0, one=0.0)
        print(*times, flush=True)


def send(address: str, attack: Attack, body: bytes) -> tuple[int, float]:
    """The status, 0 if none came in PATIENCE seconds, and the seconds that it took."""
    begun = time.monotonic()
    connection = http.client.HTTPConnection(address, timeout=PATIENCE)
    try:
        connection.request(attack.method, attack.path, body or None, attack.headers)
        response = connection.getresponse()
        while response.read(1 << 20):
            pass
        return response.status, time.monotonic() - begun
    except (TimeoutError, ConnectionError, http.client.HTTPException):
        return 0, time.monotonic() - begun
    finally:
        connection.close()


def peak_memory(pid: int) -> int:
    """Bytes of the highest resident memory since `forget_peak`."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def cost(attack: Attack, url: str, pid: int, probe: Probe) -> Cost:
    body = attack.body()
    for _ in range(4):  # until the server has done with the last one
        probe.worst()
        time.sleep(SETTLE)
        live, one = probe.worst()
        if live < MOST_LIVE and one < MOST_COMPLETION:
            break
    forget_peak(pid)
    before = peak_memory(pid)
    probe.worst()
    time.sleep(SETTLE)
    with ThreadPoolExecutor(attack.times) as senders:
        status, seconds = max(senders.map(lambda _: send(urlsplit(url).netloc, attack, body), range(attack.times)))
    time.sleep(SETTLE)
    live, one = probe.worst()
    return Cost(status, seconds, live, one, peak_memory(pid) - before)


@contextmanager
def served(directory: Path, *options: str) -> Iterator[tuple[str, int]]:
    """The address and process id of a server over the embedded model."""
    code = "from service.cli import main; raise SystemExit(main())"
    command = [sys.executable, "-c", code, "serve", "--port", "0", "--data-dir", str(directory / "data"), *options]
    log = directory / "log"
    environment = os.environ | {"BANDED_KV_BYTES": str(KV_BYTES)}
    with log.open("wb") as stderr, subprocess.Popen(command, stderr=stderr, env=environment) as process:
        try:
            while not (found := re.search(r"running on (http://\S+)", log.read_text())):
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            address = urlsplit(found[1]).netloc
            while send(address, Attack("", "/health/ready", lambda: b"", {}, "GET"), b"")[0] != 200:
                time.sleep(0.1)
            yield found[1], process.pid
        finally:
            process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose names hold this")
    parser.add_argument("--text", action="store_true", help="leave out what runs the model for long")
    parser.add_argument("--url")
    parser.add_argument("--pid", type=int)
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.probe:
        run_probe(args.probe)
        return 0
    missed = 0
    with tempfile.TemporaryDirectory() as directory:
        context = served(Path(directory))
        url, pid = (args.url, args.pid) if args.url else context.__enter__()
        probe = Probe(url)
        try:
            # Memory of the KV cache and of a full batch's sampling is taken when it is first used, and kept.
            wide = {"n": 128, "logprobs": 20, "top_p": 0.9, "presence_penalty": 1, "logit_bias": {"11": 1}}
            for fields in ({"prompt": [[i * 7] * 1500 for i in range(16)]}, {"prompt": "x", **wide}):
                warm = Attack("", COMPLETIONS, completion(**fields))
                send(urlsplit(url).netloc, warm, warm.body())
            time.sleep(2)
            print(
                f"{'request':<44}{'status':>7}{'took s':>8}{'live ms':>9}{'one token ms':>14}{'memory MB':>11}", flush=True
            )
            nothing = Attack("nothing", "/health/live", lambda: b"", {}, "GET")
            for attack in (nothing, *attacks()):
                if args.only not in attack.name or (args.text and attack.runs):
                    continue
                found = cost(attack, url, pid, probe)
                is_missed = found.live > MOST_LIVE or found.memory > attack.most_memory
                is_missed |= found.status == 500 or (not attack.runs and found.completion > MOST_COMPLETION)
                missed += is_missed
                print(
                    f"{attack.name:<44}{found.status or 'left':>7}{found.seconds:>8.2f}{found.live * 1000:>9.0f}"
                    f"{found.completion * 1000:>14.0f}{found.memory / 2**20:>11.0f}{'  missed' if is_missed else ''}",
                    flush=True,
                )
        finally:
            probe.close()
            if not args.url:
                context.__exit__(None, None, None)
    print(f"{missed} missed")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
