"""What completions, chat and scoring have in common: reading a request against the model, running it, adding it up."""

import asyncio
import hashlib
import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Coroutine
from collections.abc import Sequence as Items
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel
from pydantic_core import to_json

from model.step import TokenLogprobs
from service.api.errors import APIError, invalid
from service.api.limits import KeyLimits
from service.api.schema.base import Body, PromptTokensDetails, TokenUsage, shown
from service.api.schema.chat import ChatChunk
from service.api.schema.completions import CompletionResponse
from service.api.schema.fields import MAX_STOPS, too_many_stops
from service.api.schema.sampling import SamplingFields
from service.api.sse import CLIENT_CLOSED_REQUEST, ClientGoneError, event, unless_disconnected
from service.api.state import state_of
from service.engine.choice import ChoiceRequest, Output, ShownToken
from service.engine.engine import Engine
from service.engine.models import ServedModel

T = TypeVar("T")

log = logging.getLogger("banded.api")

# Characters and token ids of a request that are tokenized and checked at once; more of them in a worker thread, so that
# the event loop goes on.
SHORT_PROMPTS = 4096
# Models that an error names.
MAX_NAMES = 5


def served_model(request: Request, name: str | None) -> ServedModel:
    """The model that a request names, or the first where it names none. Raises APIError 404."""
    models = state_of(request).models
    served = models.find(name)
    if served is None:
        names = [f"'{each.name}'" for each in models]
        more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
        message = f"the model '{shown(name or '')}' does not exist; this server has {', '.join(names[:MAX_NAMES])}{more}"
        raise APIError(404, message, param="model", code="model_not_found")
    return served


def warnings_for(body: Body, request: Request) -> list[str] | None:
    """What the response has to warn of. Raises APIError for a field without a meaning, unless the server is lenient."""
    unknown = [shown(name) for name in body.unknown_fields]
    if not unknown:
        return None
    if not state_of(request).settings.lenient:
        raise invalid(f"unknown field '{unknown[0]}'", unknown[0], "unknown_parameter")
    named = [f"the unknown field '{name}' was ignored" for name in unknown[:MAX_WARNINGS]]
    more = len(unknown) - len(named)
    return [*named, f"{more} more unknown fields were ignored"] if more else named


MAX_WARNINGS = 32


def log_user(user: str | None, request: Request) -> None:
    """Who sent a request, for whoever has to find abuse; hashed, for names are nobody else's business."""
    if user is not None:
        digest = hashlib.sha256(user.encode(errors="replace")).hexdigest()
        log.info("request %s is for user %s", request.state.request_id, digest[:16])


async def beside_the_loop(size: int, read: Callable[[], T]) -> T:
    """The result of `read`, which goes through about `size` characters or tokens."""
    return read() if size <= SHORT_PROMPTS else await asyncio.to_thread(read)


def check_sampling(fields: SamplingFields, served: ServedModel) -> None:
    """Refuse token ids that the model doesn't have, and more stop strings than are allowed."""
    strings = [stop for stop in fields.stop if stop not in served.tokenizer.special_tokens]
    if len(strings) > MAX_STOPS:
        raise invalid(f"'stop': {too_many_stops(len(strings))}", "stop")
    check_token_ids([token for token, _ in fields.logit_bias], served.config.vocab_size, "logit_bias")
    check_token_ids(fields.stop_token_ids, served.config.vocab_size, "stop_token_ids")


# Tokens with logprobs in one answer: 64 full contexts. Each takes about 2 kB until it is sent.
MAX_LOGPROBS = 2**17


def check_logprobs(count: int, param: str) -> None:
    """Refuse an answer that would hold the logprobs of more tokens than memory should be spent on."""
    if count > MAX_LOGPROBS:
        message = f"the request asks for logprobs of up to {count} tokens, at most {MAX_LOGPROBS} are given in one answer"
        raise invalid(message, param, "request_too_large")


def check_token_ids(tokens: Items[int], vocab_size: int, param: str) -> None:
    for token in tokens:
        if not 0 <= token < vocab_size:
            message = (
                f"token id {shown(str(token))} is outside the model's vocabulary of {vocab_size} (0 to {vocab_size - 1})"
            )
            raise invalid(message, param)


def check_text_length(text: str, served: ServedModel, param: str) -> None:
    """Refuse a text before it is tokenized if not even the longest tokens make it short enough."""
    least = len(text.encode(errors="replace")) // served.tokenizer.max_token_bytes
    if least > served.config.n_positions:
        raise context_error(served.config.n_positions, f"a prompt of at least {least} tokens", param)


def check_length(prompt_tokens: int, max_tokens: int, context: int, param: str = "prompt") -> None:
    if prompt_tokens + max_tokens > context:
        asked = f"{prompt_tokens + max_tokens} tokens ({prompt_tokens} in the prompt, {max_tokens} for the completion)"
        raise context_error(context, asked, param)


