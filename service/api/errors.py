"""Every error in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route

from model.checkpoint.templates import TemplateProcessError
from service.api.encoding import LineResponse
from service.api.limits import LimitError
from service.api.schema.base import ErrorResponse
from service.engine.engine import DoesNotFitError, EngineError, QueueFullError, RetiredError, StepFailedError
from service.engine.request import RequestError, shown
from service.jobs.disk import DiskFullError
from service.jobs.store import StoreFullError

log = logging.getLogger("banded.api")

# For the OpenAPI document: the errors that every route may answer with.
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": description}
    for status, description in {
        400: "Something in the request is wrong; param names it",
        401: "No key, or a wrong one",
        403: "Without keys: the page of another site asks, by its Host or Origin header",
        404: "No such route or model",
        405: "A method that the route does not take",
        413: "The body is too large",
        415: "The body is compressed",
        429: "A key's limit or the queue's is reached; retry-after says for how many seconds",
        500: "The server failed",
        503: "Draining, or no slot was free in time",
        507: "The disk is full",
    }.items()
}

# Why a body can't be parsed, if the parser raised this instead of a JSONDecodeError.
UNREADABLE: dict[type, str] = {
    UnicodeDecodeError: "is not UTF-8",
    RecursionError: "is nested too deeply",
    ValueError: "holds a number of too many digits",
}


class ClientGoneError(Exception):
    """The client closed the connection, so nobody would read an answer."""


class APIError(Exception):
    """An error as the client will see it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        error_type = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": error_type, "param": param, "code": code}}
        self.response = LineResponse(self.body, status, headers)


def invalid(message: str, param: str | None = None, code: str | None = None) -> APIError:
    return APIError(400, message, param=param, code=code)


def api_error(error: Exception) -> APIError:
    """The client's view of any exception. Internals go to the log, never to the client."""
    text = str(error)
    match error:
        case APIError():
            return error
        case DoesNotFitError() | LimitError(retry_after=None):
            return invalid(text, code="request_too_large")
        case LimitError():
            return APIError(429, text, code="rate_limit_exceeded", headers={"retry-after": str(error.retry_after)})
        case ClientGoneError() | ClientDisconnect():  # nginx's status: nobody receives it, but the response counter shows it
            return APIError(499, "the client has left", code="client_gone")
        case QueueFullError():
            return APIError(429, text, code="server_busy", headers={"retry-after": str(error.retry_after)})
        case RetiredError():
            return APIError(404, text, param="model", code="model_not_found")
        case StepFailedError():
            return APIError(500, text, code="internal_error")
        case EngineError() | TemplateProcessError():
            return APIError(503, text, code="unavailable", headers={"retry-after": "1"})
        case RequestError():
            return invalid(text, error.param, error.code)
        case StoreFullError():
            return APIError(413, text, param=error.param, code="storage_full")
        case DiskFullError():
            return APIError(507, text, code="disk_full")
        case RequestValidationError():
            return validation_error(error.errors()[0])
        case HTTPException(status_code=413):
            return APIError(413, error.detail, code="body_too_large")
        case HTTPException() if type(error.__cause__) in UNREADABLE:
            return invalid(f"the body {UNREADABLE[type(error.__cause__)]}")
        case HTTPException():
            return APIError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    log.error("unexpected error", exc_info=error)
    return APIError(500, "internal error", code="internal_error")


def install(app: FastAPI, routes: Sequence[Route]) -> None:
    """Answer what FastAPI itself raises, in the one shape. AnswerFaults answers everything else. `routes` are the app's."""

    async def answer(request: Request, error: Exception) -> LineResponse:
        if not isinstance(error, HTTPException) or error.status_code not in (404, 405):
            return api_error(error).response
        path = shown(request.url.path)
        if error.status_code == 404:
            return APIError(404, f"no route {request.method} {path}", code="not_found").response
        methods = {*dict(error.headers or {})["Allow"].split(", ")}
        for route in routes:  # the header names the methods of only the first route with this path
            if route.matches(request.scope)[0] != Match.NONE:
                methods |= route.methods or set()
        allowed = methods | {"HEAD"} if "GET" in methods else methods  # see AnswerHead
        allow = {"allow": ", ".join(sorted(allowed))}
        return APIError(405, f"{path} does not take {request.method}", code="method_not_allowed", headers=allow).response

    for kind in (HTTPException, RequestValidationError):
        app.add_exception_handler(kind, answer)


def validation_error(error: ErrorDetails | dict[str, Any]) -> APIError:
    """The error for the first fault of a body: it names the field and repeats little of what was sent."""
    context = error.get("ctx", {})
    if error["type"] == "json_invalid":
        return invalid(f"the body is not valid JSON: {context['error']}, at character {error['loc'][-1]}")
    path = list(error["loc"][1:])
    if "param" in context:  # a validator of ours that checks several fields together blames this one
        path.append(context["param"])
    param = shown(".".join(map(str, path)))
    if not path:
        return invalid("the body must be a JSON object, sent with content-type application/json")
    if error["type"] == "extra_forbidden":
        return invalid(f"unknown field '{param}'", param, "unknown_parameter")
    if error["type"] == "missing":
        return invalid(f"'{param}' is required", param, "missing_required_parameter")
    message = error["msg"].removeprefix("Value error, ")
    return invalid(f"'{param}': {message[:1].lower()}{message[1:]}", param)
