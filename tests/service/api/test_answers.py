"""Streams read message by message: order, faults before and after the first byte, and clients that leave."""

import asyncio
import functools
import json
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.types import Message

from model.step import StepInput
from service.api.answers import DONE, KEEP_ALIVE, EventStream, event, unless_disconnected
from service.api.errors import APIError, ClientGoneError
from service.engine.metrics import Metrics
from tests.conformance import contract
from tests.service.api.helpers import Api, serving
from tests.service.engine.fakes import FakeEngine
from tests.service.helpers import run, until


class Connection:
    """A completion request whose answer is read message by message and whose client may leave."""

    def __init__(self, api: Api, **fields: Any):
        self._body = json.dumps({"model": "fake", "prompt": "a", **fields}).encode()
        self._received = False
        self._left = asyncio.Event()
        self._sent: asyncio.Queue[Message] = asyncio.Queue()
        self._events: list[str] = []  # of messages received, still to be read
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        self.task = asyncio.create_task(api.app(scope, self._receive, self._send))

    async def _receive(self) -> Message:
        if not self._received:
            self._received = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self._sent.put_nowait(message)

    @property
    def silent(self) -> bool:
        """Everything that was sent has been read."""
        return self._sent.empty() and not self._events

    async def status(self) -> int:
        message = await self._sent.get()
        assert message["type"] == "http.response.start"
        status: int = message["status"]
        return status

    async def event(self) -> Any:
        """The next event's JSON, or the text [DONE], which must be the end."""
        if not self._events:
            message = await self._sent.get()
            assert message["type"] == "http.response.body"
            *self._events, rest = message["body"].decode().split("\n\n")
            assert rest == "", "half an event"
            assert message["more_body"] == (self._events != ["data: [DONE]"])
        text = self._events.pop(0).removeprefix("data: ")
        return text if text == "[DONE]" else json.loads(text)

    async def texts(self) -> list[str]:
        """The rest of the text, piece by piece, up to [DONE]."""
        pieces = []
        while (chunk := await self.event()) != "[DONE]":
            pieces.append(chunk["choices"][0]["text"])
        return pieces

    async def leave(self) -> None:
        self._left.set()
        await self.task


class Steps:
    """Lets an engine run a given number of steps and no more."""

    def __init__(self, fake: FakeEngine):
        self._allowed = threading.Semaphore(0)
        fake.runner.fault = lambda step: self.take()

    def take(self) -> None:
        assert self._allowed.acquire(timeout=20)

    def allow(self, number: int) -> None:
        self._allowed.release(number)


@asynccontextmanager
async def stepping(**options: Any) -> AsyncIterator[tuple[Api, Steps]]:
    """An application whose engine stands still until it is allowed to step."""
    fake = FakeEngine(**options)
    steps = Steps(fake)
    async with serving(fake) as api:
        try:
            yield api, steps
        finally:
            steps.allow(10_000)


async def assert_all_freed(api: Api) -> None:
    await until(lambda: api.fake.scheduler.idle)
    assert api.fake.scheduler.cache.check_integrity() == []
    assert api.fake.metric("kv_pages_held", group="dense") == api.fake.metric("kv_pages_held", group="banded") == 0
    assert not api.fake.engine._generations


@contract("completions", "stream", "every token is sent when it is there")
def test_every_token_is_sent_when_it_is_there() -> None:
    async def test() -> None:
        async with stepping() as (api, steps):
            stream = Connection(api, stream=True, max_tokens=3)
            await until(lambda: bool(api.fake.scheduler.running))
            assert stream.silent  # no status before the first token
            steps.allow(1)
            assert await stream.status() == 200
            for text, reason in ((" one", None), (" two", None), (" three", "length")):
                choice = (await stream.event())["choices"][0]
                assert (choice["text"], choice["finish_reason"]) == (text, reason)
                if reason is None:
                    await asyncio.sleep(0.01)
                    assert stream.silent
                steps.allow(1)
            assert await stream.event() == "[DONE]"
            await stream.task

    run(test)


@contract("completions", "stop", "never leaks into a stream, not even partly")
def test_what_may_become_a_stop_string_or_a_character_waits() -> None:
    async def test() -> None:
        async with stepping(text=" one 🙂") as (api, steps):
            num_tokens = 2 * len(api.fake.runner.script)
            stream = Connection(api, stream=True, max_tokens=num_tokens, stop=" one 🙂 one 🙃")
            steps.allow(num_tokens - 1)
            await until(lambda: len(api.fake.runner.steps) == num_tokens)
            assert stream.silent
            steps.allow(1)
            assert await stream.status() == 200
            assert await stream.texts() == [" one 🙂 one 🙂"]

    run(test)


