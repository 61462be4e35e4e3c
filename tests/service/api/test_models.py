"""The models routes."""

from tests.conformance import contract
from tests.service.api.helpers import request, serving
from tests.service.helpers import run

CARD = {
    "id": "fake",
    "object": "model",
    "created": 1700000000,
    "owned_by": "banded",
    "root": "fake",
    "parent": None,
    "max_model_len": 256,
}


@contract("models", "GET /v1/models, /v1/models/{id}", "list and card")
def test_the_served_model_is_listed_and_found() -> None:
    assert request("GET", "/v1/models").json() == {"object": "list", "data": [CARD]}
    assert request("GET", "/v1/models/fake").json() == CARD


@contract("models", "GET /v1/models, /v1/models/{id}", "404 model_not_found")
def test_other_names_are_not_found() -> None:
    for name, shown in (("gpt-3", "gpt-3"), ("a/b", "a/b"), ("%FF", "\ufffd"), ("x" * 200, "x" * 80 + "...")):
        answer = request("GET", f"/v1/models/{name}")
        assert answer.status_code == 404
        assert answer.json()["error"] == {
            "message": f"the model '{shown}' does not exist; this server has 'fake'",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }


@contract("models", "GET /v1/engines", "the models, as clients of 2020 list them")
def test_engines_are_the_models() -> None:
    engine = {"id": "fake", "object": "engine", "owner": "banded", "ready": True}
    assert request("GET", "/v1/engines").json() == {"object": "list", "data": [engine]}


@contract("models", "aliases", "answer like the model, under the name that was asked for")
def test_an_alias_answers_under_its_own_name() -> None:
    async def test() -> None:
        async with serving(names=("org/alias",)) as api:
            listed = (await api.client.get("/v1/models")).json()["data"]
            assert listed == [CARD, CARD | {"id": "org/alias"}]
            assert (await api.client.get("/v1/models/org/alias")).json() == listed[1]
            unnamed = (await api.client.post("/v1/completions", json={"max_tokens": 1})).json()
            assert unnamed["model"] == "fake", "one model is served"
            answer = (await api.complete(model="org/alias", max_tokens=1)).json()
            assert answer["model"] == "org/alias"
            error = (await api.complete(model="x")).json()["error"]
            assert error["message"] == "the model 'x' does not exist; this server has 'fake', 'org/alias'"

    run(test)
