"""Middleware: ids, HEAD, keys, limits, other origins, and a count of every response."""

import asyncio
import gzip
import json
import logging
import re
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import httpx
import pytest
from fastapi import Request
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from service.api.app import ROUTERS, create_app
from service.api.bodies import SHORT_BODY, Room
from service.api.limits import KeyLimits
from service.api.middleware import EXPOSED_HEADERS, HEALTH, AnswerFaults, CheckBody
from service.engine.workers import current_client
from tests.conformance import contract
from tests.service.api.helpers import Api, error_of, request, served, serving
from tests.service.engine.fakes import FakeEngine
from tests.service.helpers import run, settings_of

KEYS = ("first-key", "second-key")
ROUTES = [
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/fake"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/docs"),
    ("GET", "/nope"),
    ("DELETE", "/v1/models"),
    ("OPTIONS", "/v1/completions"),
    ("GET", "/health/live/x"),
    ("GET", "/health//live"),
    ("GET", "/healthy"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_but_health_needs_a_key(method: str, path: str) -> None:
    url = "http://test" + path
    answer = request(method, url, api_keys=KEYS)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"] == {
        "message": "missing or wrong API key in the Authorization header",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_api_key",
    }
    assert request(method, url, api_keys=KEYS, headers={"authorization": "Bearer second-key"}).status_code != 401


@contract("errors", "401", "with keys every route but health needs one")
def test_of_all_routes_only_health_is_open() -> None:
    async def test() -> None:
        async with serving(api_keys=KEYS) as api:
            routes = [*api.app.routes, *(route for router in ROUTERS for route in router.routes)]
            found = {(method, route.path) for route in routes if isinstance(route, Route) for method in route.methods or ()}
            paths = {path.replace(":path}", "}") for _, path in found}
            assert {*HEALTH, "/v1/completions", "/v1/models", "/metrics", "/version", "/docs", "/openapi.json"} <= paths
            assert paths >= set(api.app.openapi()["paths"])
            for method, path in found:
                answer = await api.client.request(method, path)
                assert (answer.status_code != 401) == (path in HEALTH), path

    run(test)


@pytest.mark.parametrize("path", HEALTH)
def test_health_needs_no_key(path: str) -> None:
    assert request("GET", path, api_keys=KEYS).status_code == 200


def test_metrics_can_be_opened() -> None:
    assert request("GET", "/metrics", api_keys=KEYS, open_metrics=True).status_code == 200
    assert request("GET", "/v1/models", api_keys=KEYS, open_metrics=True).status_code == 401


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (b"Bearer first-key", 200),
        (b"bearer second-key", 200),
        (b"BEARER   first-key  ", 200),
        (b"", 401),
        (b"Bearer", 401),
        (b"Bearer ", 401),
        (b"first-key", 401),
        (b"Basic first-key", 401),
        (b"Bearer first-key second-key", 401),
        (b"Bearer first-keyx", 401),
        (b"Bearer FIRST-KEY", 401),
        (b"Bearer first-key\xff", 401),
        ("Bearer schlüssel".encode(), 401),
        (b"\xff\xfe \xfd", 401),
        (b"Bearer " + b"x" * 100_000, 401),
    ],
)
def test_what_counts_as_a_key(header: bytes, status: int) -> None:
    assert request("GET", "/v1/models", api_keys=KEYS, headers={b"authorization": header}).status_code == status


def test_without_keys_everything_is_open() -> None:
    assert request("GET", "/v1/models", headers={"authorization": "Bearer whatever"}).status_code == 200


def counted(fake: FakeEngine) -> dict[tuple[str, str], float]:
    """Responses by route and status."""
    return {
        (sample.labels["route"], sample.labels["status"]): sample.value
        for family in fake.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "banded_http_requests_total"
    }


def test_every_response_is_counted_under_its_route() -> None:
    async def test() -> None:
        async with serving(api_keys=KEYS) as api:
            key = {"authorization": "Bearer first-key"}
            await api.client.get("/health/live")
            await api.client.get("/v1/models")
            await api.client.get("/v1/models/fake", headers=key)
            for number in range(20):
                await api.client.get(f"/v1/models/{number}/x", headers=key)
                await api.client.get(f"/nope/{number}", headers=key)
                await api.client.request("PUT", f"/v1/models/{number}", headers=key)
            for fields in ({"max_tokens": 1}, {"max_tokens": 1, "stream": True}, {"n": 0}, {"model": "x"}):
                await api.client.post("/v1/completions", json={"model": "fake"} | fields, headers=key)
            assert counted(api.fake) == {
                ("/health/live", "200"): 1,
                ("other", "401"): 1,
                ("/v1/models/{name:path}", "200"): 1,
                ("/v1/models/{name:path}", "404"): 20,
                ("/v1/models/{name:path}", "405"): 20,
                ("other", "404"): 20,
                ("/v1/completions", "200"): 2,
                ("/v1/completions", "400"): 1,
                ("/v1/completions", "404"): 1,
            }

    run(test)


