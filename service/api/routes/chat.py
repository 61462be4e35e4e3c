"""POST /v1/chat/completions: messages laid out by the model's template, answered as chat front ends expect."""

import math
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar, cast

from fastapi import APIRouter, Request, Response

from model.checkpoint.prompt_format import Turn
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
    unless_disconnected,
)
from service.api.bodies import CONTEXT_BYTES, BodyRoute
from service.api.encoding import in_pieces
from service.api.errors import invalid
from service.api.schema.chat import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLayout,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    ChatResponse,
    ChatToken,
    Message,
    TokenBytes,
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
from service.engine.engine import QueueFullError
from service.engine.models import ModelEntry
from service.engine.prompts import chat_prompt
from service.engine.request import MAX_INT, GenerationRequest, Prompt, check_length, check_text_length, end_of
from service.engine.workers import off_the_loop, template_thread

router = APIRouter(route_class=BodyRoute)

T = TypeVar("T")

# A chat's text may have so many characters for each byte that its tokens can have: bytes of a character that NFC composes,
# and the marks next to what looks like a special token.
TEXT_PER_BYTE = 8
# Chats of a client, or of all that send no key, that wait for a checkpoint's template. They hold their bodies meanwhile.
MAX_WAITING = 256


@router.post("/v1/chat/completions", response_model=ChatResponse, responses=STREAMED)
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answer a chat; with `stream`, as server-sent events."""
    entry = find_model(request, body.model)
    size = len(await request.body())
    warnings, asked = await lay_out(
        size, entry, request, lambda: (warnings_for(body, request), generation_of(body, entry, request))
    )
    log_user(body.user, request)
    generation = entry.engine.generate(asked)
    chat = ChatAnswer(body, entry, asked.prompts[0], ChargedRun(generation, request), warnings)
    if body.stream:
        return EventStream(chat.stream(), state_of(request).metrics.stream_errors)
    return await answer(request, chat.collect())


async def lay_out(size: int, entry: ModelEntry, request: Request, work: Callable[[], T]) -> T:
    """off_the_loop, for work that lays out a chat: a checkpoint's template is waited for in the thread for that.

    Raises QueueFullError if too many chats of the client wait already, and ClientGoneError if the client leaves.
    """
    if entry.prompt_format.is_own:
        return await off_the_loop(size, work)
    client = client_of(request)
    waiting = template_thread.num_waiting(client)
    if waiting >= MAX_WAITING:
        seconds = max(1, math.ceil(waiting * template_thread.seconds))
        message = f"{waiting} chats wait to be laid out, the limit is {MAX_WAITING}; try again in {seconds} s"
        raise QueueFullError(message, seconds)
    return await unless_disconnected(request.receive, template_thread.run(client, work))


def generation_of(body: ChatRequest, entry: ModelEntry, request: Request) -> GenerationRequest:
    """What the body asks of the engine. Raises APIError, RequestError or EngineError naming what it can't do."""
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = sampling_params(body, entry, state_of(request).settings, logprobs=logprobs, max_tokens=MAX_INT)
    entry.engine.check_size(body.n)
    tokenizer = entry.tokenizer if body.add_special_tokens else entry.tokenizer.without_bos()
    is_cut, special = body.truncate_prompt_tokens is not None, body.allow_special
    prompt = read_messages(body.messages, body, entry, tokenizer, allow_special=special, is_cut=is_cut)
    if body.truncate_prompt_tokens is not None:
        asked = body.max_completion_tokens or body.max_tokens or entry.prompt_format.default_max_tokens
        room = max(entry.config.n_positions - asked, 1)
        prompt = end_of(prompt, room if body.truncate_prompt_tokens == -1 else body.truncate_prompt_tokens)
    max_tokens = max_tokens_of(body, len(prompt.tokens), entry)
    if body.logprobs:
        check_logprobs(body.n * max_tokens, body.top_logprobs or 0, "logprobs")
    if body.prompt_logprobs is not None:
        check_logprobs(len(prompt.tokens), body.prompt_logprobs, "prompt_logprobs")
    params = replace(params, max_tokens=max_tokens)
    return GenerationRequest([prompt], params, entry.adapter, client_of(request), owner_of(request))


def read_messages(
    messages: Sequence[Message],
    layout: ChatLayout,
    entry: ModelEntry,
    tokenizer: Tokenizer,
    *,
    allow_special: bool = False,
    is_cut: bool = False,
) -> Prompt:
    """The prompt of a chat.

    Raises RequestError for a message that can't fit the context, unless the prompt `is_cut`, and APIError for too much text.
    """
    turns = [Turn(message.role, message.text) for message in messages]
    for _, text in turns if not is_cut else ():
        check_text_length(text, tokenizer, entry.config.n_positions, "messages")
    size = sum(len(text) for _, text in turns)
    if size > CONTEXT_BYTES:
        raise invalid(f"'messages': hold {size} characters, at most {CONTEXT_BYTES} are laid out", "messages")
    most = TEXT_PER_BYTE * (entry.config.n_positions * tokenizer.max_token_bytes + (size if is_cut else 0))
    return chat_prompt(
        turns,
        entry.prompt_format,
        tokenizer,
        allow_special=allow_special,
        add_generation_prompt=layout.has_generation_prompt,
        continue_final_message=layout.continue_final_message,
        max_chars=None if entry.prompt_format.is_own else most,
    )


