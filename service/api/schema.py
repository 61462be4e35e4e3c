"""Request and response bodies: type, bounds and default of every field."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    PlainValidator,
    PrivateAttr,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue, WithJsonSchema
from pydantic_core import CoreSchema, PydanticCustomError

MAX_PROMPTS = 1024
MAX_STOPS = 4
# Names of special tokens end a completion as tokens do: they don't count among the four. See check_sampling.
MAX_STOPS_SENT = 64
# Characters. A longer one only costs time, for every choice.
MAX_STOP_LENGTH = 1024
# The largest number that a 64-bit integer holds.
MAX_INT = 2**63 - 1
MAX_BIAS = 100
MAX_REPETITION_PENALTY = 10
MAX_STOP_TOKENS = 1024
MAX_EXAMPLES = 2048  # as many as a context has tokens
MAX_MESSAGES = 2048
MAX_SHOWN = 80  # characters of a client's own value that an error message repeats


def shown(text: str) -> str:
    """`text`, cut so that an error stays small whatever was sent, and without lone surrogates, which no answer can hold."""
    cut = text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."
    return cut.encode(errors="backslashreplace").decode()


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


def too_many_stops(count: int) -> str:
    return f"holds {count} strings, at most {MAX_STOPS} are allowed"


def check_stop(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or an array of strings")
    if len(stops) > MAX_STOPS_SENT:
        raise ValueError(too_many_stops(len(stops)))
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


def check_logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict):
        raise ValueError("must be an object that maps token ids to numbers")
    pairs = []
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 20):
            raise ValueError(f"key {shown(key)!r} is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise ValueError(f"the bias of token {key} must be a number from -{MAX_BIAS} to {MAX_BIAS}")
        pairs.append((int(key), float(bias)))
    if len({token for token, _ in pairs}) < len(pairs):
        raise ValueError("names a token id twice")
    return tuple(pairs)


LogitBias = Annotated[
    tuple[tuple[int, float], ...],
    PlainValidator(check_logit_bias),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,19}$"},
            "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
        }
    ),
]


def nullable(schema: JsonSchemaValue) -> JsonSchemaValue:
    """`schema`, or null. What describes a field stays outside."""
    about = {name: schema.pop(name) for name in ("title", "description", "default") if name in schema}
    return about | {"anyOf": [schema, {"type": "null"}]}


class Body(BaseModel):
    """A JSON object of a request. null stands for the default everywhere; `unknown_fields` names what has no meaning."""

    model_config = ConfigDict(frozen=True, json_schema_extra={"additionalProperties": False})

    _unknown: list[str] = PrivateAttr(default_factory=list)

    @model_validator(mode="wrap")
    @classmethod
    def _set_unknown_aside(cls, body: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(body, dict):
            return validate(body)
        # Left to pydantic, every unknown field of a hostile body would become an error of its own.
        read = validate({name: value for name, value in body.items() if name in cls.model_fields and value is not None})
        read._unknown += [name for name in body if name not in cls.model_fields]
        return read

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core_schema)
        found = handler.resolve_ref_schema(schema)
        for name, field in found["properties"].items():
            if name not in found.get("required", []) and {"type": "null"} not in field.get("anyOf", []):
                found["properties"][name] = nullable(field)
        return schema

    @property
    def unknown_fields(self) -> list[str]:
        """Names of the fields that the contract doesn't know, those of objects inside as "stream_options.x"."""
        found = list(self._unknown)
        for name in type(self).model_fields:
            value = getattr(self, name)
            for place, part in enumerate(value) if isinstance(value, list | tuple) else [(None, value)]:
                if isinstance(part, Body):
                    path = name if place is None else f"{name}.{place}"
                    found += [f"{path}.{inner}" for inner in part.unknown_fields]
        return found


class StreamOptions(Body):
    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False


class ExampleFields(Body):
    input: StrictStr
    output: StrictStr