@contract("errors", "500", "without internals")
def test_an_unexpected_fault_is_a_500_counted_and_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise KeyError("secret detail")

    fake = FakeEngine()
    monkeypatch.setattr("service.api.routes.completions.CompletionAnswer", broken)
    answer = request("POST", "/v1/completions", fake, json={"model": "fake"})
    assert answer.status_code == 500
    assert answer.json()["error"] == {
        "message": "internal error",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    assert counted(fake) == {("/v1/completions", "500"): 1}
    errors = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.getMessage() for record in errors] == ["unexpected error"]
    assert "secret detail" in caplog.text


def test_a_fault_after_the_response_has_started_is_left_to_the_server() -> None:
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})
        raise KeyError("too late")

    async def send(message: Message) -> None:
        sent.append(message)

    async def test() -> None:
        with pytest.raises(KeyError, match="too late"):
            await AnswerFaults(app)({"type": "http"}, None, send)  # type: ignore[arg-type]

    run(test)
    assert sent == [{"type": "http.response.start", "status": 200}]


@pytest.mark.parametrize("stream", [False, True])
def test_an_unexpected_fault_inside_a_stream_is_an_error_event(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with serving() as api:
            texts = iter([b'"first"', b'"second"'])
            monkeypatch.setattr("service.api.answers.to_json", lambda text: next(texts))
            answer = await api.complete(prompt="a", max_tokens=4, stream=stream)
            assert answer.status_code == 200
            if stream:
                *chunks, error, done, end = answer.text.split("\n\n")
                events = [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]
                assert [event["choices"][0]["text"] for event in events] == ["first", "second"]
                assert '"code": "internal_error"' in error
                assert (done, end) == ("data: [DONE]", "")
            await asyncio.sleep(0.05)
            assert api.fake.scheduler.idle

    run(test)


async def one_of_each(api: Api) -> AsyncIterator[httpx.Response]:
    """Answers of every kind: whole, stream, refused, unknown, wrong method, fault, health, without a body."""
    yield await api.complete(max_tokens=1)
    yield await api.complete(max_tokens=1, stream=True)
    yield await api.complete(n=0)
    yield await api.complete(prompt="a", n=12, max_tokens=0, model="x")
    for method, path in (("GET", "/nope"), ("PUT", "/v1/models"), ("GET", "/health/ready"), ("HEAD", "/v1/models")):
        yield await api.client.request(method, path)
    yield await api.client.post("/v1/completions", content=b"x" * 300_000)

    def broken(step: object) -> None:
        raise RuntimeError("step")

    api.fake.runner.fault = broken
    yield await api.complete()


@contract("errors", "headers", "x-request-id, openai-processing-ms, openai-version on every response")
def test_every_response_has_an_id_a_time_and_a_version() -> None:
    async def test() -> None:
        async with serving(max_body_bytes=200_000) as api:
            ids, statuses = set(), []
            async for answer in one_of_each(api):
                statuses.append(answer.status_code)
                ids.add(answer.headers["x-request-id"])
                assert re.fullmatch(r"req_[0-9a-f]{32}", answer.headers["x-request-id"])
                assert 0 <= int(answer.headers["openai-processing-ms"]) < 20_000
                assert answer.headers["openai-version"] == "2020-10-01"
            assert statuses == [200, 200, 400, 404, 404, 405, 200, 200, 413, 500]
            assert len(ids) == len(statuses)

    run(test)


@contract("errors", "headers", "a sane x-request-id of the client is kept")
@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (b"my-id", True),
        (b"!" + b"~" * 127, True),
        (b"~" * 129, False),
        (b"", False),
        (b"two words", False),
        (b"tab\tbed", False),
        ("é".encode("latin-1"), False),
        ("é".encode(), False),
        (b"del\x7f", False),
    ],
)
def test_a_sane_id_of_the_client_is_kept(given: bytes, taken: bool) -> None:
    for api_keys in ((), KEYS):
        answer = request("GET", "/v1/models", api_keys=api_keys, headers={b"x-request-id": given})
        assert (answer.headers["x-request-id"].encode() == given) == taken


