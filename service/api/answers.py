"""From the engine's outputs to bytes for the client: whole answers, streams of server-sent events, and who pays for them.

If the client leaves before the end, the request is aborted.
"""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request, Response
from prometheus_client import Counter
from pydantic import BaseModel
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from model.checkpoint.tokenizer import Tokenizer
from service.api.encoding import PiecesResponse, on_one_line
from service.api.errors import ClientGoneError, api_error
from service.api.limits import KeyLimits
from service.api.schema.base import (
    FewShotUsage,
    PromptLogprob,
    PromptLogprobs,
    PromptTokensDetails,
    StreamOptions,
    TokenUsage,
)
from service.api.schema.chat import ChatChunk
from service.api.schema.completions import CompletionResponse
from service.engine.choice import Choice, Output
from service.engine.engine import Generation
from service.engine.models import ModelEntry
from service.engine.workers import Slices, rest

log = logging.getLogger("banded.api")

T = TypeVar("T")

# For the OpenAPI document: with `stream` the answer is a stream of events.
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n"  # a blank line would look like the end of an event to clients that count them
# Proxies close a connection that stays silent, some of them after 30 s.
KEEP_ALIVE_SECONDS = 15.0
PADDED_TO = 64  # bytes


def event(body: str) -> bytes:
    """One event that carries a JSON text."""
    return b"data: " + on_one_line(body.encode()) + b"\n\n"


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. If the client leaves first, `work` is cancelled and ClientGoneError raised.

    The body of the request must have been read: what `receive` gives next is then the disconnection.
    """

    async def disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return await working
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class ChargedRun:
    """A generation, charged to the key that the HTTP request came with."""

    def __init__(self, generation: Generation, request: Request, *, prompt_tokens: int | None = None):
        """`prompt_tokens` are billed: by default those of each prompt once.

        If they are given, the prompts begin with one that is billed once, so the first alone tells what of it was cached.
        """
        self._generation = generation
        self._is_shared = prompt_tokens is not None
        self.prompt_tokens = generation.prompt_tokens if prompt_tokens is None else prompt_tokens
        self._limits: KeyLimits = request.state.limits

    async def outputs(self) -> AsyncGenerator[list[Output], None]:
        """What the choices gain, as it comes.

        Raises LimitError if the key's token limit does not allow the request, and what Generation.outputs raises.
        """
        generation = self._generation
        most = self.prompt_tokens + generation.request.num_choices * generation.request.params.max_tokens
        self._limits.charge(most)
        try:
            async with aclosing(generation.outputs()) as steps:
                async for outputs in steps:
                    yield outputs
        finally:
            begun = min(self.prompt_tokens, generation.begun_tokens)
            self._limits.refund(most - begun - generation.completion_tokens)

    async def finish(self) -> list[Choice]:
        """The choices to return, when all have ended."""
        async with aclosing(self.outputs()) as outputs:
            async for _ in outputs:
                pass
        return self._generation.best()

    @property
    def usage(self) -> TokenUsage:
        """So far. A prompt counts once; choices that are not returned count too. Only a single prompt has examples."""
        return self.usage_after(self._generation.completion_tokens)

    def usage_after(self, completion_tokens: int) -> TokenUsage:
        """When that many tokens had been generated."""
        cached = self._generation.cached_tokens
        examples = self._generation.request.prompts[0].few_shot
        return TokenUsage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=self.prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(cached[:1] if self._is_shared else cached)),
            few_shot=FewShotUsage(**examples._asdict()) if examples else None,
        )


def heading(prefix: str, entry: ModelEntry) -> dict[str, Any]:
    """What an answer and all its chunks begin with: the fields of schema.base.Generated, without `object`."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": entry.name,
        "system_fingerprint": entry.fingerprint,
    }


def prompt_logprobs_of(choice: Choice, num_top: int | None, tokenizer: Tokenizer) -> PromptLogprobs:
    """As vLLM has them: of each prompt token after the first, the `num_top` likeliest by id, and the token itself."""
    if num_top is None:
        return None
    found: list[dict[int, PromptLogprob] | None] = [None]
    for token, given in zip(choice.prompt.tokens[1:], choice.prompt_logprobs, strict=True):
        known = {other: (value, rank) for rank, (other, value) in enumerate(given.top[:num_top], 1)}
        ranked: dict[int, tuple[float, int | None]] = {token: (given.logprob, None), **known}
        names = tokenizer.token_name
        found.append({i: PromptLogprob(logprob=x, rank=rank, decoded_token=names(i)) for i, (x, rank) in ranked.items()})
    return found


