"""The fields that completions and chat have in common."""

from typing import Annotated, Self

from pydantic import Field, StrictBool, StrictInt, StrictStr, model_validator
from pydantic_core import PydanticCustomError

from service.api.schema.base import Body, bounds
from service.api.schema.fields import LogitBiasField, Number, Penalty, StopField
from service.engine.request import BOUNDS

MAX_STOP_TOKENS = 1024


class StreamOptions(Body):
    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False


class SamplingFields(Body):
    """How tokens are sampled and where the text ends."""

    temperature: Annotated[Number, bounds("temperature")] = 1.0
    top_p: Annotated[Number, bounds("top_p")] = 1.0
    top_k: Annotated[StrictInt, bounds("top_k")] = Field(0, description="0 and -1 keep every token")
    min_p: Annotated[Number, bounds("min_p")] = 0.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Number = Field(
        1.0, gt=0, le=BOUNDS["repetition_penalty"][1], description="over prompt and completion"
    )
    logit_bias: LogitBiasField = ()
    n: Annotated[StrictInt, bounds("n")] = 1
    seed: Annotated[StrictInt, bounds("seed")] | None = None
    stop: StopField = ()
    stop_token_ids: list[StrictInt] = Field(default_factory=list, max_length=MAX_STOP_TOKENS)
    min_tokens: Annotated[StrictInt, bounds("min_tokens")] = Field(
        0, description="no end of text and no stop before so many tokens"
    )
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
