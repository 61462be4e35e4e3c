"""Bodies of /v1/models."""

from typing import Literal

from pydantic import BaseModel, Field


class ModelObject(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "banded"
    root: str
    parent: str | None  # the model that it is an adapter of
    max_model_len: int = Field(description="tokens of a prompt and its completion together, at most")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelObject]


class EngineObject(BaseModel):
    id: str
    object: Literal["engine"] = "engine"
    owner: str = "banded"
    ready: bool = True


class EngineList(BaseModel):
    object: Literal["list"] = "list"
    data: list[EngineObject]