class FewShotFields(Body):
    """How to lay out worked examples before the prompt; what is not given comes from the model's card."""

    instruction: StrictStr | None = None
    examples: list[ExampleFields] = Field(default_factory=list, max_length=MAX_EXAMPLES)
    input_prefix: StrictStr | None = None
    output_prefix: StrictStr | None = None
    separator: StrictStr | None = Field(None, min_length=1)
    on_overflow: Literal["drop", "error"] = Field("drop", description="drop: leave out the oldest examples, and say so")


Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Penalty = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-2, le=2)]


class SamplingFields(Body):
    """How tokens are picked and where the text ends: the same in completions and chat."""

    temperature: Number = Field(1.0, ge=0, le=2)
    top_p: Number = Field(1.0, ge=0, le=1)
    top_k: StrictInt = Field(0, ge=-1, le=MAX_INT, description="0 and -1 keep every token")
    min_p: Number = Field(0.0, ge=0, le=1)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Number = Field(1.0, gt=0, le=MAX_REPETITION_PENALTY, description="over prompt and completion")
    logit_bias: LogitBias = ()
    n: StrictInt = Field(1, ge=1, le=128)
    seed: StrictInt | None = Field(None, ge=-MAX_INT - 1, le=MAX_INT)
    stop: Stop = ()
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


class EngineCompletionRequest(SamplingFields):
    """Body of POST /v1/engines/{name}/completions: the path names the model."""

    model: StrictStr | None = None
    prompt: Prompt = None
    max_tokens: StrictInt = Field(16, ge=0, le=MAX_INT)
    best_of: StrictInt | None = Field(None, ge=1, le=20)
    logprobs: StrictInt | None = Field(None, ge=0, le=5)
    echo: StrictBool = False
    suffix: StrictStr | None = None
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
        if self.few_shot is not None:
            if not isinstance(self.prompt, str):
                raise PydanticCustomError("value_error", "few_shot needs a single string", {"param": "prompt"})
            if self.suffix is not None:
                raise PydanticCustomError("value_error", "can't be used together with suffix", {"param": "few_shot"})
        return self

    @property
    def num_candidates(self) -> int:
        """Choices generated for each prompt."""
        return self.best_of or self.n


class CompletionRequest(EngineCompletionRequest):
    """Body of POST /v1/completions."""

    model: StrictStr


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class FewShotUsage(BaseModel):
    examples_used: int
    examples_dropped: int


def is_absent(value: object) -> bool:
    return value is None


Warnings = Annotated[list[str] | None, Field(exclude_if=is_absent, description="with --lenient: what was ignored")]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    few_shot: Annotated[FewShotUsage | None, Field(exclude_if=is_absent)] = None


class Logprobs(BaseModel):
    """One entry a token in each list; null for the first token of a prompt, before which there is nothing."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="characters from the start of the prompt")


class CompletionChoice(BaseModel):
    text: str
    index: int
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionResponse(BaseModel):
    """A completion, or with `stream` one chunk of it; in chunks `usage` is there only with include_usage."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    warnings: Warnings = None
    obfuscation: Annotated[str | None, Field(exclude_if=is_absent, description="padding, with include_obfuscation")] = None


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


class TextPart(Body):
    type: Literal["text"]
    text: StrictStr


class Message(Body):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | list[TextPart] = ""
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
    usage: Usage
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
    usage: Usage | None = None
    warnings: Warnings = None
    obfuscation: Annotated[str | None, Field(exclude_if=is_absent, description="padding, with include_obfuscation")] = None


def check_text(value: Any) -> Any:
    """A text or a list of token ids; by hand, for the error of a union names its members."""
    if isinstance(value, list):
        check_types(value, int)
    elif not isinstance(value, str):
        raise ValueError("must be a string or an array of token ids")
    return value


TextOrTokens = Annotated[
    str | list[int],
    PlainValidator(check_text),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer", "minimum": 0}}]}),
]


