"""The official openai SDK against a real `banded serve`, and, where a fault has to be made, against a fake engine."""

import asyncio
import inspect
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import httpx2
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as ChatParams

from model.step import StepInput
from tests.clients.sdk import sdk
from tests.conformance import contract
from tests.service.api.helpers import serving
from tests.service.engine.fakes import FakeEngine
from tests.service.helpers import run, until
from tests.serving import PATIENCE, Served, banded_serve

TEXT = "Once upon a time"
LONG = 2000  # tokens, more than a test waits for
# Arguments of the SDK's methods that are not fields of a body.
OF_THE_SDK = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
# Random weights may end a text at any token.
UNENDED: dict[str, Any] = {"ignore_eos": True}


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with sdk(server.url) as client:
        yield client


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


@pytest.fixture(scope="module")
def keyed(server: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server whose one key may post two requests a minute."""
    settings = {"BANDED_API_KEYS": "sk-right", "BANDED_LIMIT_REQUESTS": "2"}
    with banded_serve(server.checkpoint, tmp_path_factory.mktemp("keyed") / "log", **settings) as keyed:
        yield keyed


@asynccontextmanager
async def faked(fake: FakeEngine, **options: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    """The SDK's client for an application over `fake`."""
    async with serving(fake, **options) as api:
        http_client = httpx2.AsyncClient(transport=httpx2.ASGITransport(api.app))  # the SDK's own httpx
        async with openai.AsyncOpenAI(
            base_url="http://test/v1", api_key="none", max_retries=0, http_client=http_client
        ) as client:
            yield client


def metric(url: str, name: str) -> float:
    found = re.search(rf"^banded_{name}\S* (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    assert found, name
    return float(found[1])


def wait_until_idle(url: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while metric(url, "requests_running"):
        assert time.monotonic() < deadline, "a slot is still taken"
        time.sleep(0.02)


def text_of(chunks: list[Completion], index: int = 0) -> str:
    return "".join(choice.text for chunk in chunks for choice in chunk.choices if choice.index == index)


def fields_of(method: Any) -> set[str]:
    return set(inspect.signature(method).parameters) - OF_THE_SDK


@contract("clients", "openai SDK", "`completions.create` with every field that it knows")
def test_completions_take_every_field_of_the_sdk(client: openai.OpenAI, model: str) -> None:
    fields: dict[str, Any] = {
        "model": model,
        "prompt": TEXT,
        "best_of": 3,
        "echo": True,
        "frequency_penalty": 0.5,
        "logit_bias": {"11": -100},
        "logprobs": 2,
        "max_tokens": 6,
        "n": 2,
        "presence_penalty": -0.5,
        "seed": 7,
        "stop": ["\N{SNOWMAN}", "\n\n\n\n"],
        "stream": False,
        "stream_options": None,
        "suffix": None,
        "temperature": 0.7,
        "top_p": 0.9,
        "user": "somebody",
    }
    assert set(fields) == fields_of(client.completions.create), "a new SDK has other fields"
    answer: Completion = client.completions.create(**fields, extra_body=UNENDED)
    assert (answer.object, answer.model) == ("text_completion", model)
    assert answer.id.startswith("cmpl-")
    assert answer.system_fingerprint
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 18, "every candidate counts"
    assert answer.usage.total_tokens == 18 + answer.usage.prompt_tokens
    for choice in answer.choices:
        assert choice.finish_reason == "length"
        assert choice.text.startswith(TEXT)
        assert choice.logprobs is not None
        assert choice.logprobs.tokens is not None
        assert len(choice.logprobs.tokens) == answer.usage.prompt_tokens + 6
        assert "," not in choice.logprobs.tokens[answer.usage.prompt_tokens :]

    again = client.completions.create(**fields, extra_body=UNENDED)
    assert [choice.text for choice in again.choices] == [choice.text for choice in answer.choices]


@contract("clients", "openai SDK", "`completions.create` with every field at null is a completion of 16 tokens")
def test_completions_take_null_for_every_field(client: openai.OpenAI, model: str) -> None:
    fields: dict[str, Any] = dict.fromkeys(fields_of(client.completions.create) - {"model"})
    answer = client.completions.create(model=model, **fields, extra_body=UNENDED)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (1, 16)
    assert answer.choices[0].logprobs is None


@contract("clients", "openai SDK", "echo and logprobs score a prompt, given as text or as token ids")
def test_echo_and_logprobs_score_a_prompt(client: openai.OpenAI, model: str) -> None:
    fields: dict[str, Any] = {"model": model, "echo": True, "logprobs": 1, "max_tokens": 0}
    scored = client.completions.create(prompt=TEXT, **fields)
    found = scored.choices[0].logprobs
    assert scored.choices[0].text == TEXT
    assert scored.usage is not None
    assert scored.usage.completion_tokens == 0
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert "".join(found.tokens) == TEXT
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(len(found.tokens))]
    assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
    assert all(logprob < 0 for logprob in found.token_logprobs[1:])

    tokens = httpx.post(f"{client.base_url}".removesuffix("v1/") + "tokenize", json={"prompt": TEXT}).json()["tokens"]
    from_ids = client.completions.create(prompt=[tokens, tokens[:2]], **fields)
    whole, start = (choice.logprobs for choice in from_ids.choices)
    assert whole is not None
    assert start is not None
    assert (whole.tokens, whole.text_offset) == (found.tokens, found.text_offset)
    assert start.tokens == found.tokens[:2]
    assert whole.token_logprobs == pytest.approx(found.token_logprobs, abs=1e-4)
    assert start.token_logprobs == pytest.approx(found.token_logprobs[:2], abs=1e-4)


@contract("clients", "openai SDK", "several prompts with n: index is prompt * n + choice")
def test_several_prompts_of_tokens_keep_their_order(client: openai.OpenAI, model: str) -> None:
    prompts = [[464, 3290], [464, 3797, 318]]
    answer = client.completions.create(model=model, prompt=prompts, n=2, max_tokens=2, echo=True, extra_body=UNENDED)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text.startswith("The dog") for choice in answer.choices] == [True, True, False, False]
    assert [choice.text.startswith("The cat is") for choice in answer.choices] == [False, False, True, True]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 8)


