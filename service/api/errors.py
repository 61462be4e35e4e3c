"""Every error in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from service.api.limits import LimitError
from service.api.schema.base import shown
from service.api.schema.errors import ErrorResponse
from service.engine.engine import DoesNotFitError, EngineError, QueueFullError, RetiredError, StepFailedError

log = logging.getLogger("banded.api")

# For the OpenAPI document: what every route may answer beside its own.
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": description}
    for status, description in {
        400: "Something in the request is wrong; param names it",
        401: "No key, or a wrong one",
        404: "No such route or model",
        405: "A method that the route does not take",
        413: "The body is too large",
        429: "A key's limit or the queue's is reached; retry-after says for how many seconds",
        500: "The server failed",
        503: "Draining, or no slot was free in time",
    }.items()
}

# Why a body can't be parsed, where the parser's exception is not a JSONDecodeError.
UNREADABLE: dict[type, str] = {
    UnicodeDecodeError: "is not UTF-8",
    RecursionError: "is nested too deeply",
    ValueError: "holds a number of too many digits",
}


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
        self.headers = headers
        error_type = "invalid_request_error" if status < 500 and status != 429 else "server_error"
        if status == 429:
            error_type = "rate_limit_error"
        self.body = {"error": {"message": message, "type": error_type, "param": param, "code": code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> APIError:
    return APIError(400, message, param=param, code=code)


def api_error(error: Exception) -> APIError:
    """The client's view of any exception. Internals go to the log, never to the client."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, DoesNotFitError):
        return invalid(str(error), code="request_too_large")
    if isinstance(error, LimitError):
        if error.retry_after is None:
            return invalid(str(error), code="request_too_large")
        return APIError(429, str(error), code="rate_limit_exceeded", headers={"retry-after": str(error.retry_after)})
    if isinstance(error, QueueFullError):
        return APIError(429, str(error), code="server_busy", headers={"retry-after": str(error.retry_after)})
    if isinstance(error, RetiredError):
        return APIError(404, str(error), param="model", code="model_not_found")
    if isinstance(error, StepFailedError):
        return APIError(500, str(error), code="internal_error")
    if isinstance(error, EngineError):
        return APIError(503, str(error), code="unavailable", headers={"retry-after": "1"})
    log.error("unexpected error", exc_info=error)
    return APIError(500, "internal error", code="internal_error")


def install(app: FastAPI, routes: Sequence[Route]) -> None:
    """Make every failure of `app`, which has these routes, answer in the one shape; AnswerFaults does the rest."""

    async def answer(request: Request, error: Exception) -> JSONResponse:  # noqa: ARG001
        known = api_error(error)
        return JSONResponse(known.body, known.status, known.headers)

    async def answer_http(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 404:
            known = APIError(404, f"no route {request.method} {shown(request.url.path)}", code="not_found")
        elif error.status_code == 405:
            message = f"{shown(request.url.path)} does not take {request.method}"
            methods = {*dict(error.headers or {})["Allow"].split(", ")}
            for route in routes:  # the header names the methods of the first one of the path only
                if route.matches(request.scope)[0] != Match.NONE:
                    methods |= route.methods or set()
            allowed = methods | {"HEAD"} if "GET" in methods else methods  # see AnswerHead
            known = APIError(405, message, code="method_not_allowed", headers={"allow": ", ".join(sorted(allowed))})
        elif error.status_code == 413:
            known = APIError(413, error.detail, code="body_too_large")
        elif type(error.__cause__) in UNREADABLE:
            known = invalid(f"the body {UNREADABLE[type(error.__cause__)]}")
        else:
            known = APIError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
        return JSONResponse(known.body, known.status, known.headers)

    async def answer_validation(request: Request, error: RequestValidationError) -> JSONResponse:  # noqa: ARG001
        known = validation_error(error.errors()[0])
        return JSONResponse(known.body, known.status)

    app.add_exception_handler(APIError, answer)
    app.add_exception_handler(EngineError, answer)
    app.add_exception_handler(LimitError, answer)
    app.add_exception_handler(HTTPException, answer_http)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, answer_validation)  # type: ignore[arg-type]


def validation_error(error: ErrorDetails | dict[str, Any]) -> APIError:
    """The first fault of a body: names the field, repeats little of what was sent."""
    context = error.get("ctx", {})
    if error["type"] == "json_invalid":
        return invalid(f"the body is not valid JSON: {context['error']}, at character {error['loc'][-1]}")
    path = list(error["loc"][1:])
    if "param" in context:  # our own validators name the part of the object that they mean
        path.append(context["param"])
    param = shown(".".join(map(str, path)))
    if not path:
        return invalid("the body must be a JSON object, sent with content-type application/json")
    if error["type"] == "extra_forbidden":
        return invalid(f"unknown field '{param}'", param, "unknown_parameter")
    if error["type"] == "missing":
        return invalid(f"'{param}' is required", param, "missing_required_parameter")
    message = error["msg"].removeprefix("Value error, ")
    code = error["type"] if error["type"] == "unsupported_parameter" else None
    return invalid(f"'{param}': {message[:1].lower()}{message[1:]}", param, code)
