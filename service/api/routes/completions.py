"""POST /v1/completions: a body becomes a request of the engine, its outputs become a response or a stream of chunks."""

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any, cast

from fastapi import APIRouter, Request, Response

from model.checkpoint.tokenizer import Tokenizer
from service.api.answers import (
    STREAMED,
    ChargedRun,
    EventStream,
    TextEvents,
    answer,
    answer_size,
    chunk_event,
    heading,
    joined,
    json_array,
    prompt_logprobs_of,
)
from service.api.bodies import BodyRoute
from service.api.encoding import in_pieces
from service.api.errors import invalid
from service.api.schema.completions import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
)
from service.api.state import state_of
from service.api.validation import (
    check_logprobs,
    client_of,
    find_model,
    log_user,
    owner_of,
    sampling_params,
    warnings_for,
)
from service.engine.choice import Choice, Output, ShownToken
from service.engine.models import ModelEntry
from service.engine.prompts import Example, FewShot, few_shot_prompt, insertion_prompt
from service.engine.request import GenerationRequest, Prompt, check_length, check_text_length, read_prompt, shown
from service.engine.workers import off_the_loop

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/completions", response_model=CompletionResponse, responses=STREAMED)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Complete a prompt, a list of prompts, or token ids; with `stream`, as server-sent events."""
    return await complete(body, body.model, request)


@router.post("/v1/engines/{engine:path}/completions", response_model=CompletionResponse, responses=STREAMED)
async def create_engine_completion(engine: str, body: CompletionRequest, request: Request) -> Response:
    """The same for clients from when a model was called an engine and named in the path."""
    if body.model is not None and body.model != engine:
        raise invalid(f"'model' is '{shown(body.model)}', but the path names the engine '{shown(engine)}'", "model")
    return await complete(body, engine, request)


async def complete(body: CompletionRequest, model: str | None, request: Request) -> Response:
    entry = find_model(request, model)
    size = len(await request.body())
    warnings, asked = await off_the_loop(size, lambda: (warnings_for(body, request), generation_of(body, entry, request)))
    log_user(body.user, request)
    generation = entry.engine.generate(asked)
    completion = CompletionAnswer(body, entry, asked.prompts, ChargedRun(generation, request), warnings)
    if body.stream:
        return EventStream(completion.stream(), state_of(request).metrics.stream_errors)
    return await answer(request, completion.collect())


def generation_of(body: CompletionRequest, entry: ModelEntry, request: Request) -> GenerationRequest:
    """What the body asks of the engine. Raises APIError, RequestError or EngineError naming what it can't do."""
    params = sampling_params(body, entry, state_of(request).settings)
    prompt: Any = body.prompt or ""  # a text, token ids, or a list of either
    texts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    entry.engine.check_size(len(texts) * params.num_candidates)
    prompts = [prompt_of(text, body, entry) for text in texts]
    num_prompt = sum(len(prompt.tokens) for prompt in prompts)
    if body.logprobs is not None:
        num_shown = num_prompt * body.echo + len(prompts) * body.max_tokens
        check_logprobs(params.num_candidates * num_shown, body.logprobs, "logprobs")
    if body.prompt_logprobs is not None:
        check_logprobs(params.num_candidates * num_prompt, body.prompt_logprobs, "prompt_logprobs")
    return GenerationRequest(prompts, params, entry.adapter, client_of(request), owner_of(request))


def prompt_of(text: str | list[int], body: CompletionRequest, entry: ModelEntry) -> Prompt:
    """A prompt of the engine. Raises RequestError naming what does not fit the model."""
    tokenizer = entry.tokenizer if body.add_special_tokens else entry.tokenizer.without_bos()
    context, prompt_format, special = entry.config.n_positions, entry.prompt_format, body.allow_special
    if body.few_shot is not None:
        examples = [Example(example.input, example.output) for example in body.few_shot.examples]
        return few_shot_prompt(
            str(text),
            FewShot(**vars(body.few_shot) | {"examples": examples}),
            prompt_format,
            tokenizer,
            context=context,
            max_tokens=body.max_tokens,
            allow_special=special,
        )
    if not body.suffix:
        room = max(context - body.max_tokens, 1)
        most = room if body.truncate_prompt_tokens == -1 else body.truncate_prompt_tokens
        prompt = read_prompt(text, tokenizer, entry.config, "prompt", allow_special=special, max_tokens=most)
    else:
        check_text_length(str(text), tokenizer, context, "prompt")
        check_text_length(body.suffix, tokenizer, context, "suffix")
        prompt = insertion_prompt(str(text), body.suffix, prompt_format, tokenizer, allow_special=special)
    check_length(len(prompt.tokens), body.max_tokens, context)
    return prompt


