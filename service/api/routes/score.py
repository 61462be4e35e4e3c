"""POST /v1/score: how likely given continuations are after a prompt, which is computed once for all of them."""

from fastapi import APIRouter, Request, Response

from service.api.answers import ChargedRun, answer
from service.api.errors import invalid
from service.api.schema.score import ScoreRequest, ScoreResponse, ScoreResult
from service.api.validation import check_logprobs, find_model, log_user, off_the_loop, owner_of, warnings_for
from service.engine.choice import Score
from service.engine.models import ModelEntry
from service.engine.request import SCORING, GenerationRequest, Prompt, check_length, read_prompt

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
    check_logprobs(num_scored, SCORING.logprobs or 0, "continuations")
    log_user(body.user, request)
    prompts = [Prompt(prompt + continuation, logprobs_from=len(prompt)) for continuation in continuations]
    generation = entry.engine.generate(
        GenerationRequest(prompts, SCORING, entry.adapter, cache_scope=owner_of(request)),
    )
    run = ChargedRun(generation, request, prompt_tokens=len(prompt) + num_scored)

    async def scores() -> ScoreResponse:
        results = []
        for tokens, choice in zip(continuations, await run.finish(), strict=True):
            names = [entry.tokenizer.token_name(token) for token in tokens]
            results.append(ScoreResult(**vars(Score.of(tokens, choice, entry.tokenizer)) | {"tokens": names}))
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

    def read(text: str | list[int], param: str) -> Prompt:
        return read_prompt(text, entry.tokenizer, entry.config, param, allow_special=body.allow_special)

    prompt = read(body.prompt or "", "prompt").tokens
    continuations = []
    for i, text in enumerate(body.continuations):
        param = f"continuations.{i}"
        continuation = read(text, param)
        tokens = continuation.tokens[continuation.num_implicit :]
        if not tokens:
            raise invalid(f"'{param}' is empty, so that there is nothing to score", param)
        check_length(len(prompt), len(tokens), entry.config.n_positions, param)
        continuations.append(tokens)
    return prompt, continuations