def test_routes_and_log_find_the_id() -> None:
    async def test() -> None:
        async with serving() as api:

            async def which(request: Request) -> str:
                return str(request.state.request_id)

            api.app.add_api_route("/which", which)
            answer = await api.client.get("/which", headers={"x-request-id": "mine"})
            assert answer.json() == "mine"

    run(test)


def test_the_time_is_that_until_the_response_starts() -> None:
    async def test() -> None:
        async with serving() as api:
            api.fake.runner.gate.clear()
            answering = asyncio.create_task(api.complete(max_tokens=1))
            await asyncio.sleep(0.1)
            api.fake.runner.gate.set()
            assert int((await answering).headers["openai-processing-ms"]) >= 100

    run(test)


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/fake", "/v1/models/x", "/health/live", "/metrics", "/docs", "/nope"]
)
def test_head_is_get_without_the_body(path: str) -> None:
    async def test() -> None:
        async with serving() as api:
            head, get = await api.client.head(path), await api.client.get(path)
            assert (head.status_code, head.content) == (get.status_code, b"")
            own = {"x-request-id", "openai-processing-ms"} | ({"content-length"} if path == "/metrics" else set())
            for name in {*get.headers, *head.headers} - own:
                assert head.headers[name] == get.headers[name]
            assert get.content

    run(test)


def test_head_needs_the_key_and_is_counted() -> None:
    async def test() -> None:
        async with serving(api_keys=KEYS) as api:
            answer = await api.client.head("/v1/models")
            assert (answer.status_code, answer.content) == (401, b"")
            await api.client.head("/v1/models", headers={"authorization": "Bearer first-key"})
            assert counted(api.fake) == {("other", "401"): 1, ("/v1/models", "200"): 1}

    run(test)


def test_head_of_what_is_only_posted_is_a_405() -> None:
    answer = request("HEAD", "/v1/completions")
    assert (answer.status_code, answer.content, answer.headers["allow"]) == (405, b"", "POST")


async def chunks(size: int, number: int) -> AsyncIterator[bytes]:
    for _ in range(number):
        yield b" " * size


@contract("connections", "paths", "slashes at either end are ignored")
@pytest.mark.parametrize("path", ["/v1/models/", "//v1/models", "/v1/models//", "/v1/models"])
def test_slashes_at_the_ends_of_a_path_are_ignored(path: str) -> None:
    assert request("GET", "http://test" + path).json()["object"] == "list"
    assert request("GET", "http://test" + path, api_keys=KEYS).status_code == 401


@contract("connections", "root_path", "routes answer below it, whether a proxy removes the prefix or not")
def test_routes_below_a_prefix() -> None:
    async def test() -> None:
        async with serving(api_keys=KEYS, root_path="/llm/a", limit_requests=5) as api:
            for prefix in ("/llm/a", ""):
                assert (await api.client.get(prefix + "/health")).status_code == 200
                assert (await api.client.get(prefix + "/v1/models")).status_code == 401
                assert (await api.client.get(prefix + "/v1/models", headers=FIRST)).status_code == 200
                body = {"model": "fake", "max_tokens": 1}
                answer = await api.client.post(prefix + "/v1/completions", json=body, headers=FIRST)
                assert (answer.status_code, "x-ratelimit-limit-requests" in answer.headers) == (200, True)
                document = (await api.client.get(prefix + "/openapi.json", headers=FIRST)).json()
                assert document["servers"] == [{"url": "/llm/a"}]
            assert (await api.client.get("/llm/ab/health")).status_code == 401
            assert (await api.client.get("/llm/a/llm/a/v1/models", headers=FIRST)).status_code == 404
            assert counted(api.fake)[("/v1/models", "200")] == 2

    run(test)


@contract("connections", "/docs", "works without any other server")
@pytest.mark.parametrize("root_path", ["", "/llm"])
@pytest.mark.parametrize("page", ["/docs", "/redoc"])
def test_the_docs_pages_load_from_this_server_alone(page: str, root_path: str) -> None:
    async def test() -> None:
        async with serving(root_path=root_path) as api:
            html = (await api.client.get(root_path + page)).text
            links = re.findall(r'(?:src|href|url)(?:=|: )["\']([^"\']+)', html)
            assert len(links) >= 2
            for link in links:
                assert link.startswith(root_path + "/")
                assert (await api.client.get(link)).status_code == 200, link
            assert "http://" not in html.replace("http://www.w3.org", "")
            assert "https://" not in html

    run(test)


