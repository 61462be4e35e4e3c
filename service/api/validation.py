"""Reads a request's body against the model that it names: what the schema alone can't check."""

import asyncio
import hashlib
import logging
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

from fastapi import Request

from model.checkpoint.files import few
from service.api.errors import APIError, invalid
from service.api.schema.base import Body, SamplingFields
from service.api.schema.fields import too_many_stops
from service.api.state import state_of
from service.engine.models import ModelEntry
from service.engine.options import NOBODY
from service.engine.request import SamplingParams, shown
from service.settings import Settings

T = TypeVar("T")

log = logging.getLogger("banded.api")

# Characters and token ids of a request that are read on the event loop. Longer ones are read in a worker thread, so that
# the event loop keeps running.
SHORT_PROMPTS = 4096
MAX_WARNINGS = 32  # ignored fields that are named
# Tokens with logprobs in one answer: 64 full contexts. Each takes about 2 kB until it is sent, with so many likeliest ones.
MAX_LOGPROBS = 2**17
TOP_COUNTED = 20


def owner_of(request: Request) -> str:
    """Who alone sees what the request makes, and whose things alone it sees: the name of its key."""
    return getattr(request.state, "owner", NOBODY)


def find_model(request: Request, name: str | None) -> ModelEntry:
    """The model that a request names, or the only one. Raises APIError: 404, or 400 if none of several is named."""
    models = state_of(request).models
    seen = models.seen_by(owner_of(request))
    names = [f"'{each.name}'" for each in seen]
    if name is None and len({each.root for each in seen}) > 1:
        raise invalid(f"'model' is required: this server has {few(names)}", "model", "missing_required_parameter")
    entry = models.find(name, owner_of(request))
    if entry is None:
        message = f"the model '{shown(name or '')}' does not exist; this server has {few(names)}"
        raise APIError(404, message, param="model", code="model_not_found")
    return entry


def warnings_for(body: Body, request: Request) -> list[str] | None:
    """What the response has to warn of. Raises APIError for a field that is refused, unless the server is lenient."""
    found = [field._replace(name=shown(field.name)) for field in body.ineffective]
    if not state_of(request).settings.lenient:
        for name, reason, is_refused in found:
            if is_refused and reason is None:
                raise invalid(f"unknown field '{name}'", name, "unknown_parameter")
            if is_refused:
                raise invalid(f"'{name}': {reason}", name, "unsupported_parameter")
    named = [
        f"the unknown field '{name}' was ignored" if reason is None else f"'{name}' was ignored: {reason}"
        for name, reason, _ in found[:MAX_WARNINGS]
    ]
    more = len(found) - len(named)
    return [*named, f"{more} more fields were ignored"] if more else named or None


def log_user(user: str | None, request: Request) -> None:
    """Log who sent a request, for whoever investigates abuse. Names are hashed, since they are private."""
    if user is not None:
        digest = hashlib.sha256(user.encode(errors="replace")).hexdigest()
        log.info("request %s is for user %s", request.state.request_id, digest[:16])


async def off_the_loop(size: int, work: Callable[[], T]) -> T:
    """The result of `work`, which goes through about `size` characters or tokens: in a worker thread if there are many."""
    return work() if size <= SHORT_PROMPTS else await asyncio.to_thread(work)


def sampling_params(body: SamplingFields, entry: ModelEntry, settings: Settings, **changed: Any) -> SamplingParams:
    """What `body` says to the engine; `changed` replaces the fields that mean something else in the body.

    Raises APIError for more than `settings` allow and RequestError for token ids that the model doesn't have.
    """
    strings = [stop for stop in body.stop if stop not in entry.tokenizer.special_tokens]
    if len(strings) > settings.max_stops:
        raise invalid(f"'stop': {too_many_stops(len(strings), settings.max_stops)}", "stop")
    for name in ("logprobs", "top_logprobs", "prompt_logprobs"):
        count = getattr(body, name, None) or 0
        if count > settings.max_logprobs:
            raise invalid(f"'{name}': is {count}, at most {settings.max_logprobs} are given by this server", name)
    shared = {field.name: vars(body)[field.name] for field in fields(SamplingParams) if field.name in vars(body)}
    converted = {name: tuple(shared[name] or ()) for name in ("stop_token_ids", "allowed_token_ids", "bad_words")}
    params = SamplingParams(**shared | converted | {"logit_bias": dict(body.logit_bias)} | changed)
    params.check_tokens(entry.config.vocab_size)
    return params


def check_logprobs(count: int, num_top: int, param: str) -> None:
    """Refuse an answer that would hold the logprobs of more tokens, each with `num_top` others, than fit in memory."""
    most = MAX_LOGPROBS * TOP_COUNTED // max(num_top, TOP_COUNTED)
    if count > most:
        message = f"the request asks for logprobs of up to {count} tokens, at most {most} are given in one answer"
        raise invalid(message, param, "request_too_large")
