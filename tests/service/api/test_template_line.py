"""Chats that wait for a checkpoint's template: clients take turns, the line ends, and who has left is not waited for."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.types import Message

from model.checkpoint import templates
from model.checkpoint.prompt_format import PromptFormat
from model.checkpoint.templates import TemplateProcess
from service.api.routes import chat
from service.engine.workers import template_thread
from tests.service.api.helpers import Api, error_of, serving
from tests.service.helpers import run, until

NOT_OURS = PromptFormat(chat_template="{{ messages[0].content }}")


class SlowTemplates:
    """In place of the process: renders a chat when it is allowed to, and remembers which."""

    def __init__(self) -> None:
        self.rendered: list[str] = []
        self._allowed = threading.Semaphore(0)

    def render(self, template: str, variables: dict[str, Any], max_chars: int | None) -> str:
        self.rendered.append(variables["messages"][0]["content"])
        assert self._allowed.acquire(timeout=20)
        return "User: Hello"

    def allow(self, number: int) -> None:
        self._allowed.release(number)


@asynccontextmanager
async def slowly(monkeypatch: pytest.MonkeyPatch, **options: Any) -> AsyncIterator[tuple[Api, SlowTemplates]]:
    monkeypatch.setattr(templates, "process", slow := SlowTemplates())
    async with serving(prompt_format=NOT_OURS, **options) as api:
        try:
            yield api, slow
        finally:
            slow.allow(1000)


def body(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 1}


def ask(api: Api, text: str, key: str = "", path: str = "/v1/chat/completions") -> asyncio.Task[httpx.Response]:
    more = {"max_tokens": 1} if "chat" in path else {}
    sent = {"messages": [{"role": "user", "content": text}], **more}
    return asyncio.create_task(api.client.post(path, json=sent, headers={"authorization": f"Bearer {key}"}))


async def in_line(api: Api, texts: list[str], *, key: str = "", path: str = "/v1/chat/completions") -> Any:
    """Asked one after the other, each when the one before it waits."""
    tasks = []
    for text in texts:
        before = len(list(template_thread._waiting))
        tasks.append(ask(api, text, key, path))
        await until(lambda: len(list(template_thread._waiting)) > before)  # noqa: B023
    return tasks


def test_keys_take_turns_and_each_has_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with slowly(monkeypatch, api_keys=("a", "b", "c")) as (api, slow):
            tasks = [ask(api, "first", "a")]
            await until(lambda: slow.rendered == ["first"])
            tasks += await in_line(api, ["a1", "a2", "a3"], key="a")
            tasks += await in_line(api, ["b1", "b2"], key="b", path="/tokenize")
            tasks += await in_line(api, ["c1"], key="c")
            slow.allow(7)
            assert [answer.status_code for answer in await asyncio.gather(*tasks)] == [200] * 7
            assert slow.rendered == ["first", "a1", "b1", "c1", "a2", "b2", "a3"]

    run(test)


def test_the_line_of_a_key_has_an_end_and_other_keys_have_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_WAITING", 2)
    monkeypatch.setattr(template_thread, "seconds", 1.2)

    async def test() -> None:
        async with slowly(monkeypatch, api_keys=("a", "b")) as (api, slow):
            tasks = [ask(api, "first", "a")]
            await until(lambda: slow.rendered == ["first"])
            tasks += await in_line(api, ["a1", "a2"], key="a")
            answer = await ask(api, "a3", "a")
            error = error_of(answer, 429, "rate_limit_error")
            assert error["message"] == "2 chats wait to be laid out, the limit is 2; try again in 3 s"
            assert (error["code"], answer.headers["retry-after"]) == ("server_busy", "3")
            tasks += await in_line(api, ["b1"], key="b")
            slow.allow(4)
            assert [answer.status_code for answer in await asyncio.gather(*tasks)] == [200] * 4

    run(test)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_a_chat_whose_client_has_left_is_not_laid_out(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Message] = []

    async def test() -> None:
        left = asyncio.Event()
        messages = [{"type": "http.request", "body": json.dumps({"messages": body("gone")["messages"]}).encode()}]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        async with slowly(monkeypatch) as (api, slow):
            first = ask(api, "first")
            await until(lambda: slow.rendered == ["first"])
            headers = [(b"content-type", b"application/json")]
            scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
            leaving = asyncio.create_task(api.app(scope, receive, send))
            await until(lambda: template_thread.num_waiting(None) == 1)
            left.set()
            await leaving
            assert sent[0]["status"] == 499
            assert template_thread.num_waiting(None) == 0
            last = (await in_line(api, ["last"]))[0]
            slow.allow(2)
            assert ((await first).status_code, (await last).status_code) == (200, 200)
            assert slow.rendered == ["first", "last"]
            assert api.fake.metric("http_requests_total", route=path, status="499") == 1

    run(test)


@pytest.mark.parametrize("command", ["/nowhere", "/bin/sleep"])
def test_a_process_that_does_not_start_is_no_fault_of_the_request(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "START_SECONDS", 0.1)

    async def test() -> None:
        process = TemplateProcess()
        monkeypatch.setattr(templates, "process", process)
        async with serving(prompt_format=NOT_OURS) as api:
            with monkeypatch.context() as broken:
                broken.setattr("sys.executable", command)
                answer = await ask(api, "Hello")
            error = error_of(answer, 503, "server_error")
            assert (error["message"], error["code"]) == ("the process for chat templates does not start", "unavailable")
            assert answer.headers["retry-after"] == "1"
            monkeypatch.setattr(templates, "START_SECONDS", 60)
            assert (await ask(api, "Hello")).status_code == 200
        process.close()

    run(test)
