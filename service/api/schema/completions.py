"""Bodies of POST /v1/completions."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, StrictBool, StrictInt, StrictStr, model_validator
from pydantic_core import PydanticCustomError

from service.api.schema.base import (
    Body,
    Generated,
    Obfuscation,
    PromptLogprobs,
    SamplingFields,
    TokenIds,
    TokenUsage,
    Warnings,
    bounds,
)
from service.api.schema.fields import PromptField

MAX_EXAMPLES = 2048  # as many as a context has tokens


class ExampleFields(Body):
    input: StrictStr
    output: StrictStr


class FewShotFields(Body):
    """How to lay out worked examples ahead of the prompt. What is not given comes from the model's card."""

    instruction: StrictStr | None = None
    examples: list[ExampleFields] = Field(fail_fast=True, default_factory=list, max_length=MAX_EXAMPLES)
    input_prefix: StrictStr | None = None
    output_prefix: StrictStr | None = None
    separator: StrictStr | None = Field(None, min_length=1)
    on_overflow: Literal["drop", "error"] = Field("drop", description="drop: leave out the oldest examples, and say so")


class CompletionRequest(SamplingFields):
    """Body of POST /v1/completions and of /v1/engines/{name}/completions, where the path names the model."""

    prompt: PromptField = None
    max_tokens: Annotated[StrictInt, bounds("max_tokens")] = 16
    best_of: Annotated[StrictInt, bounds("best_of")] | None = None
    logprobs: Annotated[StrictInt, bounds("logprobs")] | None = None
    echo: StrictBool = False
    suffix: StrictStr = Field("", description="inserts text ahead of it, where the model's card has a format for that")
    few_shot: FewShotFields | None = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.best_of is not None and self.best_of < self.n:
            raise PydanticCustomError("value_error", f"is {self.best_of}, less than n {self.n}", {"param": "best_of"})
        if self.stream and (self.best_of or 1) > 1:
            message = "can't be streamed: which candidates are best is known at the end"
            raise PydanticCustomError("value_error", message, {"param": "best_of"})
        if self.min_tokens > self.max_tokens:
            message = f"is {self.min_tokens}, more than max_tokens {self.max_tokens}"
            raise PydanticCustomError("value_error", message, {"param": "min_tokens"})
        texts = self.prompt if isinstance(self.prompt, list) else [self.prompt or ""]
        if self.suffix and not isinstance(texts[0], str):
            raise PydanticCustomError("value_error", "needs a prompt of text, not of token ids", {"param": "suffix"})
        if self.truncate_prompt_tokens is not None and (self.suffix or self.few_shot is not None):
            message = "can't be used together with suffix or few_shot"
            raise PydanticCustomError("value_error", message, {"param": "truncate_prompt_tokens"})
        if self.few_shot is not None:
            if not isinstance(self.prompt, str):
                raise PydanticCustomError("value_error", "few_shot needs a single string", {"param": "prompt"})
            if self.suffix:
                raise PydanticCustomError("value_error", "can't be used together with suffix", {"param": "few_shot"})
        return self


class CompletionLogprobs(BaseModel):
    """Each list has an entry for each token. The first token of a prompt has no logprobs, so its entries are null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="characters from the start of the prompt")


class CompletionChoice(BaseModel):
    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    prompt_logprobs: PromptLogprobs = None
    prompt_token_ids: TokenIds = None
    token_ids: TokenIds = None


class CompletionResponse(Generated):
    """A completion, or with `stream` a chunk of it. Chunks have `usage` only with include_usage."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: TokenUsage | None = None
    warnings: Warnings = None
    obfuscation: Obfuscation = None
