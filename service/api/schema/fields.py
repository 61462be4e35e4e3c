"""Types of fields: the JSON that each takes, and the error for any other."""

from typing import Annotated, Any

from pydantic import AfterValidator, Field, PlainValidator, StrictStr
from pydantic.json_schema import WithJsonSchema

from service.engine.request import MAX_BIAS, shown

MAX_PROMPTS = 1024
# Entries of logit_bias: more than any vocabulary here has tokens.
MAX_BIASES = 2**17
# A stop that names a special token is a stop token and does not count: see validation.sampling_params.
MAX_STOPS_SENT = 64
# Characters. A longer stop would only cost time, for every choice.
MAX_STOP_LENGTH = 1024
# JSON's names for the types that its parser makes.
JSON_TYPES = {
    str: "a string",
    int: "an integer",
    float: "a number with a fraction",
    bool: "a boolean",
    list: "an array",
    dict: "an object",
    type(None): "null",
}


def whole(value: Any) -> Any:
    """`value` with its whole floats as integers, also in lists: to JSON 16.0 is 16, and some clients write it so."""
    if isinstance(value, list):
        return [whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_types(items: list[Any], expected: type, place: str = "") -> None:
    for i, item in enumerate(items):
        if type(item) is not expected:
            wrong, right = JSON_TYPES[type(item)], JSON_TYPES[expected]
            raise ValueError(f"item {i}{place} is {wrong}, expected {right}")


TOKENS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}}
SOME_TOKENS_SCHEMA = {**TOKENS_SCHEMA, "minItems": 1}
PROMPT_SCHEMA = {
    "description": "Text, token ids, or a list of either.",
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
        SOME_TOKENS_SCHEMA,
        {"type": "array", "items": SOME_TOKENS_SCHEMA, "minItems": 1, "maxItems": MAX_PROMPTS},
        {"type": "null"},
    ],
}


def check_prompt(value: Any) -> Any:
    """A text, a list of texts, a list of token ids or a list of such lists.

    It is checked by hand: pydantic's errors for a union list every alternative for every element.
    """
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


PromptField = Annotated[
    str | list[str] | list[int] | list[list[int]] | None, PlainValidator(check_prompt), WithJsonSchema(PROMPT_SCHEMA)
]


def check_text(value: Any) -> Any:
    """A text or a list of token ids, checked by hand like a prompt."""
    if isinstance(value, list):
        check_types(value, int)
    elif not isinstance(value, str):
        raise ValueError("must be a string or an array of token ids")
    return value


TextOrTokens = Annotated[
    str | list[int], PlainValidator(check_text), WithJsonSchema({"anyOf": [{"type": "string"}, TOKENS_SCHEMA]})
]
STOP_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}


def too_many_stops(count: int, most: int) -> str:
    return f"holds {count} strings, at most {most} are allowed"


def check_stop(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or an array of strings")
    if len(stops) > MAX_STOPS_SENT:
        raise ValueError(too_many_stops(len(stops), MAX_STOPS_SENT))
    if "" in stops:
        raise ValueError("must not hold an empty string")
    longest = max(map(len, stops), default=0)
    if longest > MAX_STOP_LENGTH:
        raise ValueError(f"holds a string of {longest} characters, at most {MAX_STOP_LENGTH} are allowed")
    return tuple(stops)


StopField = Annotated[
    tuple[str, ...],
    PlainValidator(check_stop),
    WithJsonSchema(
        {"anyOf": [STOP_SCHEMA, {"type": "array", "items": STOP_SCHEMA, "maxItems": MAX_STOPS_SENT}, {"type": "null"}]}
    ),
]


def check_logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict):
        raise ValueError("must be an object that maps token ids to numbers")
    if len(value) > MAX_BIASES:
        raise ValueError(f"holds {len(value)} entries, at most {MAX_BIASES} are allowed")
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


LogitBiasField = Annotated[
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


def check_characters(value: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("holds a lone surrogate, which is no character")
    return value


# A text that is stored or looked up, in databases and file names that hold characters only.
Text = Annotated[StrictStr, AfterValidator(check_characters)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