REFUSALS: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "other"}, 404, "model_not_found"),
    ({"n": 0}, 400, "'n': input should be greater than or equal to 1"),
    ({"prompt": [99999]}, 400, "token id 99999 is outside"),
    ({"max_tokens": 256}, 400, "context_length_exceeded"),
    ({"n": 100}, 400, "asks for 100 choices; this server holds at most 12"),
    ({"best_of": 2}, 400, "'best_of': can't be streamed"),
    ({"suffix": "x"}, 400, "unsupported_parameter"),
]


@contract("completions", "stream", "what can be refused is refused before the first byte")
@pytest.mark.parametrize(("fields", "status", "message"), REFUSALS)
def test_what_can_be_refused_is_refused_before_the_first_byte(fields: Any, status: int, message: str) -> None:
    async def test() -> None:
        async with serving() as api:
            answer = await api.complete(**{"prompt": "a", "stream": True, **fields})
            assert answer.status_code == status
            assert answer.headers["content-type"] == "application/json"
            assert message in answer.text

    run(test)


def test_draining_refuses_before_the_first_byte() -> None:
    async def test() -> None:
        async with serving() as api:
            await api.fake.engine.drain(0)
            answer = await api.complete(prompt="a", stream=True)
            assert answer.status_code == 503
            assert answer.json()["error"] == {
                "message": "the server is shutting down",
                "type": "server_error",
                "param": None,
                "code": "unavailable",
            }
            assert answer.headers["retry-after"] == "1"

    run(test)


@contract("errors", "503", "after queue_timeout")
@pytest.mark.parametrize("stream", [False, True])
def test_waiting_too_long_is_a_503(stream: bool) -> None:
    async def test() -> None:
        async with stepping(max_slots=1, queue_timeout=0.05) as (api, steps):
            first = Connection(api, stream=True, max_tokens=200)
            await until(lambda: bool(api.fake.scheduler.running))
            second = asyncio.create_task(api.complete(prompt="a", stream=stream))
            await until(lambda: len(api.fake.engine._generations) == 2)
            await asyncio.sleep(0.1)
            steps.allow(2)
            answer = await second
            assert answer.status_code == 503
            assert answer.json()["error"]["message"] == "the request waited more than 0.05 s for a slot"
            await first.leave()

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_failing_step_is_a_500_without_internals(stream: bool) -> None:
    async def test() -> None:
        async with serving() as api:

            def fault(step: object) -> None:
                api.fake.runner.fault = lambda step: None
                raise RuntimeError("secret detail")

            api.fake.runner.fault = fault
            answer = await api.complete(prompt="a", stream=stream)
            assert answer.status_code == 500
            assert answer.json()["error"] == {
                "message": "the engine failed while it ran this request",
                "type": "server_error",
                "param": None,
                "code": "internal_error",
            }
            assert (await api.choices(prompt="a", max_tokens=1))[0]["text"] == " one"
            await assert_all_freed(api)

    run(test)


@contract("completions", "stream", "a fault after the first byte is an error event, then [DONE]")
def test_a_fault_after_the_first_byte_is_an_error_event() -> None:
    async def test() -> None:
        async with stepping() as (api, steps):
            stream = Connection(api, stream=True, stream_options={"include_usage": True})
            steps.allow(1)
            assert await stream.status() == 200
            assert (await stream.event())["choices"][0]["text"] == " one"

            def fault(step: StepInput) -> None:
                if step.token_rows[0] < api.fake.scheduler.max_rows:  # else it is the canary
                    raise RuntimeError("secret detail")

            await until(lambda: len(api.fake.runner.steps) == 2)
            api.fake.runner.fault = fault
            steps.allow(1)
            assert (await stream.event())["choices"][0]["text"] == " two"
            error = await stream.event()
            assert list(error) == ["error"]
            assert error["error"]["message"] == "the engine failed while it ran this request"
            assert error["error"]["code"] == "internal_error"
            assert await stream.event() == "[DONE]"
            await stream.task
            await assert_all_freed(api)
            assert api.fake.metric("requests_total", outcome="error") == 1
            assert api.fake.metric("stream_errors_total") == 1

    run(test)


def test_shutting_down_ends_a_stream_with_an_error_event() -> None:
    async def test() -> None:
        async with stepping() as (api, steps):
            stream = Connection(api, stream=True)
            steps.allow(1)
            assert await stream.status() == 200
            assert (await stream.event())["choices"][0]["text"] == " one"
            await api.fake.engine.drain(0)
            assert (await stream.event())["error"]["message"] == "the server shut down before the request was finished"
            assert await stream.event() == "[DONE]"

    run(test)


