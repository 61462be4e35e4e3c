"""Bodies of POST /v1/chat/completions."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, StrictBool, StrictInt, StrictStr, field_validator, model_validator
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
from service.api.schema.peers import PeerField, by_name
from service.engine.request import MAX_INT

MAX_MESSAGES = 2048


class MessagePart(Body):
    type: Literal["text"]
    text: StrictStr


class Message(Body):
    """A turn of a chat."""

    peers = by_name(
        PeerField("audio function_call name tool_call_id", "OpenAI"),
        PeerField("refusal", "OpenAI", ("",)),
        PeerField("tool_calls", "OpenAI", ([],)),
    )

    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | list[MessagePart] = ""

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


class ChatLayout(Body):
    """How the messages of a chat end."""

    add_generation_prompt: StrictBool | None = Field(None, description="end with the beginning of an answer; the default")
    continue_final_message: StrictBool = Field(False, description="the answer goes on inside the last message")

    @model_validator(mode="after")
    def _check_end(self) -> Self:
        if self.add_generation_prompt and self.continue_final_message:
            param = {"param": "continue_final_message"}
            raise PydanticCustomError("value_error", "can't be used together with add_generation_prompt", param)
        return self

    @property
    def has_generation_prompt(self) -> bool:
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt


class ChatRequest(SamplingFields, ChatLayout):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)
    max_tokens: StrictInt | None = Field(None, ge=1, le=MAX_INT)
    max_completion_tokens: StrictInt | None = Field(None, ge=1, le=MAX_INT)
    logprobs: StrictBool = False
    top_logprobs: Annotated[StrictInt, bounds("logprobs")] | None = None

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
