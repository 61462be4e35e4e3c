"""Fields that every client writes in its own way: numbers, names, limits that are settings, usage in streams."""

from typing import Any

import httpx
import pytest

from service.engine.models import Models
from service.engine.request import GenerationRequest
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
def test_limits_that_are_settings(settings: dict[str, Any], fields: dict[str, Any], message: str | None) -> None:
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


@contract("completions", "prompt_logprobs", "as in vLLM: for each prompt token the k likeliest by id, and the token itself")
def test_prompt_logprobs() -> None:
    choice = post({"prompt": [5, 8, 3], "prompt_logprobs": 2, "max_tokens": 1, "n": 2}).json()["choices"][1]
    name = FakeEngine.tokenizer.token_name
    assert choice["logprobs"] is None
    assert choice["text"] == " one"
    assert choice["prompt_logprobs"] == [
        None,
        {
            "8": {"logprob": -1, "rank": 1, "decoded_token": name(8)},
            "9": {"logprob": -2, "rank": 2, "decoded_token": name(9)},
        },
        {
            "4": {"logprob": -1, "rank": 1, "decoded_token": name(4)},
            "5": {"logprob": -2, "rank": 2, "decoded_token": name(5)},
            "3": {"logprob": -2, "rank": None, "decoded_token": name(3)},
        },
    ]
    assert "prompt_logprobs" not in post({"prompt": "a", "max_tokens": 1}).json()["choices"][0]


@contract("completions", "prompt_logprobs", "next to echo and logprobs, each with its own number")
def test_prompt_logprobs_and_logprobs() -> None:
    body = {"prompt": [5, 8], "echo": True, "logprobs": 1, "prompt_logprobs": 3, "max_tokens": 1}
    choice = post(body).json()["choices"][0]
    assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [1, 1]
    assert len(choice["prompt_logprobs"][1]) == 3
    choice = post(body | {"logprobs": 3, "prompt_logprobs": 0}).json()["choices"][0]
    assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [3, 3]
    assert choice["prompt_logprobs"][1] == {
        "8": {"logprob": -1, "rank": None, "decoded_token": FakeEngine.tokenizer.token_name(8)}
    }


@contract("chat", "prompt_logprobs", "as in vLLM, on the answer")
def test_prompt_logprobs_of_a_chat() -> None:
    answer = chat(prompt_logprobs=1, max_tokens=1, n=2).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert answer["prompt_logprobs"][0] is None


@contract("completions", "prompt_logprobs", "with stream, or more than the server gives: 400")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_logprobs": 1, "stream": True}, "'prompt_logprobs': can't be streamed"),
        ({"prompt_logprobs": 21}, "'prompt_logprobs': is 21, at most 20 are given by this server"),
        ({"prompt_logprobs": -1}, "'prompt_logprobs': input should be greater than or equal to 0"),
    ],
)
def test_prompt_logprobs_that_are_refused(fields: dict[str, Any], message: str) -> None:
    assert error_of(post({"prompt": "a", **fields}), 400)["message"] == message
    assert error_of(chat(**fields), 400)["message"] == message


def test_too_many_prompt_logprobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.api.validation.MAX_LOGPROBS", 10)
    assert post({"prompt": [5] * 5, "n": 2, "max_tokens": 1, "prompt_logprobs": 1}).status_code == 200
    error = error_of(post({"prompt": [5] * 6, "n": 2, "max_tokens": 1, "prompt_logprobs": 1}), 400)
    assert error["message"] == "the request asks for logprobs of up to 12 tokens, at most 10 are given in one answer"
    assert (error["param"], error["code"]) == ("prompt_logprobs", "request_too_large")
    long = [{"role": "user", "content": " a" * 20}]
    assert error_of(chat(messages=long, prompt_logprobs=1), 400)["param"] == "prompt_logprobs"


@contract("completions", "return_token_ids", "prompt_token_ids and token_ids in each choice, whole and streamed")
@pytest.mark.parametrize("fields", [{}, {"logprobs": 1}, {"stop": " four one"}, {"echo": True}])
def test_token_ids(fields: dict[str, Any]) -> None:
    body = {"prompt": [[7454, 2402], [5]], "n": 2, "max_tokens": 6, "return_token_ids": True} | fields
    whole = post(body).json()
    count = whole["usage"]["completion_tokens"] // 4
    script = FakeEngine.tokenizer.encode(" one two three four one two")
    for i, choice in enumerate(whole["choices"]):
        assert choice["prompt_token_ids"] == ([7454, 2402] if i < 2 else [5])
        assert choice["token_ids"] == script[:count]
    chunks = events_of(post(body | {"stream": True}))
    for i, choice in enumerate(whole["choices"]):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == i]
        assert [token for piece in own for token in piece["token_ids"]] == choice["token_ids"]
        assert own[0]["prompt_token_ids"] == choice["prompt_token_ids"]
        assert not any("prompt_token_ids" in piece for piece in own[1:])
    assert "token_ids" not in post({"prompt": "a", "max_tokens": 1}).text


