"""POST /v1/completions: a request becomes sequences, their outputs become a response or a stream of chunks."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast

from fastapi import APIRouter, Request, Response

from service.api.errors import APIError, invalid, shown
from service.api.sse import CLIENT_CLOSED_REQUEST, ClientGoneError, EventStream, event, unless_disconnected
from service.engine import Engine
from service.schema import CompletionChoice, CompletionRequest, CompletionResponse, ErrorResponse, Usage
from service.served import ServedModel, sequences_of

router = APIRouter()

# Characters and token ids of a request that are tokenized and checked at once; more of them in a worker thread, so that
# the event loop goes on.
SHORT_PROMPTS = 4096

ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorResponse} for status in (400, 401, 404, 429, 500, 503)}


@router.post("/v1/completions", response_model=CompletionResponse, responses=ERRORS)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Complete a prompt, a list of prompts, or token ids; with `stream`, as server-sent events."""
    served: ServedModel = request.app.state.served
    if body.model != served.name:
        message = f"the model '{shown(body.model)}' does not exist; this server has '{served.name}'"
        raise APIError(404, message, param="model", code="model_not_found")
    prompts = prompts_of(body)
    served.engine.check_size(len(prompts) * body.n)
    if sum(len(prompt) for prompt in prompts) <= SHORT_PROMPTS:
        tokens = read_prompts(prompts, body, served)
    else:
        tokens = await asyncio.to_thread(read_prompts, prompts, body, served)
    completion = Completion(body, tokens, served.engine)
    if body.stream:
        return EventStream(completion.stream(), request.app.state.metrics.stream_errors)
    try:
        answer = await unless_disconnected(request.receive, completion.collect())
    except ClientGoneError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(answer.model_dump_json(), media_type="application/json")


def prompts_of(body: CompletionRequest) -> list[str | list[int]]:
    """The request's prompts, each a text or token ids."""
    prompt: Any = body.prompt or ""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def read_prompts(prompts: list[str | list[int]], body: CompletionRequest, served: ServedModel) -> list[list[int]]:
    """Token ids of every prompt. Raises APIError naming what does not fit the model."""
    tokenized = []
    for prompt in prompts:
        if isinstance(prompt, str):
            tokens = tokenize(prompt, served, allow_special=body.allow_special)
        else:
            check_token_ids(prompt, served.config.vocab_size)
            tokens = prompt
        check_length(len(tokens), body.max_tokens, served.config.n_positions)
        tokenized.append(tokens)
    return tokenized


def tokenize(text: str, served: ServedModel, *, allow_special: bool) -> list[int]:
    least = len(text.encode(errors="replace")) // served.tokenizer.max_token_bytes
    if least > served.config.n_positions:
        raise context_error(served.config.n_positions, f"a prompt of at least {least} tokens")
    return served.tokenizer.encode_prompt(text, allow_special=allow_special)


def check_token_ids(tokens: list[int], vocab_size: int) -> None:
    for token in tokens:
        if not 0 <= token < vocab_size:
            message = (
                f"token id {shown(str(token))} is outside the model's vocabulary of {vocab_size} (0 to {vocab_size - 1})"
            )
            raise invalid(message, "prompt")


def check_length(prompt_tokens: int, max_tokens: int, context: int) -> None:
    if prompt_tokens + max_tokens > context:
        asked = f"{prompt_tokens + max_tokens} tokens ({prompt_tokens} in the prompt, {max_tokens} for the completion)"
        raise context_error(context, asked)


def context_error(context: int, asked: str) -> APIError:
    message = f"this model's context is {context} tokens, but the request asks for {asked}"
    return invalid(message, "prompt", "context_length_exceeded")


class Completion:
    """One request on its way through the engine."""

    def __init__(self, body: CompletionRequest, prompts: list[list[int]], engine: Engine):
        self._body = body
        self._id = f"cmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._prompt_tokens = sum(map(len, prompts))
        self._completion_tokens = 0
        sequences = sequences_of(body, prompts, engine.tokenizer)
        self._num_choices = len(sequences)
        self._outputs = engine.generate(sequences, body.stop)

    async def collect(self) -> CompletionResponse:
        """The whole completion."""
        texts = [""] * self._num_choices
        reasons: list[Any] = [None] * self._num_choices
        async with aclosing(self._outputs) as outputs:
            async for output in outputs:
                self._completion_tokens += len(output.tokens)
                texts[output.choice] += output.text
                reasons[output.choice] = output.finish_reason
        choices = [
            CompletionChoice(text=text, index=i, finish_reason=reason)
            for i, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return self._response(choices, self._usage())

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Chunks as server-sent events, one for each piece of text that is certain."""
        async with aclosing(self._outputs) as outputs:
            async for output in outputs:
                self._completion_tokens += len(output.tokens)
                if output.text or output.finish_reason:
                    reason = cast(Any, output.finish_reason)
                    choice = CompletionChoice(text=output.text, index=output.choice, finish_reason=reason)
                    yield self._chunk([choice], None)
        if self._body.include_usage:
            yield self._chunk([], self._usage())

    def _chunk(self, choices: list[CompletionChoice], usage: Usage | None) -> bytes:
        left_out = None if self._body.include_usage else {"usage"}
        return event(self._response(choices, usage).model_dump_json(exclude=left_out))

    def _response(self, choices: list[CompletionChoice], usage: Usage | None) -> CompletionResponse:
        return CompletionResponse(id=self._id, created=self._created, model=self._body.model, choices=choices, usage=usage)

    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            total_tokens=self._prompt_tokens + self._completion_tokens,
        )
