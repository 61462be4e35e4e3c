"""The models routes."""

from tests.conformance import contract
from tests.service.api.helpers import request

CARD = {"id": "fake", "object": "model", "created": 1700000000, "owned_by": "banded", "root": "fake", "parent": None}


@contract("models", "GET /v1/models, /v1/models/{id}", "list and card")
def test_the_served_model_is_listed_and_found() -> None:
    assert request("GET", "/v1/models").json() == {"object": "list", "data": [CARD]}
    assert request("GET", "/v1/models/fake").json() == CARD


@contract("models", "GET /v1/models, /v1/models/{id}", "404 model_not_found")
def test_other_names_are_not_found() -> None:
    for name, shown in (("gpt-3", "gpt-3"), ("a/b", "a/b"), ("", ""), ("%FF", "\ufffd"), ("x" * 200, "x" * 80 + "...")):
        answer = request("GET", f"/v1/models/{name}")
        assert answer.status_code == 404
        assert answer.json()["error"] == {
            "message": f"the model '{shown}' does not exist; this server has 'fake'",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
