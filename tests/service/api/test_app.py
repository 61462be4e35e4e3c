"""The application as a whole: its lifespan and its own description."""

from importlib.metadata import version

import pytest

from service.api.middleware import HEALTH
from service.api.schema.completions import CompletionRequest
from service.api.schema.peers import PEER_FIELDS
from tests.service.api.helpers import request, serving
from tests.service.helpers import run


def test_the_lifespan_starts_and_stops_the_engine() -> None:
    async def test() -> None:
        async with serving() as api:
            assert api.fake.engine._steps.is_alive
            assert (await api.choices(prompt="hi", max_tokens=2))[0]["text"] == " one two"
        assert not api.fake.engine._steps.is_alive

    run(test)


@pytest.mark.parametrize(("api_keys", "open_metrics"), [((), False), (("key",), False), (("key",), True)])
def test_the_openapi_document_tells_of_errors_and_keys(api_keys: tuple[str, ...], open_metrics: bool) -> None:
    async def test() -> None:
        async with serving(api_keys=api_keys, open_metrics=open_metrics) as api:
            headers = {"authorization": "Bearer key"}
            document = (await api.client.get("/openapi.json", headers=headers)).json()
            assert (await api.client.get("/openapi.json", headers=headers)).json() == document
            assert document["info"] == {"title": "Banded", "version": version("banded")}
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    errors = {status: answer for status, answer in operation["responses"].items() if status != "200"}
                    assert set(errors) - {"400", "409"} == {
                        "401",
                        "403",
                        "404",
                        "405",
                        "413",
                        "415",
                        "429",
                        "500",
                        "503",
                        "507",
                    }
                    for answer in errors.values():
                        [content] = answer["content"].values()
                        assert content["schema"] == {"$ref": "#/components/schemas/ErrorResponse"}
                    is_open = path in HEALTH or (open_metrics and path == "/metrics")
                    assert operation.get("security") == ([] if api_keys and is_open else None)
            assert "HTTPValidationError" not in document["components"]["schemas"]
            schemes = {"key": {"type": "http", "scheme": "bearer"}} if api_keys else None
            assert document["components"].get("securitySchemes") == schemes
            assert document.get("security") == ([{"key": []}] if api_keys else None)

    run(test)


def test_the_openapi_document_describes_every_field() -> None:
    schema = request("GET", "/openapi.json").json()["components"]["schemas"]["CompletionRequest"]
    accepted = {name for peer in PEER_FIELDS for name in peer.names.split()}
    assert {*CompletionRequest.model_fields} <= {*schema["properties"]} <= {*CompletionRequest.model_fields} | accepted
    assert len(schema["properties"]["prompt"]["anyOf"]) == 5
    assert "required" not in schema
    assert schema["additionalProperties"] is False
