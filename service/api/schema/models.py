"""Bodies of /v1/models."""

from typing import Literal

from pydantic import BaseModel


class ModelObject(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "banded"
    root: str
    parent: str | None  # the model that it is an adapter of


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelObject]
