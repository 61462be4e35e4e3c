"""Large bodies: what is refused unread, and that reading them elsewhere and in pieces changes nothing."""

import asyncio
import json
import re
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.checkpoint import tokenizer as tokenizers
from service.api import bodies, encoding
from service.api.bodies import MAX_CONTAINERS, SHORT_BODY, load_json, num_containers
from service.api.routes import tokenization
from service.api.schema.base import MAX_FIELDS
from service.api.schema.fields import MAX_BIASES
from service.engine import workers
from service.engine.workers import LARGE_AT_ONCE, Slices, current_client, off_the_loop
from tests.conformance import contract
from tests.service.api.helpers import error_of, post, request, serving
from tests.service.engine.fakes import FakeEngine
from tests.service.helpers import run, until

TOKENIZER = FakeEngine.tokenizer
NUMBERS = st.integers() | st.floats(allow_nan=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text('a"\\[{', max_size=3), inner),
    max_leaves=20,
)


def containers_of(value: object) -> int:
    if isinstance(value, dict):
        return 1 + sum(map(containers_of, value.values()))
    return 1 + sum(map(containers_of, value)) if isinstance(value, list) else 0


class TestLoading:
    @settings(max_examples=200)
    @given(value=JSON, piece=st.integers(2, 9), is_ascii=st.booleans())
    def test_arrays_and_objects_are_counted(self, value: Any, piece: int, is_ascii: bool) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bodies, "PIECE", piece)
            assert num_containers(json.dumps(value, ensure_ascii=is_ascii)) == containers_of(value)

    @settings(max_examples=200)
    @given(value=JSON, encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))
    def test_any_value_is_read_as_json_does(self, value: Any, encoding: str) -> None:
        read = load_json(json.dumps(value).encode(encoding))
        assert read == value
        assert repr(read) == repr(value), "integers and floats stay apart"

    @pytest.mark.parametrize("text", ['"', '"\\', '"[', '["a"', '["\\"', '"\\' * 50_000, '"a' * 50_001])
    def test_what_ends_inside_a_string_is_counted_at_once(self, text: str) -> None:
        assert num_containers(text) == text.startswith("[")


@contract("errors", "413", "a body of more arrays and objects than any request needs")
@pytest.mark.parametrize("item", ["[]", "{}", '{"a":[]}'])
def test_too_many_arrays_and_objects(item: str) -> None:
    count = MAX_CONTAINERS // (item.count("[") + item.count("{")) + 1
    error = error_of(post('{"metadata":{"a":[' + ",".join([item] * count) + "]}}"), 413)
    assert error["message"] == "the body holds more than 131072 arrays and objects, as no request needs"
    assert error["code"] == "body_too_large"


@pytest.mark.parametrize("around", ["%s", '{"few_shot": %s, "prompt": "a"}'])
def test_too_many_fields(around: str) -> None:
    fields = {f"f{i}": 0 for i in range(MAX_FIELDS + 1)}
    error = error_of(post(around % json.dumps(fields)), 413)
    assert error["message"] == "the body holds an object of 1025 fields, at most 1024 are read"
    assert error["code"] == "body_too_large"
    del fields["f0"]
    assert "unknown field" in error_of(post(around % json.dumps(fields)), 400)["message"]


def test_brackets_inside_strings_are_no_arrays() -> None:
    assert request("POST", "/tokenize", json={"prompt": "[{" * MAX_CONTAINERS}).status_code == 200


