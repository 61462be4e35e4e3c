"""POST /v1/completions: a request becomes sequences, their outputs become a response or a stream of chunks."""

import secrets
import time
from collections.abc import AsyncGenerator
from collections.abc import Sequence as Items
from contextlib import aclosing
from typing import Any, cast

from fastapi import APIRouter, Request, Response

from model.checkpoint.tokenizer import Tokenizer
from service.api.errors import invalid
from service.api.generation import (
    Candidate,
    Generation,
    TextEvents,
    answer,
    beside_the_loop,
    check_length,
    check_logprobs,
    check_sampling,
    check_text_length,
    check_token_ids,
    chunk_event,
    log_user,
    served_model,
    warnings_for,
)
from service.api.schema.base import FewShotUsage, TokenUsage, shown
from service.api.schema.completions import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
    EngineCompletionRequest,
    FewShotFields,
)
from service.api.sse import STREAMED, EventStream
from service.api.state import state_of
from service.engine.choice import ShownToken
from service.engine.models import ServedModel, choice_requests
from service.engine.prompts import (
    ContextOverflowError,
    Example,
    FewShot,
    NoInsertionError,
    Prompt,
    few_shot_prompt,
    insertion_prompt,
    text_prompt,
)

router = APIRouter()


@router.post("/v1/completions", response_model=CompletionResponse, responses=STREAMED)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Complete a prompt, a list of prompts, or token ids; with `stream`, as server-sent events."""
    return await complete(body, body.model, request)


@router.post("/v1/engines/{engine:path}/completions", response_model=CompletionResponse, responses=STREAMED)
async def create_engine_completion(engine: str, body: EngineCompletionRequest, request: Request) -> Response:
    """The same for clients from when a model was called an engine and named in the path."""
    if body.model is not None and body.model != engine:
        raise invalid(f"'model' is '{shown(body.model)}', but the path names the engine '{shown(engine)}'", "model")
    return await complete(body, engine, request)


async def complete(body: EngineCompletionRequest, model: str, request: Request) -> Response:
    served = served_model(request, model)
    warnings = warnings_for(body, request)
    check_sampling(body, served)
    prompts = prompts_of(body)
    served.engine.check_size(len(prompts) * body.num_candidates)
    size = sum(map(len, prompts)) + sum(len(part) for part in few_shot_texts(body))
    read = await beside_the_loop(size, lambda: [read_prompt(prompt, body, served) for prompt in prompts])
    if body.logprobs is not None:
        echoed = sum(len(prompt.tokens) for prompt in read) if body.echo else 0
        check_logprobs(body.num_candidates * (echoed + len(read) * body.max_tokens), "logprobs")
    log_user(body.user, request)
    ranked = body.num_candidates > body.n
    requests = choice_requests(
        body,
        read,
        served,
        max_tokens=body.max_tokens,
        num_candidates=body.num_candidates,
        top_logprobs=0 if ranked and body.logprobs is None else body.logprobs,
        echo=body.echo,
        echo_logprobs=body.echo and body.logprobs is not None,
    )
    generation = Generation(requests, body.num_candidates, served.engine, request)
    completion = CompletionAnswer(body, served, read, generation, warnings)
    if body.stream:
        return EventStream(completion.stream(), state_of(request).metrics.stream_errors)
    return await answer(request, completion.collect())


def prompts_of(body: EngineCompletionRequest) -> list[str | list[int]]:
    """The request's prompts, each a text or token ids."""
    prompt: Any = body.prompt or ""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def few_shot_texts(body: EngineCompletionRequest) -> list[str]:
    if body.few_shot is None:
        return []
    examples = [text for example in body.few_shot.examples for text in (example.input, example.output)]
    return [body.few_shot.instruction or "", *examples]


def read_prompt(prompt: str | list[int], body: EngineCompletionRequest, served: ServedModel) -> Prompt:
    """Tokens of a prompt. Raises APIError naming what does not fit the model."""
    if body.few_shot is not None:
        return read_few_shot(str(prompt), body.few_shot, body, served)
    if not isinstance(prompt, str):
        check_token_ids(prompt, served.config.vocab_size, "prompt")
        read = Prompt(prompt, num_implicit=0)
    elif body.suffix is None:
        check_text_length(prompt, served, "prompt")
        read = text_prompt(prompt, served.tokenizer, allow_special=body.allow_special)
    else:
        check_text_length(prompt, served, "prompt")
        check_text_length(body.suffix, served, "suffix")
        try:
            read = insertion_prompt(prompt, body.suffix, served.card, served.tokenizer, allow_special=body.allow_special)
        except NoInsertionError as error:
            raise invalid(str(error), error.param, "unsupported_parameter") from error
    check_length(len(read.tokens), body.max_tokens, served.config.n_positions)
    return read


