"""Bodies of /v1/files and /v1/fine_tuning/jobs."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, StrictInt, StrictStr
from pydantic.json_schema import WithJsonSchema

from service.api.schema.base import Body, Page, Warnings
from service.api.schema.fields import Text

# "auto" stands for null.
AUTO = BeforeValidator(lambda value: None if value == "auto" else value)


def or_auto(kind: str, **bounds: float) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"type": kind, **bounds}, {"type": "string", "enum": ["auto"]}, {"type": "null"}]})


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


class JobHyperparameters(Body):
    """ "auto" and null leave a choice to the server."""

    n_epochs: Annotated[StrictInt | None, Field(ge=1, le=100), AUTO, or_auto("integer", minimum=1, maximum=100)] = None
    batch_size: Annotated[StrictInt | None, Field(ge=1, le=256), AUTO, or_auto("integer", minimum=1, maximum=256)] = None
    learning_rate_multiplier: Annotated[
        float | None, Field(ge=1e-6, le=1000, strict=True), AUTO, or_auto("number", minimum=1e-6, maximum=1000)
    ] = None
    rank: StrictInt = Field(
        8, ge=0, le=64, description="of the adapter's matrices; 0 would be all weights, which is refused"
    )


class JobRequest(Body):
    """Body of POST /v1/fine_tuning/jobs."""

    model: StrictStr
    training_file: Text
    validation_file: Text | None = None
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


class JobList(Page):
    data: list[JobObject]


class EventObject(BaseModel):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: str
    message: str
    type: str
    data: dict[str, Any]


class EventList(Page):
    data: list[EventObject]


class CheckpointObject(BaseModel):
    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: dict[str, float]
    step_number: int


class CheckpointList(Page):
    data: list[CheckpointObject]
