"""POST /v1/completions where it succeeds: prompts, parameters, choices and the two forms of the answer."""

import hashlib
import json
import math
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from model.checkpoint.tokenizer import r50k_base
from model.step import Sampling, StepInput
from service.api.answers import TextEvents, chunk_event
from service.api.schema.base import StreamOptions
from service.api.schema.completions import CompletionChoice, CompletionLogprobs, CompletionRequest, CompletionResponse
from tests.conformance import contract
from tests.service.api.helpers import Api, events_of, post, prompts_run, request, serving
from tests.service.engine.fakes import CONFIG, FakeEngine
from tests.service.helpers import run

EOS = FakeEngine.tokenizer.special_tokens["<|endoftext|>"]
SPELT = FakeEngine.tokenizer.encode("<|endoftext|>")


@contract("completions", "prompt", 'text, token ids, lists of either; null, missing or "" is a new document')
@contract("completions", "allow_special", "special-token text in a string becomes the token, otherwise it stays text")
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "Once upon"}, [[7454, 2402]]),
        ({"prompt": ["Once", "upon", ""]}, [[7454], [27287], [EOS]]),
        ({"prompt": [7454, 2402]}, [[7454, 2402]]),
        ({"prompt": [[7454], [2402, 257]]}, [[7454], [2402, 257]]),
        ({"prompt": [CONFIG.vocab_size - 1, 0]}, [[50256, 0]]),
        ({"prompt": "Once\x00"}, [[7454, 188]]),
        ({"prompt": "\ud800"}, [[4210]]),  # U+FFFD
        ({"prompt": ""}, [[EOS]]),
        ({"prompt": None}, [[EOS]]),
        ({}, [[EOS]]),
        ({"prompt": "<|endoftext|>"}, [SPELT]),
        ({"prompt": "<|endoftext|>", "allow_special": True}, [[EOS]]),
        ({"prompt": ["a<|endoftext|>", "b"], "allow_special": True}, [[64, EOS], [65]]),
    ],
)
def test_prompt_forms(fields: dict[str, Any], expected: list[list[int]]) -> None:
    fake = FakeEngine()
    answer = post({"model": "fake", "max_tokens": 1, **fields}, fake).json()
    assert prompts_run(fake) == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
    total = sum(map(len, expected))
    generated = len(expected)
    assert answer["usage"] == usage(total, generated)


def usage(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def echoing() -> FakeEngine:
    """An engine that runs one choice at a time and answers every prompt with its own tokens."""
    fake = FakeEngine(max_slots=1, max_queue=200)

    def take_prompt(step: StepInput) -> None:
        for chunk in step.chunks:
            fake.runner.script = chunk.tokens

    fake.runner.fault = take_prompt
    return fake


@contract("completions", "n", "index = prompt * n + choice")
def test_index_counts_the_choices_prompt_by_prompt() -> None:
    fake = echoing()
    choices = post({"model": "fake", "prompt": ["Once", "upon"], "n": 3, "max_tokens": 2, "seed": 5}, fake).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3, 4, 5]
    assert [choice["text"] for choice in choices] == ["OnceOnce"] * 3 + ["uponupon"] * 3
    assert [start.sampling.choice for step in fake.runner.steps for start in step.starts] == [0, 1, 2, 3, 4, 5]
    assert {start.sampling.seed for step in fake.runner.steps for start in step.starts} == {5}


@contract("completions", "n", "up to 128")
def test_the_largest_n() -> None:
    assert len(post({"model": "fake", "prompt": "a", "n": 128, "max_tokens": 1}, echoing()).json()["choices"]) == 128