class CompletionAnswer:
    """The answer to a request, whole or in chunks."""

    def __init__(
        self,
        body: CompletionRequest,
        entry: ModelEntry,
        prompts: Sequence[Prompt],
        run: ChargedRun,
        warnings: list[str] | None,
    ):
        self._body = body
        self._options = body.stream_options
        self._entry = entry
        self._prompts = prompts
        self._run = run
        self._warnings = warnings
        self._heading = heading("cmpl", entry)
        # Of the stream so far:
        self._num_tokens = 0
        self._begun: set[int] = set()
        self._text_event = TextEvents("text", lambda choice: self._event([choice_of(choice, "", None, None)]))

    async def collect(self) -> list[bytes]:
        """The whole completion, as JSON."""
        chosen = await self._run.finish()
        whole = CompletionResponse(**self._heading, choices=[], usage=self._run.usage, warnings=self._warnings)
        choices = (self._whole_choice(i, each) for i, each in enumerate(chosen))
        size = answer_size(chosen, max(self._body.logprobs or 0, self._body.prompt_logprobs or 0))
        return await off_the_loop(size, lambda: in_pieces(whole, choices=json_array(choices)))

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Chunks as server-sent events, one for each token whose text is certain. Those of a step come together."""
        async with aclosing(joined(self._run.outputs(), self._events_of)) as pieces:
            async for events in pieces:
                yield events
        if self._options.include_usage:
            yield self._event([])

    def _events_of(self, output: Output) -> Iterator[bytes]:
        """Of what a token added; none if a client would see nothing new."""
        self._num_tokens += len(output.tokens)
        has_ids = self._body.return_token_ids
        if not (output.text or output.shown or output.finish_reason or (output.tokens and has_ids)):
            return
        if output.finish_reason or has_ids or self._warnings or not self._options.is_plain:
            piece = choice_of(output.choice, output.text, self._logprobs(output.shown), output.finish_reason)
            if has_ids:
                piece.token_ids = output.tokens
            if has_ids and output.choice not in self._begun:
                piece.prompt_token_ids = self._prompt_of(output.choice).tokens
            self._begun.add(output.choice)
            yield self._event([piece])
        else:
            yield self._text_event(output.choice, output.text, self._logprobs(output.shown))

    def _event(self, choices: list[CompletionChoice]) -> bytes:
        has_usage = self._options.continuous_usage_stats or not choices
        usage = self._run.usage_after(self._num_tokens) if has_usage else None
        chunk = CompletionResponse(**self._heading, choices=choices, usage=usage, warnings=self._warnings)
        self._warnings = None  # once is enough
        return chunk_event(chunk, self._options)

    def _prompt_of(self, choice: int) -> Prompt:
        return self._prompts[choice // self._body.n]

    def _whole_choice(self, index: int, choice: Choice) -> CompletionChoice:
        found = choice_of(index, choice.text, self._logprobs(choice.shown), choice.finish_reason)
        found.prompt_logprobs = prompt_logprobs_of(choice, self._body.prompt_logprobs, self._entry.tokenizer)
        if self._body.return_token_ids:
            found.prompt_token_ids, found.token_ids = choice.prompt.tokens, choice.tokens
        return found

    def _logprobs(self, tokens: Sequence[ShownToken]) -> CompletionLogprobs | None:
        num_top = self._body.logprobs
        return None if num_top is None else logprobs_of(tokens, num_top, self._entry.tokenizer)


def choice_of(index: int, text: str, logprobs: CompletionLogprobs | None, finish_reason: str | None) -> CompletionChoice:
    return CompletionChoice(text=text, index=index, logprobs=logprobs, finish_reason=cast(Any, finish_reason))


def logprobs_of(tokens: Sequence[ShownToken], k: int, tokenizer: Tokenizer) -> CompletionLogprobs:
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
