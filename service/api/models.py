"""GET /v1/models: what this server serves."""

from fastapi import APIRouter, Request

from service.api.errors import APIError
from service.schema import ModelCard, ModelList, shown
from service.served import ServedModel

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> ModelList:
    return ModelList(data=[card(request.app.state.served)])


@router.get("/v1/models/{name:path}")
async def get_model(name: str, request: Request) -> ModelCard:
    served: ServedModel = request.app.state.served
    if name != served.name:
        raise APIError(
            404,
            f"the model '{shown(name)}' does not exist; this server has '{served.name}'",
            param="model",
            code="model_not_found",
        )
    return card(served)


def card(served: ServedModel) -> ModelCard:
    return ModelCard(id=served.name, created=served.created)