@contract("clients", "openai SDK", "a stream of completions says what the whole answer says, with its usage at the end")
def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI, model: str) -> None:
    fields: dict[str, Any] = {"model": model, "prompt": TEXT, "n": 2, "max_tokens": 12, "seed": 3, "logprobs": 0}
    whole = client.completions.create(**fields, extra_body=UNENDED)
    with client.completions.create(
        **fields, stream=True, stream_options={"include_usage": True}, extra_body=UNENDED
    ) as stream:
        chunks = list(stream)
    *chunks, last = chunks
    assert (last.choices, last.usage) == ([], whole.usage)
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks)
    assert {(chunk.id, chunk.object, chunk.model) for chunk in [*chunks, last]} == {(last.id, "text_completion", model)}
    for index, choice in enumerate(whole.choices):
        own = [each for chunk in chunks for each in chunk.choices if each.index == index]
        assert text_of(chunks, index) == choice.text
        assert [each.finish_reason for each in own] == [None] * (len(own) - 1) + ["length"]
        tokens = [token for each in own if each.logprobs for token in each.logprobs.tokens or []]
        assert choice.logprobs is not None
        assert tokens == choice.logprobs.tokens

    plain = list(client.completions.create(**fields, stream=True, extra_body=UNENDED))
    assert not any("usage" in chunk.model_fields_set for chunk in plain)
    assert [text_of(plain, index) for index in (0, 1)] == [choice.text for choice in whole.choices]