def context_error(context: int, asked: str, param: str) -> APIError:
    message = f"this model's context is {context} tokens, but the request asks for {asked}"
    return invalid(message, param, "context_length_exceeded")


def chunk_event(chunk: CompletionResponse | ChatChunk, *, with_usage: bool, obfuscate: bool) -> bytes:
    """A chunk as a server-sent event; `obfuscate` pads it, so that its length on the wire tells nothing of its words."""
    left_out = None if with_usage else {"usage"}
    if obfuscate:
        chunk.obfuscation = "x"
        length = len(chunk.model_dump_json(exclude=left_out).encode())
        chunk.obfuscation += secrets.token_hex(PADDED_TO)[: -length % PADDED_TO]
    return event(chunk.model_dump_json(exclude=left_out))


PADDED_TO = 64  # bytes


class TextEvents:
    """The events of a stream that carry text and nothing else, as most do: those of a choice differ in the text only.

    A model for each, checked and serialised, took a tenth of the event loop's time.
    """

    def __init__(self, field: str, without_text: Callable[[int], bytes]):
        """`without_text(choice)` is such an event with the empty text in `field`."""
        self._empty = f'"{field}":""'.encode()  # inside a string its quotes would have backslashes
        self._without_text = without_text
        self._around: dict[int, tuple[bytes, bytes]] = {}

    def __call__(self, choice: int, text: str) -> bytes:
        if choice not in self._around:
            before, found, behind = self._without_text(choice).partition(self._empty)
            assert found, f"no {self._empty.decode()} in the event"
            self._around[choice] = before + self._empty[:-2], behind
        before, behind = self._around[choice]
        return before + to_json(text) + behind


async def answer(request: Request, work: Coroutine[Any, Any, BaseModel]) -> Response:
    """The response to a client that waits for all of it. The work ends where the client leaves."""
    try:
        body = await unless_disconnected(request.receive, work)
    except ClientGoneError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(body.model_dump_json(), media_type="application/json")


@dataclass
class Candidate:
    """A choice as far as it has come."""

    text: str = ""
    finish_reason: str | None = None
    num_tokens: int = 0
    total_logprob: float = 0.0
    shown: list[ShownToken] = field(default_factory=list)
    scores: list[TokenLogprobs] = field(default_factory=list)

    @property
    def mean_logprob(self) -> float:
        return self.total_logprob / self.num_tokens if self.num_tokens else 0.0

    def add(self, output: Output) -> None:
        self.text += output.text
        self.finish_reason = output.finish_reason
        self.num_tokens += len(output.tokens)
        self.total_logprob += sum(found.logprob for found in output.logprobs)
        self.shown += output.shown
        self.scores += output.scores


class Generation:
    """A request on its way through the engine. `num_choices` at a time begin alike: what the first finds cached is shown."""

    def __init__(
        self,
        requests: Items[ChoiceRequest],
        num_choices: int,
        engine: Engine,
        request: Request,
        *,
        prompt_tokens: int | None = None,
    ):
        """`prompt_tokens` are billed: by default those of each prompt once."""
        self._first_of_prompts = [each.sequence for each in requests[::num_choices]]
        self.candidates = [Candidate() for _ in requests]
        if prompt_tokens is None:
            prompt_tokens = sum(len(sequence.prompt) for sequence in self._first_of_prompts)
        self.prompt_tokens = prompt_tokens
        self._most_tokens = prompt_tokens + sum(each.sequence.max_tokens for each in requests)
        self._limits: KeyLimits | None = request.state.limits
        self._outputs = engine.generate(requests)

    async def outputs(self) -> AsyncGenerator[Output, None]:
        """What the choices gain, as it comes; added up in `candidates` as well.

        Raises LimitError where the client's limit of tokens does not allow the request, and what Engine.generate raises.
        """
        if self._limits:
            self._limits.charge(self._most_tokens)
        try:
            async with aclosing(self._outputs) as outputs:
                async for output in outputs:
                    self.candidates[output.choice].add(output)
                    yield output
        finally:
            if self._limits:
                computed = any(sequence.slot >= 0 for sequence in self._first_of_prompts)
                used = self.prompt_tokens + self.completion_tokens if computed else 0
                self._limits.refund(self._most_tokens - used)

    async def finish(self) -> list[Candidate]:
        """All choices, when they have ended."""
        async with aclosing(self.outputs()) as outputs:
            async for _ in outputs:
                pass
        return self.candidates

    @property
    def completion_tokens(self) -> int:
        return sum(candidate.num_tokens for candidate in self.candidates)

    @property
    def usage(self) -> TokenUsage:
        """As far as it has come. A prompt counts once, a candidate though it is not returned."""
        cached = sum(sequence.num_cached for sequence in self._first_of_prompts)
        return TokenUsage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=self.prompt_tokens + self.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        )
