"""logprobs and echo: the four lists, offsets, names of tokens, and what they do together with everything else."""

from typing import Any

import pytest

from tests.conformance import contract
from tests.service.api.helpers import Api, events_of, post, serving
from tests.service.engine.fakes import FakeEngine
from tests.service.helpers import run

TOKENIZER = FakeEngine.tokenizer


def choice_of(fake: FakeEngine | None = None, **fields: Any) -> dict[str, Any]:
    answer = post({"model": "fake", "prompt": "Once upon", **fields}, fake)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def name(token: int) -> str:
    return TOKENIZER.token_name(token)


@contract(
    "completions", "logprobs", "null: none", "k: the k likeliest of the raw distribution, and the token itself where outside"
)
def test_the_likeliest_and_the_chosen() -> None:
    assert choice_of(max_tokens=3)["logprobs"] is None
    one, two, three = TOKENIZER.encode(" one two three")
    logprobs = choice_of(max_tokens=3, logprobs=2)["logprobs"]
    assert logprobs["tokens"] == [" one", " two", " three"]
    assert (one % 2, two % 2, three % 2) == (0, 0, 1), "what the fake's logprobs depend on"
    assert logprobs["token_logprobs"] == [-1.0, -1.0, -2.0]
    assert logprobs["top_logprobs"] == [
        {name(one): -1.0, name(one + 1): -2.0},
        {name(two): -1.0, name(two + 1): -2.0},
        {name(three + 1): -1.0, name(three + 2): -2.0, " three": -2.0},
    ]


@contract("completions", "logprobs", "0: the chosen token only")
def test_no_likeliest() -> None:
    logprobs = choice_of(max_tokens=3, logprobs=0)["logprobs"]
    assert logprobs["token_logprobs"] == [-1.0, -1.0, -2.0]
    assert logprobs["top_logprobs"] == [{" one": -1.0}, {" two": -1.0}, {" three": -2.0}]


@contract("completions", "echo", "the prompt's text comes first")
@pytest.mark.parametrize("max_tokens", [0, 2])
def test_echo_without_logprobs(max_tokens: int) -> None:
    choice = choice_of(echo=True, max_tokens=max_tokens)
    assert choice["text"] == "Once upon" + " one two" * (max_tokens > 0)
    assert choice["logprobs"] is None


