"""Bodies of POST /v1/chat/completions."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, StrictBool, StrictInt, StrictStr, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from service.api.schema.base import MAX_INT, Body, TokenUsage, Warnings, is_absent
from service.api.schema.sampling import SamplingFields

MAX_MESSAGES = 2048
# Fields of OpenAI's chat schema that this server can't honour, with the values beside null that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in-memory", "in_memory"),
    "reasoning_effort": ("none", "medium"),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
NEUTRAL_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": ("",),
    "tool_calls": ([],),
    "tool_call_id": (),
}


def refuse_effect(value: Any, neutral: tuple[Any, ...]) -> Any:
    """`value` if it is one of those that change nothing. True is not 1 here."""
    if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in neutral):
        raise PydanticCustomError("unsupported_parameter", "not supported by this server")
    return value


class MessagePart(Body):
    type: Literal["text"]
    text: StrictStr


class Message(Body):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | list[MessagePart] = ""
    audio: Any = None
    function_call: Any = None
    name: Any = None
    refusal: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None

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

    @field_validator(*NEUTRAL_IN_MESSAGES)
    @classmethod
    def _refuse_effect(cls, value: Any, info: ValidationInfo) -> Any:
        return refuse_effect(value, NEUTRAL_IN_MESSAGES[str(info.field_name)])

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(SamplingFields):
    """Body of POST /v1/chat/completions."""

    model: StrictStr
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: StrictInt | None = Field(None, ge=1, le=MAX_INT)
    max_completion_tokens: StrictInt | None = Field(None, ge=1, le=MAX_INT)
    logprobs: StrictBool = False
    top_logprobs: StrictInt | None = Field(None, ge=0, le=20)
    # Notes to the service about a request, without an effect on its answer.
    metadata: dict[str, Any] | None = None
    prompt_cache_key: StrictStr | None = None
    safety_identifier: StrictStr | None = None

    audio: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    moderation: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    reasoning_effort: Any = None
    response_format: Any = None
    service_tier: Any = None
    store: Any = None
    tool_choice: Any = None
    tools: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    @field_validator(*NEUTRAL)
    @classmethod
    def _refuse_effect(cls, value: Any, info: ValidationInfo) -> Any:
        return refuse_effect(value, NEUTRAL[str(info.field_name)])

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


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
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


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: TokenUsage | None = None
    warnings: Warnings = None
    obfuscation: Annotated[str | None, Field(exclude_if=is_absent, description="padding, with include_obfuscation")] = None
