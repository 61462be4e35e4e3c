"""/tokenize, /detokenize and /tokenizer_info."""

from typing import Any

import pytest

from model.checkpoint.prompt_format import PromptFormat
from service.api import limits
from tests.conformance import contract
from tests.service.api.helpers import error_of, request, serving
from tests.service.engine.fakes import FakeEngine
from tests.service.helpers import run

TOKENIZER = FakeEngine.tokenizer


def tokenize(**fields: Any) -> Any:
    answer = request("POST", "/tokenize", json=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


@contract("tokenize", "add_special_tokens", "bos where the checkpoint asks for it")
@contract("tokenize", "prompt", "token ids in vLLM's form, special-token text read as special")
@pytest.mark.parametrize(
    ("text", "tokens"), [("Once upon", [7454, 2402]), ("<|endoftext|>", [50256]), ("", []), ("a" * 5000, None)]
)
def test_tokenize(text: str, tokens: list[int] | None) -> None:
    tokens = TOKENIZER.encode(text) if tokens is None else tokens
    expected = {"count": len(tokens), "max_model_len": 256, "tokens": tokens, "token_strs": None}
    assert tokenize(prompt=text) == tokenize(prompt=text, model="fake", add_special_tokens=False) == expected


@contract("tokenize", "return_token_strs", "lossless names beside the ids")
def test_token_strs() -> None:
    assert tokenize(prompt="é<|endoftext|>", return_token_strs=True)["token_strs"] == ["é", "<|endoftext|>"]


@contract("tokenize", "messages", "a chat as the template lays it out")
def test_tokenize_messages() -> None:
    messages = [{"role": "user", "content": "Hello"}]
    assert tokenize(messages=messages)["tokens"] == TOKENIZER.encode("User: Hello\nAssistant:")


@contract("detokenize", "tokens", "their text, special tokens spelt out")
@pytest.mark.parametrize(("tokens", "text"), [([7454, 2402], "Once upon"), ([50256], "<|endoftext|>"), ([], "")])
def test_detokenize(tokens: list[int], text: str) -> None:
    assert request("POST", "/detokenize", json={"tokens": tokens, "model": "fake"}).json() == {"prompt": text}


@contract("tokenize", "anything else", "--lenient turns it into an entry of warnings")
@contract("detokenize", "anything else", "--lenient turns it into an entry of warnings")
def test_lenient() -> None:
    async def test() -> None:
        async with serving(lenient=True) as api:
            for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [64]})):
                answer = (await api.client.post(path, json=body | {"colour": 1})).json()
                assert answer["warnings"] == ["the unknown field 'colour' was ignored"]

    run(test)


@contract("tokenizer_info", "response", "special tokens and chat template, as a tokenizer class reads them")
def test_tokenizer_info() -> None:
    info = request("GET", "/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"]) == ("<|endoftext|>", None)
    assert info["tokenizer_class"] == "GPT2Tokenizer"
    assert "Assistant:" in info["chat_template"]


@contract("chat", "messages", "a model whose template can't be used refuses chats with the reason, and completes text")
def test_a_model_that_can_not_chat() -> None:
    async def test() -> None:
        broken = PromptFormat(chat_problem="chat_template does not compile: line 2: no")
        async with serving(prompt_format=broken) as api:
            body = {"messages": [{"role": "user", "content": "a"}]}
            for path in ("/v1/chat/completions", "/tokenize"):
                error = error_of(await api.client.post(path, json={"model": "fake", **body}), 400)
                assert error["message"] == "'messages': the model can't chat: chat_template does not compile: line 2: no"
                assert error["param"] == "messages"
            assert (await api.complete(prompt="a")).status_code == 200
            assert (await api.client.get("/tokenizer_info")).json()["chat_template"] is None

    run(test)


@contract("tokenize", "model", "the only one when none is named; unknown: 404")
@contract("detokenize", "model", "the only one when none is named; unknown: 404")
@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/tokenize", {}, 400, "'prompt': exactly one of prompt and messages is needed"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "the model 'other' does not exist; this server has 'fake'"),
        ("/tokenize", {"prompt": "a", "colour": 1}, 400, "unknown field 'colour'"),
        ("/tokenize", {"prompt": 5}, 400, "'prompt': input should be a valid string"),
        ("/detokenize", {"tokens": [], "model": "other"}, 404, "the model 'other' does not exist; this server has 'fake'"),
        ("/detokenize", {}, 400, "'tokens' is required"),
        (
            "/detokenize",
            {"tokens": [50257]},
            400,
            "token id 50257 is outside the model's vocabulary of 50257 (0 to 50256)",
        ),
        ("/detokenize", {"tokens": [-1]}, 400, "token id -1 is outside the model's vocabulary of 50257 (0 to 50256)"),
        ("/detokenize", {"tokens": "abc"}, 400, "'tokens': input should be a valid list"),
    ],
)
def test_what_is_refused(path: str, body: object, status: int, message: str) -> None:
    assert error_of(request("POST", path, json=body), status)["message"] == message


@contract("errors", "429", "/tokenize and /detokenize count to a key's requests and tokens")
def test_texts_count_to_a_keys_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MINUTE", 1e9)  # nothing is refilled

    async def test() -> None:
        async with serving(api_keys=("a",), limit_requests=9, limit_tokens=60) as api:
            headers = {"authorization": "Bearer a"}

            async def left(status: int, path: str, **body: Any) -> list[int]:
                answer = await api.client.post(path, json=body, headers=headers)
                assert answer.status_code == status, answer.text
                return [int(answer.headers[f"x-ratelimit-remaining-{unit}"]) for unit in ("requests", "tokens")]

            assert await left(200, "/tokenize", prompt="one two three") == [8, 57]
            assert await left(200, "/tokenize", messages=[{"role": "user", "content": "Hello"}]) == [7, 51]
            assert await left(200, "/detokenize", tokens=[1] * 20) == [6, 31]
            assert await left(429, "/detokenize", tokens=[1] * 32) == [5, 31]
            assert await left(200, "/tokenize", prompt=" one" * 80) == [4, 0], "more than a minute's tokens are a minute's"
            answer = await api.client.post("/tokenize", json={"prompt": "one"}, headers=headers)
            error = error_of(answer, 429, "rate_limit_error")
            assert error["message"].startswith("this key's limit is 60 tokens a minute; the request needs 1 and 0 are left")

    run(test)