@contract("connections", "content-encoding", "a compressed body is a 415")
def test_a_compressed_body_is_refused_by_name() -> None:
    body = json.dumps({"model": "fake", "max_tokens": 1}).encode()
    for coding in ("gzip", "br", "zstd, gzip"):
        headers = {"content-encoding": coding, "content-type": "application/json"}
        answer = request("POST", "/v1/completions", content=gzip.compress(body), headers=headers)
        error = error_of(answer, 415)
        assert error["message"] == (
            f"'content-encoding': is '{coding}', but this server reads bodies that are not compressed only"
        )
        assert answer.headers["accept-encoding"] == "identity"
    headers = {"content-encoding": "identity", "content-type": "application/json"}
    assert request("POST", "/v1/completions", content=body, headers=headers).status_code == 200


@contract("errors", "413", "by the declared length")
def test_a_body_over_the_limit_is_refused_by_its_length() -> None:
    async def test() -> None:
        async with serving(max_body_bytes=100) as api:
            for path in ("/v1/completions", "/nope", "/health/live"):
                error = error_of(await api.client.post(path, content=b"x" * 101), 413)
                assert error["message"] == "the body is 101 bytes, this server's limit is 100"
                assert (error["param"], error["code"]) == (None, "body_too_large")
            assert error_of(await api.client.post("/v1/completions", content=b"x" * 100), 400)["code"] is None
            assert (await api.complete(max_tokens=1)).status_code == 200

    run(test)


@contract("errors", "413", "by what has come")
def test_a_body_of_unknown_length_is_refused_when_it_is_too_long() -> None:
    async def test() -> None:
        async with serving(max_body_bytes=100) as api:
            for stream in (False, True):  # streamed or not: the body that would say so has not been read yet
                error = error_of(await api.client.post("/v1/completions", content=chunks(30, 4 + stream)), 413)
                assert error["message"] == "the body is longer than this server's limit of 100 bytes"
                assert (error["param"], error["code"]) == (None, "body_too_large")
            assert (await api.client.post("/v1/completions", content=chunks(25, 4))).status_code == 400
            assert counted(api.fake) == {("/v1/completions", "413"): 2, ("/v1/completions", "400"): 1}

    run(test)


async def stalling(size: int, go: asyncio.Event) -> AsyncIterator[bytes]:
    yield b" " * size
    await go.wait()


def test_large_bodies_share_room_that_no_client_takes_from_the_others() -> None:
    async def test() -> None:
        async with serving(max_body_bytes=20_000, api_keys=("a:first-key", "a:other-key", "second-key")) as api:
            go = asyncio.Event()

            async def ask(key: str, content: bytes | AsyncIterator[bytes], **more: str) -> httpx.Response:
                headers = {"authorization": f"Bearer {key}", "content-type": "application/json"} | more
                return await api.client.post("/v1/completions", content=content, headers=headers)

            held = [asyncio.create_task(ask("first-key", stalling(18_000, go))) for _ in range(2)]
            declared = {"content-length": "18000"}
            held += [asyncio.create_task(ask("other-key", stalling(100, go), **declared)) for _ in range(2)]  # one name's
            await asyncio.sleep(0.05)
            large = b'{"max_tokens": 1}' + b" " * 19_000
            answer = await ask("first-key", large)
            error = error_of(answer, 503, "server_error")
            message = "there is no room for a body of 19017 bytes next to those that the server works on: try again"
            assert error["message"] == message
            assert answer.headers["retry-after"] == "5"
            assert (await ask("first-key", large[:SHORT_BODY])).status_code == 200, "a small body takes no room"
            assert (await ask("second-key", large)).status_code == 200
            go.set()
            assert [(await each).status_code for each in held] == [400] * 4
            assert (await ask("first-key", large)).status_code == 200

    run(test)


