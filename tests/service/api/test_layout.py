"""What fields say about a prompt's beginning and end: bos, truncation, and how the messages of a chat end."""

import copy
from typing import Any

import httpx
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from model.checkpoint.prompt_format import CHAT_TEMPLATE, PromptFormat, Turn
from model.checkpoint.tokenizer import Tokenizer, r50k_base
from service.engine.prompts import chat_prompt
from service.engine.request import Prompt, RequestError, end_of
from tests.conformance import contract
from tests.service.api.helpers import error_of, post, prompts_run, request, serving
from tests.service.engine.fakes import FakeEngine
from tests.service.helpers import run

PLAIN = FakeEngine.tokenizer
BOS = 50256
HELLO = {"role": "user", "content": "Hello"}


@pytest.fixture
def with_bos(monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    """A tokenizer that begins every prompt with bos."""
    tokenizer = copy.copy(r50k_base())
    tokenizer.bos_id = BOS
    monkeypatch.setattr(FakeEngine, "tokenizer", tokenizer)
    return tokenizer


def chat(fake: FakeEngine | None = None, **fields: Any) -> httpx.Response:
    return request("POST", "/v1/chat/completions", fake, json={"messages": [HELLO], "max_tokens": 1} | fields)


def chat_text(**fields: Any) -> str:
    fake = FakeEngine()
    assert chat(fake, **fields).status_code == 200
    return PLAIN.decode(prompts_run(fake)[0])


@contract("completions", "add_special_tokens", "false: no bos where the checkpoint asks for it")
@pytest.mark.usefixtures("with_bos")
def test_prompts_without_bos() -> None:
    for prompt, adds, tokens in (
        ("Once upon", True, [BOS, 7454, 2402]),
        ("Once upon", None, [BOS, 7454, 2402]),
        ("Once upon", False, [7454, 2402]),
        ("", False, [PLAIN.eos_id]),
        ([7454], False, [7454]),
        ([7454], True, [7454]),
    ):
        fake = FakeEngine()
        assert post({"prompt": prompt, "max_tokens": 1, "add_special_tokens": adds}, fake).status_code == 200
        assert prompts_run(fake) == [tokens]
    fake = FakeEngine()
    assert post({"prompt": "a", "few_shot": {}, "max_tokens": 1, "add_special_tokens": False}, fake).status_code == 200
    assert BOS not in prompts_run(fake)[0]


@contract("chat", "add_special_tokens", "false: bos only where the template writes it")
@pytest.mark.usefixtures("with_bos")
def test_chats_without_bos() -> None:
    assert chat_text() == "<|endoftext|>User: Hello\nAssistant:"
    assert chat_text(add_special_tokens=False) == "User: Hello\nAssistant:"
    template = "{{ bos_token }}{{ messages[0].content }}"
    layout = PromptFormat(chat_template=template, token_names={"bos_token": "<|endoftext|>"})
    tokens = chat_prompt([Turn("user", "Hello")], layout, FakeEngine.tokenizer.without_bos()).tokens
    assert tokens == [BOS, *PLAIN.encode("Hello")]


@contract("tokenize", "add_special_tokens, add_generation_prompt, continue_final_message", "as in chats")
@pytest.mark.usefixtures("with_bos")
def test_tokenize_lays_out_like_a_chat() -> None:
    def text(**fields: Any) -> str:
        body = {"messages": [HELLO, {"role": "assistant", "content": "Hi"}]}
        return PLAIN.decode(request("POST", "/tokenize", json=body | fields).json()["tokens"])

    whole = "User: Hello\nAssistant: Hi\nAssistant:"
    assert text() == "<|endoftext|>" + whole
    assert text(add_special_tokens=False) == whole
    assert text(add_special_tokens=False, add_generation_prompt=False) == whole.removesuffix("Assistant:")
    assert text(add_special_tokens=False, continue_final_message=True) == "User: Hello\nAssistant: Hi"
    assert request("POST", "/tokenize", json={"prompt": "a", "add_special_tokens": False}).json()["tokens"] == [64]


@pytest.mark.parametrize("most", [None, 1, 2, 3, 4, 5, 6, 100])
@pytest.mark.parametrize("num_implicit", [0, 1])
def test_the_end_of_a_prompt(most: int | None, num_implicit: int) -> None:
    tokens = [BOS] * num_implicit + [1, 2, 3, 4]
    kept = end_of(Prompt(tokens, num_implicit), most).tokens
    assert kept[:num_implicit] == [BOS] * num_implicit
    assert len(kept) == min(len(tokens), 100 if most is None else most)
    assert [1, 2, 3, 4][4 - len(kept) + num_implicit :] == kept[num_implicit:]


@contract("completions", "truncate_prompt_tokens", "keeps the last k tokens; -1: as many as the context has room for")
def test_truncated_prompts(with_bos: Tokenizer) -> None:
    words = " a" * 5000
    for fields, tokens in (
        ({"prompt": "Once upon a time", "truncate_prompt_tokens": 3}, [BOS, 257, 640]),
        ({"prompt": "Once upon", "truncate_prompt_tokens": 3}, [BOS, 7454, 2402]),
        ({"prompt": [1, 2, 3, 4], "truncate_prompt_tokens": 3.0}, [2, 3, 4]),
        ({"prompt": words, "truncate_prompt_tokens": 5}, [BOS, 257, 257, 257, 257]),
        ({"prompt": words, "truncate_prompt_tokens": -1, "max_tokens": 6}, [BOS] + [257] * 249),
        ({"prompt": "Once", "truncate_prompt_tokens": -1}, [BOS, 7454]),
    ):
        fake = FakeEngine()
        answer = post({"max_tokens": 1, **fields}, fake)
        assert answer.status_code == 200, answer.text
        assert prompts_run(fake) == [tokens]
        assert answer.json()["usage"]["prompt_tokens"] == len(tokens)
    echoed = post({"prompt": "Once upon a time", "truncate_prompt_tokens": 3, "echo": True, "max_tokens": 0, "logprobs": 0})
    assert echoed.json()["choices"][0]["text"] == " a time"
    assert with_bos.bos_id == BOS


@contract("chat", "truncate_prompt_tokens", "keeps the last k tokens; -1: as many as the context has room for")
def test_truncated_chats() -> None:
    assert chat_text(truncate_prompt_tokens=3) == PLAIN.decode(PLAIN.encode("User: Hello\nAssistant:")[-3:])
    long = [{"role": "user", "content": " a" * 5000}]
    for limit in ("max_tokens", "max_completion_tokens"):
        limits: dict[str, Any] = {"max_tokens": None, limit: 6}
        answer = chat(messages=long, truncate_prompt_tokens=-1, **limits)
        assert answer.json()["usage"] | {"prompt_tokens_details": None} == {
            "prompt_tokens": 250,
            "completion_tokens": 6,
            "total_tokens": 256,
            "prompt_tokens_details": None,
        }


@contract("completions", "truncate_prompt_tokens", "0, or together with suffix or few_shot: 400")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"truncate_prompt_tokens": 0}, "must be -1 or at least 1, got 0"),
        ({"truncate_prompt_tokens": -2}, "input should be greater than or equal to -1"),
        ({"truncate_prompt_tokens": 5, "few_shot": {}}, "can't be used together with suffix or few_shot"),
        ({"truncate_prompt_tokens": 5, "suffix": "x"}, "can't be used together with suffix or few_shot"),
    ],
)
def test_truncation_that_is_refused(fields: dict[str, Any], message: str) -> None:
    error = error_of(post({"prompt": "a", **fields}), 400)
    assert (error["message"], error["param"]) == (f"'truncate_prompt_tokens': {message}", "truncate_prompt_tokens")


