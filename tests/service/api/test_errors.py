"""Every error that a client can cause: status, message, param and code, and that it stays small."""

import asyncio
import logging
from typing import Any

import pytest

from model.checkpoint.tokenizer import Tokenizer
from tests.conformance import contract
from tests.service.api.helpers import error_of, post, request, serving
from tests.service.engine.fakes import FakeEngine
from tests.service.helpers import run

NOT_AN_OBJECT = "the body must be a JSON object, sent with content-type application/json"
INT64 = "input should be less than or equal to 9223372036854775807"


@contract("errors", "400", "a body that is no JSON object")
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", NOT_AN_OBJECT),
        ("null", NOT_AN_OBJECT),
        ("[1]", NOT_AN_OBJECT),
        ('"text"', NOT_AN_OBJECT),
        ("NaN", NOT_AN_OBJECT),
        (
            '{"model":"fake",',
            "the body is not valid JSON: Expecting property name enclosed in double quotes, at character 16",
        ),
        ('{"model":"fake"} {}', "the body is not valid JSON: Extra data, at character 17"),
        ("prompt=hello", "the body is not valid JSON: Expecting value, at character 0"),
        (b'{"model":"fake","prompt":"\xff"}', "the body is not UTF-8"),
        ('{"model":"fake","max_tokens":' + "9" * 5000 + "}", "the body holds a number of too many digits"),
        ('{"model":"fake","prompt":' + "[" * 100_000 + "]" * 100_000 + "}", "the body is nested too deeply"),
        ("[" * 100_000, "the body is nested too deeply"),
    ],
)
def test_bodies_that_are_no_object(body: str | bytes, message: str) -> None:
    error = error_of(post(body), 400)
    assert (error["message"], error["param"], error["code"]) == (message, None, None)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_the_content_type_must_be_json(content_type: str) -> None:
    error = error_of(post({"model": "fake"}, content_type=content_type), 400)
    assert error["message"] == NOT_AN_OBJECT


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "APPLICATION/JSON"])
def test_spellings_of_the_content_type(content_type: str) -> None:
    assert post({"model": "fake", "max_tokens": 1}, content_type=content_type).status_code == 200


