"""POST /v1/score: how likely given continuations are after a prompt, which is computed once for all of them."""

import math

from fastapi import APIRouter, Request, Response

from model.checkpoint.tokenizer import Tokenizer
from model.step import SamplingParams, TokenLogprobs
from service.api.errors import invalid
from service.api.generation import (
    Generation,
    answer,
    beside_the_loop,
    check_length,
    check_logprobs,
    check_text_length,
    check_token_ids,
    log_user,
    served_model,
    warnings_for,
)
from service.api.schema.score import Score, ScoreRequest, ScoreResponse
from service.engine.choice import ChoiceRequest
from service.engine.models import ServedModel
from service.engine.scheduler import Family, Sequence

router = APIRouter()


@router.post("/v1/score", response_model=ScoreResponse)
async def create_score(body: ScoreRequest, request: Request) -> Response:
    """Score continuations, each a text or token ids. A text is tokenized by itself: begin it with its space."""
    served = served_model(request, body.model)
    warnings = warnings_for(body, request)
    served.engine.check_size(len(body.continuations))
    size = len(body.prompt) + sum(map(len, body.continuations))
    prompt, continuations = await beside_the_loop(size, lambda: read_texts(body, served))
    check_logprobs(sum(map(len, continuations)), "continuations")
    log_user(body.user, request)
    family = Family(len(prompt), one_prompt=False)
    sequences = [
        Sequence(
            prompt + continuation,
            0,
            SamplingParams(),
            top_logprobs=1,
            scored_from=len(prompt),
            family=family,
            adapter=served.adapter,
        )
        for continuation in continuations
    ]
    generation = Generation(
        [ChoiceRequest(sequence) for sequence in sequences],
        len(sequences),
        served.engine,
        request,
        prompt_tokens=len(prompt) + sum(map(len, continuations)),
    )

    async def scores() -> ScoreResponse:
        candidates = zip(continuations, await generation.finish(), strict=True)
        results = [score(tokens, candidate.scores, served.tokenizer) for tokens, candidate in candidates]
        return ScoreResponse(
            model=served.name,
            system_fingerprint=served.fingerprint,
            results=results,
            usage=generation.usage,
            warnings=warnings,
        )

    return await answer(request, scores())


def read_texts(body: ScoreRequest, served: ServedModel) -> tuple[list[int], list[list[int]]]:
    """Tokens of the prompt and of each continuation. Raises APIError naming what does not fit the model."""
    prompt = read_text(body.prompt, body, served, "prompt")
    if not prompt:
        prompt = served.tokenizer.encode_prompt("")
    elif isinstance(body.prompt, str) and served.tokenizer.bos_id is not None:
        prompt = [served.tokenizer.bos_id, *prompt]
    continuations = []
    for i, text in enumerate(body.continuations):
        tokens = read_text(text, body, served, f"continuations.{i}")
        if not tokens:
            raise invalid(f"'continuations.{i}' is empty, so that there is nothing to score", f"continuations.{i}")
        check_length(len(prompt), len(tokens), served.config.n_positions, f"continuations.{i}")
        continuations.append(tokens)
    return prompt, continuations


def read_text(text: str | list[int], body: ScoreRequest, served: ServedModel, param: str) -> list[int]:
    if isinstance(text, str):
        check_text_length(text, served, param)
        return served.tokenizer.encode(text, allow_special=body.allow_special)
    check_token_ids(text, served.config.vocab_size, param)
    return text


def score(tokens: list[int], found: list[TokenLogprobs], tokenizer: Tokenizer) -> Score:
    """The sums over a continuation's tokens."""
    logprob = sum(each.logprob for each in found)
    num_bytes = sum(len(tokenizer.text_bytes(token)) for token in tokens)
    return Score(
        logprob=logprob,
        mean_logprob=logprob / len(tokens),
        is_greedy=all(each.logprob >= each.top[0][1] for each in found),
        bits_per_byte=-logprob / math.log(2) / num_bytes if num_bytes else None,
        tokens=[tokenizer.token_name(token) for token in tokens],
    )