@pytest.mark.parametrize(
    "fields", [{"stream": True}, {"stream": False}, {"stream": True, "n": 8}, {"stream": False, "n": 8}]
)
def test_leaving_before_the_first_token_frees_everything(fields: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with stepping() as (api, steps):
            leaving = Connection(api, max_tokens=200, **fields)
            await until(lambda: len(api.fake.scheduler.running) == min(fields.get("n", 1), 4))
            await leaving.leave()
            assert await leaving.status() == 499  # for the counter; nobody reads it
            steps.allow(1)
            await assert_all_freed(api)
            assert len(api.fake.runner.steps) == 1
            assert api.fake.metric("requests_total", outcome="abort") == fields.get("n", 1)
            assert api.fake.metric("http_requests_total", route="/v1/completions", status="499") == 1
            steps.allow(9)
            assert (await api.choices(prompt="a", max_tokens=1))[0]["text"] == " one"

    run(test)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@contract("completions", "stream", "a client that leaves frees its slots")
@pytest.mark.parametrize("stream", [False, True])
def test_leaving_in_the_middle_frees_everything_and_disturbs_nobody(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with stepping() as (api, steps):
            staying = Connection(api, stream=True, max_tokens=6)
            leaving = Connection(api, stream=stream, max_tokens=200, n=2)
            await until(lambda: len(api.fake.engine._generations) == 3)
            steps.allow(3)
            if stream:
                assert await leaving.status() == 200
                assert (await leaving.event())["choices"][0]["text"] == " one"
            await until(lambda: len(api.fake.runner.steps) == 4)
            await leaving.leave()
            steps.allow(9)
            assert await staying.status() == 200
            assert await staying.texts() == [" one", " two", " three", " four", " one", " two"]
            await staying.task
            await assert_all_freed(api)
            assert api.fake.metric("requests_total", outcome="abort") == 2
            assert api.fake.metric("requests_total", outcome="length") == 1

    run(test)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_waiting_client_that_leaves_gives_up_its_place() -> None:
    async def test() -> None:
        async with stepping(max_slots=1, max_queue=1) as (api, steps):
            running = Connection(api, stream=True, max_tokens=2)
            await until(lambda: bool(api.fake.scheduler.running))
            waiting = Connection(api, stream=True, max_tokens=2)
            await until(lambda: len(api.fake.engine._generations) == 2)
            assert (await api.complete(prompt="a")).status_code == 429
            await waiting.leave()
            last = Connection(api, stream=True, max_tokens=2)
            steps.allow(9)
            for stream in (running, last):
                assert await stream.status() == 200
                assert await stream.texts() == [" one", " two"]

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_cancelling_the_request_frees_everything(stream: bool) -> None:
    async def test() -> None:
        async with stepping() as (api, steps):
            request = Connection(api, stream=stream, max_tokens=200)
            await until(lambda: bool(api.fake.scheduler.running))
            request.task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request.task
            steps.allow(1)
            await assert_all_freed(api)

    run(test)


class Script:
    """Events that come when the test puts them in. An exception is raised, and None ends them."""

    def __init__(self) -> None:
        self.coming: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self.closed = False

    async def events(self) -> AsyncGenerator[bytes, None]:
        try:
            while (item := await self.coming.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            await asyncio.sleep(0)  # closing takes a while
            self.closed = True


class Played:
    """An EventStream over a script, with a short keep-alive, on a connection that is read message by message."""

    def __init__(self) -> None:
        self.script, self.metrics = Script(), Metrics("fake")
        self.left = asyncio.Event()
        self.sent: asyncio.Queue[Message] = asyncio.Queue()
        stream = EventStream(self.script.events(), self.metrics.stream_errors, keep_alive=0.01)
        self.task = asyncio.create_task(stream({"type": "http", "method": "POST"}, self._receive, self._send))

    async def _receive(self) -> Message:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self.sent.put_nowait(message)

    async def started(self) -> int:
        message = await self.sent.get()
        assert message["type"] == "http.response.start"
        status: int = message["status"]
        return status

    async def body(self) -> bytes:
        message = await self.sent.get()
        assert message["type"] == "http.response.body"
        body: bytes = message["body"]
        assert message["more_body"] == (body != DONE)
        return body

    async def after_comments(self) -> bytes:
        """The first message that is not a comment."""
        while (body := await self.body()) == KEEP_ALIVE:
            pass
        return body

    @property
    def errors(self) -> float | None:
        return self.metrics.registry.get_sample_value("banded_stream_errors_total", {"model": "fake"})


def test_comments_come_while_nothing_else_does() -> None:
    async def test() -> None:
        played = Played()
        assert await played.started() == 200  # with the first comment
        assert await played.body() == KEEP_ALIVE
        assert await played.body() == KEEP_ALIVE
        for text in (b"one", b"two"):
            played.script.coming.put_nowait(text)
            assert await played.after_comments() == text
            assert await played.body() == KEEP_ALIVE
        played.script.coming.put_nowait(None)
        assert await played.after_comments() == DONE
        await played.task
        assert played.script.closed
        assert played.errors == 0

    run(test)


def test_a_stream_that_is_never_silent_has_no_comments() -> None:
    async def test() -> None:
        played = Played()
        for number in range(5):
            played.script.coming.put_nowait(b"%d" % number)
        played.script.coming.put_nowait(None)
        assert await played.started() == 200
        assert [await played.body() for _ in range(6)] == [b"0", b"1", b"2", b"3", b"4", DONE]
        await played.task

    run(test)


def test_a_fault_after_a_comment_is_an_error_event_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        played = Played()
        assert await played.started() == 200
        played.script.coming.put_nowait(APIError(503, "waited too long", code="unavailable"))
        error = {"message": "waited too long", "type": "server_error", "param": None, "code": "unavailable"}
        assert json.loads((await played.after_comments()).removeprefix(b"data: ")) == {"error": error}
        assert await played.body() == DONE
        await played.task
        assert played.script.closed
        assert played.errors == 1

    run(test)
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert messages == ["a stream failed after its first byte, with what would be a 503: waited too long"]


def test_a_fault_before_the_first_byte_is_no_stream() -> None:
    async def test() -> None:
        played = Played()
        played.script.coming.put_nowait(APIError(503, "waited too long"))
        with pytest.raises(APIError, match="waited too long"):
            await played.task
        assert played.sent.empty()
        assert played.script.closed
        assert played.errors == 0

    run(test)


@pytest.mark.parametrize("first", [b"one", None])
def test_leaving_while_comments_come_closes_the_events(first: bytes | None) -> None:
    async def test() -> None:
        played = Played()
        if first:
            played.script.coming.put_nowait(first)
        assert await played.started() == 200
        while await played.body() != KEEP_ALIVE:
            pass
        played.left.set()
        await played.task
        assert played.script.closed
        assert played.errors == 0

    run(test)


@contract("completions", "stream", "comment keep-alives while waiting")
def test_a_waiting_request_is_kept_alive_and_fails_inside_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EventStream, "__init__", functools.partialmethod(EventStream.__init__, keep_alive=0.01))

    async def test() -> None:
        async with stepping(max_slots=1, queue_timeout=0.2) as (api, steps):
            first = Connection(api, stream=True, max_tokens=200)
            await until(lambda: bool(api.fake.scheduler.running))
            second = asyncio.create_task(api.complete(prompt="a", stream=True))
            await until(lambda: len(api.fake.engine._generations) == 2)
            await asyncio.sleep(0.3)
            steps.allow(2)
            answer = await second
            assert answer.status_code == 200
            comments, found, events = answer.text.rpartition(": keep-alive\n")
            assert found
            assert set(comments.split("\n")) <= {": keep-alive", ""}
            error, done, end = events.split("\n\n")  # the only blank lines: a comment is no event
            message = json.loads(error.removeprefix("data: "))["error"]["message"]
            assert message == "the request waited more than 0.2 s for a slot"
            assert (done, end) == ("data: [DONE]", "")
            assert api.fake.metric("stream_errors_total") == 1
            await first.leave()

    run(test)


def test_unless_disconnected_returns_raises_and_cancels() -> None:
    async def test() -> None:
        left = asyncio.Event()

        async def receive() -> Message:
            await left.wait()
            return {"type": "http.disconnect"}

        async def work(seconds: float) -> str:
            try:
                await asyncio.sleep(seconds)
            except asyncio.CancelledError:
                cancelled.append(True)
                raise
            return "done"

        async def fails() -> None:
            raise ValueError("of its own")

        cancelled: list[bool] = []
        assert await unless_disconnected(receive, work(0)) == "done"
        with pytest.raises(ValueError, match="of its own"):
            await unless_disconnected(receive, fails())
        assert not cancelled
        left.set()
        with pytest.raises(ClientGoneError):
            await unless_disconnected(receive, work(60))
        assert cancelled

    run(test)


def test_framing() -> None:
    assert event('{"text": "é"}') == b'data: {"text": "\xc3\xa9"}\n\n'
    assert DONE == b"data: [DONE]\n\n"
