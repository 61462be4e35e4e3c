"""POST /v1/score: how likely given continuations are after a prompt, which is computed once for all of them."""

from fastapi import APIRouter, Request, Response

from model.checkpoint.tokenizer import Tokenizer
from service.api.answers import ChargedRun, answer
from service.api.errors import invalid
from service.api.schema.score import ScoreRequest, ScoreResponse, ScoreResult
from service.api.validation import check_logprobs, find_model, log_user, off_the_loop, warnings_for
from service.engine.choice import Score
from service.engine.models import ModelEntry
from service.engine.request import SCORING, GenerationRequest, Prompt, check_length, check_text_length, check_token_ids

router = APIRouter()


@router.post("/v1/score", response_model=ScoreResponse)
async def create_score(body: ScoreRequest, request: Request) -> Response:
    """Score continuations, each a text or token ids. A text is tokenized by itself: begin it with its space."""
    entry = find_model(request, body.model)
    warnings = warnings_for(body, request)
    entry.engine.check_size(len(body.continuations))
    size = len(body.prompt) + sum(map(len, body.continuations))
    prompt, continuations = await off_the_loop(size, lambda: read_texts(body, entry))
    num_scored = sum(map(len, continuations))
    check_logprobs(num_scored, "continuations")
    log_user(body.user, request)
    prompts = [Prompt(prompt + continuation, logprobs_from=len(prompt)) for continuation in continuations]
    generation = entry.engine.generate(GenerationRequest(prompts, SCORING, entry.adapter))
    run = ChargedRun(generation, request, prompt_tokens=len(prompt) + num_scored)

    async def scores() -> ScoreResponse:
        scored = zip(continuations, await run.finish(), strict=True)
        results = [result_of(Score.of(tokens, choice, entry.tokenizer), entry.tokenizer) for tokens, choice in scored]
        return ScoreResponse(
            model=entry.name,
            system_fingerprint=entry.fingerprint,
            results=results,
            usage=run.usage,
            warnings=warnings,
        )

    return await answer(request, scores())


def read_texts(body: ScoreRequest, entry: ModelEntry) -> tuple[list[int], list[list[int]]]:
    """Tokens of the prompt and of each continuation. Raises APIError or RequestError naming what does not fit the model."""
    prompt = read_text(body.prompt, body, entry, "prompt")
    if not prompt:
        prompt = entry.tokenizer.encode_prompt("")
    elif isinstance(body.prompt, str) and entry.tokenizer.bos_id is not None:
        prompt = [entry.tokenizer.bos_id, *prompt]
    continuations = []
    for i, text in enumerate(body.continuations):
        tokens = read_text(text, body, entry, f"continuations.{i}")
        if not tokens:
            raise invalid(f"'continuations.{i}' is empty, so that there is nothing to score", f"continuations.{i}")
        check_length(len(prompt), len(tokens), entry.config.n_positions, f"continuations.{i}")
        continuations.append(tokens)
    return prompt, continuations


def read_text(text: str | list[int], body: ScoreRequest, entry: ModelEntry, param: str) -> list[int]:
    if isinstance(text, str):
        check_text_length(text, entry.tokenizer, entry.config.n_positions, param)
        return entry.tokenizer.encode(text, allow_special=body.allow_special)
    check_token_ids(text, entry.config.vocab_size, param)
    return text


def result_of(score: Score, tokenizer: Tokenizer) -> ScoreResult:
    names = [tokenizer.token_name(token) for token in score.tokens]
    return ScoreResult(**vars(score) | {"tokens": names})
