"""Bodies of POST /tokenize and /detokenize."""

from typing import Self

from pydantic import BaseModel, Field, StrictBool, StrictInt, StrictStr, model_validator
from pydantic_core import PydanticCustomError

from service.api.schema.base import Body, Warnings
from service.api.schema.chat import MAX_MESSAGES, ChatLayout, Message


class TokenizeRequest(ChatLayout):
    """Body of POST /tokenize: a text, or the messages of a chat."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: list[Message] | None = Field(None, fail_fast=True, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: StrictBool = Field(True, description="begin with bos where the checkpoint asks for it")
    return_token_strs: StrictBool = False

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("value_error", "exactly one of prompt and messages is needed", {"param": "prompt"})
        return self


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None
    warnings: Warnings = None


class DetokenizeRequest(Body):
    """Body of POST /detokenize."""

    model: StrictStr | None = None
    tokens: list[StrictInt] = Field(fail_fast=True)


class DetokenizeResponse(BaseModel):
    prompt: str
    warnings: Warnings = None
