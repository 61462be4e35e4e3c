"""/v1/fine_tuning/jobs: jobs that train adapters of the served model while it serves."""

import secrets
from typing import Annotated

from fastapi import APIRouter, Query, Request

from service.api.bodies import BodyRoute
from service.api.errors import APIError, invalid
from service.api.routes.files import find_content, jobs_of, page, store_of, unknown_id
from service.api.schema.fine_tuning import (
    CheckpointList,
    CheckpointObject,
    EventList,
    EventObject,
    JobError,
    JobHyperparameters,
    JobList,
    JobObject,
    JobRequest,
)
from service.api.state import state_of
from service.api.validation import find_model, owner_of, warnings_for
from service.engine.models import ModelEntry, Models
from service.engine.pages import sequence_bytes
from service.engine.request import shown
from service.engine.workers import off_the_loop
from service.jobs.store import UNFINISHED, Hyperparameters, Job, Store

router = APIRouter(route_class=BodyRoute)

# What "auto" means. The rate is multiplied by learning_rate_multiplier.
EPOCHS, BATCH, RATE = 4, 8, 1e-3

Limit = Annotated[int, Query(ge=1, le=100)]


def find_job(request: Request, job_id: str) -> Job:
    """A job of the request's owner. Raises APIError 404."""
    job = store_of(request).job(owner_of(request), job_id)
    if job is None:
        raise APIError(404, f"there is no job '{shown(job_id)}'", code="job_not_found")
    return job


@router.post("/v1/fine_tuning/jobs")
async def create_job(body: JobRequest, request: Request) -> JobObject:
    """Queue a job. It trains a low-rank adapter, which the server then serves under a name of its own."""
    jobs, state, owner = jobs_of(request), state_of(request), owner_of(request)
    store = jobs.store
    warnings = await off_the_loop(len(await request.body()), lambda: warnings_for(body, request))
    entry = find_model(request, body.model)
    if entry.parent is not None:
        raise invalid(f"'model': '{entry.name}' is an adapter; fine-tune '{entry.parent}'", "model")
    find_content(request, body.training_file, "training_file")
    if body.validation_file is not None:
        find_content(request, body.validation_file, "validation_file")
    check_room(owner, store, state.models, state.settings.max_adapters)
    given = body.hyperparameters or JobHyperparameters.model_validate({})
    if given.rank == 0:
        raise invalid(all_weights(entry), "hyperparameters.rank", "second_engine")
    parameters = Hyperparameters(
        n_epochs=given.n_epochs or EPOCHS,
        batch_size=given.batch_size or BATCH,
        learning_rate=RATE * (given.learning_rate_multiplier or 1.0),
        rank=given.rank,
    )
    seed = secrets.randbits(31) if body.seed is None else body.seed
    job = store.add_job(owner, entry.root, body.suffix or "", seed, parameters, body.training_file, body.validation_file)
    jobs.notice()
    return job_object(job, warnings)


def all_weights(entry: ModelEntry) -> str:
    """Why a job can't change all weights, with the numbers."""
    weights = entry.num_parameters * entry.item_bytes
    keys = sequence_bytes(entry.config, entry.config.n_positions, entry.item_bytes)
    return (
        f"rank 0, all weights: the result would need a second engine, {weights:,} bytes of weights and at least {keys:,} of "
        "keys and values, and this server has one; `banded finetune --full` makes a model to serve by itself"
    )


def check_room(owner: str, store: Store, models: Models, max_adapters: int) -> None:
    """Raises APIError if the result could not be served. What others have counts for nothing: it must not be told."""
    waiting = sum(job.model == models.base.name and job.owner == owner for job in store.unfinished_jobs())
    count = sum(entry.parent is not None for entry in models.seen_by(owner))
    if count + waiting >= max_adapters:
        raise invalid(
            f"this server serves {max_adapters} adapters at most (max_adapters): {count} are there and {waiting} in work; "
            "delete one with DELETE /v1/models/{name}",
            code="too_many_adapters",
        )


@router.get("/v1/fine_tuning/jobs")
async def list_jobs(request: Request, limit: Limit = 20, after: str | None = None) -> JobList:
    """The jobs, the newest first."""
    jobs, has_more = page(store_of(request).jobs(owner_of(request)), limit, after)
    return JobList(data=[job_object(job) for job in jobs], has_more=has_more)


@router.get("/v1/fine_tuning/jobs/{job_id}")
async def get_job(job_id: str, request: Request) -> JobObject:
    return job_object(find_job(request, job_id))


@router.post("/v1/fine_tuning/jobs/{job_id}/cancel")
async def cancel_job(job_id: str, request: Request) -> JobObject:
    jobs = jobs_of(request)
    job = find_job(request, job_id)
    if job.status not in UNFINISHED or jobs.has_learnt(job):
        status = job.status if job.status not in UNFINISHED else "about to be succeeded"
        raise invalid(f"job {job.id} is not running: its status is {status}", code="job_ended")
    await jobs.cancel(job)
    return job_object(find_job(request, job_id))


@router.get("/v1/fine_tuning/jobs/{job_id}/events")
async def list_events(job_id: str, request: Request, limit: Limit = 20, after: str | None = None) -> EventList:
    """The events of a job, the newest first."""
    store, job = store_of(request), find_job(request, job_id)
    before, prefix = None, f"ftevent-{job.id.removeprefix('ftjob-')}-"
    if after is not None:
        number = after.removeprefix(prefix) if after.startswith(prefix) else ""
        before = int(number) if number.isdecimal() and len(number) < 19 else 0
        if not store.has_event(job.id, before):
            raise unknown_id(after)
    events = [
        EventObject(id=f"{prefix}{event.number}", created_at=event.created, **event._asdict())
        for event in store.events(job.id, limit + 1, before)
    ]
    return EventList(data=events[:limit], has_more=len(events) > limit)


@router.get("/v1/fine_tuning/jobs/{job_id}/checkpoints")
async def list_checkpoints(job_id: str, request: Request, limit: Limit = 10, after: str | None = None) -> CheckpointList:
    """The result, once there is one: a run keeps only its last state."""
    store, job = store_of(request), find_job(request, job_id)
    if job.fine_tuned_model is None:
        return CheckpointList(data=[], has_more=False)
    metrics = store.last_metrics(job.id)
    if "valid_loss" in metrics:  # the last update measures it on all examples
        metrics["full_valid_loss"] = metrics["valid_loss"]
    checkpoint = CheckpointObject(
        id=f"ftckpt-{job.id.removeprefix('ftjob-')}",
        created_at=job.finished or 0,
        fine_tuned_model_checkpoint=job.fine_tuned_model,
        fine_tuning_job_id=job.id,
        metrics=metrics,
        step_number=int(metrics.get("step", 0)),  # events may be lost with the database
    )
    some, has_more = page([checkpoint], limit, after)
    return CheckpointList(data=some, has_more=has_more)


def job_object(job: Job, warnings: list[str] | None = None) -> JobObject:
    parameters = job.hyperparameters
    changed = {
        "error": None if job.error is None else JobError(code="job_failed", message=job.error, param=None),
        "hyperparameters": JobHyperparameters.model_construct(  # without the checks and defaults of a request
            n_epochs=parameters.n_epochs,
            batch_size=parameters.batch_size,
            learning_rate_multiplier=parameters.learning_rate / RATE,
            rank=parameters.rank,
        ),
        "trained_tokens": job.trained_tokens if job.status == "succeeded" else None,
        "user_provided_suffix": job.suffix or None,
        "warnings": warnings,
    }
    return JobObject(created_at=job.created, finished_at=job.finished, **job._asdict() | changed)
