"""Bodies with the fields that chat front ends send, and their answers read as those front ends read them.

Open WebUI (`routers/openai.py`, `routers/tasks.py`, `utils/payload.py`, `utils/middleware.py` of its backend) posts JSON
with aiohttp. Its own `metadata`, `params`, `files` and `chat_id` stay behind; `max_completion_tokens` is renamed to
`max_tokens` for servers that are not OpenAI's; what an administrator enters as a parameter goes out under its own name.

LibreChat posts through LangChain's ChatOpenAI and OpenAI's SDK for Node, which leave undefined fields out.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import pytest

from tests.serving import Served

PNG = "data:image/png;base64,iVBORw0KGgo="
WEATHER = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {"type": "object"}}}


class Answer(NamedTuple):
    """What a front end has read when a stream ends."""

    text: str
    finish_reason: str
    usage: dict[str, Any] | None


@pytest.fixture
def client(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{server.url}/v1", headers={"authorization": "Bearer sk-none"}, timeout=None) as client:
        yield client


@pytest.fixture
def model(client: httpx.Client) -> str:
    return str(client.get("/models").json()["data"][0]["id"])


def events(client: httpx.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a streamed answer; both front ends tell a stream by its content type and end at [DONE]."""
    with client.stream("POST", "/chat/completions", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        assert "text/event-stream" in answer.headers["content-type"]
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Answer in one sentence."},
    {"role": "user", "content": "Who wrote Faust?"},
    {"role": "assistant", "content": "Goethe did."},
    {"role": "user", "content": "When?"},
]


def read_as_open_webui(chunks: list[dict[str, Any]]) -> Answer:
    """It takes `error` and `usage` of any chunk, passes over chunks without choices, and adds up `content` of the first
    choice's delta, which must not be missing."""
    text, finish_reason, usage = "", "", None
    for chunk in chunks:
        assert "error" not in chunk
        usage = chunk.get("usage") or usage
        if not chunk.get("choices", []):
            continue
        choice = chunk["choices"][0]
        text += choice.get("delta", {}).get("content") or ""
        finish_reason = choice.get("finish_reason") or finish_reason
    return Answer(text, finish_reason, usage)


def test_open_webui_lists_the_models(client: httpx.Client, model: str) -> None:
    headers = {"X-OpenWebUI-User-Name": "A%20User", "X-OpenWebUI-User-Id": "1", "X-OpenWebUI-User-Role": "admin"}
    listed = client.get("/models", headers=headers).json()
    assert "error" not in listed
    assert [entry.get("name", entry["id"]) for entry in listed["data"]] == [model]
    assert not listed["data"][0].get("pipeline"), "it would send `user` as an object"


@pytest.mark.parametrize("with_usage", [True, False])
def test_open_webui_chats(client: httpx.Client, model: str, with_usage: bool) -> None:
    body = {"stream": True, "model": model, "messages": CHAT} | (
        {"stream_options": {"include_usage": True}} if with_usage else {}
    )
    answer = read_as_open_webui(events(client, body))
    assert answer.text
    assert answer.finish_reason in ("stop", "length")
    if with_usage:
        assert answer.usage is not None
        assert answer.usage["total_tokens"] == answer.usage["prompt_tokens"] + answer.usage["completion_tokens"]
    else:
        assert answer.usage is None


def test_open_webui_chats_with_parameters(client: httpx.Client, model: str) -> None:
    body: dict[str, Any] = {
        "stream": True,
        "model": model,
        "messages": CHAT,
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "max_tokens": 12,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.1,
        "seed": 42,
        "stop": ["\nEND", "###"],
        "logit_bias": {"11": -100, "13": -100},
        "stream_options": {"include_usage": True},
    }
    answer = read_as_open_webui(events(client, body))
    assert answer.text
    assert "," not in answer.text
    assert answer.usage is not None
    assert 1 <= answer.usage["completion_tokens"] <= 12
    assert read_as_open_webui(events(client, body)).text == answer.text, "the seed is kept"


def test_open_webui_chats_with_its_tools(client: httpx.Client, model: str) -> None:
    body: dict[str, Any] = {"stream": True, "model": model, "messages": CHAT, "tools": [WEATHER] * 36, "max_tokens": 8}
    chunks = events(client, body)
    assert read_as_open_webui(chunks).text
    assert chunks[0]["warnings"] == ["'tools' was ignored: this server makes no tool calls"]


@pytest.mark.parametrize("limit", [{"max_tokens": 1000}, {}])
def test_open_webui_asks_for_titles_and_tags(client: httpx.Client, model: str, limit: dict[str, int]) -> None:
    task = '### Task:\nName this chat.\n### Output:\nJSON: { "title": "..." }\n### Chat:\nUSER: Who wrote Faust?'
    body = {"model": model, "messages": [{"role": "user", "content": task}], "stream": False, **limit}
    answer = client.post("/chat/completions", json=body)
    assert answer.headers["content-type"] == "application/json"
    [choice] = answer.json()["choices"]
    assert isinstance(choice["message"]["content"], str)
    assert "reasoning_content" not in choice["message"]