class ScoreRequest(Body):
    """Body of POST /v1/score."""

    model: StrictStr
    prompt: TextOrTokens = ""
    continuations: list[TextOrTokens] = Field(min_length=1, max_length=MAX_PROMPTS)
    allow_special: StrictBool = False
    user: StrictStr | None = None


class Score(BaseModel):
    logprob: float = Field(description="natural logarithm, of the whole continuation after the prompt")
    mean_logprob: float
    is_greedy: bool = Field(description="every token is the likeliest")
    bits_per_byte: float | None = Field(description="null where the tokens have no text")
    tokens: list[str]


class ScoreResponse(BaseModel):
    object: Literal["score"] = "score"
    model: str
    system_fingerprint: str
    results: list[Score]
    usage: Usage
    warnings: Warnings = None


class TokenizeRequest(Body):
    """Body of POST /tokenize: a text, or the messages of a chat."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
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
    tokens: list[StrictInt]


class DetokenizeResponse(BaseModel):
    prompt: str
    warnings: Warnings = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "banded"
    root: str
    parent: str | None  # the model that it is an adapter of


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class DeletedObject(BaseModel):
    id: str
    object: str
    deleted: bool = True


class FileObject(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class FileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FileObject]
    has_more: bool


def unless_auto(value: Any) -> Any:
    """The default for "auto"."""
    return None if value == "auto" else value


def or_auto(kind: str, **bounds: float) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"type": kind, **bounds}, {"type": "string", "enum": ["auto"]}, {"type": "null"}]})


class JobHyperparameters(Body):
    """ "auto" and null leave a choice to the server."""

    n_epochs: Annotated[
        Annotated[StrictInt, Field(ge=1, le=100)] | None,
        BeforeValidator(unless_auto),
        or_auto("integer", minimum=1, maximum=100),
    ] = None
    batch_size: Annotated[
        Annotated[StrictInt, Field(ge=1, le=256)] | None,
        BeforeValidator(unless_auto),
        or_auto("integer", minimum=1, maximum=256),
    ] = None
    learning_rate_multiplier: Annotated[
        Annotated[float, Field(ge=1e-6, le=1000, strict=True)] | None,
        BeforeValidator(unless_auto),
        or_auto("number", minimum=1e-6, maximum=1000),
    ] = None
    rank: StrictInt = Field(
        8, ge=0, le=64, description="of the adapter's matrices; 0 would be all weights, which is refused"
    )


class JobRequest(Body):
    """Body of POST /v1/fine_tuning/jobs."""

    model: StrictStr
    training_file: StrictStr
    validation_file: StrictStr | None = None
    suffix: StrictStr | None = Field(None, pattern=r"^[A-Za-z0-9_-]{1,64}$", description="in the result's name")
    hyperparameters: JobHyperparameters | None = None
    seed: StrictInt | None = Field(None, ge=0, le=2**31 - 1)


class JobError(BaseModel):
    code: str
    message: str
    param: str | None


class JobObject(BaseModel):
    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    error: JobError | None
    fine_tuned_model: str | None
    hyperparameters: JobHyperparameters
    model: str
    organization_id: str = "banded"
    result_files: list[str] = []
    status: str
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    seed: int
    user_provided_suffix: str | None
    warnings: Warnings = None


class JobList(BaseModel):
    object: Literal["list"] = "list"
    data: list[JobObject]
    has_more: bool


class EventObject(BaseModel):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: str
    message: str
    type: str
    data: dict[str, Any]


class EventList(BaseModel):
    object: Literal["list"] = "list"
    data: list[EventObject]
    has_more: bool


class CheckpointObject(BaseModel):
    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: dict[str, float]
    step_number: int


class CheckpointList(BaseModel):
    object: Literal["list"] = "list"
    data: list[CheckpointObject]
    has_more: bool


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorDetail
