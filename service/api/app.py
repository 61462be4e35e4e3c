"""The ASGI application: routes, middleware, errors and the engine's lifespan."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from service.api import errors, openapi
from service.api.middleware import (
    HEALTH,
    AnswerFaults,
    AnswerHead,
    CountResponses,
    IdentifyRequests,
    LimitBody,
    LimitRates,
    RequireKey,
)
from service.api.routes import chat, completions, files, fine_tuning, models, operations, score, tokenization
from service.api.state import AppState
from service.engine.metrics import Metrics
from service.engine.models import Models
from service.jobs.runner import Jobs
from service.settings import Settings

ROUTERS = tuple(module.router for module in (completions, chat, score, tokenization, models, files, fine_tuning, operations))
# Headers that a script of another origin may read.
EXPOSED_HEADERS = (
    "x-request-id",
    "openai-processing-ms",
    "openai-version",
    "retry-after",
    *(f"x-ratelimit-{what}-{unit}" for unit in ("requests", "tokens") for what in ("limit", "remaining", "reset")),
)


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

    app = FastAPI(
        title="Banded", version=version("banded"), lifespan=lifespan, redirect_slashes=False, responses=errors.RESPONSES
    )
    app.state.shared = AppState(models, metrics, settings, jobs)
    for router in ROUTERS:
        app.include_router(router)
    errors.install(app, [route for router in ROUTERS for route in router.routes if isinstance(route, Route)])
    open_paths = (*HEALTH, "/metrics") if settings.open_metrics else HEALTH
    openapi.install(app, open_paths if settings.api_keys else None)
    # The last one added is the outermost.
    app.add_middleware(AnswerFaults)
    app.add_middleware(LimitBody, max_bytes=settings.max_body_bytes)
    app.add_middleware(
        LimitRates, keys=settings.api_keys, limit_requests=settings.limit_requests, limit_tokens=settings.limit_tokens
    )
    if settings.api_keys:
        app.add_middleware(RequireKey, keys=settings.api_keys, open_paths=open_paths)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "HEAD", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=EXPOSED_HEADERS,
        )
    app.add_middleware(CountResponses, metrics=metrics)
    app.add_middleware(AnswerHead)
    app.add_middleware(IdentifyRequests)
    return app
