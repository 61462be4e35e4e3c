"""The types of what the store keeps: files, fine-tuning jobs and their events."""

from typing import Any, Literal, NamedTuple

Status = Literal["validating_files", "running", "succeeded", "failed", "cancelled"]
# A job with one of these goes on, after a restart too.
UNFINISHED = ("validating_files", "running")


class StoredFile(NamedTuple):
    id: str
    filename: str
    purpose: str
    bytes: int
    created: int


class Hyperparameters(NamedTuple):
    n_epochs: int
    batch_size: int
    learning_rate: float
    rank: int


class Job(NamedTuple):
    id: str
    status: Status
    model: str
    suffix: str
    seed: int
    hyperparameters: Hyperparameters
    training_file: str
    validation_file: str | None
    created: int
    finished: int | None = None
    error: str | None = None
    fine_tuned_model: str | None = None
    trained_tokens: int | None = None


class Event(NamedTuple):
    number: int
    job: str
    created: int
    level: str  # info, warn or error
    type: str  # message, or metrics
    message: str
    data: dict[str, Any]
