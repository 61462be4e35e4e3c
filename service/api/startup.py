"""What answers from the moment the port is open: while the model loads, everything but liveness is a 503."""

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.errors import APIError
from service.api.middleware import IdentifyRequests


class Startup:
    """Hands requests to `app` once it is set."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None
        self._while_loading = IdentifyRequests(answer_while_loading)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self.app or self._while_loading)(scope, receive, send)


async def answer_while_loading(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["path"] == "/health/live":
        await JSONResponse({"status": "live"})(scope, receive, send)
        return
    error = APIError(503, "the model is still loading", code="unavailable", headers={"retry-after": "1"})
    await error.response(scope, receive, send)