@contract("errors", "400", "a large body is refused with the words of a small one")
@pytest.mark.parametrize(
    "body",
    [
        b'{"n": 0}',
        b'{"n": 1.5, "max_tokens": []}',
        b'{"unheard": 0}',
        b'{"prompt": [[1], "a"]}',
        b'{"stop_token_ids": [1, 2, "a", "b"]}',
        b'{"few_shot": {"examples": [{"input": 1}]}, "prompt": "a"}',
        b'{"stream_options": {"x": 1}, "stream": true}',
        b'{"best_of": 1, "n": 2}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "a}',
        b"[]",
        b'"text"',
        b'{"metadata": %b1%b}' % (b"[" * 3000, b"]" * 3000),
        b'{"n": %b}' % (b"9" * 5000),
    ],
)
def test_the_same_errors(body: bytes) -> None:
    assert len(body) < SHORT_BODY
    small, large = post(body), post(b" " * SHORT_BODY + body)
    assert small.status_code == 400
    expected = small.json()["error"]
    expected["message"] = re.sub(r"(?<=at character )\d+", lambda at: str(SHORT_BODY + int(at[0])), expected["message"])
    assert large.json()["error"] == expected


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "application/vnd.any+json", "text/plain", ""])
def test_the_same_content_types(content_type: str) -> None:
    small, large = (post(b'{"max_tokens": 1}' + b" " * count, content_type=content_type) for count in (0, SHORT_BODY))
    assert small.status_code == large.status_code == (200 if "json" in content_type else 400)
    assert large.json().get("error") == small.json().get("error")


def test_large_bodies_are_read_in_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def noting(body: bytes) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return load_json(body)

    monkeypatch.setattr(bodies, "load_json", noting)
    fields = {"metadata": {"a": "b" * SHORT_BODY}, "max_tokens": 1}
    for path, more in (
        ("/v1/completions", fields),
        ("/v1/engines/fake/completions", fields),
        ("/v1/chat/completions", {**fields, "messages": [{"role": "user", "content": "a"}]}),
        ("/v1/score", {"continuations": ["a"], "user": "b" * SHORT_BODY}),
        ("/tokenize", {"prompt": "a " * SHORT_BODY}),
        ("/detokenize", {"tokens": [1] * SHORT_BODY}),
    ):
        answer = request("POST", path, json=more)
        assert answer.status_code == 200, answer.text
    assert threads == [False] * 6


def test_four_large_requests_are_worked_on_at_a_time() -> None:
    running: list[int] = []
    go = threading.Event()

    def work(number: int) -> None:
        running.append(number)
        assert go.wait(20)

    async def large(number: int) -> None:
        current_client.set(number % 2)
        await off_the_loop(2**20, lambda: work(number))

    async def test() -> None:
        waiting = [asyncio.create_task(large(number)) for number in range(6)]
        await until(lambda: len(running) == LARGE_AT_ONCE)
        await asyncio.sleep(0.02)
        assert running == list(range(LARGE_AT_ONCE)) == [0, 1, 2, 3]
        go.set()
        await asyncio.gather(*waiting)
        assert sorted(running) == list(range(6))

    run(test)


def test_long_work_on_the_event_loop_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    async def turns(seconds: float) -> int:
        monkeypatch.setattr(workers, "SLICE_SECONDS", seconds)
        count = 0

        async def other() -> None:
            nonlocal count
            while True:
                count += 1
                await asyncio.sleep(0)

        task, slices = asyncio.ensure_future(other()), Slices()
        for _ in range(10):
            await slices.rest()
        task.cancel()
        return count

    assert asyncio.run(turns(60.0)) == 0
    assert asyncio.run(turns(-1.0)) == 10


