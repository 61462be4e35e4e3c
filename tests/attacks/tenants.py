"""`python -m tests.attacks.tenants`: what one key's owner learns of another's things; exits with 1 if it is anything.

Alice has a file, a job and an adapter on a server; Bob asks for them on every route. What he gets must be what he gets for
things that are not there. Then strings that can't be stored go into every field, the pages of other sites ask a server
without keys, keys stand in query strings, and a terminal closes.
"""

import argparse
import json
import re
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import httpx

from tests.attacks.full_disk import at_once
from tests.attacks.stored_data import JOB, client_of, create_job, lines, upload, wait_for
from tests.attacks.table import Table, run
from tests.model.checkpoint.checkpoints import tiny
from tests.serving import PATIENCE, Served, banded_serve

ALICE, ALICE_TOO, BOB = ({"authorization": f"Bearer {key}"} for key in ("sk-a", "sk-a2", "sk-b"))
KEYS = {"BANDED_API_KEYS": "alice:sk-a,alice:sk-a2,bob:sk-b", "BANDED_LIMIT_REQUESTS": "300", "BANDED_MAX_ADAPTERS": "1"}
QUIET = {"OMP_WAIT_POLICY": "PASSIVE"}
# Headers that differ between any two answers.
CHANGING = ("date", "x-request-id", "openai-processing-ms", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests")
PROMPT = [*range(1, 200)]
LONE = "\ud800"  # as JSON writes it; no encoding has it
SECRET = "sk-in-the-query"


class Ask(NamedTuple):
    """A request. {} in the path and as a field of the body is the name of a thing."""

    method: str
    path: str
    body: Any = None

    def send(self, client: httpx.Client, name: str, headers: dict[str, str]) -> httpx.Response:
        path, body = self.path.replace("{}", name), json.dumps(self.body).replace('"{}"', json.dumps(name))
        options = {} if self.body is None else {"json": json.loads(body)}
        return client.request(self.method, path, headers=headers, **options)


def asks_of_files() -> list[Ask]:
    job = {"model": "banded", "training_file": "{}"}
    return [
        *(Ask(method, "/v1/files/{}") for method in ("GET", "HEAD", "DELETE", "POST")),
        *(Ask(method, "/v1/files/{}/content") for method in ("GET", "HEAD")),
        Ask("GET", "/v1/files?after={}"),
        Ask("GET", "/v1/files?purpose={}"),
        Ask("POST", "/v1/fine_tuning/jobs", job),
        Ask("POST", "/v1/fine_tuning/jobs", {"model": "banded", "training_file": "file-0", "validation_file": "{}"}),
    ]


def asks_of_jobs() -> list[Ask]:
    job = "/v1/fine_tuning/jobs/{}"
    return [
        *(Ask(method, job) for method in ("GET", "HEAD", "DELETE")),
        Ask("POST", f"{job}/cancel", {}),
        Ask("GET", f"{job}/events"),
        Ask("GET", f"{job}/events?after=ftevent-1-1"),
        Ask("GET", f"{job}/checkpoints"),
        Ask("GET", "/v1/fine_tuning/jobs?after={}"),
    ]


def asks_of_models() -> list[Ask]:
    messages = [{"role": "user", "content": "Hi"}]
    return [
        *(Ask(method, "/v1/models/{}") for method in ("GET", "HEAD", "DELETE")),
        Ask("POST", "/v1/completions", {"model": "{}", "prompt": "a", "max_tokens": 1}),
        Ask("POST", "/v1/completions", {"model": "{}", "prompt": "a", "max_tokens": 1, "stream": True}),
        Ask("POST", "/v1/engines/{}/completions", {"prompt": "a", "max_tokens": 1}),
        Ask("POST", "/v1/chat/completions", {"model": "{}", "messages": messages}),
        Ask("POST", "/v1/score", {"model": "{}", "prompt": "a", "continuations": ["b"]}),
        Ask("POST", "/tokenize", {"model": "{}", "prompt": "a"}),
        Ask("POST", "/detokenize", {"model": "{}", "tokens": [1]}),
        Ask("POST", "/v1/fine_tuning/jobs", {"model": "{}", "training_file": "file-0"}),
    ]


def normal(answer: httpx.Response, name: str) -> tuple[int, str, list[tuple[str, str]]]:
    """An answer without what differs between any two, and without the name of the thing."""
    headers = sorted((key, value) for key, value in answer.headers.items() if key not in CHANGING)
    return answer.status_code, answer.text.replace(name, "NAME"), headers


def difference(client: httpx.Client, ask: Ask, name: str, none: str) -> tuple[str, list[str]]:
    """What Bob gets for Alice's thing, and whether it is another answer than for one that is not there."""
    theirs, nothing = ask.send(client, name, BOB), ask.send(client, none, BOB)
    is_same = normal(theirs, name) == normal(nothing, none)
    fault = f"{theirs.status_code} {theirs.text[:80]} is not {nothing.status_code} {nothing.text[:80]}"
    return f"{theirs.status_code}", [] if is_same else [fault]


def like(name: str) -> str:
    """A name of the same form that nothing has."""
    return re.sub(r"\w{8}$", lambda found: found[0][::-1] if found[0] != found[0][::-1] else "0" * 8, name)


def names(table: Table, client: httpx.Client, log: Path) -> None:
    """What belongs to Alice, asked for by Bob."""
    file = upload(client_with(client, ALICE), "secret", lines(8)).raise_for_status().json()["id"]
    with client_of(str(client.base_url), headers=ALICE) as alice:
        job = create_job(alice, "banded", file, JOB).raise_for_status().json()["id"]
        adapter = wait_for(alice, job, "succeeded")["fine_tuned_model"]
    for kind, name, asks in (
        ("file", file, asks_of_files()),
        ("job", job, asks_of_jobs()),
        ("model", adapter, asks_of_models()),
    ):
        for ask in asks:
            fields = [key for key, value in (ask.body or {}).items() if value == "{}"]
            what = f"{ask.method} {ask.path}{' ' + fields[0] if fields else ''}"
            table.case(f"{kind}: {what}"[:57], *difference(client, ask, name, like(name)))
        asked = {re.sub(r"\{\w+(:path)?\}", "{}", ask.path.partition("?")[0]) for ask in asks}
        paths = {re.sub(r"\{\w+\}", "{}", path) for path in client.get("/openapi.json", headers=BOB).json()["paths"]}
        prefix = {"file": "/v1/files/{}", "job": "/v1/fine_tuning/jobs/{}", "model": "/v1/models/{}"}[kind]
        unasked = sorted(path for path in paths if path.startswith(prefix) and path not in asked)
        table.case(f"{kind}: routes with its id that were not asked", f"{len(unasked)}", unasked)
    still = [client.get(path, headers=ALICE).status_code for path in (f"/v1/files/{file}", f"/v1/models/{adapter}")]
    table.case("what Alice has afterwards", f"{still}", [] if still == [200, 200] else ["gone"], "200, 200")
    lists(table, client, [file, job, adapter])
    numbers(table, client, file)
    prefix_cache(table, client)
    table.case("tracebacks in the log", *no_tracebacks(log))


def client_with(client: httpx.Client, headers: dict[str, str]) -> httpx.Client:
    return client_of(str(client.base_url), headers=headers)


def lists(table: Table, client: httpx.Client, secrets: list[str]) -> None:
    """Nothing that lists, counts or describes has a name or a part of an id of Alice's."""
    paths = [
        "/v1/files",
        "/v1/fine_tuning/jobs",
        "/v1/models",
        "/v1/engines",
        "/tokenizer_info",
        "/metrics",
        "/openapi.json",
    ]
    paths += [f"{path}?limit={limit}" for path in paths[:2] for limit in (1, 100)]
    for path in paths:
        answer = client.get(path, headers=BOB)
        told = [secret for secret in [*secrets, "alice", *(each[-8:] for each in secrets)] if secret in answer.text]
        count = len(answer.json().get("data", ())) if answer.headers["content-type"] == "application/json" else 0
        table.case(f"GET {path}", f"{answer.status_code}, {count} entries", told[:1], "no name or id of Alice's")


def numbers(table: Table, client: httpx.Client, file: str) -> None:
    """Counts and limits are Bob's own."""

    def remaining() -> int:
        return int(client.post("/v1/completions", json={}, headers=BOB).headers["x-ratelimit-remaining-requests"])

    before = remaining()
    at_once(40, lambda: client.post("/v1/completions", json={}, headers=ALICE))
    after = remaining()
    faults = ["fewer"] * (after < before - 5)  # it grows again meanwhile
    table.case("requests that are left, after 40 of Alice's", f"{before} and {after}", faults, "about as many")
    with client_with(client, BOB) as bob:
        own = upload(bob, "own", lines(1)).raise_for_status().json()["id"]
        answer = create_job(bob, "banded", own, JOB)  # Alice's adapter is the only one that the setting allows to a name
        table.case(
            "a job, when Alice has as many models as may be",
            f"{answer.status_code}",
            [] if answer.status_code == 200 else [answer.text],
            "200",
        )
        job = answer.json()["id"]
        [first] = client.get(f"/v1/fine_tuning/jobs/{job}/events?limit=100", headers=BOB).json()["data"][-1:]
        table.case("the number of the first event", first["id"][-2:], [] if first["id"].endswith("-1") else ["not 1"], "1")
        wait_for(bob, job, "succeeded")
        again = create_job(bob, "banded", own, JOB)
        told = re.search(r"(\d+) are there", again.text)
        faults = [] if told and told[1] == "1" else [again.text]
        table.case("the number of models that are there", told[1] if told else "none", faults, "1, Bob's own")


def prefix_cache(table: Table, client: httpx.Client) -> None:
    """A prompt that Alice has sent is none that Bob has sent."""
    base = {"model": "banded", "prompt": PROMPT, "max_tokens": 1}
    chat = {"model": "banded", "messages": [{"role": "user", "content": "a secret " * 60}], "max_tokens": 1}
    for path, body in (
        ("/v1/completions", base),
        ("/v1/completions", base | {"stream": True, "stream_options": {"include_usage": True}}),
        ("/v1/chat/completions", chat),
    ):
        changed = json.loads(json.dumps(body).replace("a secret", f"{time.monotonic_ns()} secret", 1))
        if "prompt" in changed:
            changed["prompt"] = [PROMPT[0] + len(str(changed)), *PROMPT[1:]]
        found = [cached_tokens(client.post(path, json=changed, headers=key)) for key in (ALICE, BOB, ALICE_TOO, BOB)]
        faults = [] if found[0] == found[1] == 0 and found[2] == found[3] > 0 else ["Bob's first is not as Alice's first"]
        name = f"cached tokens of {path[4:]}{', streamed' if 'stream' in body else ''}"
        table.case(name, f"{found}", faults, "0, 0, some, as many")


def cached_tokens(answer: httpx.Response) -> int:
    found = re.findall(r'"cached_tokens": ?(\d+)', answer.text)
    return int(found[-1]) if found else -1


def no_tracebacks(log: Path) -> tuple[str, list[str]]:
    count = log.read_text(errors="replace").count("Traceback")
    return f"{count}", ["not 0"] * (count > 0)


# Strings.

CHARSETS = ["undefined", "punycode", "unicode_escape", "raw_unicode_escape", "idna", "utf-7", "utf-16", "utf-32", "rot13"]
CHARSETS += ["zlib", "base64", "hex", "mbcs", "oem", "latin-1", "ascii", "cp037", "x" * 5000, "\xff", "../utf-8", ""]
# Fields that are stored or looked up; others only have to be answered.
KEPT = ("model", "training_file", "validation_file", "suffix of a job")
# Bytes of a path, a query or a name that are no text, or an odd one.
ODD = {
    "a lone surrogate": b"\xed\xa0\x80",
    "no UTF-8": b"\xff\xfe",
    "a NUL": b"\0",
    "a line end": b"a\r\nb",
    "a way up": b"../../etc/passwd",
    "a right-to-left mark": "\u202e".encode(),
    "5000 characters": b"x" * 5000,
}


def string_fields(file: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """A field's name, the route, and a body with a lone surrogate in it."""
    completion = {"model": "banded", "prompt": "a", "max_tokens": 1}
    job = {"model": "banded", "training_file": file}
    message = {"role": "user", "content": "a"}
    for path, body in (
        ("/v1/completions", completion),
        ("/v1/chat/completions", {"messages": [message], "max_tokens": 1}),
        ("/v1/score", {"prompt": "a", "continuations": ["b"]}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [1]}),
    ):
        yield "model", path, body | {"model": LONE}
    for field, value in (
        ("prompt", LONE),
        ("prompt", ["a", LONE]),
        ("user", LONE),
        ("stop", [LONE]),
        ("suffix", LONE),
        ("bad_words", [LONE]),
        ("prompt_cache_key", LONE),
        ("metadata", {LONE: LONE}),
        ("logit_bias", {LONE: 1}),
        ("few_shot", {"instruction": LONE, "examples": [{"input": LONE, "output": LONE}], "separator": LONE}),
        ("service_tier", LONE),
        (LONE, 1),
    ):
        yield field if field != LONE else "an unknown one", "/v1/completions", completion | {field: value}
    for field in message:
        yield (
            f"{field} of a message",
            "/v1/chat/completions",
            {"model": "banded", "messages": [message | {field: LONE}], "max_tokens": 1},
        )
    yield "name of a message", "/v1/chat/completions", {"messages": [message | {"name": LONE}], "max_tokens": 1}
    yield (
        "text of a part",
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": LONE}]}], "max_tokens": 1},
    )
    yield "continuations", "/v1/score", {"prompt": "a", "continuations": [LONE]}
    yield "prompt", "/tokenize", {"prompt": LONE, "return_token_strs": True}
    for field in ("model", "training_file", "validation_file"):
        yield field, "/v1/fine_tuning/jobs", job | {field: LONE}
    yield "suffix of a job", "/v1/fine_tuning/jobs", job | {"suffix": LONE}
    yield "an unknown one", "/v1/fine_tuning/jobs", job | {LONE: 1}


def answered(answer: httpx.Response, *, kept: bool) -> tuple[str, list[str]]:
    """What is `kept`, stored or looked up, must be refused; nothing may be the server's fault."""
    faults = ["a fault of the server"] * (answer.status_code >= 500) + ["taken"] * (kept and answer.status_code < 400)
    return f"{answer.status_code}", faults


def form(content_type: str, disposition: bytes, purpose: bytes = b"fine-tune") -> dict[str, Any]:
    """An upload's options for httpx, with bytes that it would not send by itself."""
    body = b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\n' + purpose
    body += b"\r\n--b\r\ncontent-disposition: form-data; " + disposition + b"\r\n\r\n" + lines(1) + b"\r\n--b--\r\n"
    return {"content": body, "headers": {"content-type": content_type.encode("latin-1", "replace")}}


def strings(table: Table, client: httpx.Client, log: Path) -> None:
    """No key is needed, so that every route is reached."""
    plain, named = "multipart/form-data; boundary=b", b'name="file"; filename="x.jsonl"'
    for charset in CHARSETS:
        answer = client.post("/v1/files", **form(f'{plain}; charset="{charset}"', named))
        table.case(f"form, charset {charset[:30]!r}", *answered(answer, kept=True))
    for name, data in ODD.items():
        quoted = data.replace(b"\r\n", b"%0D%0A")  # a real one would end the header
        for what, disposition in (
            ("filename", b'name="file"; filename="%s"' % quoted),
            ("filename*", b"name=\"file\"; filename*=utf-8''%s" % quote(data).encode()),
        ):
            answer = client.post("/v1/files", **form(plain, disposition))
            is_whole = answer.status_code == 200 and client.get(f"/v1/files/{answer.json()['id']}").status_code == 200
            outcome, faults = answered(answer, kept=False)
            table.case(
                f"form, {what}: {name}",
                outcome,
                faults + ["it can't be read"] * (answer.status_code == 200 and not is_whole),
            )
        answer = client.post("/v1/files", **form(plain, named, quoted))
        table.case(f"form, purpose: {name}", *answered(answer, kept=True))
    file = upload(client, "x", lines(1)).raise_for_status().json()["id"]
    for field, path, body in string_fields(file):
        answer = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        table.case(f"{path}, {field}", *answered(answer, kept=field in KEPT), "" if field not in KEPT else "4xx")
    for name, data in ODD.items():
        odd = quote(data, safe="")
        for path in (
            f"/v1/files/{odd}",
            f"/v1/files/{odd}/content",
            f"/v1/fine_tuning/jobs/{odd}",
            f"/v1/models/{odd}",
            f"/{odd}",
        ):
            table.case(f"GET {path.replace(odd, '...')}: {name}", *answered(client.get(path), kept=True), "4xx")
        for path in (
            f"/v1/files?after={odd}",
            f"/v1/files?purpose={odd}",
            f"/v1/fine_tuning/jobs?after={odd}",
            f"/v1/models?x={odd}",
        ):
            table.case(f"GET {path.replace(odd, '...')}: {name}", *answered(client.get(path), kept="after" in path))
        for header in ("x-request-id", "authorization", "origin", "content-encoding", "accept"):
            if not data.startswith((b"\0", b"a\r\n")):  # those end the connection ahead of the application
                answer = client.get("/v1/models", headers=[(header.encode(), data)])
                table.case(f"{header}: {name}", *answered(answer, kept=False))
    table.case("tracebacks in the log", *no_tracebacks(log))


# Other sites.


def raw(url: str, request: str, body: bytes = b"") -> int:
    """The status of what is answered to bytes as they are; 0 if nothing is."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port or 80), timeout=60) as connection:
        connection.sendall(request.encode("latin-1") + body)
        answer = b""
        while b"\r\n" not in answer and (more := connection.recv(1 << 16)):
            answer += more
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def sites(table: Table, client: httpx.Client, url: str) -> None:
    """Host and Origin, without keys on loopback."""
    port = urlsplit(url).port
    for host, status in {
        "evil.example": 403,
        f"evil.example:{port}": 403,
        "127.0.0.1.evil.example": 403,
        "localhost.evil.example": 403,
        "evil.example@127.0.0.1": 403,
        "169.254.169.254": 403,
        f"localhost:{port}": 200,
        f"127.0.0.1:{port}": 200,
        f"[::1]:{port}": 200,
        "LOCALHOST": 200,
        "proxy": 200,
    }.items():
        found = raw(url, f"GET /v1/files HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
        table.case(f"Host: {host}", f"{found}", ["another"] * (found != status), f"{status}")
    for name, head in {
        "two Hosts": "GET /v1/files HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n",
        "a Host in the request line": "GET http://evil.example/v1/files HTTP/1.1\r\nHost: evil.example\r\n",
        "X-Forwarded-Host of this server": "GET /v1/files HTTP/1.1\r\nHost: evil.example\r\nX-Forwarded-Host: localhost\r\n",
    }.items():
        found = raw(url, f"{head}Connection: close\r\n\r\n")
        table.case(name, f"{found}", ["answered"] * (found not in (400, 403)), "400 or 403")
    before = len(client.get("/v1/files").json()["data"])
    for origin, status in {
        "https://evil.example": 403,
        "null": 403,
        f"http://localhost.evil.example:{port}": 403,
        f"http://127.0.0.1:{(port or 0) + 1}": 403,
        f"http://127.0.0.1:{port}": 200,
        f"http://localhost:{port}": 200,
    }.items():
        options = form("multipart/form-data; boundary=b", b'name="file"; filename="x.jsonl"')
        options["headers"] |= {"origin": origin}
        found = client.post("/v1/files", **options).status_code
        table.case(f"an upload, Origin: {origin}", f"{found}", ["another"] * (found != status), f"{status}")
    stored = len(client.get("/v1/files").json()["data"]) - before
    table.case("what was stored of those", f"{stored}", ["another"] * (stored != 2), "2")


# The log and signals.


def query_strings(table: Table, client: httpx.Client, log: Path) -> None:
    """Keys that clients put there."""
    for path in ("/v1/models", "/v1/files", "/nowhere", "/v1/models/", "/health/live", "/v1//files", "/metrics"):
        client.get(f"{path}?api_key={SECRET}&x={SECRET}")
        client.post(f"{path}?key={SECRET}#{SECRET}", json={})
    count = log.read_text(errors="replace").count(SECRET)
    table.case("keys from 14 query strings in the log", f"{count}", ["not 0"] * (count > 0), "0")


def hang_up(table: Table, served: Served) -> None:
    """SIGHUP while a stream runs: it is finished, others are refused, and the server ends well."""
    body = {"model": "banded", "prompt": "a", "max_tokens": 240, "stream": True, "ignore_eos": True}
    with client_of(served.url) as client, client.stream("POST", "/v1/completions", json=body) as answer:
        parts = answer.iter_text()
        text = next(parts)
        served.process.send_signal(signal.SIGHUP)
        time.sleep(0.05)
        refused = other_status(served.url)
        text += "".join(parts)
    num_events = text.count('"text"')
    faults = [] if text.endswith("data: [DONE]\n\n") and '"error"' not in text else ["it was cut"]
    table.case("SIGHUP: the running stream", f"{num_events} events", faults, "it is finished")
    table.case("SIGHUP: a new request", refused, ["taken"] * (refused == "200"), "503 or no connection")
    status = served.ended()
    table.case("SIGHUP: the exit status", f"{status}", ["not 0"] * (status != 0), "0")


def other_status(url: str) -> str:
    try:
        body = {"model": "banded", "prompt": "b", "max_tokens": 1}
        return str(httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE).status_code)
    except httpx.TransportError:
        return "no connection"


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root, log = Path(temporary), Path(temporary) / "log"
        checkpoint = tiny("banded", root, vocab_size=50257, n_layer=2)
        table = Table(
            "names of keys, strings, other sites, signals", "for Alice's things the answer as for none; else as said"
        )
        options = "--data-dir", str(root / "named")
        with banded_serve(checkpoint, log, *options, **KEYS, **QUIET) as served, client_of(served.url) as client:
            names(table, client, log)
        with banded_serve(checkpoint, log, "--data-dir", str(root / "open"), **QUIET) as served:
            with client_of(served.url) as client:
                strings(table, client, log)
                sites(table, client, served.url)
                query_strings(table, client, log)
            hang_up(table, served)
        return table.end()


if __name__ == "__main__":
    run(main)
