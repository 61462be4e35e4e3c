"""The application as a whole: its lifespan, its own description, and a client for the tests of its parts."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import httpx
from fastapi import FastAPI
from model.card import Card

from service.api.app import create_app
from service.schema import CompletionRequest
from service.served import ServedModel
from tests.service.fakes import CONFIG, FakeEngine
from tests.service.test_engine import run


class Api(NamedTuple):
    """An application over a fake engine, and a client for it."""

    app: FastAPI
    fake: FakeEngine
    client: httpx.AsyncClient

    async def complete(self, **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/completions", json={"model": "fake", **fields})

    async def choices(self, **fields: Any) -> list[dict[str, Any]]:
        answer = await self.complete(**fields)
        assert answer.status_code == 200, answer.text
        choices: list[dict[str, Any]] = answer.json()["choices"]
        return choices


def served(fake: FakeEngine) -> ServedModel:
    return ServedModel("fake", 1700000000, CONFIG, fake.tokenizer, Card(), "fp_0123456789", fake.engine)


@asynccontextmanager
async def serving(fake: FakeEngine | None = None, **options: Any) -> AsyncIterator[Api]:
    fake = fake or FakeEngine()
    app = create_app(served(fake), fake.metrics, **options)
    async with app.router.lifespan_context(app):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            yield Api(app, fake, client)
        fake.runner.fault = lambda step: None
        fake.runner.gate.set()


def request(
    method: str,
    path: str,
    fake: FakeEngine | None = None,
    *,
    api_keys: tuple[str, ...] = (),
    open_metrics: bool = False,
    **options: Any,
) -> httpx.Response:
    """The answer of a fresh application to a single request; `options` are httpx's."""

    async def asking() -> httpx.Response:
        async with serving(fake, api_keys=api_keys, open_metrics=open_metrics) as api:
            return await api.client.request(method, path, **options)

    return asyncio.run(asking())


def post(body: object, fake: FakeEngine | None = None, *, content_type: str = "application/json") -> httpx.Response:
    """The answer of a fresh application to a single completion request, given as an object, as text or as bytes."""
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    return request("POST", "/v1/completions", fake, content=content, headers={"content-type": content_type})


def events_of(answer: httpx.Response) -> list[Any]:
    """The JSON of a whole event stream, which must end in [DONE]."""
    *events, done, end = answer.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert all(event.startswith("data: ") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_the_lifespan_starts_and_stops_the_engine() -> None:
    async def test() -> None:
        async with serving() as api:
            assert api.fake.engine._thread.is_alive()
            assert (await api.choices(prompt="hi", max_tokens=2))[0]["text"] == " one two"
        assert not api.fake.engine._thread.is_alive()

    run(test)


def test_the_openapi_document_describes_every_field() -> None:
    schema = request("GET", "/openapi.json").json()["components"]["schemas"]["CompletionRequest"]
    assert set(schema["properties"]) == set(CompletionRequest.model_fields)
    assert len(schema["properties"]["prompt"]["anyOf"]) == 5
    assert schema["required"] == ["model"]
    assert schema["additionalProperties"] is False
