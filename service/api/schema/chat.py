"""Bodies of POST /v1/chat/completions."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, StrictBool, StrictInt, StrictStr, field_validator, model_validator
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
    is_absent,
)
from service.engine.request import MAX_INT

MAX_MESSAGES = 2048


def neutral(*values: Any) -> AfterValidator:
    """Marks a field of OpenAI's that this server can't honour. It may be null or have a value that changes nothing."""

    def check(value: Any) -> Any:
        # 1 == True, but they are different values here.
        if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in values):
            raise PydanticCustomError("unsupported_parameter", "not supported by this server")
        return value

    return AfterValidator(check)


class MessagePart(Body):
    type: Literal["text"]
    text: StrictStr


class Message(Body):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | list[MessagePart] = ""
    audio: Annotated[Any, neutral()] = None
    function_call: Annotated[Any, neutral()] = None
    name: Annotated[Any, neutral()] = None
    refusal: Annotated[Any, neutral("")] = None
    tool_calls: Annotated[Any, neutral([])] = None
    tool_call_id: Annotated[Any, neutral()] = None

    @field_validator("content", mode="before")
    @classmethod
    def _check_content(cls, value: Any) -> Any:
        # The union's own error would be about a string, whatever part is wrong.
        if not isinstance(value, str | list):
            raise ValueError("must be a string or an array of text parts")
        for i, part in enumerate(value if isinstance(value, list) else ()):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"part {i} is no text: this server takes parts of type 'text' with a string 'text' only")
        return value

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(SamplingFields):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: StrictInt | None = Field(None, ge=1, le=MAX_INT)
    max_completion_tokens: StrictInt | None = Field(None, ge=1, le=MAX_INT)
    logprobs: StrictBool = False
    top_logprobs: Annotated[StrictInt, bounds("logprobs")] | None = None
    # Notes about a request that have no effect on its answer.
    metadata: dict[str, Any] | None = None
    prompt_cache_key: StrictStr | None = None
    safety_identifier: StrictStr | None = None

    audio: Annotated[Any, neutral()] = None
    function_call: Annotated[Any, neutral("none", "auto")] = None
    functions: Annotated[Any, neutral([])] = None
    modalities: Annotated[Any, neutral(["text"])] = None
    moderation: Annotated[Any, neutral()] = None
    parallel_tool_calls: Annotated[Any, neutral(True, False)] = None
    prediction: Annotated[Any, neutral()] = None
    prompt_cache_options: Annotated[Any, neutral()] = None
    prompt_cache_retention: Annotated[Any, neutral("in-memory", "in_memory")] = None
    reasoning_effort: Annotated[Any, neutral("none", "medium")] = None
    response_format: Annotated[Any, neutral({"type": "text"})] = None
    service_tier: Annotated[Any, neutral("auto", "default")] = None
    store: Annotated[Any, neutral(False)] = None
    tool_choice: Annotated[Any, neutral("none", "auto")] = None
    tools: Annotated[Any, neutral([])] = None
    verbosity: Annotated[Any, neutral("medium")] = None
    web_search_options: Annotated[Any, neutral()] = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("value_error", "allowed only with logprobs true", {"param": "top_logprobs"})
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            message = f"is {self.max_completion_tokens}, but max_tokens is {self.max_tokens}"
            raise PydanticCustomError("value_error", message, {"param": "max_completion_tokens"})
        return self


class TokenBytes(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(TokenBytes):
    top_logprobs: list[TokenBytes]


class ChatLogprobs(BaseModel):
    content: list[ChatToken]
    refusal: None = None


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    token_ids: TokenIds = None


class ChatResponse(Generated):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    prompt_logprobs: PromptLogprobs = None
    prompt_token_ids: TokenIds = None
    usage: TokenUsage
    warnings: Warnings = None


class ChatDelta(BaseModel):
    role: Annotated[Literal["assistant"] | None, Field(exclude_if=is_absent)] = None
    content: Annotated[str | None, Field(exclude_if=is_absent)] = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    token_ids: TokenIds = None


class ChatChunk(Generated):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    prompt_token_ids: TokenIds = None
    usage: TokenUsage | None = None
    warnings: Warnings = None
    obfuscation: Obfuscation = None
