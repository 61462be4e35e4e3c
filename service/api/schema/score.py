"""Bodies of POST /v1/score."""

from typing import Literal

from pydantic import BaseModel, Field, StrictBool, StrictStr

from service.api.schema.base import Body, TokenUsage, Warnings
from service.api.schema.fields import MAX_PROMPTS, TextOrTokens


class ScoreRequest(Body):
    """Body of POST /v1/score."""

    model: StrictStr | None = None
    prompt: TextOrTokens = ""
    continuations: list[TextOrTokens] = Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)
    allow_special: StrictBool = False
    user: StrictStr | None = None


class ScoreResult(BaseModel):
    logprob: float = Field(description="natural logarithm, of the whole continuation after the prompt")
    mean_logprob: float
    is_greedy: bool = Field(description="every token is the likeliest")
    bits_per_byte: float | None = Field(description="null where the tokens have no text")
    tokens: list[str]


class ScoreResponse(BaseModel):
    object: Literal["score"] = "score"
    model: str
    system_fingerprint: str
    results: list[ScoreResult]
    usage: TokenUsage
    warnings: Warnings = None
