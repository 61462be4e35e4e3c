"""few_shot and suffix: how the text is laid out, what is dropped where, and how it ends."""

from typing import Any

import httpx
import pytest

from model.checkpoint.prompt_format import PromptFormat
from tests.conformance import contract
from tests.service.api.helpers import error_of, post, prompts_run, serving
from tests.service.engine.fakes import FakeEngine
from tests.service.helpers import run

TOKENIZER = FakeEngine.tokenizer
OTTER = {"input": "sea otter", "output": "loutre de mer"}


def complete(few_shot: object, fake: FakeEngine | None = None, **fields: Any) -> httpx.Response:
    return post({"model": "fake", "prompt": "cheese", "max_tokens": 2, "few_shot": few_shot} | fields, fake)


@contract("completions", "few_shot", "instruction, examples and prompt, laid out with prefixes and separator")
@pytest.mark.parametrize(
    ("few_shot", "text"),
    [
        ({}, "cheese =>"),
        ({"examples": [OTTER]}, "sea otter => loutre de mer\n###\ncheese =>"),
        (
            {"instruction": "Translate.", "examples": [OTTER, OTTER]},
            "Translate.\n###\nsea otter => loutre de mer\n###\nsea otter => loutre de mer\n###\ncheese =>",
        ),
        (
            {"examples": [OTTER], "input_prefix": "Q: ", "output_prefix": "\nA: ", "separator": "\n\n"},
            "Q: sea otter\nA: loutre de mer\n\nQ: cheese\nA:",
        ),
    ],
)
def test_the_layout(few_shot: object, text: str) -> None:
    fake = FakeEngine()
    answer = complete(few_shot, fake, echo=True).json()
    assert prompts_run(fake) == [TOKENIZER.encode(text)]
    assert answer["choices"][0]["text"] == text + " one two"
    dropped = {"examples_used": len(few_shot.get("examples", [])), "examples_dropped": 0}  # type: ignore[attr-defined]
    assert answer["usage"]["few_shot"] == dropped


@contract("completions", "few_shot", "the separator may be a special token, text in the user's fields is plain")
def test_a_special_separator() -> None:
    fake = FakeEngine(" one<|endoftext|>")
    few_shot = {"examples": [{"input": "<|endoftext|>", "output": "b"}], "separator": "<|endoftext|>"}
    choice = complete(few_shot, fake, ignore_eos=True).json()["choices"][0]
    plain = TOKENIZER.encode("<|endoftext|> => b")
    assert prompts_run(fake) == [[*plain, TOKENIZER.special_tokens["<|endoftext|>"], *TOKENIZER.encode("cheese =>")]]
    assert (choice["text"], choice["finish_reason"]) == (" one", "stop")


@contract("completions", "few_shot", "the separator ends the completion beside four stops")
def test_the_separator_ends_the_completion() -> None:
    fake = FakeEngine(" fromage\n###\nmore")
    choice = complete({"examples": [OTTER]}, fake, stop=["w", "x", "y", "z"], max_tokens=9).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (" fromage", "stop")


@contract("completions", "few_shot", "the oldest examples are dropped where the context is too small, and the reply says so")
def test_the_oldest_examples_are_dropped() -> None:
    fake = FakeEngine()
    examples = [{"input": f"number {i}", "output": "x"} for i in range(40)]
    answer = complete({"instruction": "Go.", "examples": examples}, fake, max_tokens=100).json()
    counts = answer["usage"]["few_shot"]
    assert counts["examples_used"] + counts["examples_dropped"] == 40
    assert 0 < counts["examples_dropped"] < 40
    text = TOKENIZER.decode(prompts_run(fake)[0])
    assert text.startswith(f"Go.\n###\nnumber {counts['examples_dropped']} => x")
    assert answer["usage"]["prompt_tokens"] <= 156
    error = error_of(complete({"examples": examples, "on_overflow": "error"}, max_tokens=100), 400)
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    assert "in the prompt with 40 of its 40 examples, 100 for the completion)" in error["message"]
    too_long = error_of(complete({"instruction": " a" * 300}), 400)
    assert too_long["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("few_shot", "fields", "message"),
    [
        ({"example": []}, {}, "unknown field 'few_shot.example'"),
        ({"examples": [{"input": "a"}]}, {}, "'few_shot.examples.0.output' is required"),
        ({"examples": [OTTER | {"x": 1}]}, {}, "unknown field 'few_shot.examples.0.x'"),
        ({"separator": ""}, {}, "'few_shot.separator': string should have at least 1 character"),
        ({"on_overflow": "cut"}, {}, "'few_shot.on_overflow': input should be 'drop' or 'error'"),
        ({}, {"prompt": ["a"]}, "'prompt': few_shot needs a single string"),
        ({}, {"prompt": [1]}, "'prompt': few_shot needs a single string"),
        ({}, {"suffix": "x"}, "'few_shot': can't be used together with suffix"),
    ],
)
def test_what_is_refused(few_shot: object, fields: dict[str, Any], message: str) -> None:
    assert error_of(complete(few_shot, **fields), 400)["message"] == message


@contract("completions", "suffix", "400 unless the model's card declares an insertion format")
def test_suffix_without_an_insertion_format() -> None:
    error = error_of(post({"model": "fake", "prompt": "a", "suffix": "b"}), 400)
    assert (error["param"], error["code"]) == ("suffix", "unsupported_parameter")
    assert error["message"] == "'suffix' is not supported by this model: its card declares no format for insertions"


@pytest.mark.parametrize("prompt", [[1, 2], [[1], [2]]])
def test_suffix_after_token_ids(prompt: Any) -> None:
    error = error_of(post({"model": "fake", "prompt": prompt, "suffix": "b"}), 400)
    assert (error["param"], error["message"]) == ("suffix", "'suffix': needs a prompt of text, not of token ids")


@contract("completions", "suffix", "laid out by the card's insertion format")
def test_suffix_with_an_insertion_format() -> None:
    async def test() -> None:
        fake = FakeEngine()
        async with serving(fake, PromptFormat(insertion="<|endoftext|>{suffix}<|endoftext|>{prompt}")) as api:
            answer = await api.complete(prompt="<|endoftext|>", suffix=" b", max_tokens=1)
            assert answer.status_code == 200, answer.text
            eos, spelt = TOKENIZER.special_tokens["<|endoftext|>"], TOKENIZER.encode("<|endoftext|>")
            assert prompts_run(fake) == [[eos, *TOKENIZER.encode(" b"), eos, *spelt]]

    run(test)
