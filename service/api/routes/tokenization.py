"""POST /tokenize and /detokenize, GET /tokenizer_info: in vLLM's form, for clients that have no tokenizer of their own."""

import codecs
from collections.abc import Iterable
from itertools import chain
from typing import Any, cast

from fastapi import APIRouter, Request, Response
from pydantic_core import to_json

from service.api.bodies import BodyRoute
from service.api.encoding import PiecesResponse, in_pieces
from service.api.limits import KeyLimits
from service.api.routes.chat import lay_out, read_messages
from service.api.schema.tokenization import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from service.api.state import state_of
from service.api.validation import find_model, warnings_for
from service.engine.models import ModelEntry
from service.engine.request import check_token_ids, encode_slowly
from service.engine.workers import off_the_loop, rest

router = APIRouter(route_class=BodyRoute)

SOME_TOKENS = 2**14  # that are turned into text at a time


def entry_of(name: str | None, request: Request) -> ModelEntry:
    """The model whose tokenizer is meant. Adapters have the base model's, so that none need be named."""
    return state_of(request).models.base if name is None else find_model(request, name)


@router.post("/tokenize", response_model=TokenizeResponse)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """Token ids of a text, or of a chat laid out by its template. Special-token text becomes the special token."""
    entry, size = entry_of(body.model, request), len(await request.body())
    tokenizer, limits = entry.tokenizer, cast(KeyLimits, request.state.limits)
    texts = [body.prompt or ""] if body.messages is None else [message.text for message in body.messages]
    least = sum(tokenizer.least_tokens(tokenizer.num_known_bytes(text)) for text in texts)
    with limits.charged_text(least) as used:
        if body.messages is not None:
            count, pieces = await lay_out(size, entry, request, lambda: tokenized(body, entry, request))
        else:
            count, pieces = await off_the_loop(size, lambda: tokenized(body, entry, request))
        used.append(count)
    return PiecesResponse(pieces)


def tokenized(body: TokenizeRequest, entry: ModelEntry, request: Request) -> tuple[int, list[bytes]]:
    """How many tokens there are, and the answer.

    A text of any length is never a list of ids: they would take ten times as much memory.
    """
    warnings = warnings_for(body, request)
    tokenizer = entry.tokenizer if body.add_special_tokens else entry.tokenizer.without_bos()
    if body.messages is not None:
        lists: Iterable[list[int]] = [read_messages(body.messages, body, entry, tokenizer).tokens]
    else:
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        lists = chain([bos], encode_slowly([(body.prompt or "", True)], tokenizer, "prompt"))
    count, ids, names = 0, bytearray(), bytearray()
    for tokens in filter(None, lists):
        count += len(tokens)
        ids += b"," + to_json(tokens)[1:-1]
        if body.return_token_strs:
            names += b"," + to_json([tokenizer.token_name(token) for token in tokens])[1:-1]
    answer = TokenizeResponse(
        count=count,
        max_model_len=entry.config.n_positions,
        tokens=[],
        token_strs=[] if body.return_token_strs else None,
        warnings=warnings,
    )
    contents = {"tokens": ids, "token_strs": names} if body.return_token_strs else {"tokens": ids}
    return count, in_pieces(answer, **{name: [bytes(content[1:])] for name, content in contents.items()})


@router.post("/detokenize", response_model=DetokenizeResponse)
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """Text of token ids, with special tokens spelt out. Bytes that are not UTF-8 become U+FFFD."""
    entry, size = entry_of(body.model, request), len(await request.body())
    with request.state.limits.charged_text(len(body.tokens)) as used:
        pieces = await off_the_loop(size, lambda: detokenized(body, entry, request))
        used.append(len(body.tokens))
    return PiecesResponse(pieces)


def detokenized(body: DetokenizeRequest, entry: ModelEntry, request: Request) -> list[bytes]:
    warnings = warnings_for(body, request)
    check_token_ids(body.tokens, entry.config.vocab_size, "tokens")
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    texts = []
    for start in range(0, len(body.tokens) + 1, SOME_TOKENS):
        # A model may have more ids than its vocabulary has tokens; the extra ids have no text.
        known = (token for token in body.tokens[start : start + SOME_TOKENS] if token in entry.tokenizer)
        is_last = start + SOME_TOKENS > len(body.tokens)
        text = decoder.decode(b"".join(map(entry.tokenizer.token_bytes, known)), is_last)
        texts.append(to_json(text)[1:-1])
        rest()
    return in_pieces(DetokenizeResponse(prompt="", warnings=warnings), prompt=texts)


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> dict[str, Any]:
    """The fields that a client's tokenizer class reads from tokenizer_config.json."""
    entry = entry_of(None, request)
    tokenizer = entry.tokenizer
    eos, bos = (None if token is None else tokenizer.token_name(token) for token in (tokenizer.eos_id, tokenizer.bos_id))
    return {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": entry.config.n_positions,
        "add_bos_token": tokenizer.bos_id is not None,
        "bos_token": bos,
        "eos_token": eos,
        "chat_template": None if entry.prompt_format.chat_problem else entry.prompt_format.chat_template,
    }
