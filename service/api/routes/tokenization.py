"""POST /tokenize and /detokenize, GET /tokenizer_info: in vLLM's form, for clients that have no tokenizer of their own."""

from typing import Any

from fastapi import APIRouter, Request

from service.api.limits import KeyLimits
from service.api.routes.chat import read_messages
from service.api.schema.tokenization import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from service.api.state import state_of
from service.api.validation import find_model, off_the_loop, warnings_for
from service.engine.models import ModelEntry
from service.engine.request import check_token_ids

router = APIRouter()


def entry_of(name: str | None, request: Request) -> ModelEntry:
    """The model whose tokenizer is meant. Adapters have the base model's, so that none need be named."""
    return state_of(request).models.base if name is None else find_model(request, name)


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> TokenizeResponse:
    """Token ids of a text, or of a chat laid out by its template. Special-token text becomes the special token."""
    entry = entry_of(body.model, request)
    warnings = warnings_for(body, request)
    tokenizer = entry.tokenizer if body.add_special_tokens else entry.tokenizer.without_bos()
    limits: KeyLimits = request.state.limits
    texts = [body.prompt or ""] if body.messages is None else [message.text for message in body.messages]
    charged = limits.charge_text(sum(map(tokenizer.least_tokens, texts)))
    if body.messages is not None:
        tokens = (await read_messages(body.messages, body, entry, tokenizer)).tokens
    else:
        text = body.prompt or ""
        tokens = await off_the_loop(len(text), lambda: tokenizer.encode(text, allow_special=True))
        if tokenizer.bos_id is not None:
            tokens = [tokenizer.bos_id, *tokens]
    limits.settle_text(charged, len(tokens))
    return TokenizeResponse(
        count=len(tokens),
        max_model_len=entry.config.n_positions,
        tokens=tokens,
        token_strs=[tokenizer.token_name(token) for token in tokens] if body.return_token_strs else None,
        warnings=warnings,
    )


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> DetokenizeResponse:
    """Text of token ids, with special tokens spelt out. Bytes that are not UTF-8 become U+FFFD."""
    entry = entry_of(body.model, request)
    warnings = warnings_for(body, request)
    request.state.limits.charge_text(len(body.tokens))
    check_token_ids(body.tokens, entry.config.vocab_size, "tokens")
    # A model may have more ids than its vocabulary has tokens; the extra ids have no text.
    known = (token for token in body.tokens if token in entry.tokenizer)
    return DetokenizeResponse(prompt=entry.tokenizer.decode(known), warnings=warnings)


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
