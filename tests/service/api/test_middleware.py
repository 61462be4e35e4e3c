"""API keys on every route, and the count of every response."""

import asyncio
import logging
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from service.api.middleware import AnswerFaults
from tests.service.api.test_app import request, serving
from tests.service.fakes import FakeEngine
from tests.service.test_engine import run

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
    ("GET", "/health/live/"),
    ("GET", "//health/live"),
    ("GET", "/health"),
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


@pytest.mark.parametrize("path", ["/health/live", "/health/ready"])
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


def test_an_unexpected_fault_is_a_500_counted_and_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise KeyError("secret detail")

    fake = FakeEngine()
    monkeypatch.setattr("service.api.completions.Completion", broken)
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
            names = iter(["first", "second"])
            monkeypatch.setattr("service.api.generation.event", lambda body: f"data: {next(names)}\n\n".encode())
            answer = await api.complete(prompt="a", max_tokens=3, stream=stream)
            assert answer.status_code == 200
            if stream:
                *chunks, error, done, end = answer.text.split("\n\n")
                assert chunks == ["data: first", "data: second"]
                assert '"code": "internal_error"' in error
                assert (done, end) == ("data: [DONE]", "")
            await asyncio.sleep(0.05)
            assert api.fake.scheduler.idle

    run(test)
