"""Corrects the OpenAPI document where this server differs from what FastAPI assumes."""

from typing import Any

from fastapi import FastAPI


def install(app: FastAPI, open_paths: tuple[str, ...] | None) -> None:
    """Correct the document of `app` when it is first requested.

    All paths but `open_paths` need a key; None means that no path does.
    """
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema:
            return app.openapi_schema
        document = generate()
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)  # an invalid field is a 400 here, in the shape of every error
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        if open_paths is not None:
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"key": []}]
            for path in open_paths:
                for operation in document["paths"][path].values():
                    operation["security"] = []
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way
