"""What the bodies of all routes have in common."""

from typing import Annotated, Any, Literal, Self

from annotated_types import Interval
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    PrivateAttr,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from service.engine.request import BOUNDS


def bounds(name: str) -> Interval:
    """The engine's bounds of a number, for an annotation."""
    least, most = BOUNDS[name]
    return Interval(ge=least, le=most)


def is_absent(value: object) -> bool:
    return value is None


Warnings = Annotated[list[str] | None, Field(exclude_if=is_absent, description="with --lenient: what was ignored")]


def nullable(schema: JsonSchemaValue) -> JsonSchemaValue:
    """`schema` or null. Title, description and default stay outside the alternatives."""
    about = {name: schema.pop(name) for name in ("title", "description", "default") if name in schema}
    return about | {"anyOf": [schema, {"type": "null"}]}


class Body(BaseModel):
    """A JSON object of a request. null means the default everywhere; `unknown_fields` names the fields without a meaning."""

    model_config = ConfigDict(frozen=True, json_schema_extra={"additionalProperties": False})

    _unknown: list[str] = PrivateAttr(default_factory=list)

    @model_validator(mode="wrap")
    @classmethod
    def _set_unknown_aside(cls, body: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(body, dict):
            return validate(body)
        # Pydantic would make an error of every unknown field, and a hostile body can hold very many.
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
        """Fields that the contract does not know; in an object inside the body they are named "stream_options.x"."""
        found = list(self._unknown)
        for name in type(self).model_fields:
            value = getattr(self, name)
            for place, part in enumerate(value) if isinstance(value, list | tuple) else [(None, value)]:
                if isinstance(part, Body):
                    path = name if place is None else f"{name}.{place}"
                    found += [f"{path}.{inner}" for inner in part.unknown_fields]
        return found


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
