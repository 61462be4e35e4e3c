"""POST /v1/score over fake logprobs; tests/service/engine/test_exactness.py compares it with a real model."""

import math
from typing import Any

import httpx
import pytest

from tests.conformance import contract
from tests.service.api.helpers import error_of, request
from tests.service.engine.fakes import FakeEngine

TOKENIZER = FakeEngine.tokenizer


def score(fake: FakeEngine | None = None, **fields: Any) -> httpx.Response:
    return request("POST", "/v1/score", fake, json={"model": "fake", "prompt": "Say"} | fields)


@contract("score", "results", "logprob, mean_logprob, is_greedy, bits_per_byte, tokens", "strings or token lists")
def test_results() -> None:
    three = TOKENIZER.encode(" three")
    body = score(continuations=[" one two", [*three, 50256]]).json()
    assert list(body) == ["object", "model", "system_fingerprint", "results", "usage"]
    assert body["results"][0] == {
        "logprob": -2.0,
        "mean_logprob": -1.0,
        "is_greedy": True,
        "bits_per_byte": pytest.approx(2 / math.log(2) / 8),
        "tokens": [" one", " two"],
    }
    assert body["results"][1]["tokens"] == [" three", "<|endoftext|>"]
    assert (body["results"][1]["logprob"], body["results"][1]["is_greedy"]) == (-3.0, False)
    assert score(continuations=[[50256]]).json()["results"][0]["bits_per_byte"] is None
    assert body["usage"]["prompt_tokens"] == 5
    assert body["usage"]["completion_tokens"] == 0


@contract("score", "continuations", "one shared prefill")
def test_one_shared_prefill() -> None:
    fake = FakeEngine()
    answer = score(fake, prompt=[7] * 150, continuations=[[i] for i in range(4)]).json()
    computed = sum(len(chunk.tokens) for step in fake.runner.steps for chunk in step.chunks)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0, "the prompt is billed once, and was computed"
    assert computed == 151 + 3 * (151 - 128), "all but the last page is shared"
    assert [result["tokens"] for result in answer["results"]] == [["!"], ['"'], ["#"], ["$"]]
    assert answer["usage"]["prompt_tokens"] == 154


@contract("score", "prompt", "empty: a new document")
@pytest.mark.parametrize("fields", [{"prompt": ""}, {"prompt": None}, {"prompt": []}])
def test_an_empty_prompt(fields: dict[str, Any]) -> None:
    fake = FakeEngine()
    assert score(fake, continuations=["a"], **fields).status_code == 200
    assert fake.runner.steps[0].chunks[0].tokens == [50256, 64]


@contract("score", "allow_special, user", "as in completions")
def test_special_tokens() -> None:
    fake = FakeEngine()
    assert score(fake, prompt="<|endoftext|>", continuations=["a"], allow_special=True, user="x").status_code == 200
    assert fake.runner.steps[0].chunks[0].tokens == [50256, 64]


@contract("score", "model", "unknown: 404 model_not_found")
def test_another_model() -> None:
    assert error_of(score(model="other", continuations=["a"]), 404)["code"] == "model_not_found"


@contract("score", "continuations", "empty or too long ones are refused by their place")
@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({}, "continuations", "'continuations' is required"),
        (
            {"continuations": []},
            "continuations",
            "'continuations': list should have at least 1 item after validation, not 0",
        ),
        ({"continuations": [1]}, "continuations.0", "'continuations.0': must be a string or an array of token ids"),
        ({"continuations": [[1, "a"]]}, "continuations.0", "'continuations.0': item 1 is a string, expected an integer"),
        ({"continuations": ["a"], "prompt": {}}, "prompt", "'prompt': must be a string or an array of token ids"),
        ({"continuations": ["a", ""]}, "continuations.1", "'continuations.1' is empty, so that there is nothing to score"),
        ({"continuations": [[]]}, "continuations.0", "'continuations.0' is empty, so that there is nothing to score"),
        (
            {"continuations": [[50257]]},
            "continuations.0",
            "token id 50257 is outside the model's vocabulary of 50257 (0 to 50256)",
        ),
        ({"continuations": ["a"], "n": 2}, "n", "unknown field 'n'"),
        (
            {"continuations": [" a" * 256]},
            "continuations.0",
            "This model's maximum context length is 256 tokens, but the request asks for 257 tokens "
            "(1 in the prompt, 256 for the completion)",
        ),
    ],
)
def test_what_is_refused(fields: dict[str, Any], param: str, message: str) -> None:
    error = error_of(score(**fields), 400)
    assert (error["message"], error["param"]) == (message, param)
