"""What stays charged to a key's tokens, on every route that charges: work that was done, and nothing that was refused."""

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
import pytest

from service.api import limits
from service.api.routes import tokenization
from tests.service.api.helpers import Api, serving
from tests.service.engine.fakes import FakeEngine
from tests.service.helpers import run, until

KEY = {"authorization": "Bearer a"}
HELLO = [{"role": "user", "content": "Hello"}]
PROMPT = [1] * 10
# Requests that an engine runs, and one of two choices.
RUNS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("/v1/completions", {"prompt": PROMPT, "max_tokens": 5}, {"n": 2}),
    ("/v1/completions", {"prompt": PROMPT, "max_tokens": 5, "stream": True}, {"n": 2}),
    ("/v1/engines/fake/completions", {"prompt": PROMPT, "max_tokens": 5}, {"n": 2}),
    ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 5}, {"n": 2}),
    ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 5, "stream": True}, {"n": 2}),
    ("/v1/score", {"prompt": PROMPT, "continuations": [[1]]}, {"continuations": [[1], [2]]}),
]
TEXTS: list[tuple[str, dict[str, Any]]] = [
    ("/tokenize", {"prompt": "one two three"}),
    ("/tokenize", {"messages": HELLO}),
    ("/detokenize", {"tokens": [1] * 20}),
]


@pytest.fixture(autouse=True)
def nothing_is_refilled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MINUTE", 1e9)


def serving_a_key(fake: FakeEngine | None = None, **options: Any) -> AbstractAsyncContextManager[Api]:
    return serving(fake, api_keys=("a",), limit_tokens=1000, **options)


async def post(api: Api, path: str, body: dict[str, Any]) -> httpx.Response:
    return await api.client.post(path, json=body, headers=KEY)


async def left(api: Api) -> int:
    return int((await api.client.get("/v1/models", headers=KEY)).headers["x-ratelimit-remaining-tokens"])


async def cost(api: Api, path: str, body: dict[str, Any], status: int) -> int:
    """What a request leaves charged that is answered with `status`."""
    before = await left(api)
    answer = await post(api, path, body)
    assert answer.status_code == status, answer.text
    return before - await left(api)


@pytest.mark.parametrize(
    ("path", "body", "wrong"),
    [
        *((path, body, wrong) for path, body, _ in RUNS for wrong in ({"unknown": 1}, {"logit_bias": {"99999": 1}})),
        *((path, body, {"unknown": 1}) for path, body in TEXTS),
        ("/detokenize", {"tokens": [1] * 20}, {"tokens": [1] * 20 + [99999]}),
    ],
)
def test_what_is_wrong_costs_nothing(path: str, body: dict[str, Any], wrong: dict[str, Any]) -> None:
    async def test() -> None:
        async with serving_a_key() as api:
            assert await cost(api, path, body | wrong, 400) == 0
            assert await cost(api, path, body, 200) > 0

    run(test)


@pytest.mark.parametrize(("path", "body", "more"), RUNS)
def test_what_the_engine_does_not_take_costs_nothing(path: str, body: dict[str, Any], more: dict[str, Any]) -> None:
    async def test() -> None:
        async with serving_a_key(fake := FakeEngine(max_slots=1, max_queue=1, queue_timeout=0.2)) as api:
            fake.runner.gate.clear()
            first = asyncio.create_task(post(api, "/v1/completions", {"prompt": [1], "max_tokens": 1}))
            await until(lambda: bool(fake.scheduler.running))
            before = await left(api)
            late = asyncio.create_task(post(api, path, body))
            await until(lambda: len(fake.engine._active) == 2)
            assert (await post(api, path, body | more)).json()["error"]["code"] == "server_busy"
            await asyncio.sleep(0.3)
            fake.runner.gate.set()
            assert ((await late).status_code, (await first).status_code) == (503, 200)
            assert await left(api) == before
            await fake.engine.drain(0)
            assert await cost(api, path, body, 503) == 0

    run(test)


@pytest.mark.parametrize(("path", "body", "more"), RUNS)
def test_a_step_that_fails_costs_the_prompt_that_it_ran(path: str, body: dict[str, Any], more: dict[str, Any]) -> None:
    def fault(step: object) -> None:
        raise RuntimeError

    async def test() -> None:
        async with serving_a_key(fake := FakeEngine()) as api:
            whole = await cost(api, path, body, 200)
            fake.runner.late_fault = fault
            assert await cost(api, path, body, 500) == whole - body.get("max_tokens", 0)

    run(test)


def test_a_client_that_leaves_pays_for_the_prompts_that_have_begun() -> None:
    async def test() -> None:
        async with serving_a_key(fake := FakeEngine(max_slots=1)) as api:
            fake.runner.gate.clear()
            for body, path, begun in (
                ({"prompt": [PROMPT] * 4, "max_tokens": 5}, "/v1/completions", 10),
                ({"prompt": PROMPT, "continuations": [[1, 2], [3], [4]]}, "/v1/score", 12),
            ):
                before = await left(api)
                leaving = asyncio.create_task(post(api, path, body))
                waiting = asyncio.create_task(post(api, path, body))
                await until(lambda: bool(fake.scheduler.running) and len(fake.engine._generations) > 5)
                for each in (waiting, leaving):
                    each.cancel()
                await until(lambda: not fake.engine._generations)
                assert before - await left(api) == begun
                fake.runner.gate.set()
                await until(lambda: fake.scheduler.idle)
                fake.runner.gate.clear()

    run(test)


@pytest.mark.parametrize(("path", "body"), TEXTS)
def test_work_on_a_text_that_fails_costs_nothing(path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object) -> None:
        raise MemoryError

    async def test() -> None:
        async with serving_a_key() as api:
            for name in ("tokenized", "detokenized"):
                monkeypatch.setattr(tokenization, name, fault)
            assert await cost(api, path, body, 500) == 0

    run(test)
