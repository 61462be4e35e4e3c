"""Reads a request's body against the model that it names: what the schema alone can't check."""

import hashlib
import logging
from dataclasses import fields
from typing import Any

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

log = logging.getLogger("banded.api")

MAX_WARNINGS = 32  # ignored fields that are named
# Tokens with logprobs in one answer: 64 full contexts. Each takes about 0.5 kB until it is written, with so many others.
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


def client_of(request: Request) -> bytes | None:
    """Whose share of the engine the request takes: its name's or its key's, or one of its own on a server without keys."""
    owner = owner_of(request)
    return owner.encode() if owner != NOBODY else getattr(request.state, "key", None)


def warnings_for(body: Body, request: Request) -> list[str] | None:
    """What the response has to warn of. Raises APIError for a field that is refused, unless the server is lenient."""
    found = body.ineffective
    if not state_of(request).settings.lenient:
        for field in found:
            name = shown(field.name)
            if field.is_refused and field.reason is None:
                raise invalid(f"unknown field '{name}'", name, "unknown_parameter")
            if field.is_refused:
                raise invalid(f"'{name}': {field.reason}", name, "unsupported_parameter")
    named = [
        f"the unknown field '{shown(name)}' was ignored" if reason is None else f"'{shown(name)}' was ignored: {reason}"
        for name, reason, _ in found[:MAX_WARNINGS]
    ]
    more = len(found) - len(named)
    return [*named, f"{more} more fields were ignored"] if more else named or None


def log_user(user: str | None, request: Request) -> None:
    """Log who sent a request, for whoever investigates abuse. Names are hashed, since they are private."""
    if user is not None:
        digest = hashlib.sha256(user.encode(errors="replace")).hexdigest()
        log.info("request %s is for user %s", request.state.request_id, digest[:16])


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
    lists = ("stop_token_ids", "allowed_token_ids", "bad_words")
    converted = {name: tuple(dict.fromkeys(shared[name] or ())) for name in lists}  # what is named twice counts once
    params = SamplingParams(**shared | converted | {"logit_bias": dict(body.logit_bias)} | changed)
    params.check_tokens(entry.config.vocab_size)
    return params


def check_logprobs(count: int, num_top: int, param: str) -> None:
    """Refuse an answer that would hold the logprobs of more tokens, each with `num_top` others, than fit in memory."""
    most = MAX_LOGPROBS * TOP_COUNTED // max(num_top, TOP_COUNTED)
    if count > most:
        message = f"the request asks for logprobs of up to {count} tokens, at most {most} are given in one answer"
        raise invalid(message, param, "request_too_large")
