"""The fields that completions and chat have in common."""

from typing import Self

from pydantic import Field, StrictBool, StrictInt, StrictStr, model_validator
from pydantic_core import PydanticCustomError

from service.api.schema.base import MAX_INT, Body
from service.api.schema.fields import LogitBiasField, Number, Penalty, StopField

MAX_REPETITION_PENALTY = 10
MAX_STOP_TOKENS = 1024


class StreamOptions(Body):
    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False


class SamplingFields(Body):
    """How tokens are sampled and where the text ends."""

    temperature: Number = Field(1.0, ge=0, le=2)
    top_p: Number = Field(1.0, ge=0, le=1)
    top_k: StrictInt = Field(0, ge=-1, le=MAX_INT, description="0 and -1 keep every token")
    min_p: Number = Field(0.0, ge=0, le=1)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Number = Field(1.0, gt=0, le=MAX_REPETITION_PENALTY, description="over prompt and completion")
    logit_bias: LogitBiasField = ()
    n: StrictInt = Field(1, ge=1, le=128)
    seed: StrictInt | None = Field(None, ge=-MAX_INT - 1, le=MAX_INT)
    stop: StopField = ()
    stop_token_ids: list[StrictInt] = Field(default_factory=list, max_length=MAX_STOP_TOKENS)
    min_tokens: StrictInt = Field(0, ge=0, le=MAX_INT, description="no end of text and no stop before so many tokens")
    ignore_eos: StrictBool = False
    include_stop_str_in_output: StrictBool = False
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    user: StrictStr | None = None
    allow_special: StrictBool = Field(False, description="special-token text in a string becomes the token")

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("value_error", "allowed only with stream true", {"param": "stream_options"})
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def include_obfuscation(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_obfuscation)