@contract("tokenize", "prompt", "a text of any length has the tokens of the text; a word of more than 1048576 bytes: 400")
class TestTokenize:
    @pytest.mark.parametrize("strings", [False, True])
    def test_in_pieces(self, strings: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(encoding, "PIECE", 1000)
        text = 'The king\u2028said "\u00e9" \u5929\n' * 5000 + "<|endoftext|> end"
        answer = request("POST", "/tokenize", json={"prompt": text, "return_token_strs": strings})
        assert int(answer.headers["content-length"]) == len(answer.content)
        assert "\u2028" not in answer.text
        tokens = TOKENIZER.encode(text, allow_special=True)
        names = [TOKENIZER.token_name(token) for token in tokens] if strings else None
        assert answer.json() == {"count": len(tokens), "max_model_len": 256, "tokens": tokens, "token_strs": names}

    def test_of_nothing(self) -> None:
        answer = request("POST", "/tokenize", json={"prompt": "", "return_token_strs": True}).json()
        assert answer == {"count": 0, "max_model_len": 256, "tokens": [], "token_strs": []}

    @pytest.mark.parametrize("letter", ["a", " ", "-"])
    def test_a_word_too_long(self, letter: str) -> None:
        error = error_of(request("POST", "/tokenize", json={"prompt": "b " + letter * (2**20 + 5)}), 400)
        assert error["param"] == "prompt"
        assert re.fullmatch(r"'prompt': holds a word of 10485\d\d bytes, at most 1048576 can be tokenized", error["message"])

    def test_a_chat_too_long(self) -> None:
        messages = [{"role": "user", "content": "a " * 600}] * 1000
        error = error_of(request("POST", "/tokenize", json={"messages": messages}), 400)
        assert error["message"] == "'messages': hold 1200000 characters, at most 1048576 are laid out"
        assert error["param"] == "messages"


@contract("completions", "truncate_prompt_tokens", "of a text of any length")
def test_the_end_of_a_long_text() -> None:
    answer = post({"prompt": "the king " * 50_000, "truncate_prompt_tokens": 4, "echo": True, "max_tokens": 0})
    assert answer.json()["choices"][0]["text"] == " the king the king "[-15:]
    error = error_of(post({"prompt": "a" * (2**20 + 1), "truncate_prompt_tokens": 4}), 400)
    assert error["message"] == "'prompt': holds a word of 1048577 bytes, at most 1048576 can be tokenized"
    assert post({"prompt": "a b", "truncate_prompt_tokens": 2**70, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 21])
def test_detokenizing_in_pieces_changes_nothing(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters reach across the pieces' borders, and the text may end inside one."""
    tokens = TOKENIZER.encode('\U0001f600"\n\u2028<|endoftext|>' * 9, allow_special=True)[:count]
    for some in (1, 7, 2**14):
        monkeypatch.setattr(tokenization, "SOME_TOKENS", some)
        answer = request("POST", "/detokenize", json={"tokens": tokens})
        assert answer.json() == {"prompt": TOKENIZER.decode(tokens)}


@settings(max_examples=100)
@given(text=st.lists(st.sampled_from(["a", " ", "\n", "\u00e9", "\u5929", "12", "'s", "--", "<s>", "s>", "<"])).map("".join))
def test_a_text_is_split_at_names_in_pieces(text: str) -> None:
    pattern = tokenizers.any_of(["<s>", "<", "s>a"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "PIECE", 2)
        assert list(tokenizers.split_slowly(pattern, 3, text)) == [piece for piece in pattern.split(text) if piece]


@contract("completions", "logit_bias", "of more entries than any vocabulary has tokens: 400")
def test_too_many_biases() -> None:
    error = error_of(post({"logit_bias": dict.fromkeys(range(MAX_BIASES + 1), 0)}), 400)
    assert error["message"] == "'logit_bias': holds 131073 entries, at most 131072 are allowed"
    assert error["param"] == "logit_bias"


@contract("completions", "few_shot", "a separator longer than the context: 400")
def test_a_separator_too_long() -> None:
    error = error_of(post({"prompt": "a", "few_shot": {"separator": "-" * (256 * 128 + 1)}}), 400)
    assert error["message"].startswith(
        "This model's maximum context length is 256 tokens, but the request asks for a prompt of"
    )
    assert error["param"] == "few_shot.separator"


def test_many_choices_are_made_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    async def test() -> None:
        fake = FakeEngine(max_queue=200)
        prepare = fake.engine._prepare

        def noting(*given: Any) -> None:
            threads.append(threading.current_thread() is threading.main_thread())
            prepare(*given)

        monkeypatch.setattr(fake.engine, "_prepare", noting)
        async with serving(fake) as api:
            few = await api.choices(prompt="a", n=2, max_tokens=2, stop=["x"])
            many = await api.choices(prompt="a", n=100, max_tokens=2, stop=["x"])
            assert [each["text"] for each in few + many] == [few[0]["text"]] * 102

    run(test)
    assert threads == [True, False]