def read_as_langchain(chunks: list[dict[str, Any]]) -> Answer:
    """It takes the role from the first delta that has one, needs `delta` in every choice, and counts what is in `usage`."""
    role, text, finish_reason, usage = None, "", "", None
    for chunk in chunks:
        usage = chunk.get("usage") or usage
        if not chunk["choices"]:
            continue
        [choice] = chunk["choices"]
        delta = choice["delta"]
        role = delta.get("role") or role
        assert role == "assistant", "without a role the message is of no kind"
        text += delta.get("content") or ""
        assert not delta.get("tool_calls")
        if choice["finish_reason"] is not None:
            finish_reason = choice["finish_reason"]
            assert chunk["system_fingerprint"]
    if usage is not None:
        assert usage["prompt_tokens_details"]["cached_tokens"] >= 0
    return Answer(text, finish_reason, usage)


def test_librechat_lists_the_models(client: httpx.Client, model: str) -> None:
    listed = client.get("/models", params={"user": "64f1"}, headers={"OpenAI-Organization": "org"}).json()
    assert [entry["id"] for entry in listed["data"]] == [model]


@pytest.mark.parametrize("as_parts", [False, True])
def test_librechat_chats(client: httpx.Client, model: str, as_parts: bool) -> None:
    messages = CHAT
    if as_parts:
        messages = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in CHAT]
    body: dict[str, Any] = {
        "model": model,
        "temperature": 1,
        "top_p": 1,
        "frequency_penalty": 0,
        "presence_penalty": 0,
        "n": 1,
        "user": "64f1c0ffee",
        "stop": ["||>"],
        "max_tokens": 16,
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": messages,
    }
    answer = read_as_langchain(events(client, body))
    assert answer.text
    assert answer.usage is not None
    assert 1 <= answer.usage["completion_tokens"] <= 16


def test_librechat_chats_with_the_defaults(client: httpx.Client, model: str) -> None:
    body = {"model": model, "user": "64f1c0ffee", "stream": True, "messages": CHAT}
    chunks = events(client, body)
    answer = read_as_langchain(chunks)
    assert answer.text
    assert answer.usage is None
    assert not any("usage" in chunk for chunk in chunks)


def test_librechat_asks_for_a_title(client: httpx.Client, model: str) -> None:
    messages = [{"role": "developer", "content": "Write a short title."}, {"role": "user", "content": "User: Hi\nAI: Hello"}]
    body = {"model": model, "temperature": 0.2, "max_completion_tokens": 16, "stream": False, "messages": messages}
    answer = client.post("/chat/completions", json=body).json()
    [choice] = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert isinstance(choice["message"]["content"], str)
    assert answer["usage"]["prompt_tokens"] > 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": [WEATHER], "tool_choice": "required"}, "tool_choice", "'tool_choice': not supported by this server"),
        ({"response_format": {"type": "json_object"}}, "response_format", "'response_format': not supported by this server"),
        ({"repeat_penalty": 1.1}, "repeat_penalty", "'repeat_penalty': not supported by this server"),
        ({"num_ctx": 2048}, "num_ctx", "unknown field 'num_ctx'"),
        ({"max_tokens": -1}, "max_tokens", "'max_tokens': input should be greater than or equal to 1"),
        ({"stop": list("abcdefghijklmnopq")}, "stop", "'stop': holds 17 strings, at most 16 are allowed"),
        ({"user": {"id": "1", "name": "A"}}, "user", "'user': input should be a valid string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PNG}}]}]},
            "messages.0.content",
            "text",
        ),
        ({"messages": [{"role": "tool", "tool_call_id": "1", "content": "sunny"}]}, "messages.0.role", "'messages.0.role'"),
        (
            {"messages": [{"role": "user", "name": "Ada", "content": "Hi"}]},
            "messages.0.name",
            "'messages.0.name': not supported by this server",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(
    client: httpx.Client, model: str, stream: bool, fields: dict[str, Any], param: str, message: str
) -> None:
    body: dict[str, Any] = {"model": model, "messages": CHAT, "stream": stream} | fields
    answer = client.post("/chat/completions", json=body)
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/json", "a front end would take a stream for an answer"
    error = answer.json()["error"]
    assert error["param"] == param
    assert message in error["message"]


def test_a_long_chat_is_refused(client: httpx.Client, model: str) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": " a" * 3000}], "stream": True}
    error = client.post("/chat/completions", json=body).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "This model's maximum context length is 2048 tokens" in error["message"]