@contract("completions", "temperature, top_p, top_k, min_p", "reach the sampler")
@contract(
    "completions",
    "presence_penalty, frequency_penalty, repetition_penalty, logit_bias",
    "reach the sampler",
)
@contract("completions", "seed", "any 64-bit integer")
@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        ({"seed": 0}, Sampling(1.0, 0, 1.0, 0)),
        ({"seed": 7, "temperature": 0.5, "top_k": 40, "top_p": 0.9}, Sampling(0.5, 40, 0.9, 7)),
        ({"seed": -(2**63), "temperature": 0, "top_k": -1, "top_p": 0}, Sampling(0.0, 0, 0.0, -(2**63))),
        ({"seed": 2**63 - 1, "temperature": 2, "top_k": 2**63 - 1}, Sampling(2.0, 2**63 - 1, 1.0, 2**63 - 1)),
        ({"seed": 1, "min_p": 0.1, "repetition_penalty": 1.2}, Sampling(seed=1, min_p=0.1, repetition_penalty=1.2)),
        (
            {"seed": 1, "presence_penalty": -2, "frequency_penalty": 2.0},
            Sampling(seed=1, presence_penalty=-2.0, frequency_penalty=2.0),
        ),
        (
            {"seed": 1, "logit_bias": {"50256": -100, "7": 0.5}},
            Sampling(seed=1, logit_bias=((50256, -100.0), (7, 0.5))),
        ),
    ],
)
def test_sampling_parameters_reach_the_runner(fields: dict[str, Any], sampling: Sampling) -> None:
    fake = FakeEngine()
    assert post({"model": "fake", "prompt": "a", "max_tokens": 1, **fields}, fake).status_code == 200
    assert fake.runner.steps[0].starts[0].sampling == sampling


@contract("completions", "seed", "without one every request draws its own")
def test_without_a_seed_every_request_draws_its_own() -> None:
    async def test() -> None:
        async with serving() as api:
            for _ in range(3):
                await api.choices(prompt="a", max_tokens=1)
            assert len({start.sampling.seed for step in api.fake.runner.steps for start in step.starts}) == 3

    run(test)


@contract("completions", "max_tokens", "16 by default; 0 is legal")
@contract("completions", "stop", "a string or up to 4: excluded from the text, found across token borders")
@pytest.mark.parametrize(
    ("fields", "text", "reason"),
    [
        ({"max_tokens": 3}, " one two three", "length"),
        ({}, " one two three four" * 4, "length"),  # 16 tokens
        ({"max_tokens": 0}, "", "length"),
        ({"stop": " three"}, " one two", "stop"),
        ({"stop": ["zzz", "wo th", "r", " four"]}, " one t", "stop"),
        ({"stop": []}, " one two three four" * 4, "length"),
        ({"stop": None, "max_tokens": 2}, " one two", "length"),
        ({"stop": "\ud800", "max_tokens": 2}, " one two", "length"),
        ({"stop": "x" * 1024, "max_tokens": 2}, " one two", "length"),
        ({"stop": " two", "max_tokens": 1}, " one", "length"),
        ({"max_tokens": 255}, (" one two three four" * 64).removesuffix(" four"), "length"),
    ],
)
def test_where_a_completion_ends(fields: dict[str, Any], text: str, reason: str) -> None:
    fake = FakeEngine()
    choice = post({"model": "fake", "prompt": "a", **fields}, fake).json()["choices"][0]
    assert choice == {"text": text, "index": 0, "logprobs": None, "finish_reason": reason}
    assert fake.scheduler.cache.check_integrity() == []


@contract("completions", "ignore_eos", "the end-of-text token ends a choice unless ignored")
def test_end_of_text_stops_unless_ignored() -> None:
    async def test() -> None:
        async with serving(FakeEngine(" one<|endoftext|>")) as api:
            answer = (await api.complete(prompt="a")).json()
            assert answer["choices"][0]["text"] == " one"
            assert answer["choices"][0]["finish_reason"] == "stop"
            assert answer["usage"]["completion_tokens"] == 2
            ignoring = (await api.choices(prompt="a", max_tokens=4, ignore_eos=True))[0]
            assert (ignoring["text"], ignoring["finish_reason"]) == (" one one", "length")

    run(test)


@contract("completions", "response", "id, object, created, model, system_fingerprint, choices, usage")
def test_the_body_of_an_answer() -> None:
    before = int(time.time())
    answer = post({"model": "fake", "prompt": "a", "max_tokens": 1, "user": "someone"})
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert list(body) == ["id", "object", "created", "model", "system_fingerprint", "choices", "usage"]
    assert body["system_fingerprint"] == "fp_0123456789"
    assert body["id"].startswith("cmpl-")
    assert (body["object"], body["model"]) == ("text_completion", "fake")
    assert before <= body["created"] <= time.time()


