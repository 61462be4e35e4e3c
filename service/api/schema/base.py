"""What the bodies of all routes have in common, and the fields that completions and chat share."""

from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Interval
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    PrivateAttr,
    StrictBool,
    StrictInt,
    StrictStr,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError
from starlette.exceptions import HTTPException

from service.api.schema.fields import MAX_STOP_LENGTH, LogitBiasField, Number, StopField, whole
from service.api.schema.peers import PEER_FIELDS, Ineffective, PeerField, by_name, ineffective
from service.engine.request import BOUNDS

MAX_FIELDS = 1024  # of one object. All that are known, here and elsewhere, are a quarter of them.
MAX_STOP_TOKENS = 1024
MAX_BAD_WORDS = 256
BadWord = Annotated[StrictStr, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


def bounds(name: str) -> Interval:
    """The engine's bounds of a number, for an annotation."""
    least, most = BOUNDS[name]
    return Interval(ge=least, le=most)


def is_absent(value: object) -> bool:
    return value is None


Warnings = Annotated[list[str] | None, Field(exclude_if=is_absent, description="what was ignored")]


def nullable(schema: JsonSchemaValue) -> JsonSchemaValue:
    """`schema` or null. Title, description and default stay outside the alternatives."""
    about = {name: schema.pop(name) for name in ("title", "description", "default") if name in schema}
    return about | {"anyOf": [schema, {"type": "null"}]}


class Body(BaseModel):
    """A JSON object of a request. null means the default everywhere; `ineffective` names the fields without a meaning."""

    model_config = ConfigDict(frozen=True, json_schema_extra={"additionalProperties": False})

    # Only the first fault is reported, so that lists, of which a hostile one has very many, `fail_fast`.
    peers: ClassVar[dict[str, PeerField]] = {}  # fields that it does not declare, but may have

    _ineffective: list[Ineffective] = PrivateAttr(default_factory=list)

    @model_validator(mode="wrap")
    @classmethod
    def _set_unknown_aside(cls, body: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(body, dict):
            return validate(body)
        if len(body) > MAX_FIELDS:
            raise HTTPException(413, f"the body holds an object of {len(body)} fields, at most {MAX_FIELDS} are read")
        # Pydantic would make an error of every unknown field, and a hostile body can hold very many.
        known = {name: whole(value) for name, value in body.items() if name in cls.model_fields and value is not None}
        read = validate(known)
        read._ineffective += ineffective(body, {name: f.default for name, f in cls.model_fields.items()}, cls.peers)
        return read

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core_schema)
        found = handler.resolve_ref_schema(schema)
        for name, field in found["properties"].items():
            if name not in found.get("required", []) and {"type": "null"} not in field.get("anyOf", []):
                found["properties"][name] = nullable(field)
        found["properties"] |= {name: field.schema for name, field in cls.peers.items() if name not in found["properties"]}
        return schema

    @property
    def ineffective(self) -> list[Ineffective]:
        """Fields that ask for what is not done, those of objects inside the body too."""
        found = list(self._ineffective)
        for name in type(self).model_fields:
            value = getattr(self, name)
            for place, part in enumerate(value) if isinstance(value, list | tuple) else [(None, value)]:
                if isinstance(part, Body):
                    path = name if place is None else f"{name}.{place}"
                    found += [inner._replace(name=f"{path}.{inner.name}") for inner in part.ineffective]
        return found


class StreamOptions(Body):
    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False
    continuous_usage_stats: Annotated[StrictBool, Field(description="every chunk has the usage so far")] = False

    @property
    def is_plain(self) -> bool:
        """Whether chunks differ in their text only."""
        return not (self.include_obfuscation or self.continuous_usage_stats)


class SamplingFields(Body):
    """Which model answers, how tokens are sampled and where the text ends."""

    peers = by_name(*PEER_FIELDS)

    model: StrictStr | None = Field(None, description="may be left out where one model is served")
    temperature: Annotated[Number, bounds("temperature")] = 1.0
    top_p: Annotated[Number, bounds("top_p")] = 1.0
    top_k: Annotated[StrictInt, bounds("top_k")] = Field(0, description="0 and -1 keep every token")
    min_p: Annotated[Number, bounds("min_p")] = 0.0
    presence_penalty: Annotated[Number, bounds("presence_penalty")] = 0.0
    frequency_penalty: Annotated[Number, bounds("frequency_penalty")] = 0.0
    repetition_penalty: Number = Field(
        1.0, gt=0, le=BOUNDS["repetition_penalty"][1], description="over prompt and completion"
    )
    logit_bias: LogitBiasField = ()
    n: Annotated[StrictInt, bounds("n")] = 1
    seed: Annotated[StrictInt, bounds("seed")] | None = None
    stop: StopField = ()
    stop_token_ids: list[StrictInt] = Field(default_factory=list, fail_fast=True, max_length=MAX_STOP_TOKENS)
    min_tokens: Annotated[StrictInt, bounds("min_tokens")] = Field(
        0, description="no end of text and no stop before so many tokens"
    )
    ignore_eos: StrictBool = False
    allowed_token_ids: list[StrictInt] | None = Field(
        None, fail_fast=True, min_length=1, description="no other token is generated"
    )
    bad_words: list[BadWord] = Field(
        default_factory=list,
        fail_fast=True,
        max_length=MAX_BAD_WORDS,
        description="texts that are not generated, nor after a space",
    )
    include_stop_str_in_output: StrictBool = False
    add_special_tokens: StrictBool = Field(True, description="begin with bos where the checkpoint asks for it")
    truncate_prompt_tokens: Annotated[StrictInt, Interval(ge=-1)] | None = Field(
        None, description="keep so many of the prompt's last tokens; -1: as many as the context has room for"
    )
    skip_special_tokens: StrictBool = Field(True, description="false: special tokens are spelled out in the text")
    prompt_logprobs: Annotated[StrictInt, bounds("prompt_logprobs")] | None = None
    return_token_ids: StrictBool = False
    cache_prompt: StrictBool = Field(True, description="false: the prefix cache neither gives the prompt nor keeps it")
    stream: StrictBool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    # Notes about a request that have no effect on its answer.
    user: StrictStr | None = None
    metadata: dict[str, Any] | None = None
    prompt_cache_key: StrictStr | None = None
    safety_identifier: StrictStr | None = None
    allow_special: StrictBool = Field(False, description="special-token text in a string becomes the token")

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if "stream_options" in self.model_fields_set and not self.stream:
            raise PydanticCustomError("value_error", "allowed only with stream true", {"param": "stream_options"})
        if self.truncate_prompt_tokens == 0:
            raise PydanticCustomError("value_error", "must be -1 or at least 1, got 0", {"param": "truncate_prompt_tokens"})
        if self.prompt_logprobs is not None and self.stream:
            raise PydanticCustomError("value_error", "can't be streamed", {"param": "prompt_logprobs"})
        return self


class PromptLogprob(BaseModel):
    logprob: float
    rank: int | None = Field(description="1 is the likeliest; null outside the likeliest ones that were asked for")
    decoded_token: str


# vLLM's: for each token of the prompt, by token id. The first has none.
PromptLogprobs = Annotated[list[dict[int, PromptLogprob] | None] | None, Field(exclude_if=is_absent)]
TokenIds = Annotated[list[int] | None, Field(exclude_if=is_absent, description="with return_token_ids")]


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class FewShotUsage(BaseModel):
    examples_used: int
    examples_dropped: int


class TokenUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    few_shot: Annotated[FewShotUsage | None, Field(exclude_if=is_absent)] = None


Obfuscation = Annotated[str | None, Field(exclude_if=is_absent, description="padding, with include_obfuscation")]


class Generated(BaseModel):
    """What the answers of completions and chat begin with, and each chunk of a stream."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str


class Page(BaseModel):
    """Some of a list of objects; `data` is declared by each kind of list."""

    object: Literal["list"] = "list"
    data: list[Any]
    has_more: bool


class DeletedObject(BaseModel):
    id: str
    object: str
    deleted: bool = True


# The body of every error.
class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorDetail
