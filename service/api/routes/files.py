"""/v1/files: training data for fine-tuning jobs."""

import asyncio
import sys
from email.message import Message
from pathlib import Path
from typing import Annotated, Literal, TypeVar, cast

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartParser
from starlette.types import Receive, Scope, Send

from model.training.examples import encode, read_examples
from service.api.errors import APIError, invalid
from service.api.limits import KeyLimits
from service.api.schema.base import DeletedObject, ErrorResponse
from service.api.schema.fine_tuning import CheckpointObject, FileList, FileObject
from service.api.state import state_of
from service.api.validation import owner_of
from service.engine.models import ModelEntry
from service.engine.request import shown
from service.engine.workers import RestingFile, off_the_loop
from service.jobs.runner import Jobs
from service.jobs.store import Job, Store, StoredFile

router = APIRouter()

# An upload is read into memory anyway, and the disk for temporary files may be full.
MultiPartParser.spool_max_size = sys.maxsize

PURPOSE = "fine-tune"
MAX_FILENAME = 255
MAX_FIELD = 1024  # bytes of a form's field that is no file

UPLOAD_SCHEMA = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "JSONL of prompt and completion"},
        "purpose": {"type": "string", "enum": [PURPOSE]},
    },
}
UPLOAD = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": UPLOAD_SCHEMA}}}}


def jobs_of(request: Request) -> Jobs:
    """Raises APIError 404 if the server has no data directory."""
    jobs = state_of(request).jobs
    if jobs is None:
        raise APIError(404, "this server keeps no files: start it with --data-dir", code="not_found")
    return jobs


def store_of(request: Request) -> Store:
    """Raises APIError 404 like jobs_of."""
    return jobs_of(request).store


def find_file(request: Request, file_id: str, param: str | None = None) -> StoredFile:
    """A file of the request's owner. Raises APIError: 404, or 400 if a field, `param`, names it."""
    file = store_of(request).file(owner_of(request), file_id)
    if file is None:
        message = f"there is no file '{shown(file_id)}'"
        raise invalid(message, param, "file_not_found") if param else APIError(404, message, code="file_not_found")
    return file


def find_content(request: Request, file_id: str, param: str | None = None) -> Path:
    """The path of a file's content. Raises APIError like find_file, and if the content is not what was stored."""
    store, file = store_of(request), find_file(request, file_id, param)
    if fault := store.missing_content(file):
        message = f"the content of file '{file.id}' {fault}: delete the file and send it again"
        raise (
            invalid(message, param, "file_content_missing") if param else APIError(404, message, code="file_content_missing")
        )
    return store.path_of(file.id)


@router.post("/v1/files", openapi_extra=UPLOAD)
async def upload_file(request: Request) -> FileObject:
    """Store a file, unless a job would refuse it."""
    store = store_of(request)
    content_type = Message()
    content_type["content-type"] = request.headers.get("content-type", "")
    if content_type.get_content_type() != "multipart/form-data":
        raise invalid("a file is sent as multipart/form-data", "file")
    charset = str(content_type.get_param("charset", "utf-8"))
    # Others can be names of Python's codecs that are no encodings, or take a minute for a megabyte.
    if charset.lower() not in ("utf-8", "utf8"):
        raise invalid(f"the form's charset is '{shown(charset)}', but this server reads UTF-8 only")
    async with request.form(max_files=1, max_fields=8, max_part_size=MAX_FIELD) as form:
        unknown = [name for name in form if name not in ("file", "purpose")]
        if unknown:
            raise invalid(f"unknown field '{shown(unknown[0])}'", shown(unknown[0]), "unknown_parameter")
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile):
            raise invalid("'file': a file is needed", "file")
        if purpose != PURPOSE:
            raise invalid(f"'purpose': '{PURPOSE}' is the only one, got '{shown(str(purpose))}'", "purpose")
        content = await file.read()
        name = file.filename or "file.jsonl"
    if len(name) > MAX_FILENAME:
        raise invalid(f"'file': its name has {len(name)} characters, at most {MAX_FILENAME} are taken", "file")
    if not content:
        raise invalid("'file': it is empty", "file")
    base, limits = state_of(request).models.base, cast(KeyLimits, request.state.limits)
    with limits.charged_text(1) as used:  # a key that owes tokens must wait; how many these are is not known yet
        num_tokens, fault = await off_the_loop(len(content), lambda: check_examples(content, shown(name), base))
        used.append(num_tokens)  # of a file that is refused, what was tokenized ahead of the fault
    if fault:
        raise invalid(f"'file': {fault}", "file") from fault
    return file_object(await asyncio.to_thread(store.add_file, owner_of(request), name, PURPOSE, content))


def check_examples(content: bytes, name: str, base: ModelEntry) -> tuple[int, ValueError | None]:
    """How many tokens of a file were found, and why no job could learn from it, if so. They are never all in memory."""
    num_tokens = 0
    try:
        for example in encode(read_examples(RestingFile(content), name), base.tokenizer, base.config.n_positions):
            num_tokens += len(example.inputs) + 1
    except ValueError as error:
        return num_tokens, error
    return num_tokens, None


@router.get("/v1/files")
async def list_files(
    request: Request,
    purpose: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
) -> FileList:
    """The stored files, the newest first unless `order` is asc."""
    files = [file for file in store_of(request).files(owner_of(request)) if purpose in (None, file.purpose)]
    some, has_more = page(files if order == "desc" else files[::-1], limit, after)
    return FileList(data=[file_object(file) for file in some], has_more=has_more)


@router.get("/v1/files/{file_id}")
async def get_file(file_id: str, request: Request) -> FileObject:
    return file_object(find_file(request, file_id))


@router.get("/v1/files/{file_id}/content", response_class=FileResponse)
async def get_content(file_id: str, request: Request) -> FileResponse:
    return OpenFile(find_content(request, file_id))


class OpenFile(FileResponse):
    """The content of a file, which may be deleted from now on."""

    def __init__(self, path: Path):
        self._file = path.open("rb")
        super().__init__(f"/dev/fd/{self._file.fileno()}", media_type="application/jsonl")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._file:
            await super().__call__(scope, receive, send)


@router.delete("/v1/files/{file_id}", responses={409: {"model": ErrorResponse, "description": "A job needs the file"}})
async def delete_file(file_id: str, request: Request) -> DeletedObject:
    """Delete a file that no unfinished job needs."""
    store = store_of(request)
    file = find_file(request, file_id)
    using = [job.id for job in store.unfinished_jobs() if file.id in (job.training_file, job.validation_file)]
    if using:
        raise APIError(409, f"job {using[0]} needs the file: cancel it first", code="file_in_use")
    store.delete_file(file.id)
    return DeletedObject(id=file.id, object="file")


Listed = TypeVar("Listed", StoredFile, Job, CheckpointObject)


def page(items: list[Listed], limit: int, after: str | None) -> tuple[list[Listed], bool]:
    """The `limit` items after the one with id `after`, and whether more follow. Raises APIError if no item has that id."""
    ids = [item.id for item in items]
    if after is not None and after not in ids:
        raise unknown_id(after)
    start = 0 if after is None else ids.index(after) + 1
    return items[start : start + limit], len(items) > start + limit


def unknown_id(after: str) -> APIError:
    return invalid(f"after: there is no '{shown(after)}'", "after")


def file_object(file: StoredFile) -> FileObject:
    return FileObject(id=file.id, bytes=file.bytes, created_at=file.created, filename=file.filename, purpose=file.purpose)