@contract("completions", "anything else", "wrong types and values out of range name the field and the bound")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        # wrong types
        ({"model": 5}, "input should be a valid string"),
        ({"prompt": 5}, "must be a string, an array of strings, an array of token ids, or an array of those arrays"),
        (
            {"prompt": {"text": "a"}},
            "must be a string, an array of strings, an array of token ids, or an array of those arrays",
        ),
        ({"prompt": True}, "must be a string, an array of strings, an array of token ids, or an array of those arrays"),
        ({"max_tokens": "5"}, "input should be a valid integer"),
        ({"max_tokens": 16.5}, "input should be a valid integer"),
        ({"max_tokens": 1e300}, INT64),
        ({"n": 129.0}, "input should be less than or equal to 128"),
        ({"max_tokens": True}, "input should be a valid integer"),
        ({"temperature": "1"}, "input should be a valid number"),
        ({"temperature": True}, "input should be a valid number"),
        ({"top_p": [0.5]}, "input should be a valid number"),
        ({"top_k": 1.5}, "input should be a valid integer"),
        ({"n": "2"}, "input should be a valid integer"),
        ({"stop": 5}, "must be a string or an array of strings"),
        ({"stop": ["a", None]}, "must be a string or an array of strings"),
        ({"stop": {"a": "b"}}, "must be a string or an array of strings"),
        ({"seed": "7"}, "input should be a valid integer"),
        ({"seed": 7.5}, "input should be a valid integer"),
        ({"ignore_eos": 1}, "input should be a valid boolean"),
        ({"stream": "true"}, "input should be a valid boolean"),
        ({"allow_special": "no"}, "input should be a valid boolean"),
        ({"user": 5}, "input should be a valid string"),
        ({"stream": True, "stream_options": 5}, "input should be a valid dictionary or object to extract fields from"),
        # bounds
        ({"max_tokens": -1}, "input should be greater than or equal to 0"),
        ({"max_tokens": 2**63}, INT64),
        ({"max_tokens": 10**4299}, INT64),
        ({"temperature": -0.1}, "input should be greater than or equal to 0"),
        ({"temperature": 2.1}, "input should be less than or equal to 2"),
        ({"temperature": float("nan")}, "input should be a finite number"),
        ({"temperature": float("inf")}, "input should be a finite number"),
        ({"temperature": 10**400}, "input should be a valid number"),
        ({"top_p": -0.1}, "input should be greater than or equal to 0"),
        ({"top_p": 1.1}, "input should be less than or equal to 1"),
        ({"top_p": float("nan")}, "input should be a finite number"),
        ({"top_k": -2}, "input should be greater than or equal to -1"),
        ({"top_k": 2**63}, INT64),
        ({"n": 0}, "input should be greater than or equal to 1"),
        ({"n": 129}, "input should be less than or equal to 128"),
        ({"n": 10**30}, "input should be less than or equal to 128"),
        ({"seed": 2**63}, INT64),
        ({"seed": -(2**63) - 1}, "input should be greater than or equal to -9223372036854775808"),
        ({"stop": ""}, "must not hold an empty string"),
        ({"stop": ["a", ""]}, "must not hold an empty string"),
        ({"stop": list("abcdefghijklmnopq")}, "holds 17 strings, at most 16 are allowed"),
        ({"stop": ["a"] * 65}, "holds 65 strings, at most 64 are allowed"),
        ({"stop": ["a", "b" * 1025]}, "holds a string of 1025 characters, at most 1024 are allowed"),
        # prompts
        ({"prompt": []}, "must not be an empty array"),
        ({"prompt": [[]]}, "item 0 is an empty array"),
        ({"prompt": [[1], []]}, "item 1 is an empty array"),
        ({"prompt": [None]}, "item 0 is null, expected a string, a token id or an array of token ids"),
        ({"prompt": [True]}, "item 0 is a boolean, expected a string, a token id or an array of token ids"),
        ({"prompt": [{}]}, "item 0 is an object, expected a string, a token id or an array of token ids"),
        ({"prompt": [1, True]}, "item 1 is a boolean, expected an integer"),
        ({"prompt": [1, 2.5]}, "item 1 is a number with a fraction, expected an integer"),
        ({"prompt": [1, "a"]}, "item 1 is a string, expected an integer"),
        ({"prompt": ["a", [1]]}, "item 1 is an array, expected a string"),
        ({"prompt": ["a", None]}, "item 1 is null, expected a string"),
        ({"prompt": [[1], "a"]}, "item 1 is a string, expected an array"),
        ({"prompt": [[1], [2, False]]}, "item 1 of item 1 is a boolean, expected an integer"),
        ({"prompt": [[[1]]]}, "item 0 of item 0 is an array, expected an integer"),
        ({"prompt": ["a"] * 1025}, "holds 1025 prompts, at most 1024 are allowed"),
        ({"prompt": [[1]] * 1025}, "holds 1025 prompts, at most 1024 are allowed"),
        # combinations
        ({"stream_options": {"include_usage": True}}, "allowed only with stream true"),
        ({"stream_options": {}, "stream": False}, "allowed only with stream true"),
    ],
)
def test_fields_out_of_type_or_range(fields: dict[str, Any], message: str) -> None:
    param = list(fields)[-1] if "stream_options" not in fields else "stream_options"
    error = error_of(post({"model": "fake", "prompt": "a", **fields}), 400)
    assert (error["message"], error["param"], error["code"]) == (f"'{param}': {message}", param, None)


@contract("errors", "400", "missing and unknown fields are named, those inside objects too")
@pytest.mark.parametrize(
    ("fields", "param", "message", "code"),
    [
        ({"max_token": 5}, "max_token", "unknown field 'max_token'", "unknown_parameter"),
        ({"max_token": None}, "max_token", "unknown field 'max_token'", "unknown_parameter"),
        ({"": 5}, "", "unknown field ''", "unknown_parameter"),
        ({"\ud800": 5}, "\\ud800", "unknown field '\\ud800'", "unknown_parameter"),
        ({"\n\x00é": 5}, "\n\x00é", "unknown field '\n\x00é'", "unknown_parameter"),
        (
            {"stream": True, "stream_options": {"usage": True}},
            "stream_options.usage",
            "unknown field 'stream_options.usage'",
            "unknown_parameter",
        ),
        (
            {"stream": True, "stream_options": {"include_usage": 1}},
            "stream_options.include_usage",
            "'stream_options.include_usage': input should be a valid boolean",
            None,
        ),
        (
            {"stream": True, "stream_options": {"include_obfuscation": "yes"}},
            "stream_options.include_obfuscation",
            "'stream_options.include_obfuscation': input should be a valid boolean",
            None,
        ),
    ],
)
def test_missing_and_unknown_fields(fields: dict[str, Any], param: str | None, message: str, code: str | None) -> None:
    error = error_of(post({"model": "fake", **fields}), 400)
    assert (error["message"], error["param"], error["code"]) == (message, param, code)


BIAS = "the bias of token 5 must be a number from -100 to 100"
NO_TOKEN = "token id 50257 is outside the model's vocabulary of 50257 (0 to 50256)"


@contract("completions", "anything else", "400 naming the field", "out of range or of another type: 400, never clamped")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("best_of", 0, "'best_of': input should be greater than or equal to 1"),
        ("best_of", 21, "'best_of': input should be less than or equal to 20"),
        ("best_of", True, "'best_of': input should be a valid integer"),
        ("min_p", 1.1, "'min_p': input should be less than or equal to 1"),
        ("min_p", float("nan"), "'min_p': input should be a finite number"),
        ("min_tokens", -1, "'min_tokens': input should be greater than or equal to 0"),
        ("min_tokens", 17, "'min_tokens': is 17, more than max_tokens 16"),
        ("stop_token_ids", [50257], NO_TOKEN),
        ("stop_token_ids", 50256, "'stop_token_ids': input should be a valid list"),
        ("stop_token_ids", [5] * 1025, "'stop_token_ids': list should have at most 1024 items after validation, not 1025"),
        ("include_stop_str_in_output", 0, "'include_stop_str_in_output': input should be a valid boolean"),
        ("repetition_penalty", 0, "'repetition_penalty': input should be greater than 0"),
        ("repetition_penalty", 10.1, "'repetition_penalty': input should be less than or equal to 10"),
        ("repetition_penalty", True, "'repetition_penalty': input should be a valid number"),
        ("presence_penalty", -2.1, "'presence_penalty': input should be greater than or equal to -2"),
        ("presence_penalty", 2.1, "'presence_penalty': input should be less than or equal to 2"),
        ("frequency_penalty", float("inf"), "'frequency_penalty': input should be a finite number"),
        ("frequency_penalty", "0", "'frequency_penalty': input should be a valid number"),
        ("logit_bias", [], "'logit_bias': must be an object that maps token ids to numbers"),
        ("logit_bias", {"a": 1}, "'logit_bias': key 'a' is not a token id"),
        ("logit_bias", {"-1": 1}, "'logit_bias': key '-1' is not a token id"),
        ("logit_bias", {"x" * 999: 1}, f"'logit_bias': key '{'x' * 80}...' is not a token id"),
        ("logit_bias", {"5": 100.1}, f"'logit_bias': {BIAS}"),
        ("logit_bias", {"5": -101}, f"'logit_bias': {BIAS}"),
        ("logit_bias", {"5": True}, f"'logit_bias': {BIAS}"),
        ("logit_bias", {"5": None}, f"'logit_bias': {BIAS}"),
        ("logit_bias", {"5": float("nan")}, f"'logit_bias': {BIAS}"),
        ("logit_bias", {"5": 1, "05": 2}, "'logit_bias': names a token id twice"),
        ("logit_bias", {"50257": 1}, NO_TOKEN),
        ("logprobs", -1, "'logprobs': input should be greater than or equal to 0"),
        ("logprobs", 21, "'logprobs': is 21, at most 20 are given by this server"),
        ("logprobs", 1001, "'logprobs': input should be less than or equal to 1000"),
        ("logprobs", True, "'logprobs': input should be a valid integer"),
        ("echo", 0, "'echo': input should be a valid boolean"),
        ("suffix", 5, "'suffix': input should be a valid string"),
        ("few_shot", [], "'few_shot': input should be a valid dictionary or object to extract fields from"),
    ],
)
def test_the_other_fields_out_of_type_or_range(name: str, value: Any, message: str) -> None:
    error = error_of(post({"model": "fake", "prompt": "a", name: value}), 400)
    assert (error["message"], error["param"], error["code"]) == (message, name, None)


@contract("completions", "best_of", "less than n, or with stream: 400")
def test_best_of_that_can_not_be() -> None:
    error = error_of(post({"model": "fake", "n": 3, "best_of": 2}), 400)
    assert (error["message"], error["param"]) == ("'best_of': is 2, less than n 3", "best_of")
    error = error_of(post({"model": "fake", "best_of": 2, "stream": True}), 400)
    assert error["message"] == "'best_of': can't be streamed: which candidates are best is known at the end"
    assert post({"model": "fake", "best_of": 1, "stream": True, "max_tokens": 1}).status_code == 200


@contract("completions", "logprobs", "of more tokens than one answer holds: 400")
def test_too_many_logprobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.api.validation.MAX_LOGPROBS", 100)
    body = {"model": "fake", "prompt": [[1] * 20] * 2, "logprobs": 0, "max_tokens": 5}
    assert post(body | {"echo": True}).status_code == 200
    error = error_of(post(body | {"echo": True, "n": 3}), 400)
    assert error["message"] == "the request asks for logprobs of up to 150 tokens, at most 100 are given in one answer"
    assert (error["param"], error["code"]) == ("logprobs", "request_too_large")
    assert post(body | {"n": 3}).status_code == 200
    score = {"model": "fake", "continuations": [[1] * 60] * 2}
    assert error_of(request("POST", "/v1/score", json=score), 400)["param"] == "continuations"
    chat = {"model": "fake", "messages": [{"role": "user", "content": "a"}], "max_tokens": 60, "n": 2}
    assert request("POST", "/v1/chat/completions", json=chat).status_code == 200
    assert error_of(request("POST", "/v1/chat/completions", json=chat | {"logprobs": True}), 400)["param"] == "logprobs"


@contract("engines", "model", "400 where the body names another than the path")
def test_an_engine_and_another_model() -> None:
    error = error_of(request("POST", "/v1/engines/fake/completions", json={"model": "other"}), 400)
    assert (error["message"], error["param"]) == ("'model' is 'other', but the path names the engine 'fake'", "model")
    error = error_of(request("POST", "/v1/engines/other/completions", json={}), 404)
    assert error["code"] == "model_not_found"


@contract("completions", "prompt", "ids outside the vocabulary: 400")
@pytest.mark.parametrize(
    ("prompt", "token"),
    [([50257], "50257"), ([-1], "-1"), ([[5], [5, 2**70]], str(2**70)), ([10**200], "1" + "0" * 79 + "...")],
)
def test_token_ids_out_of_range(prompt: Any, token: str) -> None:
    error = error_of(post({"model": "fake", "prompt": prompt}), 400)
    assert error["message"] == f"token id {token} is outside the model's vocabulary of 50257 (0 to 50256)"
    assert error["param"] == "prompt"


@contract("completions", "max_tokens", "over the context: 400 context_length_exceeded with the true numbers")
@pytest.mark.parametrize(
    ("prompt", "max_tokens", "asked"),
    [
        ([5] * 250, 7, "257 tokens (250 in the prompt, 7 for the completion)"),
        ([5] * 257, 0, "257 tokens (257 in the prompt, 0 for the completion): the prompt is too long"),
        (" a" * 241, None, "257 tokens (241 in the prompt, 16 for the completion)"),
        (["a", " a" * 5000], 0, "5000 tokens (5000 in the prompt, 0 for the completion): the prompt is too long"),
        ("", 2**63 - 1, f"{2**63} tokens (1 in the prompt, {2**63 - 1} for the completion)"),
    ],
)
def test_a_prompt_too_long_is_refused_with_the_true_numbers(prompt: Any, max_tokens: Any, asked: str) -> None:
    error = error_of(post({"model": "fake", "prompt": prompt, "max_tokens": max_tokens}), 400)
    assert error["message"] == f"This model's maximum context length is 256 tokens, but the request asks for {asked}"
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")


def test_a_prompt_that_fills_the_context_is_served() -> None:
    assert post({"model": "fake", "prompt": [5] * 250, "max_tokens": 6}).status_code == 200
    assert post({"model": "fake", "prompt": [5] * 256, "max_tokens": 0}).status_code == 200


def test_a_prompt_longer_than_any_text_of_the_context_is_not_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = 128  # bytes of r50k_base's longest token
    encode = Tokenizer.encode

    def encode_short(self: Tokenizer, text: str, *, allow_special: bool = False) -> list[int]:
        assert len(text) <= 256 * longest, "a text that can't fit was tokenized"
        return encode(self, text, allow_special=allow_special)

    monkeypatch.setattr(Tokenizer, "encode", encode_short)
    assert FakeEngine.tokenizer.max_token_bytes == longest
    error = error_of(post({"model": "fake", "prompt": " " * (257 * longest)}), 400)
    assert error["message"].endswith(
        "256 tokens, but the request asks for a prompt of at least 257 tokens: the prompt is too long"
    )
    assert error["code"] == "context_length_exceeded"


def test_a_prompt_of_the_longest_tokens_is_served() -> None:
    answer = post({"model": "fake", "prompt": "-" * (255 * 64), "max_tokens": 1})
    assert answer.json()["usage"]["prompt_tokens"] == 255


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ["a"] * 1024, "n": 128}, "the request asks for 131072 choices; this server holds at most 12"),
        ({"n": 13}, "the request asks for 13 choices; this server holds at most 12"),
        ({"prompt": "x" * 3_000_000, "n": 13}, "the request asks for 13 choices; this server holds at most 12"),
    ],
)
def test_more_choices_than_the_server_holds(fields: dict[str, Any], message: str) -> None:
    error = error_of(post({"model": "fake", **fields}), 400)
    assert (error["message"], error["code"]) == (message, "request_too_large")


@contract("completions", "model", "unknown: 404 model_not_found")
def test_unknown_models() -> None:
    error = error_of(post({"model": "gpt-3"}), 404)
    assert error["message"] == "the model 'gpt-3' does not exist; this server has 'fake'"
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "'\\ud800'" in error_of(post({"model": "\ud800"}), 404)["message"]
    assert error_of(post({"model": ""}), 404)["code"] == "model_not_found"


@contract("errors", "404, 405", "unknown routes and wrong methods speak the same shape")
@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/nope", 404, "no route GET /nope"),
        ("GET", "/" + "x" * 5000, 404, "no route GET /" + "x" * 79 + "..."),
        ("GET", "/%FF%00", 404, "no route GET /\ufffd\x00"),
        ("GET", "/v1/completions", 405, "/v1/completions does not take GET"),
        ("OPTIONS", "/v1/completions", 405, "/v1/completions does not take OPTIONS"),
        ("POST", "/health/live", 405, "/health/live does not take POST"),
        ("PUT", "/v1/models/" + "x" * 5000, 405, "/v1/models/" + "x" * 69 + "... does not take PUT"),
    ],
)
def test_unknown_routes_and_wrong_methods(method: str, path: str, status: int, message: str) -> None:
    error = error_of(request(method, path), status)
    assert error["message"] == message
    assert error["code"] == ("not_found" if status == 404 else "method_not_allowed")


@contract("errors", "404, 405", "allow names every method of the path")
def test_a_wrong_method_is_told_the_right_ones() -> None:
    for path, allowed in (
        ("/v1/completions", "POST"),
        ("/v1/models", "GET, HEAD"),
        ("/v1/files", "GET, HEAD, POST"),
        ("/v1/files/file-1", "DELETE, GET, HEAD"),
    ):
        assert request("PUT", path).headers["allow"] == allowed


def test_a_wrong_method_is_told_the_right_one() -> None:
    assert request("PUT", "/v1/completions").headers["allow"] == "POST"
    for path in ("/v1/models", "/health/live", "/docs"):
        answer = request("DELETE", path)
        assert answer.headers["allow"] == "GET, HEAD"
        assert error_of(answer, 405)["message"] == f"{path} does not take DELETE"


MEGABYTE = "x" * 1_000_000


@contract("errors", "400", "errors stay small whatever was sent")
@pytest.mark.parametrize(
    "fields",
    [
        {"model": MEGABYTE},
        {MEGABYTE: 1},
        {"prompt": {MEGABYTE: MEGABYTE}},
        {"prompt": [1] * 100_000 + ["a"]},
        {"prompt": [[1]] * 1000 + [MEGABYTE]},
        {"prompt": list(range(100_000))},
        {"max_tokens": MEGABYTE},
        {"temperature": [MEGABYTE]},
        {"stop": MEGABYTE},
        {"stop": ["x"] * 100_000},
        {"user": [MEGABYTE]},
        {"logit_bias": {str(i): MEGABYTE for i in range(3)}},
        {"few_shot": {"examples": [{"input": MEGABYTE}]}},
        {"stream": True, "stream_options": {MEGABYTE: 1}},
        {f"field{i}": i for i in range(1000)},
        {"stream": True, "stream_options": {f"field{i}": i for i in range(1000)}},
    ],
    ids=lambda fields: next(reversed(fields))[:20],
)
def test_errors_stay_small(fields: dict[str, Any]) -> None:
    answer = post({"model": "fake", **fields})
    error_of(answer, 404 if "model" in fields else 400)


def test_nothing_a_client_sends_is_logged_as_an_error(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with serving() as api:
            for fields in ({"n": 0}, {"model": "x"}, {"prompt": [2**70]}, {"prompt": "a " * 9999}, {"echo": 1}):
                assert (await api.complete(**fields)).status_code in (400, 404)
            await api.client.post("/v1/completions", content=b"\xff")
            assert (await api.choices(max_tokens=1))[0]["text"] == " one"

    run(test)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@contract("errors", "429", "server_busy with Retry-After from the queue")
def test_a_full_queue_says_when_to_come_back() -> None:
    async def test() -> None:
        async with serving(FakeEngine(max_slots=1, max_queue=1)) as api:
            api.fake.runner.gate.clear()
            others = asyncio.create_task(api.choices(prompt="a", n=2, max_tokens=1))
            while not api.fake.scheduler.running:
                await asyncio.sleep(0.001)
            for stream in (False, True):
                answer = await api.complete(prompt="a", stream=stream)
                error = error_of(answer, 429, "rate_limit_error")
                assert error["message"].startswith("1 choices are waiting, the limit is 1; try again in ")
                assert error["code"] == "server_busy"
                assert int(answer.headers["retry-after"]) >= 1
            api.fake.runner.gate.set()
            assert len(await others) == 2
        assert api.fake.metric("requests_total", outcome="rejected") == 2

    run(test)
