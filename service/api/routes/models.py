"""GET /v1/models: what this server serves."""

from fastapi import APIRouter, Request

from service.api.errors import invalid
from service.api.schema.base import DeletedObject
from service.api.schema.models import EngineList, EngineObject, ModelList, ModelObject
from service.api.state import state_of
from service.api.validation import find_model, owner_of
from service.engine.models import ModelEntry

router = APIRouter()


def models_of(request: Request) -> list[ModelEntry]:
    """Those that the request may name."""
    return state_of(request).models.seen_by(owner_of(request))


@router.get("/v1/models")
async def list_models(request: Request) -> ModelList:
    return ModelList(data=[model_object(entry) for entry in models_of(request)])


@router.get("/v1/engines")
async def list_engines(request: Request) -> EngineList:
    """The models, for clients from when a model was called an engine."""
    return EngineList(data=[EngineObject(id=entry.name) for entry in models_of(request)])


@router.get("/v1/models/{name:path}")
async def get_model(name: str, request: Request) -> ModelObject:
    return model_object(find_model(request, name))


@router.delete("/v1/models/{name:path}")
async def delete_model(name: str, request: Request) -> DeletedObject:
    """Delete the result of a fine-tuning job. Requests that are using it finish first."""
    state, owner = state_of(request), owner_of(request)
    made = [job for job in state.jobs.store.jobs(owner) if job.fine_tuned_model == name] if state.jobs else []
    if not state.jobs or not made:
        name = find_model(request, name).name  # a 404 if there is no such model
        raise invalid(f"'{name}' is not the result of a job: it can't be deleted", "model")
    # It is not served if the weights it was made for have been replaced. `--adapter` may serve another one of that name.
    if entry := next((each for each in models_of(request) if (each.owner, each.name) == (owner, name)), None):
        await state.models.remove(entry)
    state.jobs.store.forget_result(made[0])
    return DeletedObject(id=name, object="model")


def model_object(entry: ModelEntry) -> ModelObject:
    return ModelObject(
        id=entry.name,
        created=entry.created,
        root=entry.root,
        parent=entry.parent,
        max_model_len=entry.config.n_positions,
    )