def test_a_request_s_work_is_done_for_its_client() -> None:
    """For the name of its key, or its key, or its address: see FairThreads."""
    found = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        found.append(current_client.get())

    async def test() -> None:
        check = CheckBody(app, lambda _: 100, Room(100))
        states: list[dict[str, Any]] = [{"owner": "alice", "key": b"1"}, {"key": b"1"}, {}]
        for state in states:
            scope: Scope = {
                "type": "http",
                "path": "/",
                "root_path": "",
                "headers": [],
                "state": state,
                "client": ("1.2.3.4", 5),
            }
            await asyncio.create_task(check(scope, None, None))  # type: ignore[arg-type]

    run(test)
    assert found == ["alice", b"1", "1.2.3.4"]


def test_room_is_for_each_client_and_for_all() -> None:
    room = Room(1000)  # 8000 for all
    assert [room.take("a", 1000) for _ in range(5)] == [True] * 4 + [False]
    assert [room.take("b", 1000) for _ in range(3)] == [True] * 2 + [False]
    assert [room.take("c", 1000) for _ in range(2)] == [True, False]
    room.give_back("a", 2000)
    assert [room.take("c", 1000) for _ in range(2)] == [True, False]
    for client, size in (("a", 2000), ("b", 2000), ("c", 2000)):
        room.give_back(client, size)
    assert room.take("d", 4000)
    assert not room.take("d", 1)


def test_a_false_length_is_not_believed() -> None:
    async def test() -> None:
        async with serving(max_body_bytes=100) as api:
            for length in ("5", "-1", "many", "²"):
                headers = {b"content-length": length.encode("latin-1")}
                answer = await api.client.post("/v1/completions", content=chunks(30, 4), headers=headers)
                assert answer.status_code == 413

    run(test)


@contract("errors", "413", "16 MiB for a file, 4 MiB for many prompts or a text of any length, 1 MiB for all else")
@pytest.mark.parametrize(
    ("path", "limit"),
    [
        ("/v1/files", 2**24),
        ("/v1/completions", 2**22),
        ("/v1/engines/a/b/completions", 2**22),
        ("/v1/score", 2**22),
        ("/tokenize", 2**22),
        ("/detokenize/", 2**22),
        ("/v1/chat/completions", 2**20),
        ("/v1/fine_tuning/jobs", 2**20),
        ("/v1/nothing", 2**20),
    ],
)
def test_the_default_limits(path: str, limit: int) -> None:
    assert request("POST", path, content=b"x" * limit).status_code in (400, 404)
    error = error_of(request("POST", path, content=b"x" * (limit + 1)), 413)
    assert error["message"] == f"the body is {limit + 1} bytes, this server's limit is {limit}"
    assert error["code"] == "body_too_large"


def test_a_lower_limit_of_files_is_a_limit_of_all() -> None:
    async def test() -> None:
        async with serving(max_body_bytes=10, max_text_bytes=20) as api:
            assert (await api.client.post("/tokenize", content=b"x" * 11)).status_code == 413

    run(test)


@pytest.mark.parametrize(("expect", "connection"), [({}, None), ({"expect": "100-continue"}, "close")])
def test_who_waits_to_be_asked_for_the_body_is_not_asked_for_another(expect: dict[str, str], connection: str | None) -> None:
    async def test() -> None:
        async with serving(max_body_bytes=100) as api:
            answer = await api.client.post("/v1/completions", content=b"x" * 101, headers=expect)
            assert answer.status_code == 413
            assert answer.headers.get("connection") == connection

    run(test)


FIRST, SECOND = ({"authorization": f"Bearer {key}"} for key in KEYS)
RATE = {f"x-ratelimit-{what}-{unit}" for what in ("limit", "remaining", "reset") for unit in ("requests", "tokens")}


@contract("errors", "429", "rate_limit_exceeded of a key's requests, with x-ratelimit headers")
def test_requests_over_a_keys_limit() -> None:
    async def test() -> None:
        async with serving(api_keys=KEYS, limit_requests=2) as api:
            for remaining in ("1", "0"):
                answer = await api.client.post("/v1/completions", json={"model": "fake", "max_tokens": 1}, headers=FIRST)
                assert answer.status_code == 200
                assert answer.headers["x-ratelimit-limit-requests"] == "2"
                assert answer.headers["x-ratelimit-remaining-requests"] == remaining
                assert re.fullmatch(r"1m0s|[\d.]+s", answer.headers["x-ratelimit-reset-requests"])
            answer = await api.client.post("/v1/completions", json={"model": "fake", "stream": True}, headers=FIRST)
            error = error_of(answer, 429, "rate_limit_error")
            assert error["message"].startswith("this key's limit is 2 requests a minute; the request needs 1 and 0 are left")
            assert error["code"] == "rate_limit_exceeded"
            assert 25 <= int(answer.headers["retry-after"]) <= 30
            assert answer.headers["x-ratelimit-remaining-requests"] == "0"
            assert {name for name in answer.headers if "ratelimit" in name} == {name for name in RATE if "requests" in name}
            # Reading costs nothing, and the other key has limits of its own.
            assert (await api.client.get("/v1/models", headers=FIRST)).headers["x-ratelimit-remaining-requests"] == "0"
            answer = await api.client.post("/v1/completions", json={"model": "x"}, headers=SECOND)
            assert (answer.status_code, answer.headers["x-ratelimit-remaining-requests"]) == (404, "1")
            assert counted(api.fake)[("other", "429")] == 1

    run(test)


