"""Fields of other servers: each is honoured, accepted where it changes nothing, or refused by name."""

import json
from collections import Counter
from typing import Any

import pytest

from service.api.schema.base import Body
from service.api.schema.chat import ChatRequest
from service.api.schema.completions import CompletionRequest
from service.api.schema.peers import PEER_FIELDS, Ineffective, PeerField, by_name, ineffective
from tests.conformance import contract
from tests.service.api.helpers import error_of, events_of, post, request, serving
from tests.service.api.peers_table import PAGE, table
from tests.service.engine.fakes import FakeEngine
from tests.service.helpers import run

MESSAGES = [{"role": "user", "content": "Hello"}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
FIELDS = by_name(*PEER_FIELDS)
BODIES: list[type[CompletionRequest] | type[ChatRequest]] = [CompletionRequest, ChatRequest]
# What clients may send that the issue of these fields named as honoured.
HONOURED = [
    "skip_special_tokens",
    "add_special_tokens",
    "truncate_prompt_tokens",
    "allowed_token_ids",
    "bad_words",
    "cache_prompt",
]


def read(body: type[Body], **fields: Any) -> list[Ineffective]:
    messages = {"messages": MESSAGES} if body is ChatRequest else {}
    return body.model_validate(messages | fields).ineffective


def chat(**fields: Any) -> Any:
    return request("POST", "/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 1} | fields)


def test_the_docs_have_the_table_of_the_code() -> None:
    assert table() in PAGE.read_text(encoding="utf-8"), "run python -m tests.service.api.peers_table"


def test_every_field_stands_in_the_table_once_and_depends_on_one_that_exists() -> None:
    assert [
        name for name, count in Counter(" ".join(field.names for field in PEER_FIELDS).split()).items() if count > 1
    ] == []
    for field in PEER_FIELDS:
        assert field.part_of is None or field.part_of in FIELDS or field.part_of in CompletionRequest.model_fields
        assert field.warning is None or field.values, "the first value says which type is warned of"
    for body in BODIES:
        assert [name for name in HONOURED if name not in body.model_fields] == []


def test_the_openapi_document_has_the_values_that_are_accepted() -> None:
    for body in BODIES:
        properties = body.model_json_schema()["properties"]
        assert properties["mirostat"] == {"enum": [None, 0]}
        assert properties["mirostat_tau"] == properties["tools"] == {}
        assert properties["cache_prompt"]["anyOf"][0] == {"type": "boolean"}
        assert properties.keys() == FIELDS.keys() | body.model_fields.keys()


OTHERS: tuple[Any, ...] = (7, -7, 0.5, True, False, "x", [1], {"x": 1}, ["text", "x"])


@contract("completions", "fields of other servers", "accepted where they change nothing, else refused by name")
@contract("chat", "fields of other servers", "accepted where they change nothing, else refused by name")
@pytest.mark.parametrize("name", FIELDS)
def test_a_field_is_honoured_or_accepted_at_its_values_or_refused(name: str) -> None:
    field = FIELDS[name]
    for body in BODIES:
        if name in body.model_fields:
            assert read(body, **{name: None}) == []
            continue
        for value in (None, *field.values):
            assert read(body, **{name: value}) == [], value
        for value in OTHERS:
            if any(json.dumps(value) == json.dumps(known) for known in field.values):
                continue
            found = read(body, **{name: value})
            if field.part_of:
                assert found == [], "the field that it belongs to is off"
            elif field.warning and type(value) is type(field.values[0]):
                assert found == [Ineffective(name, field.warning, is_refused=False)]
            else:
                reason = f"not supported by this server (accepted: {field.accepted})"
                assert found == [Ineffective(name, reason)]


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"mirostat": 0, "mirostat_tau": 5.0}, []),
        ({"mirostat": 2, "mirostat_tau": 5.0}, ["mirostat", "mirostat_tau"]),
        ({"repeat_last_n": 64}, []),
        ({"repeat_last_n": 64, "repetition_penalty": 1}, []),
        ({"repeat_last_n": 64, "repetition_penalty": 1.1}, ["repeat_last_n"]),
        ({"repeat_last_n": -1, "repetition_penalty": 1.1}, []),
        ({"temperature_last": True}, []),
        ({"temperature_last": True, "temperature": 0.5}, ["temperature_last"]),
        ({"priority": False}, ["priority"]),
        ({"priority": 0.0}, []),
        ({"use_beam_search": 0}, ["use_beam_search"]),
    ],
)
def test_values_that_depend_on_another_field(fields: dict[str, Any], refused: list[str]) -> None:
    assert [found.name for found in read(CompletionRequest, **fields)] == refused


def test_a_table_is_read_field_by_field() -> None:
    peers = by_name(PeerField("a b", "X", (1,)), PeerField("c", "X", part_of="a"), PeerField("d", "X", ("",), warning="why"))
    honoured = {"e": 5}
    assert ineffective({"a": 1, "b": None, "c": 3, "d": "", "e": 0}, honoured, peers) == []
    found = ineffective({"a": 2, "c": 3, "d": "x", "f": None}, honoured, peers)
    assert found == [
        Ineffective("a", "not supported by this server (accepted: null, 1)"),
        Ineffective("c", "not supported by this server (accepted: null)"),
        Ineffective("d", "why", is_refused=False),
        Ineffective("f", None),
    ]


