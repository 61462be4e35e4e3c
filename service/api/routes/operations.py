"""What operators and orchestrators ask: is the server alive, is it ready, how is it doing."""

from importlib.metadata import version as installed

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from service.api.errors import APIError
from service.api.metrics_alias import VllmNames
from service.api.middleware import LIVENESS
from service.api.state import state_of

router = APIRouter()

VERSIONS = {"version": installed("banded"), "torch": installed("torch")}  # read from files, which takes milliseconds


@router.get(LIVENESS)
async def live() -> dict[str, str]:  # for the OpenAPI document and other methods: AnswerLiveness answers GET
    """The process answers."""
    return {"status": "live"}


@router.get("/ping")
@router.get("/health")
@router.get("/health/ready")
async def ready(request: Request) -> dict[str, str]:
    """Requests may be sent: weights loaded, not draining, and idle or a step finished recently."""
    if reason := state_of(request).models.base.engine.unready_reason:
        raise APIError(503, f"not ready: {reason}", code="unavailable")
    return {"status": "ready"}


@router.get("/version")
async def version() -> dict[str, str]:
    return VERSIONS


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Prometheus text."""
    state = state_of(request)
    registry = state.metrics.registry
    exported = VllmNames(registry) if state.settings.metrics_alias == "vllm" else registry
    return Response(generate_latest(exported), media_type=CONTENT_TYPE_LATEST)
