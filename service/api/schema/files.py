"""Bodies of /v1/files."""

from typing import Literal

from pydantic import BaseModel

from service.api.schema.base import Page


class FileObject(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class FileList(Page):
    data: list[FileObject]