@contract("completions", "anything else", "400 naming the field")
def test_the_error_names_the_field_and_what_is_accepted() -> None:
    for answer in (post({"prompt": "a", "mirostat": 2}), chat(mirostat=2)):
        error = error_of(answer, 400)
        assert error["message"] == "'mirostat': not supported by this server (accepted: null, 0)"
        assert (error["param"], error["code"]) == ("mirostat", "unsupported_parameter")
    assert error_of(post({"prompt": "a", "mirostatt": 0}), 400)["message"] == "unknown field 'mirostatt'"


@contract("completions", "anything else", "--lenient: an entry of warnings")
def test_a_lenient_server_warns_of_them() -> None:
    async def test() -> None:
        async with serving(lenient=True) as api:
            answer = (await api.complete(prompt="a", max_tokens=1, mirostat=2, x=1, typical_p=1)).json()
            assert answer["warnings"] == [
                "'mirostat' was ignored: not supported by this server (accepted: null, 0)",
                "the unknown field 'x' was ignored",
            ]

    run(test)


@contract("chat", "tools, functions", "with tool_choice absent, auto or none: answered, with an entry in warnings")
@pytest.mark.parametrize("choice", [{}, {"tool_choice": "auto"}, {"tool_choice": "none"}, {"parallel_tool_calls": False}])
@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_answered_without_a_call(choice: dict[str, Any], stream: bool) -> None:
    warning = ["'tools' was ignored: this server makes no tool calls"]
    answer = chat(tools=[WEATHER] * 36, stream=stream, **choice)
    assert answer.status_code == 200, answer.text
    if stream:
        first, *rest = events_of(answer)
        assert first["warnings"] == warning
        assert not any("warnings" in chunk for chunk in rest)
    else:
        assert answer.json()["warnings"] == warning
        assert answer.json()["choices"][0]["message"] == {"role": "assistant", "content": " one", "refusal": None}
    assert "warnings" not in chat(tools=[]).text
    functions = chat(functions=[{"name": "f"}], function_call="auto").json()
    assert functions["warnings"] == ["'functions' was ignored: this server makes no tool calls"]


@contract("chat", "tool_choice, function_call", "required or named: 400")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "weather"}}),
        ("function_call", {"name": "weather"}),
    ],
)
def test_a_call_that_is_required_is_refused(name: str, value: Any) -> None:
    error = error_of(chat(tools=[WEATHER], **{name: value}), 400)
    assert error["message"] == f'\'{name}\': not supported by this server (accepted: null, "none", "auto")'
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    assert error_of(chat(tools="weather"), 400)["message"] == "'tools': not supported by this server (accepted: null, [])"


@contract("chat", "reasoning_effort", "what asks for reasoning: answered, with an entry in warnings")
@pytest.mark.parametrize("effort", ["minimal", "low", "high", "xhigh"])
def test_reasoning_is_warned_of(effort: str) -> None:
    answer = chat(reasoning_effort=effort).json()
    assert answer["warnings"] == ["'reasoning_effort' was ignored: this server's models do not reason ahead of an answer"]
    for value in ("none", "medium", None):
        assert "warnings" not in chat(reasoning_effort=value).text
    assert error_of(chat(reasoning_effort=5), 400)["param"] == "reasoning_effort"


# All that a router of SGLang's adds to a request whose client left it out.
ROUTED = {
    "no_stop_trim": False,
    "ignore_eos": False,
    "continue_final_message": False,
    "skip_special_tokens": True,
    "separate_reasoning": True,
    "stream_reasoning": True,
    "return_hidden_states": False,
    "top_k": None,
    "min_p": None,
    "regex": None,
    "ebnf": None,
    "lora_path": None,
    "session_params": None,
}


@contract("clients", "SGLang's router", "the fields that it adds to every request change nothing")
def test_what_a_router_adds_changes_nothing() -> None:
    for answer in (post({"prompt": "a", "max_tokens": 1} | ROUTED, FakeEngine()), chat(**ROUTED)):
        assert answer.status_code == 200, answer.text
        assert "warnings" not in answer.json()


@contract("completions", "fields of other servers", "a warning where a value has no effect here but the answer is of use")
def test_penalties_of_another_range_are_warned_of() -> None:
    fields = {"repetition_penalty": 1.1, "repeat_last_n": 256, "penalize_nl": False, "max_tokens": 1}
    answer = post({"prompt": "a", **fields})
    assert answer.status_code == 200
    why = "penalties here count every token of the text, line breaks too"
    assert answer.json()["warnings"] == [f"'{name}' was ignored: {why}" for name in ("repeat_last_n", "penalize_nl")]
    assert "warnings" not in post({"prompt": "a", **fields, "repetition_penalty": 1}).json()
