"""The application as a whole: its lifespan, its own description, and a client for the tests of its parts."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any, NamedTuple

import httpx
import pytest
from fastapi import FastAPI

from model.checkpoint.prompt_format import Card
from service.api.app import create_app
from service.api.middleware import HEALTH
from service.api.schema.completions import CompletionRequest
from service.engine.models import Models, ServedModel
from tests.service.engine.fakes import CONFIG, FakeEngine
from tests.service.engine.test_engine import run

NO_CARD = Card()


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


def served(fake: FakeEngine, card: Card = NO_CARD) -> Models:
    return Models([ServedModel("fake", 1700000000, CONFIG, fake.tokenizer, card, "fp_0123456789", fake.engine)])


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


@pytest.mark.parametrize(("api_keys", "open_metrics"), [((), False), (("key",), False), (("key",), True)])
def test_the_openapi_document_tells_of_errors_and_keys(api_keys: tuple[str, ...], open_metrics: bool) -> None:
    async def test() -> None:
        async with serving(api_keys=api_keys, open_metrics=open_metrics) as api:
            headers = {"authorization": "Bearer key"}
            document = (await api.client.get("/openapi.json", headers=headers)).json()
            assert (await api.client.get("/openapi.json", headers=headers)).json() == document
            assert document["info"] == {"title": "Banded", "version": version("banded")}
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    errors = {status: answer for status, answer in operation["responses"].items() if status != "200"}
                    assert set(errors) - {"400", "409"} == {"401", "404", "405", "413", "429", "500", "503"}
                    for answer in errors.values():
                        [content] = answer["content"].values()
                        assert content["schema"] == {"$ref": "#/components/schemas/ErrorResponse"}
                    is_open = path in HEALTH or (open_metrics and path == "/metrics")
                    assert operation.get("security") == ([] if api_keys and is_open else None)
            assert "HTTPValidationError" not in document["components"]["schemas"]
            schemes = {"key": {"type": "http", "scheme": "bearer"}} if api_keys else None
            assert document["components"].get("securitySchemes") == schemes
            assert document.get("security") == ([{"key": []}] if api_keys else None)

    run(test)


def test_leniency_is_there_for_the_routes() -> None:
    async def test() -> None:
        async with serving() as strict, serving(lenient=True) as lenient:
            assert (strict.app.state.lenient, lenient.app.state.lenient) == (False, True)

    run(test)


def test_the_openapi_document_describes_every_field() -> None:
    schema = request("GET", "/openapi.json").json()["components"]["schemas"]["CompletionRequest"]
    assert set(schema["properties"]) == set(CompletionRequest.model_fields)
    assert len(schema["properties"]["prompt"]["anyOf"]) == 5
    assert schema["required"] == ["model"]
    assert schema["additionalProperties"] is False
