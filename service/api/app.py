"""The ASGI application: routes, middleware, errors and the engine's lifespan."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from service.api import chat, completions, errors, models, operations, score, tokenization
from service.api.middleware import HEALTH, AnswerFaults, CountResponses, RequireKey
from service.metrics import Metrics
from service.served import ServedModel


def create_app(
    served: ServedModel, metrics: Metrics, *, api_keys: tuple[str, ...] = (), open_metrics: bool = False
) -> FastAPI:
    """An application over a loaded model. Its lifespan starts and stops the engine; draining is the server's part."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:  # noqa: ARG001
        served.engine.start()
        yield
        await served.engine.stop()

    app = FastAPI(title="Banded", version=version("banded"), lifespan=lifespan, redirect_slashes=False)
    app.state.served = served
    app.state.metrics = metrics
    app.state.lenient = lenient
    for module in (completions, chat, score, tokenization, models, operations):
        app.include_router(module.router)
    errors.install(app)
    # The last one added is the outermost.
    app.add_middleware(AnswerFaults)
    if api_keys:
        app.add_middleware(RequireKey, keys=api_keys, open_paths=(*HEALTH, "/metrics") if open_metrics else HEALTH)
    app.add_middleware(CountResponses, metrics=metrics)
    return app