def max_tokens_of(body: ChatRequest, prompt_tokens: int, entry: ModelEntry) -> int:
    """What the client asks for, else the prompt format's default as far as the context has room."""
    context = entry.config.n_positions
    asked = body.max_completion_tokens or body.max_tokens
    check_length(prompt_tokens, asked or 1, context, "messages")
    max_tokens = asked or min(entry.prompt_format.default_max_tokens, context - prompt_tokens)
    if body.min_tokens > max_tokens:
        raise invalid(f"'min_tokens': is {body.min_tokens}, more than max_tokens {max_tokens}", "min_tokens")
    return max_tokens


class ChatAnswer:
    """The answer to a request, whole or in chunks."""

    def __init__(self, body: ChatRequest, entry: ModelEntry, prompt: Prompt, run: ChargedRun, warnings: list[str] | None):
        self._has_logprobs = body.logprobs
        self._num_prompt_top = body.prompt_logprobs
        self._num_top = max(body.top_logprobs or 0, body.prompt_logprobs or 0)
        self._has_ids = body.return_token_ids
        self._prompt_token_ids = prompt.tokens if body.return_token_ids else None
        self._options = body.stream_options
        self._entry = entry
        self._run = run
        self._warnings = warnings
        self._heading = heading("chatcmpl", entry)
        # Of the stream so far:
        self._num_tokens = 0
        self._begun: set[int] = set()
        self._text_event = TextEvents("content", lambda choice: self._piece(choice, ChatDelta(content="")))

    async def collect(self) -> list[bytes]:
        """The whole answer, as JSON."""
        chosen = await self._run.finish()
        size = answer_size(chosen, self._num_top)
        return await off_the_loop(size, lambda: in_pieces(self._heading_of(chosen[0]), choices=self._choices_of(chosen)))

    def _heading_of(self, first: Choice) -> ChatResponse:
        """The answer without its choices."""
        return ChatResponse(
            **self._heading,
            choices=[],
            prompt_logprobs=prompt_logprobs_of(first, self._num_prompt_top, self._entry.tokenizer),
            prompt_token_ids=self._prompt_token_ids,
            usage=self._run.usage,
            warnings=self._warnings,
        )

    def _choices_of(self, chosen: Sequence[Choice]) -> Iterator[bytes]:
        return json_array(
            ChatChoice(
                index=i,
                message=ChatMessage(content=each.text),
                logprobs=self._logprobs(each.shown),
                finish_reason=cast(Any, each.finish_reason),
                token_ids=each.tokens if self._has_ids else None,
            )
            for i, each in enumerate(chosen)
        )

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Chunks as server-sent events: the role first, then one for each token whose text is certain, then why it ended.

        Those of a step come together.
        """
        async with aclosing(joined(self._run.outputs(), self._events_of)) as pieces:
            async for events in pieces:
                yield events
        if self._options.include_usage:
            yield self._event([])

    def _events_of(self, output: Output) -> Iterator[bytes]:
        """Of what a token added; none if a client would see nothing new."""
        self._num_tokens += len(output.tokens)
        if output.choice not in self._begun:
            self._begun.add(output.choice)
            yield self._piece(output.choice, ChatDelta(role="assistant", content=""))
        logprobs = self._logprobs(output.shown)
        if (output.tokens and self._has_ids) or ((output.text or output.shown) and not self._options.is_plain):
            more = {"logprobs": logprobs, "token_ids": output.tokens if self._has_ids else None}
            yield self._piece(output.choice, ChatDelta(content=output.text), **more)
        elif output.text or output.shown:
            yield self._text_event(output.choice, output.text, logprobs)
        if output.finish_reason:
            yield self._piece(output.choice, ChatDelta(), finish_reason=cast(Any, output.finish_reason))

    def _piece(self, index: int, delta: ChatDelta, **fields: Any) -> bytes:
        return self._event([ChatChunkChoice(index=index, delta=delta, **fields)])

    def _event(self, choices: list[ChatChunkChoice]) -> bytes:
        has_usage = self._options.continuous_usage_stats or not choices
        usage = self._run.usage_after(self._num_tokens) if has_usage else None
        once: dict[str, Any] = {"warnings": self._warnings, "prompt_token_ids": self._prompt_token_ids}
        chunk = ChatChunk(**self._heading, choices=choices, usage=usage, **once)
        self._warnings = self._prompt_token_ids = None
        return chunk_event(chunk, self._options)

    def _logprobs(self, shown: Sequence[ShownToken]) -> ChatLogprobs | None:
        if not self._has_logprobs:
            return None
        tokenizer, content = self._entry.tokenizer, []
        for token, logprobs, _ in shown:
            assert logprobs is not None, "only the first token of a prompt has none"
            top = [token_bytes(other, logprob, tokenizer) for other, logprob in logprobs.top]
            content.append(ChatToken(**vars(token_bytes(token, logprobs.logprob, tokenizer)), top_logprobs=top))
        return ChatLogprobs(content=content)


def token_bytes(token: int, logprob: float, tokenizer: Tokenizer) -> TokenBytes:
    data = tokenizer.token_bytes(token) if token in tokenizer else b""
    return TokenBytes(token=tokenizer.token_name(token), logprob=logprob, bytes=list(data))