def chunk_event(chunk: CompletionResponse | ChatChunk, options: StreamOptions) -> bytes:
    """A chunk as a server-sent event. Obfuscation pads it, so that its length on the wire does not reveal its words."""
    left_out = None if options.include_usage or options.continuous_usage_stats else {"usage"}
    if options.include_obfuscation:
        chunk.obfuscation = "x"
        length = len(chunk.model_dump_json(exclude=left_out).encode())
        chunk.obfuscation += secrets.token_hex(PADDED_TO)[: -length % PADDED_TO]
    return event(chunk.model_dump_json(exclude=left_out))


async def joined(
    steps: AsyncGenerator[list[Output], None], events_of: Callable[[Output], Iterable[bytes]]
) -> AsyncGenerator[bytes, None]:
    """The events of each step in one piece, so that they are one write. An exception comes after those that are done."""
    slices = Slices()
    async with aclosing(steps):
        async for outputs in steps:
            found = bytearray()
            try:
                for output in outputs:
                    for part in events_of(output):
                        found += part
                    await slices.rest()
            except Exception:
                if found:
                    yield bytes(found)
                raise
            if found:
                yield bytes(found)


class TextEvents:
    """The events of a stream that carry text, perhaps with logprobs, and nothing else. Most do, and only these differ.

    A pydantic model for each of them would take a tenth of the event loop's time.
    """

    def __init__(self, field: str, empty: Callable[[int], bytes]):
        """`empty(choice)` is such an event with the empty text in `field`, and after it no logprobs."""
        self._no_text = f'"{field}":""'.encode()  # inside a string its quotes would have backslashes
        self._empty = empty
        self._around: dict[int, tuple[bytes, bytes, bytes]] = {}

    def __call__(self, choice: int, text: str, logprobs: BaseModel | None) -> bytes:
        if choice not in self._around:
            before, text_found, rest = self._empty(choice).partition(self._no_text)
            between, logprobs_found, after = rest.partition(b'"logprobs":null')
            assert text_found, f"no {self._no_text.decode()} in the event"
            assert logprobs_found, "no empty logprobs behind the text"
            self._around[choice] = before + self._no_text[:-2], between + logprobs_found[:-4], after
        before, between, after = self._around[choice]
        known = logprobs.model_dump_json().encode() if logprobs else b"null"
        return before + on_one_line(to_json(text)) + between + on_one_line(known) + after


async def answer(request: Request, work: Coroutine[Any, Any, list[bytes]]) -> Response:
    """The response to a client that waits for all of it, whose pieces `work` gives. If the client leaves, the work ends."""
    return PiecesResponse(await unless_disconnected(request.receive, work))


def json_array(items: Iterable[BaseModel]) -> Iterator[bytes]:
    """What stands between the brackets of a JSON array, an item at a time: all of them may take much memory."""
    for i, item in enumerate(items):
        yield b"," * (i > 0) + item.model_dump_json().encode()
        rest()


def answer_size(choices: Sequence[Choice], num_top: int) -> int:
    """About how many tokens an answer tells of, with `num_top` likeliest ones for each logprob."""
    return sum(len(each.tokens) + (len(each.shown) + len(each.prompt_logprobs)) * (1 + num_top) for each in choices)


class EventStream(Response):
    """Sends `events` as they come, then [DONE]. After `keep_alive` silent seconds it sends a comment.

    The status goes out with the first event or comment. An exception before that becomes an ordinary error response;
    a later one becomes an error event, which is logged and counted in `errors`. However the stream ends, `events` is
    closed before this returns.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], errors: Counter, *, keep_alive: float = KEEP_ALIVE_SECONDS):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._errors = errors
        self._keep_alive = keep_alive
        self._sent: float | None = None  # when the last event or comment was, on the loop's clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - as starlette has it
        try:
            await unless_disconnected(receive, self._stream(send))
        except ClientGoneError:
            if self._sent is None:
                raise

    async def _stream(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            # One task comments on the whole stream: a task for each event would cost as much as the event itself.
            commenting = asyncio.create_task(self._comment(send))
            try:
                async for body in events:
                    await self._send(send, body)
            except Exception as error:
                if self._sent is None:
                    raise
                self._errors.inc()
                known = api_error(error)
                # The response counter shows a 200, so only this line tells the operator.
                log.warning("a stream failed after its first byte, with what would be a %d: %s", known.status, known)
                await self._send(send, event(json.dumps(known.body)))
            finally:
                commenting.cancel()
                await asyncio.gather(commenting, return_exceptions=True)
            await self._send(send, DONE, more=False)

    async def _comment(self, send: Send) -> None:
        now = asyncio.get_running_loop().time
        silent_since = now()
        while True:
            await asyncio.sleep(silent_since + self._keep_alive - now())
            if self._sent is not None and self._sent > silent_since:
                silent_since = self._sent
            else:
                await self._send(send, KEEP_ALIVE)
                silent_since = now()

    async def _send(self, send: Send, body: bytes, *, more: bool = True) -> None:
        first, self._sent = self._sent is None, asyncio.get_running_loop().time()
        if first:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": body, "more_body": more})