async def stream(api: Api, **fields: Any) -> list[Any]:
    answer = await api.complete(stream=True, **fields)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert "content-length" not in answer.headers
    return events_of(answer)


@contract("completions", "stream", "chunks add up to the whole answer; no U+FFFD for a character whose bytes still arrive")
def test_a_stream_adds_up_to_the_answer() -> None:
    async def test() -> None:
        async with serving(FakeEngine(" naïve 🙂 three")) as api:
            fields: dict[str, Any] = {"prompt": ["a", "b"], "n": 2, "max_tokens": 9, "stop": "ree n"}
            whole = await api.choices(**fields)
            chunks = await stream(api, **fields)
            assert len(chunks) > len(whole)
            assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
            for choice in whole:
                pieces = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
                assert "".join(piece["text"] for piece in pieces) == choice["text"] == " naïve 🙂 th"
                assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
                assert all("\ufffd" not in piece["text"] and piece["logprobs"] is None for piece in pieces)
            for chunk in chunks:
                assert list(chunk) == ["id", "object", "created", "model", "system_fingerprint", "choices"]
                assert (chunk["object"], chunk["model"]) == ("text_completion", "fake")

    run(test)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"logprobs": 2},
        {"stop": " one two" * 8},
        {"stop": " one two" * 8, "logprobs": 2},
        {"stop": " two", "min_tokens": 30},
    ],
)
def test_tokens_that_come_several_in_a_step_are_what_comes_one_by_one(fields: dict[str, Any]) -> None:
    text = " go" + " one two" * 30
    body: dict[str, Any] = {"prompt": ["a", "b"], "max_tokens": 50, "stream_options": {"include_usage": True}, **fields}

    async def answers(max_draft: int) -> tuple[str, list[Any], Any, float, int, float]:
        fake = FakeEngine(text, max_draft=max_draft)
        async with serving(fake) as api:
            *chunks, last = await stream(api, **body)
            first = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == 0]
            logprobs = [token for piece in first if piece["logprobs"] for token in piece["logprobs"]["tokens"]]
            assert fake.metric("accepted_draft_tokens_total") == fake.metric("draft_tokens_total")
            tokens, gaps = fake.metric("generated_tokens_total"), fake.metric("inter_token_latency_seconds_count")
            return "".join(piece["text"] for piece in first), logprobs, last["usage"], tokens, len(chunks), gaps

    async def test() -> None:
        one_by_one, together = await answers(0), await answers(7)
        assert together[:4] == one_by_one[:4]
        assert one_by_one[0].startswith(" go")
        assert (one_by_one[0] == " go") == (fields.get("stop") == " one two" * 8)
        assert one_by_one[5] == one_by_one[3] - 2, "a gap before each token but the first of both choices"
        assert together[5] < one_by_one[5] / 2, "a gap before each step"
        assert together[4] == one_by_one[4], "a chunk for each token, whatever the steps"

    run(test)


@contract("completions", "stream_options", "no usage unless asked")
@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": None}])
def test_a_stream_has_no_usage_unless_asked(options: Any) -> None:
    async def test() -> None:
        async with serving() as api:
            chunks = await stream(api, prompt="a", max_tokens=3, stream_options=options)
            assert [chunk["choices"][0]["text"] for chunk in chunks] == [" one", " two", " three"]
            assert all("usage" not in chunk for chunk in chunks)

    run(test)


@contract("completions", "stream_options", "include_usage: a last chunk with usage and no choices, usage null in the others")
def test_a_stream_with_usage() -> None:
    async def test() -> None:
        async with serving() as api:
            options = {"include_usage": True, "include_obfuscation": False}
            *chunks, last = await stream(api, prompt="Once upon", n=2, max_tokens=3, stream_options=options)
            assert [chunk["usage"] for chunk in chunks] == [None] * 6
            assert last["choices"] == []
            assert last["usage"] == usage(2, 6)

    run(test)