@contract("clients", "openai SDK", "async requests and streams at once give what each gives alone")
def test_async_requests_at_once(server: Served, client: openai.OpenAI, model: str) -> None:
    seeds = range(6)

    def fields(seed: int) -> dict[str, Any]:
        return {"model": model, "prompt": TEXT, "max_tokens": 10, "seed": seed, "extra_body": UNENDED}

    alone = [client.completions.create(**fields(seed)).choices[0].text for seed in seeds]

    async def test() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as together:

            async def streamed(seed: int) -> str:
                stream = await together.completions.create(**fields(seed), stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            async def whole(seed: int) -> str:
                return (await together.completions.create(**fields(seed))).choices[0].text

            assert await asyncio.gather(*map(whole, seeds), *map(streamed, seeds)) == alone * 2

    run(test)
    assert len(set(alone)) > 1


@contract("clients", "openai SDK", "a stream that is closed early frees its slot, in sync and async")
def test_a_stream_closed_early_frees_its_slot(server: Served, client: openai.OpenAI, model: str) -> None:
    fields: dict[str, Any] = {"model": model, "prompt": TEXT, "max_tokens": LONG, "stream": True, "extra_body": UNENDED}
    stream = client.completions.create(**fields)
    next(iter(stream))
    assert metric(server.url, "requests_running") == 1
    stream.close()
    wait_until_idle(server.url)

    async def test() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as leaving:
            async with await leaving.completions.create(**fields) as stream:
                await anext(aiter(stream))
                assert metric(server.url, "requests_running") == 1
            await asyncio.to_thread(wait_until_idle, server.url)

    run(test)
    assert metric(server.url, 'requests_total{model="[^"]*",outcome="abort"') >= 2


@contract("clients", "openai SDK", "a 400 is a BadRequestError with message, type, param and code")
@pytest.mark.parametrize(
    ("fields", "param", "code", "message"),
    [
        ({"n": 0}, "n", None, "'n': input should be greater than or equal to 1"),
        ({"temperature": 3}, "temperature", None, "less than or equal to 2"),
        ({"best_of": 2, "stream": True}, "best_of", None, "can't be streamed"),
        ({"stream_options": {"include_usage": True}}, "stream_options", None, "allowed only with stream true"),
        ({"max_tokens": 100_000}, "prompt", "context_length_exceeded", "100004 tokens (4 in the prompt, 100000 for the"),
        ({"prompt": [464, 9_999_999]}, "prompt", None, "token id 9999999 is outside the model's vocabulary"),
        ({"logit_bias": {"11": 101}}, "logit_bias", None, "the bias of token 11 must be a number from -100 to 100"),
        ({"suffix": "the end"}, "suffix", "unsupported_parameter", ""),
        ({"extra_body": {"colour": "red"}}, "colour", "unknown_parameter", "unknown field 'colour'"),
    ],
)
def test_bad_requests(
    client: openai.OpenAI, model: str, fields: dict[str, Any], param: str, code: str | None, message: str
) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(**{"model": model, "prompt": TEXT} | fields)
    error = raised.value
    assert (error.status_code, error.type, error.param, error.code) == (400, "invalid_request_error", param, code)
    assert message in str(error)
    assert error.request_id == error.response.headers["x-request-id"]


@contract("clients", "openai SDK", "an unknown model is a NotFoundError")
def test_an_unknown_model(client: openai.OpenAI) -> None:
    for ask in (
        lambda: client.completions.create(model="other", prompt=TEXT),
        lambda: client.chat.completions.create(model="other", messages=[{"role": "user", "content": "Hi"}]),
        lambda: client.models.retrieve("other"),
    ):
        with pytest.raises(openai.NotFoundError, match="the model 'other' does not exist") as raised:
            ask()
        assert (raised.value.param, raised.value.code) == ("model", "model_not_found")


@contract("clients", "openai SDK", "no route is a NotFoundError")
def test_an_unknown_route(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError, match="no route POST /v1/embeddings") as raised:
        client.embeddings.create(model=model, input=TEXT)
    assert raised.value.code == "not_found"


@contract(
    "clients",
    "openai SDK",
    "a wrong key is an AuthenticationError",
    "a key's limit is a RateLimitError, and every response tells of the limits",
)
def test_keys_and_their_limits(keyed: Served) -> None:
    with sdk(keyed.url, "sk-wrong") as client:
        for ask in (client.models.list, lambda: client.completions.create(model="any", prompt=TEXT)):
            with pytest.raises(openai.AuthenticationError, match="missing or wrong API key") as denied:
                ask()
            assert (denied.value.code, denied.value.type) == ("invalid_api_key", "invalid_request_error")

    with sdk(keyed.url, "sk-right") as client:
        model = client.models.list().data[0].id
        for remaining in (1, 0):
            raw = client.completions.with_raw_response.create(model=model, prompt=TEXT, max_tokens=1)
            assert raw.headers["x-ratelimit-limit-requests"] == "2"
            assert raw.headers["x-ratelimit-remaining-requests"] == str(remaining)
        with pytest.raises(openai.RateLimitError, match="this key's limit is 2 requests a minute") as limited:
            client.completions.create(model=model, prompt=TEXT, max_tokens=1)
        error = limited.value
        assert (error.code, error.type, error.param) == ("rate_limit_exceeded", "rate_limit_error", None)
        assert 1 <= int(error.response.headers["retry-after"]) <= 30
        assert error.response.headers["x-ratelimit-remaining-requests"] == "0"


@contract("clients", "openai SDK", "a full queue is a RateLimitError with Retry-After")
def test_a_full_queue() -> None:
    async def test() -> None:
        fake = FakeEngine(max_slots=1, max_queue=0)
        async with faked(fake) as client:
            fake.runner.gate.clear()
            first = asyncio.create_task(client.completions.create(model="fake", prompt=TEXT))
            await until(lambda: bool(fake.scheduler.running))
            with pytest.raises(openai.RateLimitError) as raised:
                await client.completions.create(model="fake", prompt=TEXT)
            assert raised.value.code == "server_busy"
            assert int(raised.value.response.headers["retry-after"]) >= 1
            fake.runner.gate.set()
            assert (await first).choices[0].finish_reason == "length"

    run(test)


@contract(
    "clients",
    "openai SDK",
    "a fault in the middle of a stream is an APIError, one before its first byte an InternalServerError",
)
def test_faults_of_the_server() -> None:
    async def test() -> None:
        fake = FakeEngine()

        def fault(step: StepInput) -> None:
            if len(fake.runner.steps) > 3 and step.token_rows[0] < fake.scheduler.max_rows:  # the canary's row is right
                raise RuntimeError("device on fire")

        fake.runner.fault = fault
        async with faked(fake) as client:
            chunks = []

            async def read() -> None:
                async for chunk in await client.completions.create(model="fake", prompt=TEXT, max_tokens=50, stream=True):
                    chunks.append(chunk)

            with pytest.raises(openai.APIError) as broken:
                await read()
            assert text_of(chunks).startswith(" one")
            assert (broken.value.code, broken.value.type) == ("internal_error", "server_error")
            assert "on fire" not in str(broken.value)
            with pytest.raises(openai.InternalServerError) as refused:
                await client.completions.create(model="fake", prompt=TEXT, stream=True)
            assert refused.value.code == "internal_error"
            assert "on fire" not in str(refused.value)

    run(test)


@contract(
    "clients", "openai SDK", "`_request_id` and the raw response's headers name the request, a client's own id is kept"
)
def test_ids_and_headers(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt=TEXT, max_tokens=1)
    assert str(answer._request_id).startswith("req_")
    raw = client.completions.with_raw_response.create(
        model=model, prompt=TEXT, max_tokens=1, extra_headers={"X-Request-Id": "mine-1"}
    )
    assert (raw.http_response.status_code, raw.request_id) == (200, "mine-1")
    assert raw.parse()._request_id == "mine-1"
    assert int(raw.headers["openai-processing-ms"]) >= 0
    assert raw.headers["openai-version"] == "2020-10-01"
    assert raw.headers["content-type"] == "application/json"
    with client.completions.with_streaming_response.create(model=model, prompt=TEXT, max_tokens=1, stream=True) as streaming:
        assert streaming.headers["content-type"].startswith("text/event-stream")
        assert streaming.headers["cache-control"] == "no-cache"
        assert streaming.headers["x-accel-buffering"] == "no"
        assert list(streaming.iter_lines())[-2:] == ["data: [DONE]", ""]


@contract("clients", "openai SDK", "`models.list` and `models.retrieve`")
def test_models(client: openai.OpenAI, model: str) -> None:
    [listed] = client.models.list()
    assert (listed.id, listed.object, listed.owned_by) == (model, "model", "banded")
    assert listed.created > 1_500_000_000
    assert client.models.retrieve(model) == listed


HELLO: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


@contract("clients", "openai SDK", "`chat.completions.create`, with content as text or as parts")
def test_a_chat(client: openai.OpenAI, model: str) -> None:
    fields: dict[str, Any] = {"model": model, "seed": 5, "n": 2, "max_completion_tokens": 8, "extra_body": UNENDED}
    answer: ChatCompletion = client.chat.completions.create(messages=HELLO, **fields)
    assert (answer.object, answer.model) == ("chat.completion", model)
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.message.role == "assistant"
        assert choice.message.content
        assert (choice.message.refusal, choice.message.tool_calls) == (None, None)
        assert choice.finish_reason == "length"

    parts = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in HELLO]
    again = client.chat.completions.create(messages=parts, **fields)
    assert [choice.message for choice in again.choices] == [choice.message for choice in answer.choices]


