"""Schemathesis sends an application over a fake engine what the OpenAPI document allows and what it forbids."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import uvicorn
from hypothesis import HealthCheck, settings
from schemathesis import Case, CheckContext, CheckFunction, Response
from schemathesis.config import SchemathesisConfig
from schemathesis.openapi import from_dict
from schemathesis.specs.openapi.checks import positive_data_acceptance

import service.jobs.store
from service.api.app import create_app
from service.jobs.runner import Jobs
from service.jobs.store import Hyperparameters, Store
from tests.conformance import contract
from tests.service.api.helpers import served
from tests.service.engine.fakes import FakeEngine
from tests.service.helpers import settings_of

pytest_plugins = ["schemathesis.pytest.plugin"]

SEED = 20200528
EXAMPLES = 40  # requests to each route, besides the boundary values of every field

# One built-in check is left out: the server refuses much that the document allows, since JSON Schema can't express it, such
# as a prompt longer than the context, a token outside the vocabulary, or a best_of below n. The end of `running` checks that
# every route also succeeds.
LEFT_OUT: list[CheckFunction] = [positive_data_acceptance]


# These fail here: no job has a result to delete, and no random bytes are training examples.
NEVER_SUCCEED = {"DELETE /v1/models/{name}", "POST /v1/files"}
# What exists when the requests begin: the job needs the first file, until it is cancelled.
FILES, JOB = ("file-1", "file-2"), "ftjob-1"
EXISTING = {"name": ["fake"], "engine": ["fake"], "file_id": FILES, "job_id": [JOB]}


class Running(NamedTuple):
    url: str
    asked: set[str]
    succeeded: set[str]


class WaitingJobs(Jobs):
    """Jobs that never start."""

    def start(self) -> None:
        pass


def application(store: Store | None = None) -> Any:
    # Room for any n, so that few requests end in a 429.
    fake = FakeEngine(max_slots=32, max_queue=4096, kv_sequences=32)
    models = served(fake)
    jobs = WaitingJobs(store, models, Path("nowhere")) if store else None
    return create_app(models, fake.metrics, settings_of(max_adapters=1000), jobs)


def fill(store: Store) -> None:
    with pytest.MonkeyPatch.context() as patch:
        numbers = iter("121")
        patch.setattr(service.jobs.store.secrets, "token_hex", lambda _: next(numbers))  # type: ignore[attr-defined]
        for _ in FILES:
            store.add_file("", "a.jsonl", "fine-tune", b"{}")
        job = store.add_job("", "fake", "", 0, Hyperparameters(1, 1, 1.0, 1), FILES[0], None)
    store.add_event(job.id, "Created")


def document() -> dict[str, Any]:
    """The application's document, restricted to the names that exist: any other name is a 404."""
    found: dict[str, Any] = application().openapi()
    bodies = [schema for schema in found["components"]["schemas"].values() if schema.get("additionalProperties") is False]
    parameters = [
        parameter
        for operations in found["paths"].values()
        for operation in operations.values()
        for parameter in operation.get("parameters", [])
    ]
    for body in bodies:
        if "model" in body["properties"]:
            body["properties"]["model"] = {"enum": ["fake"] if "model" in body.get("required", []) else ["fake", None]}
        if "training_file" in body["properties"]:
            body["properties"] |= {"training_file": {"enum": [FILES[0]]}, "validation_file": {"enum": [FILES[0], None]}}
    for parameter in parameters:
        if parameter["name"] in EXISTING:
            parameter["schema"] = {"enum": list(EXISTING[parameter["name"]])}
    return found


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    store = Store(tmp_path_factory.mktemp("store"))
    fill(store)
    server = uvicorn.Server(uvicorn.Config(application(store), port=0, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    running = Running(f"http://127.0.0.1:{port}", set(), set())
    yield running
    server.should_exit = True
    thread.join()
    assert running.asked - NEVER_SUCCEED == running.succeeded, "some routes only ever failed"


def errors_have_one_shape(context: CheckContext, response: Response, case: Case[Any]) -> None:
    if response.status_code >= 400:
        body = response.json()
        assert list(body) == ["error"]
        assert list(body["error"]) == ["message", "type", "param", "code"]
        assert isinstance(body["error"]["message"], str)
        assert isinstance(body["error"]["type"], str)
        assert all(body["error"][name] is None or isinstance(body["error"][name], str) for name in ("param", "code"))
        assert len(response.content) < 1000, "errors stay small whatever was sent"


schema = from_dict(document(), config=SchemathesisConfig(seed=SEED))


@contract(
    "clients",
    "schemathesis",
    "no request that the OpenAPI document allows or forbids ends in a 5xx",
    "statuses, content types, headers and bodies are as documented",
    "what the document forbids is refused",
    "every error is {error: {message, type, param, code}}, and small",
)
@schema.parametrize()
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_the_openapi_document_is_true(case: Case[Any], running: Running) -> None:
    response = case.call(base_url=running.url)
    running.asked.add(case.operation.label)
    if response.status_code == 200:
        running.succeeded.add(case.operation.label)
    case.validate_response(response, additional_checks=[errors_have_one_shape], excluded_checks=LEFT_OUT)