def test_an_empty_completion_streams_its_end() -> None:
    async def test() -> None:
        async with serving() as api:
            chunks = await stream(api, prompt="a", max_tokens=0)
            assert [chunk["choices"] for chunk in chunks] == [
                [{"text": "", "index": 0, "logprobs": None, "finish_reason": "length"}]
            ]

    run(test)


@contract("completions", "null", "stands for the default everywhere")
@pytest.mark.parametrize("name", sorted(CompletionRequest.model_fields.keys() - {"model"}))
def test_null_is_the_default(name: str) -> None:
    assert post({"model": "fake", "max_tokens": 1, name: None}).status_code == 200


def ranked() -> FakeEngine:
    """Choices of which the second is the likeliest and the first the least likely: see fake_logprobs."""
    fake = FakeEngine()
    words = {0: " three", 1: " one", 2: " one three", 3: " three three one"}
    fake.runner.script_of = lambda start: FakeEngine.tokenizer.encode(words[start.sampling.choice % 4])
    return fake


@contract("completions", "best_of", "the n with the highest mean logprob", "usage counts every candidate")
@pytest.mark.parametrize("logprobs", [None, 1])
def test_best_of(logprobs: int | None) -> None:
    body = {"model": "fake", "prompt": ["a", "b"], "n": 2, "best_of": 4, "max_tokens": 3, "logprobs": logprobs}
    answer = post(body, ranked()).json()
    assert [choice["text"] for choice in answer["choices"]] == [" one one one", " one three one"] * 2
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert all((choice["logprobs"] is None) == (logprobs is None) for choice in answer["choices"])
    assert answer["usage"] == usage(2, 24)


@contract("completions", "best_of", "absent: no ranking")
def test_no_ranking_without_best_of() -> None:
    choices = post({"model": "fake", "prompt": "a", "n": 4, "max_tokens": 1}, ranked()).json()["choices"]
    assert [choice["text"] for choice in choices] == [" three", " one", " one", " three"]


@contract("completions", "min_tokens", "no end of text, stop token or stop string before so many tokens")
def test_min_tokens() -> None:
    async def test() -> None:
        async with serving(FakeEngine(" one<|endoftext|>")) as api:
            choice = (await api.choices(prompt="a", min_tokens=3))[0]
            # While the end of text is banned, the fake has one word to repeat; then it ends.
            assert choice["text"].startswith(" one one one")
            assert {row.banned for step in api.fake.runner.steps for row in step.samples[:1]} >= {(EOS,), ()}
        async with serving() as api:
            choice = (await api.choices(prompt="a", min_tokens=5, stop=" two"))[0]
            assert (choice["text"], choice["finish_reason"]) == (" one two three four one", "stop")

    run(test)


@contract("completions", "stop_token_ids", "end the choice and have no text")
def test_stop_token_ids() -> None:
    async def test() -> None:
        async with serving() as api:
            three = FakeEngine.tokenizer.encode(" three")
            choice = (await api.choices(prompt="a", stop_token_ids=three, logprobs=0))[0]
            assert (choice["text"], choice["finish_reason"]) == (" one two", "stop")
            assert choice["logprobs"]["tokens"] == [" one", " two", " three"]
            kept = (await api.choices(prompt="a", stop_token_ids=three, include_stop_str_in_output=True, ignore_eos=True))[0]
            assert (kept["text"], kept["finish_reason"]) == (" one two three", "stop")

    run(test)


@contract("completions", "stop", "the name of a special token is that token, and none of the four")
def test_a_special_token_as_a_stop() -> None:
    fake = FakeEngine(" one<|endoftext|> two")
    body = {"model": "fake", "stop": ["w", "x", "y", "z", "<|endoftext|>"], "ignore_eos": True}
    choice = post(body, fake).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (" one", "stop")


def test_a_special_tokens_name_spelt_by_ordinary_tokens_is_a_stop_too() -> None:
    fake = FakeEngine()
    fake.runner.script = [64, *SPELT, 65]
    choice = post({"model": "fake", "stop": "<|endoftext|>"}, fake).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("a", "stop")


