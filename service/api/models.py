"""GET /v1/models: what this server serves."""

from fastapi import APIRouter, Request

from service.api.generation import served_model
from service.schema import ModelCard, ModelList
from service.served import Models, ServedModel

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> ModelList:
    models: Models = request.app.state.models
    return ModelList(data=[card(served) for served in models])


@router.get("/v1/models/{name:path}")
async def get_model(name: str, request: Request) -> ModelCard:
    return card(served_model(request, name))


def card(served: ServedModel) -> ModelCard:
    return ModelCard(id=served.name, created=served.created, root=served.name, parent=served.parent)