def test_who_has_the_headers() -> None:
    async def test() -> None:
        async with serving(api_keys=KEYS, limit_requests=9, limit_tokens=99, max_body_bytes=100) as api:
            for method, path, status in (
                ("GET", "/v1/models", 200),
                ("HEAD", "/v1/models", 200),
                ("GET", "/metrics", 200),
                ("GET", "/nope", 404),
                ("PUT", "/v1/models", 405),
            ):
                answer = await api.client.request(method, path, headers=FIRST)
                assert (answer.status_code, RATE - set(answer.headers)) == (status, set())
            answer = await api.client.post("/v1/completions", content=b"x" * 101, headers=FIRST)
            assert (answer.status_code, answer.headers["x-ratelimit-remaining-requests"]) == (413, "8")
            for answer in (await api.client.get("/health/live", headers=FIRST), await api.client.get("/v1/models")):
                assert not RATE & set(answer.headers)

    run(test)


@contract("errors", "429", "a key pays for what it used, and for nothing that was refused")
def test_completions_cost_what_they_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.api.middleware.KeyLimits", partial(KeyLimits, clock=lambda: 0.0))  # else a bucket fills

    async def test() -> None:
        async with serving(FakeEngine(max_slots=1, max_queue=0), api_keys=KEYS, limit_tokens=200) as api:

            async def left(path: str, **body: object) -> int:
                await api.client.post(path, json={"model": "fake", **body}, headers=FIRST)
                answer = await api.client.get("/v1/models", headers=FIRST)
                return int(answer.headers["x-ratelimit-remaining-tokens"])

            assert await left("/v1/completions", prompt=[1] * 10, max_tokens=50, stop=" three") == 200 - 10 - 3
            before = await left("/v1/completions", prompt=[1] * 10, max_tokens=0)
            assert before == 187 - 10
            assert await left("/v1/completions", prompt=[1] * 10, n=2) == before, "a full queue"
            assert await left("/v1/completions", prompt=[1] * 10, stream=True, n=2) == before
            too_much = await api.client.post(
                "/v1/completions", json={"model": "fake", "prompt": [1], "max_tokens": 200}, headers=FIRST
            )
            assert error_of(too_much, 400)["code"] == "request_too_large"

    run(test)


@contract("errors", "429", "rate_limit_exceeded of a key's tokens")
def test_routes_charge_tokens_and_give_back_what_was_not_used() -> None:
    async def test() -> None:
        async with serving(api_keys=KEYS, limit_tokens=100) as api:

            async def spend(request: Request, asked: int, used: int) -> None:
                request.state.limits.charge(asked)
                request.state.limits.refund(asked - used)

            api.app.add_api_route("/spend", spend, methods=["POST"])

            async def spent(asked: int, used: int) -> httpx.Response:
                return await api.client.post("/spend", params={"asked": asked, "used": used}, headers=FIRST)

            answer = await spent(90, 40)
            assert (answer.status_code, answer.headers["x-ratelimit-remaining-tokens"]) == (200, "60")
            answer = await spent(70, 0)
            error = error_of(answer, 429, "rate_limit_error")
            assert error["code"] == "rate_limit_exceeded"
            assert 1 <= int(answer.headers["retry-after"]) <= 6
            assert set(answer.headers) >= {name for name in RATE if "tokens" in name}
            error = error_of(await spent(101, 0), 400)
            assert error["message"].startswith("the request asks for 101 tokens")
            assert (await spent(60, 60)).headers["x-ratelimit-remaining-tokens"] in ("0", "1")

    run(test)


