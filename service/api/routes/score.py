"""POST /v1/score: how likely given continuations are after a prompt, which is computed once for all of them."""

from fastapi import APIRouter, Request, Response

from service.api.answers import ChargedRun, answer, answer_size, json_array
from service.api.bodies import BodyRoute
from service.api.encoding import in_pieces
from service.api.errors import invalid
from service.api.schema.score import ScoreRequest, ScoreResponse, ScoreResult
from service.api.validation import check_logprobs, client_of, find_model, log_user, owner_of, warnings_for
from service.engine.choice import Choice, Score
from service.engine.models import ModelEntry
from service.engine.request import SCORING, GenerationRequest, Prompt, check_length, read_prompt
from service.engine.workers import off_the_loop

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/score", response_model=ScoreResponse)
async def create_score(body: ScoreRequest, request: Request) -> Response:
    """Score continuations, each a text or token ids. A text is tokenized by itself: begin it with its space."""
    entry = find_model(request, body.model)
    size = len(await request.body())
    warnings = await off_the_loop(size, lambda: warnings_for(body, request))
    entry.engine.check_size(len(body.continuations))
    prompt, continuations = await off_the_loop(size, lambda: read_texts(body, entry))
    log_user(body.user, request)
    prompts = [Prompt(prompt + continuation, logprobs_from=len(prompt)) for continuation in continuations]
    asked = GenerationRequest(prompts, SCORING, entry.adapter, client_of(request), owner_of(request))
    run = ChargedRun(entry.engine.generate(asked), request, prompt_tokens=len(prompt) + sum(map(len, continuations)))

    def result(tokens: list[int], choice: Choice) -> ScoreResult:
        names = [entry.tokenizer.token_name(token) for token in tokens]
        return ScoreResult(**vars(Score.of(tokens, choice, entry.tokenizer)) | {"tokens": names})

    async def scores() -> list[bytes]:
        chosen = await run.finish()
        whole = ScoreResponse(
            model=entry.name, system_fingerprint=entry.fingerprint, results=[], usage=run.usage, warnings=warnings
        )
        results = json_array(map(result, continuations, chosen))
        return await off_the_loop(answer_size(chosen, 0), lambda: in_pieces(whole, results=results))

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
    check_logprobs(sum(map(len, continuations)), SCORING.logprobs or 0, "continuations")
    return prompt, continuations
