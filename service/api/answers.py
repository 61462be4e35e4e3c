"""From the engine's outputs to bytes for the client: runs a request at the client's expense, frames chunks and answers."""

import secrets
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel
from pydantic_core import to_json

from service.api.limits import KeyLimits
from service.api.schema.base import PromptTokensDetails, TokenUsage
from service.api.schema.chat import ChatChunk
from service.api.schema.completions import CompletionResponse
from service.api.sse import CLIENT_CLOSED_REQUEST, ClientGoneError, event, unless_disconnected
from service.engine.choice import Choice, Output
from service.engine.engine import Generation

PADDED_TO = 64  # bytes


class ChargedRun:
    """A generation, charged to the key that the HTTP request came with."""

    def __init__(self, generation: Generation, request: Request, *, prompt_tokens: int | None = None):
        """`prompt_tokens` are billed: by default those of each prompt once.

        If they are given, the prompts begin with one that is billed once, so the first alone tells what of it was cached.
        """
        self._generation = generation
        self._is_shared = prompt_tokens is not None
        self.prompt_tokens = generation.prompt_tokens if prompt_tokens is None else prompt_tokens
        self._limits: KeyLimits | None = request.state.limits

    async def outputs(self) -> AsyncGenerator[Output, None]:
        """What the choices gain, as it comes.

        Raises LimitError if the key's token limit does not allow the request, and what Generation.outputs raises.
        """
        generation = self._generation
        most = self.prompt_tokens + generation.request.num_choices * generation.request.params.max_tokens
        if self._limits:
            self._limits.charge(most)
        try:
            async with aclosing(generation.outputs()) as outputs:
                async for output in outputs:
                    yield output
        finally:
            if self._limits:
                used = self.prompt_tokens + generation.completion_tokens if generation.has_begun else 0
                self._limits.refund(most - used)

    async def finish(self) -> list[Choice]:
        """The choices to return, when all have ended."""
        async with aclosing(self.outputs()) as outputs:
            async for _ in outputs:
                pass
        return self._generation.best()

    @property
    def usage(self) -> TokenUsage:
        """So far. A prompt counts once; choices that are not returned count too."""
        completion_tokens, cached = self._generation.completion_tokens, self._generation.cached_tokens
        return TokenUsage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=self.prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(cached[:1] if self._is_shared else cached)),
        )


def chunk_event(chunk: CompletionResponse | ChatChunk, *, with_usage: bool, obfuscate: bool) -> bytes:
    """A chunk as a server-sent event; `obfuscate` pads it, so that its length on the wire does not reveal its words."""
    left_out = None if with_usage else {"usage"}
    if obfuscate:
        chunk.obfuscation = "x"
        length = len(chunk.model_dump_json(exclude=left_out).encode())
        chunk.obfuscation += secrets.token_hex(PADDED_TO)[: -length % PADDED_TO]
    return event(chunk.model_dump_json(exclude=left_out))


class TextEvents:
    """The events of a stream that carry nothing but text. Most do, and those of one choice differ in the text only.

    A pydantic model for each of them would take a tenth of the event loop's time.
    """

    def __init__(self, field: str, without_text: Callable[[int], bytes]):
        """`without_text(choice)` is such an event with the empty text in `field`."""
        self._empty = f'"{field}":""'.encode()  # inside a string its quotes would have backslashes
        self._without_text = without_text
        self._around: dict[int, tuple[bytes, bytes]] = {}

    def __call__(self, choice: int, text: str) -> bytes:
        if choice not in self._around:
            before, found, after = self._without_text(choice).partition(self._empty)
            assert found, f"no {self._empty.decode()} in the event"
            self._around[choice] = before + self._empty[:-2], after
        before, after = self._around[choice]
        return before + to_json(text) + after


async def answer(request: Request, work: Coroutine[Any, Any, BaseModel]) -> Response:
    """The response to a client that waits for all of it. If the client leaves, the work ends."""
    try:
        body = await unless_disconnected(request.receive, work)
    except ClientGoneError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(body.model_dump_json(), media_type="application/json")
