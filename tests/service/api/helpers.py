"""A client for tests of the application over a fake engine."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import httpx
from fastapi import FastAPI

from model.checkpoint.prompt_format import PromptFormat
from service.api.app import create_app
from service.engine.models import ModelEntry, Models
from tests.service.engine.fakes import CONFIG, FakeEngine
from tests.service.helpers import settings_of

DEFAULT_FORMAT = PromptFormat()


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


def served(fake: FakeEngine, prompt_format: PromptFormat = DEFAULT_FORMAT, aliases: tuple[str, ...] = ()) -> Models:
    base = ModelEntry("fake", 1700000000, CONFIG, fake.tokenizer, prompt_format, "fp_0123456789", fake.engine)
    return Models([base, *(base._replace(name=name, alias_of="fake") for name in aliases)])


@asynccontextmanager
async def serving(
    fake: FakeEngine | None = None, prompt_format: PromptFormat = DEFAULT_FORMAT, **settings: Any
) -> AsyncIterator[Api]:
    fake = fake or FakeEngine()
    app = create_app(served(fake, prompt_format, settings_of(**settings).names), fake.metrics, settings_of(**settings))
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


def error_of(answer: httpx.Response, status: int, kind: str = "invalid_request_error") -> dict[str, Any]:
    """The error in an answer, after checking what all errors have in common."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert len(answer.content) < 1000
    body = answer.json()
    error: dict[str, Any] = body["error"]
    assert list(body) == ["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["type"] == kind
    return error


def prompts_run(fake: FakeEngine) -> list[list[int]]:
    """The prompts that the runner was given."""
    prompts: list[list[int]] = []
    for chunk in (chunk for step in fake.runner.steps for chunk in step.chunks):
        if chunk.start == 0:
            prompts.append([])
        prompts[-1] += chunk.tokens
    return prompts