@contract("completions", "include_stop_str_in_output", "keeps the stop string in the text")
def test_the_stop_string_may_be_kept() -> None:
    choice = post({"model": "fake", "stop": "o thr", "include_stop_str_in_output": True}).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (" one two thr", "stop")


@contract("completions", "ignore_eos", "concerns every end-of-text token of a model that has several")
@pytest.mark.parametrize(
    ("ignore_eos", "script", "text", "reason"),
    [
        (False, " one two one", " one", "stop"),
        (False, " one one three", " one one", "stop"),
        (False, "<|endoftext|> one", "", "stop"),
        (True, " one two one three", " one two one three", "length"),
    ],
)
def test_each_end_of_text_token_ends_a_text(ignore_eos: bool, script: str, text: str, reason: str) -> None:
    class SeveralEnds(FakeEngine):
        tokenizer = r50k_base([50256, *FakeEngine.tokenizer.encode(" two three")])

    choice = post({"model": "fake", "ignore_eos": ignore_eos, "max_tokens": 4}, SeveralEnds(script)).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text, reason)


@contract("completions", "n", "one shared prefill")
def test_choices_share_one_prefill() -> None:
    fake = FakeEngine()
    answer = post({"model": "fake", "prompt": [7] * 150, "n": 4, "max_tokens": 2}, fake).json()
    assert sum(len(chunk.tokens) for step in fake.runner.steps for chunk in step.chunks) == 150
    assert answer["usage"] == usage(150, 8)


@contract("completions", "usage", "prompt_tokens_details.cached_tokens", "a list of prompts shares what they begin with")
def test_cached_tokens() -> None:
    async def test() -> None:
        async with serving() as api:
            body: dict[str, Any] = {"prompt": [7] * 150, "max_tokens": 2}
            for cached in (0, 128):
                assert (await api.complete(**body)).json()["usage"] == usage(150, 2, cached)
            ranked = await api.complete(**body, echo=True, best_of=2)
            assert ranked.json()["usage"] == usage(150, 4, 128), "without logprobs nothing of the prompt is scored"
            scoring = await api.complete(**body, echo=True, logprobs=0)
            assert scoring.json()["usage"] == usage(150, 2, 0), "what is scored is computed"
            listed = await api.complete(prompt=[[8] * 100 + [i] for i in range(3)], max_tokens=1)
            assert listed.json()["usage"] == usage(303, 3, 128)

    run(test)


@contract("completions", "user", "accepted, logged hashed")
def test_the_user_is_logged_hashed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "banded.api"):
        assert post({"model": "fake", "max_tokens": 1, "user": "someone"}).status_code == 200
    assert f"is for user {hashlib.sha256(b'someone').hexdigest()[:16]}" in caplog.text
    assert "someone" not in caplog.text


@contract("completions", "stream_options", "include_obfuscation pads the chunks")
def test_obfuscation_pads_the_chunks() -> None:
    async def test() -> None:
        async with serving() as api:
            answer = await api.complete(prompt="a", max_tokens=8, stream=True, stream_options={"include_obfuscation": True})
            chunks = events_of(answer)
            assert all(chunk["obfuscation"] for chunk in chunks)
            lengths = {len(event) for event in answer.text.split("\n\n")[:-3]}
            assert len(lengths) == 1, "words of different lengths look the same on the wire"

    run(test)


@contract("completions", "anything else", "--lenient turns it into an entry of warnings")
def test_lenient() -> None:
    async def test() -> None:
        async with serving(lenient=True) as api:
            body: dict[str, Any] = {"prompt": "a", "max_tokens": 2, "colour": 2, "few_shots": None}
            answer = (await api.complete(**body)).json()
            expected = ["the unknown field 'colour' was ignored", "the unknown field 'few_shots' was ignored"]
            assert answer["warnings"] == expected
            chunks = await stream(api, **body)
            assert [chunk.get("warnings") for chunk in chunks] == [expected, None]
            assert "warnings" not in (await api.complete(prompt="a", max_tokens=1)).json()
            many = (await api.complete(prompt="a", max_tokens=1, **{f"x{i}": i for i in range(40)})).json()["warnings"]
            assert (len(many), many[-1]) == (33, "8 more fields were ignored")

    run(test)