@contract("clients", "openai SDK", "`chat.completions.create` with every field at null")
def test_a_chat_takes_null_for_every_field(client: openai.OpenAI, model: str) -> None:
    names = set(ChatParams.__annotations__) | fields_of(client.chat.completions.create)
    fields: dict[str, Any] = dict.fromkeys(names - {"model", "messages"})
    answer = client.chat.completions.create(model=model, messages=HELLO, **fields | {"max_tokens": 1})
    assert answer.choices[0].finish_reason in ("stop", "length")


@contract(
    "clients", "openai SDK", "`chat.completions.create` with the values that change nothing, and notes about the request"
)
def test_a_chat_takes_values_that_change_nothing(client: openai.OpenAI, model: str) -> None:
    fields: dict[str, Any] = {"model": model, "messages": HELLO, "seed": 5, "max_tokens": 8, "extra_body": UNENDED}
    neutral: dict[str, Any] = {
        "logit_bias": {},
        "metadata": {"team": "one"},
        "modalities": ["text"],
        "parallel_tool_calls": True,
        "prompt_cache_key": "key",
        "reasoning_effort": "none",
        "response_format": {"type": "text"},
        "safety_identifier": "hash",
        "service_tier": "auto",
        "store": False,
        "tool_choice": "none",
        "tools": [],
        "user": "somebody",
        "verbosity": "medium",
    }
    plain = client.chat.completions.create(**fields)
    assert client.chat.completions.create(**fields, **neutral).choices == plain.choices