@contract(
    "completions", "echo", "with logprobs the lists cover the prompt, first entries null", "max_tokens 0 scores the prompt"
)
@pytest.mark.parametrize("prompt", ["Once upon", [7454, 2402]])
def test_echo_with_logprobs(prompt: object) -> None:
    choice = choice_of(prompt=prompt, echo=True, logprobs=1, max_tokens=1)
    assert choice["text"] == "Once upon one"
    assert choice["logprobs"] == {
        "tokens": ["Once", " upon", " one"],
        "token_logprobs": [None, -1.0, -1.0],
        "top_logprobs": [None, {" upon": -1.0}, {" one": -1.0}],
        "text_offset": [0, 4, 9],
    }
    scoring = post({"model": "fake", "prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 0}).json()
    assert scoring["choices"][0]["text"] == "Once upon"
    assert scoring["choices"][0]["logprobs"]["tokens"] == ["Once", " upon"]
    assert scoring["choices"][0]["finish_reason"] == "length"
    assert scoring["usage"]["completion_tokens"] == 0


@contract("completions", "logprobs", "text_offset counts characters from the start of the prompt, with or without echo")
def test_offsets_do_not_depend_on_echo() -> None:
    with_echo = choice_of(prompt="naïve", echo=True, logprobs=0, max_tokens=3)["logprobs"]
    without = choice_of(prompt="naïve", logprobs=0, max_tokens=3)["logprobs"]
    assert without["text_offset"] == [5, 9, 13]
    assert with_echo["text_offset"][-3:] == without["text_offset"]


@contract(
    "completions",
    "logprobs",
    "a token that is not whole UTF-8 is written bytes:\\x..",
    "text_offset is right inside a split character",
)
def test_split_characters() -> None:
    fake = FakeEngine("a🙂b")
    tokens = fake.runner.script
    assert len(tokens) > 3, "the character must be split"
    logprobs = choice_of(fake, prompt="x", max_tokens=len(tokens), logprobs=0)
    found = logprobs["logprobs"]
    assert logprobs["text"] == "a🙂b"
    assert found["tokens"] == [name(token) for token in tokens]
    assert all(each.startswith("bytes:\\x") for each in found["tokens"][1:-1])
    assert found["text_offset"] == [1, *[2] * (len(tokens) - 2), 3]
    whole = b"".join(TOKENIZER.token_bytes(token) for token in tokens[1:-1])
    spelt = "".join(each.removeprefix("bytes:") for each in found["tokens"][1:-1])
    assert spelt == "".join(f"\\x{byte:02x}" for byte in whole)


def test_offsets_behind_a_prompt_that_ends_inside_a_character() -> None:
    tokens = TOKENIZER.encode("🙂b")
    head, rest = [7454, tokens[0]], tokens[1:]
    fake = FakeEngine()
    fake.runner.script = rest
    fields: dict[str, Any] = {"prompt": head, "logprobs": 0, "max_tokens": len(rest)}
    with_echo = choice_of(fake, echo=True, **fields)
    assert with_echo["text"] == "Once🙂b"
    assert with_echo["logprobs"]["text_offset"] == [0, 4, *[4] * (len(rest) - 1), 5]
    fake = FakeEngine()
    fake.runner.script = rest
    without = choice_of(fake, **fields)
    assert without["text"].endswith("b")
    assert without["logprobs"]["text_offset"] == with_echo["logprobs"]["text_offset"][2:]


def test_an_echoed_prompt_without_text_is_shown_before_a_stop() -> None:
    choice = choice_of(prompt="", echo=True, logprobs=0, stop=" one")
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    assert choice["logprobs"]["tokens"] == ["<|endoftext|>"]
    assert choice["logprobs"]["token_logprobs"] == [None]


@contract("completions", "logprobs", "the end-of-text token is among the tokens, without text")
def test_the_end_of_text_is_shown() -> None:
    choice = choice_of(FakeEngine(" one<|endoftext|>"), logprobs=0)
    assert choice["text"] == " one"
    assert choice["logprobs"]["tokens"] == [" one", "<|endoftext|>"]
    assert choice["logprobs"]["text_offset"] == [9, 13]


@contract("completions", "logprobs", "tokens behind a stop string are not shown")
def test_tokens_behind_a_stop_string_are_not_shown() -> None:
    choice = choice_of(stop="o thr", logprobs=0)
    assert choice["text"] == " one tw"
    assert choice["logprobs"]["tokens"] == [" one", " two"]
    with_stop = choice_of(stop="o thr", logprobs=0, include_stop_str_in_output=True)
    assert with_stop["text"] == " one two thr"
    assert with_stop["logprobs"]["tokens"] == [" one", " two", " three"]


@contract("completions", "stream", "logprobs in the chunks add up to those of the whole answer")
@pytest.mark.parametrize("fields", [{}, {"echo": True}, {"stop": "o thr"}, {"echo": True, "n": 3, "logprobs": 2}])
def test_a_stream_adds_up(fields: dict[str, Any]) -> None:
    async def test() -> None:
        async with serving(FakeEngine(" naïve 🙂 two three")) as api:
            body: dict[str, Any] = {"prompt": ["Once upon", "🙂"], "max_tokens": 8, "logprobs": 1} | fields
            whole = await api.choices(**body)
            chunks = await streamed(api, **body)
            for choice in whole:
                pieces = [piece for piece in chunks if piece["index"] == choice["index"]]
                assert "".join(piece["text"] for piece in pieces) == choice["text"]
                for each in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                    assert [found for piece in pieces for found in piece["logprobs"][each]] == choice["logprobs"][each]

    run(test)


async def streamed(api: Api, **fields: Any) -> list[dict[str, Any]]:
    answer = await api.complete(stream=True, **fields)
    assert answer.status_code == 200, answer.text
    return [chunk["choices"][0] for chunk in events_of(answer)]


@contract("completions", "prompt", "an empty prompt is a new document; echoed it has no text")
def test_an_empty_prompt_echoed() -> None:
    choice = choice_of(prompt="", echo=True, logprobs=0, max_tokens=1)
    assert choice["text"] == " one"
    assert choice["logprobs"]["tokens"] == ["<|endoftext|>", " one"]
    assert choice["logprobs"]["text_offset"] == [0, 0]
    by_id = choice_of(prompt=[50256, 7454], echo=True, logprobs=0, max_tokens=0)
    assert by_id["text"] == "<|endoftext|>Once", "what a client names by id is spelt out"
    assert by_id["logprobs"]["text_offset"] == [0, 13]


@contract("completions", "n", "every choice is echoed with the prompt's logprobs, which are computed once")
def test_echo_with_many_choices() -> None:
    fake = FakeEngine(max_slots=2)
    answer = post(
        {"model": "fake", "prompt": "Once upon", "n": 5, "echo": True, "logprobs": 1, "max_tokens": 2}, fake
    ).json()
    assert len({str(choice["logprobs"]) for choice in answer["choices"]}) == 1
    assert answer["choices"][4]["logprobs"]["token_logprobs"] == [None, -1.0, -1.0, -1.0]
    assert sum(len(rows.targets) for step in fake.runner.steps for rows in step.prompt_logprobs) == 1
    assert answer["usage"]["prompt_tokens"] == 2