@contract("chat", "return_token_ids", "prompt_token_ids on the answer, token_ids in each choice, whole and streamed")
def test_token_ids_of_a_chat() -> None:
    whole = chat(max_tokens=3, return_token_ids=True).json()
    assert whole["prompt_token_ids"] == FakeEngine.tokenizer.encode("User: Hello\nAssistant:")
    assert whole["choices"][0]["token_ids"] == FakeEngine.tokenizer.encode(" one two three")
    first, *rest = events_of(chat(max_tokens=3, return_token_ids=True, stream=True, stop=[" three"]))
    assert first["prompt_token_ids"] == whole["prompt_token_ids"]
    assert not any("prompt_token_ids" in chunk for chunk in rest)
    streamed = [token for chunk in rest for token in chunk["choices"][0].get("token_ids", [])]
    assert streamed == whole["choices"][0]["token_ids"]
    assert "token_ids" not in chat(max_tokens=1).text


@contract("completions", "skip_special_tokens", "false: special tokens are spelled out, those that end the text are not")
def test_special_tokens_in_the_text() -> None:
    def text(**fields: Any) -> Any:
        return post({"max_tokens": 4, "prompt": "a", **fields}, FakeEngine(" one<|endoftext|>")).json()["choices"][0]["text"]

    assert text(ignore_eos=True) == " one one"
    assert text(ignore_eos=True, skip_special_tokens=False) == " one<|endoftext|> one<|endoftext|>"
    assert text(skip_special_tokens=False) == " one"


@contract("completions", "cache_prompt", "false: the prompt neither comes from the prefix cache nor stays there")
def test_prompts_that_are_not_cached() -> None:
    async def test() -> None:
        async with serving() as api:

            async def cached(**fields: Any) -> int:
                answer = (await api.complete(prompt=[5] * 130, max_tokens=1, **fields)).json()
                count: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
                return count

            assert [await cached(cache_prompt=False), await cached(), await cached()] == [0, 0, 128]
            assert await cached(cache_prompt=False, n=2) == 0
            assert api.fake.metric("prefix_cache_queries_total") == 260

    run(test)


@contract("completions", "allowed_token_ids", "reach the sampler")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"allowed_token_ids": []}, "'allowed_token_ids': list should have at least 1 item after validation, not 0"),
        ({"allowed_token_ids": [50257]}, "token id 50257 is outside the model's vocabulary of 50257 (0 to 50256)"),
        ({"bad_words": "a"}, "'bad_words': input should be a valid list"),
        ({"bad_words": [""]}, "'bad_words.0': string should have at least 1 character"),
        ({"bad_words": [" "]}, "'bad_words': must hold texts, each of more than spaces"),
        ({"bad_words": ["a"] * 257}, "'bad_words': list should have at most 256 items after validation, not 257"),
        ({"bad_words": ["a" * 1025]}, "'bad_words.0': string should have at most 1024 characters"),
    ],
)
def test_constraints_that_are_refused(fields: dict[str, Any], message: str) -> None:
    assert error_of(post({"prompt": "a", **fields}), 400)["message"] == message
    fake = FakeEngine()
    assert post({"prompt": "a", "max_tokens": 1, "allowed_token_ids": [7, 5]}, fake).status_code == 200
    assert fake.runner.steps[0].starts[0].sampling.allowed_token_ids == (7, 5)
    choices = post({"prompt": "a", "max_tokens": 4, "bad_words": ["one", "two three"]}).json()["choices"]
    assert choices[0]["text"] == " two four four two"


@contract("chat", "allowed_token_ids, bad_words, cache_prompt, skip_special_tokens", "reach the engine as in completions")
def test_chats_and_completions_hand_the_same_fields_to_the_engine() -> None:
    fields = {"allowed_token_ids": [5, 6], "bad_words": ["x"], "cache_prompt": False, "skip_special_tokens": False}

    async def test() -> None:
        async with serving() as api:
            seen, generate = [], api.fake.engine.generate

            def noting(request: GenerationRequest) -> Any:
                seen.append(request.params)
                return generate(request)

            api.fake.engine.generate = noting  # type: ignore[method-assign]
            common = {"model": "fake", "max_tokens": 1} | fields
            messages = [{"role": "user", "content": "a"}]
            for path, body in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": messages})):
                assert (await api.client.post(f"/v1/{path}", json=common | body)).status_code == 200
            for params in seen:
                assert (params.allowed_token_ids, params.bad_words) == ((5, 6), ("x",))
                assert params.cache_prompt is params.skip_special_tokens is False
            assert len(seen) == 2

    run(test)


@contract("completions", "metadata, prompt_cache_key, safety_identifier", "notes of OpenAI's, without effect")
def test_notes_have_no_effect() -> None:
    notes = {"metadata": {"a": "b"}, "prompt_cache_key": "k", "safety_identifier": "s"}
    plain, noted = (post({"prompt": "a", "max_tokens": 2, **more}).json() for more in ({}, notes))
    assert noted["choices"] == plain["choices"]
    assert "warnings" not in noted