@pytest.mark.parametrize("api_keys", [(), KEYS])
def test_routes_find_no_limits_where_there_are_none(api_keys: tuple[str, ...]) -> None:
    async def test() -> None:
        async with serving(api_keys=api_keys) as api:

            async def unlimited(request: Request) -> bool:
                request.state.limits.charge(10**9)
                return True

            api.app.add_api_route("/unlimited", unlimited)
            answer = await api.client.get("/unlimited", headers=FIRST)
            assert answer.json() is True
            assert not RATE & set(answer.headers)

    run(test)


PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}


@contract("errors", "CORS", "closed by default")
def test_other_origins_are_shut_out_by_default() -> None:
    for keys, statuses in ((KEYS, (200, 401)), ((), (403, 403))):
        answer = request("GET", "/v1/models", api_keys=keys, headers={"origin": "https://a.example", **FIRST})
        assert answer.status_code == statuses[0]
        assert not [name for name in answer.headers if name.startswith("access-control-")]
        answer = request("OPTIONS", "/v1/completions", api_keys=keys, headers={"origin": "https://a.example", **PREFLIGHT})
        assert answer.status_code == statuses[1]


@contract("errors", "CORS", "open to the origins of the setting")
@pytest.mark.parametrize(
    ("origins", "origin", "allowed"),
    [
        (("https://a.example", "https://b.example"), "https://b.example", "https://b.example"),
        (("https://a.example",), "https://b.example", None),
        (("https://a.example",), "https://a.example.org", None),
        (("*",), "https://b.example", "*"),
    ],
)
def test_the_origins_of_the_setting_are_let_in(origins: tuple[str, ...], origin: str, allowed: str | None) -> None:
    async def test() -> None:
        async with serving(api_keys=KEYS, cors_origins=origins) as api:
            asked = await api.client.options("/v1/completions", headers={"origin": origin, **PREFLIGHT})
            assert asked.status_code == (200 if allowed else 400)
            assert asked.headers.get("access-control-allow-origin") == allowed
            assert "x-request-id" in asked.headers
            for headers in (FIRST, {}):  # a browser must be able to read a 401 too
                answer = await api.client.get("/v1/models", headers={"origin": origin, **headers})
                assert answer.status_code == (200 if headers else 401)
                assert answer.headers.get("access-control-allow-origin") == allowed
                assert answer.headers["access-control-expose-headers"].split(", ") == list(EXPOSED_HEADERS)

    run(test)


def test_a_preflight_lets_through_what_clients_send() -> None:
    async def test() -> None:
        async with serving(api_keys=KEYS, cors_origins=("https://a.example",)) as api:
            asked = await api.client.options("/v1/completions", headers={"origin": "https://a.example", **PREFLIGHT})
            assert asked.headers["access-control-allow-headers"] == "authorization,content-type"
            assert asked.headers["access-control-allow-methods"] == "GET, HEAD, POST, DELETE"
            # Without the headers of a preflight, OPTIONS is a request like any other.
            answer = await api.client.options("/v1/completions", headers={"origin": "https://a.example"})
            assert answer.status_code == 401

    run(test)


async def site(
    settings: dict[str, Any], host: str | None, origin: str | None = None, server: str = "127.0.0.1"
) -> httpx.Response:
    """The answer to a request with such headers, of a server with `settings` that was reached at the address `server`."""
    fake = FakeEngine()
    app = create_app(served(fake), fake.metrics, settings_of(**settings))
    status, sent, sent_headers = 0, b"", []
    headers = [(b"host", host.encode())] if host is not None else []
    headers += [(b"origin", origin.encode())] if origin is not None else []

    async def send(message: Message) -> None:
        nonlocal status, sent
        status, sent = message.get("status", status), sent + message.get("body", b"")
        sent_headers.extend(message.get("headers", []))

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/health/live",
        "headers": headers,
        "query_string": b"",
        "scheme": "http",
    }
    await app(scope | {"server": (server, 8000), "client": ("127.0.0.1", 1)}, receive, send)
    return httpx.Response(status, headers=sent_headers, content=sent)


OPEN: dict[str, Any] = {}
NAMED = {"allowed_hosts": ("llm.example", "FD00::1")}
OUTSIDE = {"host": "0.0.0.0", "allow_unauthenticated": True}
KEYED = {"api_keys": KEYS}