def read_few_shot(query: str, asked: FewShotFields, body: EngineCompletionRequest, served: ServedModel) -> Prompt:
    few_shot = FewShot(
        [Example(example.input, example.output) for example in asked.examples],
        asked.instruction,
        asked.input_prefix,
        asked.output_prefix,
        asked.separator,
        "error" if asked.on_overflow == "error" else "drop_oldest",
    )
    try:
        return few_shot_prompt(
            query,
            few_shot,
            served.card,
            served.tokenizer,
            context=served.config.n_positions,
            max_tokens=body.max_tokens,
            allow_special=body.allow_special,
        )
    except ContextOverflowError as error:
        raise invalid(str(error), error.param, "context_length_exceeded") from error


class CompletionAnswer:
    """The answer to a request, whole or in chunks."""

    def __init__(
        self,
        body: EngineCompletionRequest,
        served: ServedModel,
        prompts: Items[Prompt],
        generation: Generation,
        warnings: list[str] | None,
    ):
        self._body = body
        self._served = served
        self._prompts = prompts
        self._generation = generation
        self._warnings = warnings
        self._id = f"cmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())

    async def collect(self) -> CompletionResponse:
        """The whole completion."""
        body = self._body
        candidates = await self._generation.finish()
        chosen: list[Candidate] = []
        for first in range(0, len(candidates), body.num_candidates):
            ranked = candidates[first : first + body.num_candidates]
            if body.num_candidates > body.n:
                ranked = sorted(ranked, key=lambda candidate: candidate.mean_logprob, reverse=True)[: body.n]
            chosen += ranked
        choices = await beside_the_loop(
            sum(len(each.shown) for each in chosen),
            lambda: [self._choice(i, each.text, each.shown, each.finish_reason) for i, each in enumerate(chosen)],
        )
        response = self._response(choices, self._usage())
        response.warnings = self._warnings
        return response

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Chunks as server-sent events, one for each piece of text that is certain."""
        body, warnings = self._body, self._warnings
        text_event = TextEvents(
            "text", lambda choice: self._event(self._response([self._choice(choice, "", (), None)], None))
        )
        async with aclosing(self._generation.outputs()) as outputs:
            async for output in outputs:
                if output.shown or output.finish_reason or (output.text and (warnings or body.include_obfuscation)):
                    choice = self._choice(output.choice, output.text, output.shown, output.finish_reason)
                    chunk = self._response([choice], None)
                    chunk.warnings, warnings = warnings, None  # once is enough
                    yield self._event(chunk)
                elif output.text:
                    yield text_event(output.choice, output.text)
        if self._body.include_usage:
            yield self._event(self._response([], self._usage()))

    def _event(self, chunk: CompletionResponse) -> bytes:
        return chunk_event(chunk, with_usage=self._body.include_usage, obfuscate=self._body.include_obfuscation)

    def _choice(self, index: int, text: str, tokens: Items[ShownToken], finish_reason: str | None) -> CompletionChoice:
        k = self._body.logprobs
        logprobs = None if k is None else logprobs_of(tokens, k, self._served.tokenizer)
        return CompletionChoice(text=text, index=index, logprobs=logprobs, finish_reason=cast(Any, finish_reason))

    def _response(self, choices: list[CompletionChoice], usage: TokenUsage | None) -> CompletionResponse:
        return CompletionResponse(
            id=self._id,
            created=self._created,
            model=self._served.name,
            system_fingerprint=self._served.fingerprint,
            choices=choices,
            usage=usage,
        )

    def _usage(self) -> TokenUsage:
        usage = self._generation.usage
        if counts := self._prompts[0].few_shot:
            usage.few_shot = FewShotUsage(**counts._asdict())
        return usage


def logprobs_of(tokens: Items[ShownToken], k: int, tokenizer: Tokenizer) -> CompletionLogprobs:
    """The four lists; of the likeliest tokens `k`, and the token itself where it is not one of them."""
    found = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for token, logprobs, offset in tokens:
        found.tokens.append(tokenizer.token_name(token))
        found.text_offset.append(offset)
        if logprobs is None:
            found.token_logprobs.append(None)
            found.top_logprobs.append(None)
        else:
            top = {tokenizer.token_name(other): logprob for other, logprob in logprobs.top[:k]}
            found.token_logprobs.append(logprobs.logprob)
            found.top_logprobs.append(top | {tokenizer.token_name(token): logprobs.logprob})
    return found
