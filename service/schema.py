"""Request and response bodies: type, bounds and default of every field."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.json_schema import WithJsonSchema
from pydantic_core import PydanticCustomError

MAX_PROMPTS = 1024
MAX_STOPS = 4

PROMPT_SCHEMA = {
    "description": "Text, token ids, or a list of either.",
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        {
            "type": "array",
            "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
            "minItems": 1,
            "maxItems": MAX_PROMPTS,
        },
        {"type": "null"},
    ],
}


def is_token_list(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def check_prompt(value: Any) -> Any:
    """A text, a list of texts, a list of token ids or a list of those; checked by hand because a union's own errors
    list every alternative for every element."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string, an array of strings, an array of token ids, or an array of those arrays")
    if not value:
        raise ValueError("must not be an empty array")
    if is_token_list(value):
        return value
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"holds {len(value)} prompts, at most {MAX_PROMPTS} are allowed")
    if all(isinstance(item, str) for item in value):
        return value
    for i, item in enumerate(value):
        if not is_token_list(item):
            kind = type(item).__name__
            raise ValueError(f"item {i} is a {kind}: prompts are all strings or all arrays of token ids, not mixed")
        if not item:
            raise ValueError(f"item {i} is an empty array")
    return value


Prompt = Annotated[
    str | list[str] | list[int] | list[list[int]] | None, PlainValidator(check_prompt), WithJsonSchema(PROMPT_SCHEMA)
]

StopString = Annotated[str, Field(strict=True, min_length=1)]


def check_stop(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or an array of strings")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"holds {len(stops)} strings, at most {MAX_STOPS} are allowed")
    if "" in stops:
        raise ValueError("must not hold an empty string")
    return tuple(stops)


Stop = Annotated[
    tuple[str, ...],
    PlainValidator(check_stop),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOPS},
                {"type": "null"},
            ]
        }
    ),
]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    include_usage: StrictBool | None = False
    include_obfuscation: StrictBool | None = False


# Fields of the contract that this version can't honour yet, with the values beside null that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (),
    "min_p": (0,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (),
    "echo": (False,),
    "suffix": (),
    "few_shot": (),
}


class CompletionRequest(BaseModel):
    """Body of POST /v1/completions. null stands for the default everywhere."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: StrictStr
    prompt: Prompt = None
    max_tokens: StrictInt = Field(16, ge=0)
    temperature: float = Field(1.0, ge=0, le=2, strict=True, allow_inf_nan=False)
    top_p: float = Field(1.0, ge=0, le=1, strict=True, allow_inf_nan=False)
    top_k: StrictInt = Field(0, ge=-1, description="0 and -1 keep every token")
    n: StrictInt = Field(1, ge=1, le=128)
    stop: Stop = ()
    seed: StrictInt | None = Field(None, ge=-(2**63), lt=2**63)
    ignore_eos: StrictBool = False
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    user: StrictStr | None = None
    allow_special: StrictBool = False

    best_of: Any = None
    min_p: Any = None
    min_tokens: Any = None
    stop_token_ids: Any = None
    include_stop_str_in_output: Any = None
    repetition_penalty: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    logit_bias: Any = None
    logprobs: Any = None
    echo: Any = None
    suffix: Any = None
    few_shot: Any = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, body: Any) -> Any:
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body

    @field_validator(*NEUTRAL)
    @classmethod
    def _refuse_not_built(cls, value: Any, info: ValidationInfo) -> Any:
        neutral = NEUTRAL[str(info.field_name)]
        if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in neutral):
            raise PydanticCustomError("unsupported_parameter", "not supported yet")
        return value

    @model_validator(mode="after")
    def _check_stream_options(self) -> "CompletionRequest":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("value_error", "allowed only with stream true", {"param": "stream_options"})
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionChoice(BaseModel):
    text: str
    index: int
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None


class CompletionResponse(BaseModel):
    """A completion, or with `stream` one chunk of it; in chunks `usage` is there only with include_usage."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "banded"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorDetail
