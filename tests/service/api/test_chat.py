"""POST /v1/chat/completions: the template, the two forms of the answer, logprobs, and every field of OpenAI's schema."""

from typing import Any

import httpx
import pytest

from model.checkpoint.prompt_format import PromptFormat
from model.step import Sampling
from service.api.schema.chat import ChatRequest
from tests.conformance import contract
from tests.service.api.helpers import Api, error_of, events_of, prompts_run, serving
from tests.service.engine.fakes import FakeEngine
from tests.service.helpers import run

NOT_SUPPORTED = "not supported by this server"
TOKENIZER = FakeEngine.tokenizer
HELLO = [{"role": "user", "content": "Hello"}]


async def chat(api: Api, **fields: Any) -> httpx.Response:
    return await api.client.post("/v1/chat/completions", json={"model": "fake", "messages": HELLO} | fields)


def answer_to(fake: FakeEngine | None = None, **fields: Any) -> httpx.Response:
    answers = []

    async def test() -> None:
        async with serving(fake) as api:
            answers.append(await chat(api, **fields))

    run(test)
    return answers[0]


@contract("chat", "messages", "laid out by the card's template")
@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (HELLO, "User: Hello\nAssistant:"),
        ([{"role": "system", "content": "Be brief."}, *HELLO], "Be brief.\n\nUser: Hello\nAssistant:"),
        ([{"role": "developer", "content": "Be brief."}, *HELLO], "Be brief.\n\nUser: Hello\nAssistant:"),
        (
            [*HELLO, {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": []}, *HELLO],
            "User: Hello\nAssistant: Hi\nUser: Hello\nAssistant:",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}],
            "User: Hello\nAssistant:",
        ),
        ([{"role": "user", "content": "<|endoftext|>"}], "User: <|endoftext|>\nAssistant:"),
    ],
)
def test_messages_become_a_prompt(messages: list[Any], text: str) -> None:
    fake = FakeEngine()
    assert answer_to(fake, messages=messages, max_tokens=1).status_code == 200
    assert prompts_run(fake) == [TOKENIZER.encode(text)]


@contract("chat", "response", "the body of an answer")
def test_the_body_of_an_answer() -> None:
    body = answer_to(max_tokens=3, n=2).json()
    assert list(body) == ["id", "object", "created", "model", "system_fingerprint", "choices", "usage"]
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    message = {"role": "assistant", "content": " one two three", "refusal": None}
    assert body["choices"] == [
        {"index": i, "message": message, "logprobs": None, "finish_reason": "length"} for i in range(2)
    ]
    assert body["usage"]["completion_tokens"] == 6


@contract("chat", "stream", "chunks as chat front ends expect them: the role, the text, the end")
def test_a_stream() -> None:
    answer = answer_to(max_tokens=2, stream=True, stream_options={"include_usage": True})
    chunks = events_of(answer)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [(chunk["choices"][0]["delta"], chunk["choices"][0]["finish_reason"]) for chunk in chunks[:-1]] == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": " one"}, None),
        ({"content": " two"}, None),
        ({}, "length"),
    ]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 2
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 4
    assert all("usage" not in chunk for chunk in events_of(answer_to(max_tokens=2, stream=True)))


@contract("chat", "stop", "the template's own stops end the answer as well")
def test_the_templates_stop_ends_the_answer() -> None:
    choice = answer_to(FakeEngine(" fine.\nUser: more"), max_tokens=9).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (" fine.", "stop")


@contract("chat", "max_tokens", "without it the card's default, as far as the context has room")
def test_the_default_of_max_tokens() -> None:
    assert answer_to().json()["usage"]["completion_tokens"] == 256 - len(TOKENIZER.encode("User: Hello\nAssistant:"))
    assert PromptFormat().default_max_tokens == 256
    long = [{"role": "user", "content": " a" * 300}]
    error = error_of(answer_to(messages=long), 400)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "messages"
    assert (
        "This model's maximum context length is 256 tokens, but the request asks for 307 tokens (306 in the prompt, 1 for"
        in error["message"]
    )


@contract("chat", "max_completion_tokens", "is max_tokens")
def test_both_names_of_the_limit() -> None:
    assert answer_to(max_completion_tokens=2).json()["usage"]["completion_tokens"] == 2
    assert answer_to(max_completion_tokens=2, max_tokens=2).json()["usage"]["completion_tokens"] == 2
    error = error_of(answer_to(max_completion_tokens=2, max_tokens=3), 400)
    assert error["message"] == "'max_completion_tokens': is 2, but max_tokens is 3"