@contract("engines", "path", "names the model, as clients of 2020 do")
def test_the_engines_alias() -> None:
    async def test() -> None:
        async with serving() as api:
            for body in ({}, {"model": "fake"}, {"model": None}):
                answer = await api.client.post("/v1/engines/fake/completions", json=body | {"max_tokens": 1})
                assert answer.json()["choices"][0]["text"] == " one"
                assert answer.json()["model"] == "fake"

    run(test)


def test_long_prompts_are_tokenized_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    encode = FakeEngine.tokenizer.encode_slowly

    def noting(parts: Iterable[tuple[str, bool]]) -> Iterator[list[int]]:
        parts = list(parts)
        if not parts[0][1]:  # the fake reads its script with special tokens
            threads.append(threading.current_thread() is threading.main_thread())
        return encode(parts)

    monkeypatch.setattr(FakeEngine.tokenizer, "encode_slowly", noting)
    post({"model": "fake", "prompt": "short", "max_tokens": 1})
    post({"model": "fake", "prompt": " a" * 3000})
    post({"model": "fake", "prompt": ["many short ones " * 15] * 100, "max_tokens": 1}, FakeEngine(max_queue=100))
    assert threads == [True, False] + [False] * 100


@pytest.mark.parametrize(
    "text", ["plain", '"quoted" \\ and\nlines\t\x00\x7f', "\u2028 café \U0001f600", "</script>", '"text":""']
)
@pytest.mark.parametrize("with_usage", [False, True])
@pytest.mark.parametrize("with_logprobs", [False, True])
def test_the_event_of_a_text_is_that_of_its_chunk(text: str, with_usage: bool, with_logprobs: bool) -> None:
    def chunk(choice: int, text: str, logprobs: CompletionLogprobs | None) -> bytes:
        choices = [CompletionChoice(text=text, index=choice, logprobs=logprobs, finish_reason=None)]
        model = 'named "text":"" by "logprobs":null and somebody'
        response = CompletionResponse(id="cmpl-1", created=1, model=model, system_fingerprint="fp", choices=choices)
        return chunk_event(response, StreamOptions(include_usage=with_usage))

    logprobs = None
    if with_logprobs:
        top = {text: -0.1, "other": -1 / 3, "impossible": -math.inf, "unknown": math.nan}
        logprobs = CompletionLogprobs(tokens=[text], token_logprobs=[-0.1], top_logprobs=[top], text_offset=[7])
    events = TextEvents("text", lambda choice: chunk(choice, "", None))
    for choice in (0, 1, 0):
        assert events(choice, text, logprobs) == chunk(choice, text, logprobs)


@contract("connections", "line breaks", "U+0085, U+2028 and U+2029 are escaped, in events and in bodies")
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_what_goes_out_is_one_line_for_every_reader(path: str) -> None:
    """Python's splitlines, which older SDKs cut a stream with, knows more line breaks than JSON escapes."""
    breaks = "a\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029b"
    body = {"model": "fake", "max_tokens": 30, "stop": "never", "prompt": breaks, "echo": True}
    if "chat" in path:
        body = {"model": "fake", "max_tokens": 30, "messages": [{"role": "user", "content": breaks}], "stop": "never"}
    whole = request("POST", path, FakeEngine(breaks), json=body)
    assert whole.status_code == 200
    assert len(whole.text.splitlines()) == 1
    streamed = request("POST", path, FakeEngine(breaks), json=body | {"stream": True})
    lines = [line for line in streamed.text.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    found = [json.loads(line[6:])["choices"][0] for line in lines[:-1]]
    text = "".join(choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in found)
    assert breaks in text
    error = request("GET", f"/v1/models/{breaks[6:]}")
    assert (error.status_code, len(error.text.splitlines())) == (404, 1)
    assert breaks[6:9] in error.json()["error"]["message"]