def test_truncation_does_not_make_room_that_is_not_there() -> None:
    error = error_of(post({"prompt": [5] * 300, "truncate_prompt_tokens": 250, "max_tokens": 7}), 400)
    assert "257 tokens (250 in the prompt, 7 for the completion)" in error["message"]


@contract("chat", "continue_final_message", "the answer goes on inside the last message")
@contract("chat", "add_generation_prompt", "false: without the beginning of an answer")
def test_how_a_chat_ends() -> None:
    messages = [HELLO, {"role": "assistant", "content": "Once upon"}]
    assert chat_text(messages=messages) == "User: Hello\nAssistant: Once upon\nAssistant:"
    assert chat_text(messages=messages, add_generation_prompt=True) == "User: Hello\nAssistant: Once upon\nAssistant:"
    assert chat_text(messages=messages, add_generation_prompt=False) == "User: Hello\nAssistant: Once upon\n"
    for more in ({}, {"add_generation_prompt": False}):
        assert chat_text(messages=messages, continue_final_message=True, **more) == "User: Hello\nAssistant: Once upon"
    error = error_of(chat(continue_final_message=True, add_generation_prompt=True), 400)
    assert error["message"] == "'continue_final_message': can't be used together with add_generation_prompt"


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRAILING = "{% for message in messages %}[{{ message.content }}] {{ message.content }}. {% endfor %}"


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHATML, TRAILING])
@pytest.mark.parametrize(
    "content", ["Once upon", "Once upon ", "\n  Once\n", "", "a", "User:", "Hello", "<|endoftext|> and"]
)
@pytest.mark.parametrize("adds", [False, True])
def test_a_continued_message_is_what_transformers_makes_of_it(template: str, content: str, adds: bool) -> None:
    turns = [Turn("system", "Be brief."), Turn("user", "Hello"), Turn("assistant", content)]
    messages = [turn._asdict() for turn in turns]
    layout = PromptFormat(chat_template=template)
    for continues in (False, True):
        rendered, _ = render_jinja_template(
            [messages], chat_template=template, continue_final_message=continues, add_generation_prompt=adds
        )
        prompt = chat_prompt(turns, layout, PLAIN, add_generation_prompt=adds, continue_final_message=continues)
        # It leaves its own tag in where a template writes a content twice.
        assert PLAIN.decode(prompt.tokens) == rendered[0].replace("CONTINUE_FINAL_MESSAGE_TAG ", "")
        assert BOS not in prompt.tokens


def test_a_template_that_leaves_the_last_message_out() -> None:
    layout = PromptFormat(chat_template="{{ messages[0].content }}")
    with pytest.raises(
        RequestError, match="the model's chat template leaves out the final message, so nothing continues it"
    ):
        chat_prompt([Turn("user", "a"), Turn("assistant", "b")], layout, PLAIN, continue_final_message=True)
    layout = PromptFormat(chat_template="{{ raise_exception(messages[0].content) }}")
    with pytest.raises(RequestError, match=r"does not take these messages: b$"):
        chat_prompt([Turn("assistant", "b")], layout, PLAIN, continue_final_message=True)

    async def test() -> None:
        async with serving(prompt_format=PromptFormat(chat_template="x")) as api:
            body = {"messages": [HELLO], "continue_final_message": True}
            error = error_of(await api.client.post("/v1/chat/completions", json=body), 400)
            assert error["param"] == "messages"

    run(test)