@contract("chat", "logprobs, top_logprobs", "tokens with their bytes and the likeliest beside them")
@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(stream: bool) -> None:
    answer = answer_to(max_tokens=2, logprobs=True, top_logprobs=2, stream=stream)
    if stream:
        content = [
            token for chunk in events_of(answer) for token in (chunk["choices"][0]["logprobs"] or {}).get("content", [])
        ]
    else:
        content = answer.json()["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in content] == [" one", " two"]
    assert content[0]["bytes"] == list(b" one")
    assert content[0]["logprob"] == -1.0
    assert [each["logprob"] for each in content[0]["top_logprobs"]] == [-1.0, -2.0]
    assert answer_to(max_tokens=2, logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


SAMPLING: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 7,
    "min_p": 0.1,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.3,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": 1.5},
    "seed": 3,
    "n": 1,
    "stop": [" four"],
    "stop_token_ids": [9],
    "min_tokens": 1,
    "ignore_eos": True,
    "include_stop_str_in_output": True,
    "allow_special": True,
    "stream_options": None,
}


@contract("chat", ", ".join(SAMPLING), "as in completions")
def test_sampling_fields_are_those_of_completions() -> None:
    fake = FakeEngine()
    choice = answer_to(fake, **SAMPLING).json()["choices"][0]
    assert choice["message"]["content"] == " one two three four"
    assert fake.runner.steps[0].starts[0].sampling == Sampling(
        0.5,
        7,
        0.9,
        3,
        0,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        logit_bias=((5, 1.5),),
    )
    assert fake.runner.steps[0].samples[0].banned == (9,)


@contract("chat", "metadata, prompt_cache_key, safety_identifier, user", "accepted")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, None) for name in ChatRequest.model_fields if name != "messages"],
        ("metadata", {"a": "b"}),
        ("safety_identifier", "x"),
        ("prompt_cache_key", "x"),
        ("user", "x"),
    ],
)
def test_fields_without_effect(name: str, value: Any) -> None:
    assert answer_to(max_tokens=1, **{name: value} if name != "max_tokens" else {}).status_code == 200


@contract("chat", "messages", "what is not a text of a known role is refused by its place")
@pytest.mark.parametrize(
    ("messages", "param", "message"),
    [
        ([], "messages", "list should have at least 1 item after validation, not 0"),
        ("Hello", "messages", "input should be a valid list"),
        ([{"content": "x"}], "messages.0.role", None),
        (
            [{"role": "tool", "content": "x"}],
            "messages.0.role",
            "input should be 'system', 'developer', 'user' or 'assistant'",
        ),
        ([{"role": "user", "content": 5}], "messages.0.content", None),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages.0.content", None),
        (
            [{"role": "user", "content": "x", "tool_calls": [1]}],
            "messages.0.tool_calls",
            f"{NOT_SUPPORTED} (accepted: null, [])",
        ),
        ([{"role": "user", "content": "x", "colour": 1}], "messages.0.colour", None),
    ],
)
def test_messages_that_are_refused(messages: object, param: str, message: str | None) -> None:
    error = error_of(answer_to(messages=messages), 400)
    assert error["param"].startswith(param)
    if message is not None:
        assert error["message"] == f"'{param}': {message}"


@contract("chat", "model", "unknown: 404 model_not_found")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_logprobs": 2}, "'top_logprobs': allowed only with logprobs true"),
        ({"logprobs": 2}, "'logprobs': input should be a valid boolean"),
        ({"logprobs": True, "top_logprobs": 21}, "'top_logprobs': is 21, at most 20 are given by this server"),
        ({"max_tokens": 0}, "'max_tokens': input should be greater than or equal to 1"),
        ({"min_tokens": 3, "max_tokens": 2}, "'min_tokens': is 3, more than max_tokens 2"),
        ({"best_of": 2}, "'best_of': not supported by this server (accepted: null, 1)"),
        ({"prompt": "x"}, "unknown field 'prompt'"),
        ({"model": "other"}, "the model 'other' does not exist; this server has 'fake'"),
    ],
)
def test_fields_that_are_refused(fields: dict[str, Any], message: str) -> None:
    answer = answer_to(**fields)
    assert error_of(answer, answer.status_code)["message"] == message