@contract("clients", "openai SDK", "a chat field with an effect that this server lacks is a BadRequestError")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("verbosity", "high"),
        ("modalities", ["text", "audio"]),
    ],
)
def test_a_chat_field_without_effect_is_refused(client: openai.OpenAI, model: str, field: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=f"'{field}': not supported by this server") as raised:
        client.chat.completions.create(**{"model": model, "messages": HELLO, field: value})
    assert (raised.value.param, raised.value.code) == (field, "unsupported_parameter")


@contract("clients", "openai SDK", "a chat's stream: the role first, then text, the reason and the usage")
def test_a_chat_as_a_stream(client: openai.OpenAI, model: str) -> None:
    fields: dict[str, Any] = {"model": model, "messages": HELLO, "seed": 5, "max_tokens": 8, "extra_body": UNENDED}
    whole = client.chat.completions.create(**fields)
    *chunks, last = client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    assert (last.choices, last.usage) == ([], whole.usage)
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert (choices[0].delta.role, choices[0].delta.content) == ("assistant", "")
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert {(chunk.id, chunk.object) for chunk in [*chunks, last]} == {(last.id, "chat.completion.chunk")}


@contract("clients", "openai SDK", "`chat.completions.stream`: its events, and the completion that they add up to")
def test_the_stream_helper_adds_a_chat_up(client: openai.OpenAI, model: str) -> None:
    fields: dict[str, Any] = {"model": model, "messages": HELLO, "seed": 5, "max_tokens": 8, "extra_body": UNENDED}
    unstopped = client.chat.completions.create(**fields).choices[0].message.content or ""
    fields["stop"] = unstopped[len(unstopped) // 2 :]  # for the SDK an answer that ran into its limit is an error
    whole = client.chat.completions.create(**fields)
    assert whole.choices[0].message.content
    with client.chat.completions.stream(**fields, stream_options={"include_usage": True}) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    assert {event.type for event in events} == {"chunk", "content.delta", "content.done"}
    assert "".join(event.delta for event in events if event.type == "content.delta") == whole.choices[0].message.content
    [done] = [event for event in events if event.type == "content.done"]
    assert done.content == whole.choices[0].message.content
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert (final.choices[0].finish_reason, final.usage) == ("stop", whole.usage)
    assert final.system_fingerprint == whole.system_fingerprint

    async def test() -> None:
        async with (
            openai.AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0) as other,
            other.chat.completions.stream(**fields) as stream,
        ):
            assert (await stream.get_final_completion()).choices[0].message.content == done.content

    run(test)


@contract("clients", "openai SDK", "logprobs of a chat, whole and through the stream helper")
def test_logprobs_of_a_chat(client: openai.OpenAI, model: str) -> None:
    fields: dict[str, Any] = {
        "model": model,
        "messages": HELLO,
        "temperature": 0,
        "max_tokens": 5,
        "logprobs": True,
        "top_logprobs": 3,
        "extra_body": UNENDED,
    }
    found = client.chat.completions.create(**fields).choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert len(found.content) == 5
    for token in found.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(other.logprob for other in token.top_logprobs), "greedy"
        assert token.bytes is not None
        assert token.token.encode() == bytes(token.bytes) or token.token.startswith("bytes:")

    with client.chat.completions.stream(**fields) as stream:
        events = list(stream)
    pieces = [token.token for event in events if event.type == "logprobs.content.delta" for token in event.content]
    [done] = [event for event in events if event.type == "logprobs.content.done"]
    assert pieces == [token.token for token in done.content] == [token.token for token in found.content]


@contract("clients", "openai SDK", "a chat's stream that is left early frees its slot")
def test_a_chat_left_early_frees_its_slot(server: Served, client: openai.OpenAI, model: str) -> None:
    with client.chat.completions.stream(
        model=model, messages=HELLO, max_tokens=LONG, extra_body=UNENDED | {"seed": 1}
    ) as stream:
        for event in stream:
            if event.type == "content.delta":
                break
        assert metric(server.url, "requests_running") == 1
    wait_until_idle(server.url)
