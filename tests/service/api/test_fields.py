"""Fields that every client writes in its own way: numbers, names, limits that are settings, usage in streams."""

from typing import Any

import httpx
import pytest

from service.engine.models import Models
from tests.conformance import contract
from tests.service.api import helpers
from tests.service.api.helpers import error_of, events_of, post, prompts_run, request, serving
from tests.service.engine.fakes import FakeEngine
from tests.service.helpers import run

MESSAGES = [{"role": "user", "content": "Hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Once"},
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/score": {"prompt": "Once", "continuations": [" upon"]},
}


def chat(fake: FakeEngine | None = None, **fields: Any) -> httpx.Response:
    return request("POST", "/v1/chat/completions", fake, json={"messages": MESSAGES} | fields)


@contract("completions", "numbers", "a whole float is an integer, also among token ids")
@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 3.0},
        {"max_tokens": 3, "n": 1.0, "seed": 5.0, "top_k": 7.0, "min_tokens": 1.0, "logprobs": 2.0, "best_of": 1.0},
        {"max_tokens": 3, "prompt": [7454.0, 2402], "stop_token_ids": [9.0]},
        {"max_tokens": 3, "prompt": [[7454, 2402.0]], "temperature": 1},
    ],
)
def test_whole_floats_are_integers(fields: dict[str, Any]) -> None:
    fake = FakeEngine()
    answer = post({"model": "fake", "prompt": "Once upon", **fields}, fake)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 3
    assert prompts_run(fake) == [[7454, 2402]]


@contract("fine_tuning", "hyperparameters", "a whole float is an integer")
def test_whole_floats_in_other_bodies() -> None:
    detokenized = request("POST", "/detokenize", json={"tokens": [7454.0, 2402]})
    assert detokenized.json()["prompt"] == "Once upon"
    assert error_of(request("POST", "/detokenize", json={"tokens": [7454.5]}), 400)["param"] == "tokens.0"
    assert chat(max_tokens=2.0).json()["usage"]["completion_tokens"] == 2
    assert chat(max_completion_tokens=2.0, logprobs=True, top_logprobs=1.0).status_code == 200


@contract("completions", "model", "may be missing where one model is served")
@contract("chat", "model", "may be missing where one model is served")
@contract("score", "model", "may be missing where one model is served")
@pytest.mark.parametrize("path", BODIES)
def test_the_model_may_be_missing(path: str) -> None:
    for fields in ({}, {"model": None}):
        answer = request("POST", path, json=BODIES[path] | fields)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == "fake"


@contract("completions", "model", "missing where several are served: 400 that lists them")
@contract("chat", "model", "missing where several are served: 400 that lists them")
@contract("score", "model", "missing where several are served: 400 that lists them")
@pytest.mark.parametrize("path", BODIES)
def test_the_model_is_required_where_there_are_several(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def several(fake: FakeEngine, *_: Any) -> Models:
        one = served(fake)
        return Models([one.base, one.base._replace(name="other")])

    served = helpers.served
    monkeypatch.setattr(helpers, "served", several)
    error = error_of(request("POST", path, json=BODIES[path]), 400)
    assert error["message"] == "'model' is required: this server has 'fake', 'other'"
    assert (error["param"], error["code"]) == ("model", "missing_required_parameter")
    assert request("POST", path, json=BODIES[path] | {"model": "other"}).json()["model"] == "other"
    assert request("POST", "/tokenize", json={"prompt": "Once"}).json()["tokens"] == [7454]


@contract("completions", "logprobs", "up to 20, or the server's BANDED_MAX_LOGPROBS")
@contract("completions", "stop", "up to 16, or the server's BANDED_MAX_STOPS")
@pytest.mark.parametrize(
    ("settings", "fields", "message"),
    [
        ({}, {"logprobs": 20}, None),
        ({"max_logprobs": 21}, {"logprobs": 21}, None),
        ({"max_logprobs": 5}, {"logprobs": 6}, "'logprobs': is 6, at most 5 are given by this server"),
        ({}, {"stop": list("abcdefghijklmnop")}, None),
        ({"max_stops": 17}, {"stop": list("abcdefghijklmnopq")}, None),
        ({"max_stops": 4}, {"stop": list("abcde")}, "'stop': holds 5 strings, at most 4 are allowed"),
    ],
)
def test_limits_that_are_settings(settings: dict[str, int], fields: dict[str, Any], message: str | None) -> None:
    async def test() -> None:
        async with serving(**settings) as api:
            answer = await api.complete(prompt="a", max_tokens=1, **fields)
            if message is not None:
                assert error_of(answer, 400)["message"] == message
                return
            assert answer.status_code == 200, answer.text
            for top in (answer.json()["choices"][0]["logprobs"] or {}).get("top_logprobs", []):
                assert len(top) == fields["logprobs"]

    run(test)


@contract("completions", "logprobs", "of more tokens than one answer holds: 400")
def test_many_likeliest_tokens_count_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.api.validation.MAX_LOGPROBS", 10)

    async def test() -> None:
        async with serving(max_logprobs=50) as api:
            assert (await api.complete(prompt="a", max_tokens=10, logprobs=20)).status_code == 200
            assert (await api.complete(prompt="a", max_tokens=5, logprobs=40)).status_code == 200
            error = error_of(await api.complete(prompt="a", max_tokens=6, logprobs=40), 400)
            assert error["message"] == "the request asks for logprobs of up to 6 tokens, at most 5 are given in one answer"

    run(test)


@contract("completions", "suffix", '"" inserts nothing')
@pytest.mark.parametrize("prompt", ["Once upon", [7454, 2402]])
def test_an_empty_suffix_inserts_nothing(prompt: object) -> None:
    fake = FakeEngine()
    assert post({"prompt": prompt, "suffix": "", "max_tokens": 1}, fake).status_code == 200
    assert prompts_run(fake) == [[7454, 2402]]
    assert post({"prompt": "a", "suffix": "", "few_shot": {}, "max_tokens": 1}).status_code == 200


@contract("completions", "stream_options", "continuous_usage_stats: every chunk has the usage so far")
@contract("chat", "stream_options", "continuous_usage_stats: every chunk has the usage so far")
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("include_usage", [True, False])
def test_usage_in_every_chunk(path: str, include_usage: bool) -> None:
    options = {"include_usage": include_usage, "continuous_usage_stats": True}
    body = BODIES[path] | {"stream": True, "max_tokens": 3, "stream_options": options}
    chunks = events_of(request("POST", path, json=body))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    head = [1] if "chat" in path else []  # the role comes with the first token
    tail = [3] if "chat" in path else []  # the reason, in a chunk of its own
    assert counts == [*head, 1, 2, 3, *tail, *([3] if include_usage else [])]
    assert [chunk["choices"] for chunk in chunks].count([]) == include_usage
    assert all(
        usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        for usage in (chunk["usage"] for chunk in chunks)
    )
