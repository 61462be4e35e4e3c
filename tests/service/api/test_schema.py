"""Bodies: defaults, null, bounds, and prompts compared with a slow description of what a prompt is."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.api.schema.base import StreamOptions
from service.api.schema.completions import CompletionRequest
from service.api.schema.fields import check_prompt
from service.api.schema.peers import Ineffective

DEFAULTS: dict[str, Any] = {
    "prompt": None,
    "max_tokens": 16,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "n": 1,
    "stop": (),
    "seed": None,
    "ignore_eos": False,
    "stream": False,
    "stream_options": {"include_usage": False, "include_obfuscation": False, "continuous_usage_stats": False},
    "user": None,
    "metadata": None,
    "prompt_cache_key": None,
    "safety_identifier": None,
    "allow_special": False,
    "best_of": None,
    "echo": False,
    "few_shot": None,
    "frequency_penalty": 0.0,
    "include_stop_str_in_output": False,
    "logit_bias": (),
    "logprobs": None,
    "min_p": 0.0,
    "min_tokens": 0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "stop_token_ids": [],
    "allowed_token_ids": None,
    "bad_words": [],
    "skip_special_tokens": True,
    "cache_prompt": True,
    "prompt_logprobs": None,
    "add_special_tokens": True,
    "truncate_prompt_tokens": None,
    "return_token_ids": False,
    "suffix": "",
}


def read(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", **fields})


def test_defaults_are_the_contracts_and_null_means_them() -> None:
    assert read().model_dump() == {"model": "m"} | DEFAULTS
    assert read(**dict.fromkeys(DEFAULTS)) == read()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_tokens", [0, 1, 2**63 - 1]),
        ("temperature", [0, 0.0, 1e-300, 2, 2.0]),
        ("top_p", [0, 1, 0.5]),
        ("top_k", [-1, 0, 1, 2**63 - 1]),
        ("n", [1, 128]),
        ("seed", [-(2**63), 0, 2**63 - 1]),
        ("user", ["", "someone", "\ud800"]),
        ("prompt", ["", "a", ["a"], ["a"] * 1024, [1], [1] * 5000, [[1]], [[1]] * 1024]),
    ],
)
def test_bounds_are_inclusive(name: str, values: list[Any]) -> None:
    for value in values:
        assert getattr(read(**{name: value}), name) == value


def test_stop_becomes_a_tuple() -> None:
    for value, stops in (("a", ("a",)), (["a"], ("a",)), ([], ()), (["a", "b", "c", "d"], ("a", "b", "c", "d"))):
        assert read(stop=value).stop == stops


@pytest.mark.parametrize(
    ("options", "include_usage"),
    [
        (None, False),
        ({}, False),
        ({"include_usage": None}, False),
        ({"include_usage": False}, False),
        ({"include_usage": True}, True),
    ],
)
def test_include_usage(options: Any, include_usage: bool) -> None:
    assert read(stream=True, stream_options=options).stream_options.include_usage is include_usage


def test_a_request_does_not_change() -> None:
    with pytest.raises(ValidationError, match="Instance is frozen"):
        read().n = 2
    with pytest.raises(ValidationError, match="Instance is frozen"):
        StreamOptions.model_validate({}).include_usage = True


def test_unknown_fields_are_set_aside() -> None:
    body = read(colour=2, few_shot={"examples": [{"input": "a", "output": "b", "x": 1}], "y": None}, prompt="a")
    assert body.ineffective == [Ineffective(name, None) for name in ("colour", "few_shot.y", "few_shot.examples.0.x")]
    assert read().ineffective == []
    assert read(colour=2) is not None
    with pytest.raises(ValidationError) as caught:
        read(n=0, **{f"field{i}": i for i in range(1000)})
    assert [error["loc"] for error in caught.value.errors()] == [("n",)]


json_values: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats(0, 1) | st.sampled_from(["", "a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.just("k"), inner),
    max_leaves=6,
)


def is_prompt(value: Any) -> bool:
    """The contract's row, word for word."""

    def ids(value: Any) -> bool:
        return isinstance(value, list) and value != [] and all(isinstance(i, int) and not isinstance(i, bool) for i in value)

    if value is None or isinstance(value, str) or ids(value):
        return True
    return isinstance(value, list) and value != [] and (all(isinstance(i, str) for i in value) or all(map(ids, value)))


@given(json_values)
def test_check_prompt_takes_prompts_and_nothing_else(value: Any) -> None:
    if is_prompt(value):
        assert check_prompt(value) is value
    else:
        with pytest.raises(ValueError, match=r"^(must|item \d|holds)") as caught:
            check_prompt(value)
        assert len(str(caught.value)) < 100
