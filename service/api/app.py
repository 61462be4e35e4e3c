"""The ASGI application: routes, middleware, errors and the engine's lifespan."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware import Middleware
from starlette.routing import Route

from service.api import errors, openapi
from service.api.bodies import Room, max_bytes_of
from service.api.encoding import LineResponse
from service.api.middleware import (
    HEALTH,
    AnswerFaults,
    AnswerHead,
    AnswerLiveness,
    CheckBody,
    CountResponses,
    FindPath,
    IdentifyRequests,
    LimitRates,
    RequireKey,
    allow_origins,
    refuse_sites,
)
from service.api.routes import chat, completions, files, fine_tuning, models, operations, score, tokenization
from service.api.state import AppState
from service.engine.metrics import Metrics
from service.engine.models import Models
from service.jobs.runner import Jobs
from service.settings import Settings

ROUTERS = tuple(module.router for module in (completions, chat, score, tokenization, models, files, fine_tuning, operations))


def create_app(models: Models, metrics: Metrics, settings: Settings, jobs: Jobs | None = None) -> FastAPI:
    """An application over loaded models. Its lifespan starts and stops the engine and `jobs`; draining is not its part."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:  # noqa: ARG001
        models.base.engine.start()
        if jobs:
            jobs.start()
        yield
        if jobs:
            await jobs.stop()
        await models.base.engine.stop()

    if jobs:
        metrics.data_free_bytes.set_function(lambda: jobs.store.free_bytes)
    open_paths = (*HEALTH, "/metrics") if settings.open_metrics else HEALTH
    app = FastAPIOffline(
        title="Banded",
        version=version("banded"),
        lifespan=lifespan,
        redirect_slashes=False,
        responses=errors.RESPONSES,
        default_response_class=LineResponse,
        middleware=[
            Middleware(IdentifyRequests),
            Middleware(AnswerHead),
            Middleware(FindPath, root_path=settings.root_path),
            Middleware(CountResponses, metrics=metrics),
            *refuse_sites(settings),
            *allow_origins(settings),
            *([Middleware(RequireKey, keys=settings.api_keys, open_paths=open_paths)] if settings.api_keys else []),
            Middleware(AnswerLiveness),
            Middleware(LimitRates, settings.api_keys, settings.limit_requests, settings.limit_tokens),
            Middleware(CheckBody, lambda path: max_bytes_of(path, settings), Room(settings.max_body_bytes)),
            Middleware(AnswerFaults),
        ],
    )
    app.state.shared = AppState(models, metrics, settings, jobs)
    for router in ROUTERS:
        app.include_router(router)
    errors.install(app, [route for router in ROUTERS for route in router.routes if isinstance(route, Route)])
    openapi.install(app, open_paths if settings.api_keys else None)
    return app