@contract("errors", "403", "without keys on loopback: the Host header is loopback's or in BANDED_ALLOWED_HOSTS")
@pytest.mark.parametrize(
    ("settings", "host", "known"),
    [
        *((OPEN, host, True) for host in ("localhost", "localhost:8000", "LocalHost.:8000", "127.0.0.1:8000", "127.9.9.9")),
        *((OPEN, host, True) for host in ("[::1]:8000", "[::1]", "0.0.0.0:8000", "host.docker.internal:8000", None, "")),
        *(
            (OPEN, host, False)
            for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "10.0.0.1", "x.y")
        ),
        *((OPEN, host, True) for host in ("banded", "banded:8000", "x")),  # what nginx calls the server by default
        *(
            (OPEN, host, False)
            for host in ("evil@localhost", "localhost:8000:1", "localhost evil", "[::2]", "127.0.0.1.nip.io")
        ),
        (NAMED, "llm.example:443", True),
        (NAMED, "LLM.example", True),
        (NAMED, "[fd00::1]:8000", True),
        (NAMED, "localhost", True),
        (NAMED, "other.llm.example", False),
        ({"allowed_hosts": ("*",)}, "evil.example", True),
        (OUTSIDE, "banded:8000", True),
        (OUTSIDE | NAMED, "banded:8000", True),
        (OUTSIDE | NAMED, "banded.example:8000", False),
        (OUTSIDE | NAMED, "llm.example", True),
        (OUTSIDE | NAMED, "127.0.0.1:8000", True),
        (KEYED, "evil.example", True),
        (KEYED | NAMED, "evil.example", False),
    ],
)
def test_a_foreign_host_is_refused_where_no_key_is_asked_for(
    settings: dict[str, Any], host: str | None, known: bool
) -> None:
    answer = asyncio.run(site(settings, host))
    if known:
        assert answer.status_code == 200
    else:
        error = error_of(answer, 403)
        assert error["message"] == f"'{host}' is no name of this server: if it should be, add it to BANDED_ALLOWED_HOSTS"
        assert error["code"] == "unknown_host"


def test_a_probe_may_name_the_address_that_it_connects_to() -> None:
    for server, host, status in (
        ("10.1.2.3", "10.1.2.3:8000", 200),
        ("fd00::5", "[fd00::5]:8000", 200),
        ("10.1.2.3", "10.1.2.4", 403),
    ):
        assert asyncio.run(site(OUTSIDE | NAMED, host, server=server)).status_code == status


@contract("errors", "403", "without keys on loopback: an Origin is the server's own, or allowed")
@pytest.mark.parametrize(
    ("settings", "host", "origin", "allowed"),
    [
        (OPEN, "localhost:8000", "http://localhost:8000", True),
        (OPEN, "127.0.0.1:8000", "http://localhost:8000", True),
        (OPEN, "[::1]:8000", "http://[::1]:8000", True),
        (OPEN, "localhost:8000", "http://localhost:3000", False),
        (OPEN, "localhost:8000", "http://evil.example", False),
        (OPEN, "localhost:8000", "http://evil.example:8000", False),
        (OPEN, "localhost:8000", "http://localhost:8000.evil.example", False),
        (OPEN, "localhost:8000", "null", False),
        (OPEN, "localhost:8000", "", False),
        (OPEN, None, "http://evil.example", False),
        (OPEN | {"cors_origins": ("http://localhost:3000",)}, "localhost:8000", "http://localhost:3000", True),
        (OPEN | {"cors_origins": ("http://localhost:3000",)}, "localhost:8000", "http://evil.example", False),
        (OPEN | {"cors_origins": ("*",)}, "localhost:8000", "null", True),
        # A proxy that speaks TLS, which hands the Host header on or not.
        (NAMED, "llm.example", "https://llm.example", True),
        (NAMED, "127.0.0.1:8000", "https://llm.example", True),
        ({"allowed_hosts": ("*",)}, "one.example", "https://one.example", True),
        ({"allowed_hosts": ("*",)}, "one.example", "https://two.example", False),
        (OUTSIDE, "banded:8000", "http://evil.example", True),
        (KEYED, "localhost:8000", "http://evil.example", True),
    ],
)
def test_another_sites_page_is_refused_where_no_key_is_asked_for(
    settings: dict[str, Any], host: str | None, origin: str, allowed: bool
) -> None:
    answer = asyncio.run(site(settings, host, origin))
    if allowed:
        assert answer.status_code == 200
    else:
        error = error_of(answer, 403)
        assert error["message"] == f"pages of '{origin}' may not use this server: if they should, see BANDED_CORS_ORIGINS"
        assert error["code"] == "unknown_origin"
