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
# Characters. A longer one only costs time, for every choice.
MAX_STOP_LENGTH = 1024
# The largest number that a 64-bit integer holds.
MAX_INT = 2**63 - 1

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


# What JSON calls the types that its parser gives.
JSON_TYPES = {
    str: "a string",
    int: "an integer",
    float: "a number with a fraction",
    bool: "a boolean",
    list: "an array",
    dict: "an object",
    type(None): "null",
}


def check_prompt(value: Any) -> Any:
    """A text, a list of texts, a list of token ids or a list of those; checked by hand because a union's own errors
    list every alternative for every element."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string, an array of strings, an array of token ids, or an array of those arrays")
    if not value:
        raise ValueError("must not be an empty array")
    kind = type(value[0])
    if kind not in (str, int, list):
        raise ValueError(f"item 0 is {JSON_TYPES[kind]}, expected a string, a token id or an array of token ids")
    check_types(value, kind)
    if kind is not int and len(value) > MAX_PROMPTS:
        raise ValueError(f"holds {len(value)} prompts, at most {MAX_PROMPTS} are allowed")
    if kind is list:
        for i, tokens in enumerate(value):
            if not tokens:
                raise ValueError(f"item {i} is an empty array")
            check_types(tokens, int, f" of item {i}")
    return value


def check_types(items: list[Any], expected: type, place: str = "") -> None:
    for i, item in enumerate(items):
        if type(item) is not expected:
            wrong, right = JSON_TYPES[type(item)], JSON_TYPES[expected]
            raise ValueError(f"item {i}{place} is {wrong}, expected {right}")


Prompt = Annotated[
    str | list[str] | list[int] | list[list[int]] | None, PlainValidator(check_prompt), WithJsonSchema(PROMPT_SCHEMA)
]


STOP_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}


def check_stop(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or an array of strings")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"holds {len(stops)} strings, at most {MAX_STOPS} are allowed")
    if "" in stops:
        raise ValueError("must not hold an empty string")
    longest = max(map(len, stops), default=0)
    if longest > MAX_STOP_LENGTH:
        raise ValueError(f"holds a string of {longest} characters, at most {MAX_STOP_LENGTH} are allowed")
    return tuple(stops)


Stop = Annotated[
    tuple[str, ...],
    PlainValidator(check_stop),
    WithJsonSchema(
        {
            "anyOf": [
                STOP_SCHEMA,
                {"type": "array", "items": STOP_SCHEMA, "maxItems": MAX_STOPS},
                {"type": "null"},
            ]
        }
    ),
]


class Body(BaseModel):
    """A JSON object of a request. null stands for the default everywhere."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name in body:
            # Left to pydantic, every unknown field of a hostile body would become an error of its own.
            if name not in cls.model_fields:
                param = name.encode(errors="backslashreplace").decode()  # pydantic can't hold lone surrogates
                raise PydanticCustomError("extra_forbidden", "unknown field", {"param": param})
        return {name: value for name, value in body.items() if value is not None}


def refuse_not_built(value: Any, neutral: tuple[Any, ...]) -> Any:
    """`value` if it is one of those that change nothing. True is not 1 here."""
    if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in neutral):
        raise PydanticCustomError("unsupported_parameter", "not supported yet")
    return value


class StreamOptions(Body):
    include_usage: StrictBool = False
    include_obfuscation: Any = None

    @field_validator("include_obfuscation")
    @classmethod
    def _refuse_not_built(cls, value: Any) -> Any:
        return refuse_not_built(value, (False,))


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


class CompletionRequest(Body):
    """Body of POST /v1/completions."""

    model: StrictStr
    prompt: Prompt = None
    max_tokens: StrictInt = Field(16, ge=0, le=MAX_INT)
    temperature: float = Field(1.0, ge=0, le=2, strict=True, allow_inf_nan=False)
    top_p: float = Field(1.0, ge=0, le=1, strict=True, allow_inf_nan=False)
    top_k: StrictInt = Field(0, ge=-1, le=MAX_INT, description="0 and -1 keep every token")
    n: StrictInt = Field(1, ge=1, le=128)
    stop: Stop = ()
    seed: StrictInt | None = Field(None, ge=-MAX_INT - 1, le=MAX_INT)
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

    @field_validator(*NEUTRAL)
    @classmethod
    def _refuse_not_built(cls, value: Any, info: ValidationInfo) -> Any:
        return refuse_not_built(value, NEUTRAL[str(info.field_name)])

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
