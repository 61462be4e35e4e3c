"""Prompt formats are read from a checkpoint's files or refused by file and field; templates render as in transformers."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from model.checkpoint.files import CheckpointError
from model.checkpoint.prompt_format import CHAT_TEMPLATE, PromptFormat, PromptFormatError, Turn, load_prompt_format
from model.checkpoint.vocabulary import BYTE_OF, load_tokenizer
from service.engine.prompts import chat_prompt
from tests.model.checkpoint.vocabularies import write_vocabulary

CHAT = [
    Turn("user", "Hi <there> & 'you'"),
    Turn("assistant", " Yes?\n"),
    Turn("system", "Be brief."),
    Turn("user", "Bye"),
]


def write(directory: Path, name: str, content: Any) -> None:
    (directory / name).write_text(json.dumps(content), encoding="utf-8")


def rendered(prompt_format: PromptFormat, messages: list[Turn]) -> str:
    return prompt_format.render_chat(messages, bos_token="<s>", eos_token="</s>")


class TestLoading:
    def test_defaults(self, tmp_path: Path) -> None:
        found = load_prompt_format(tmp_path)
        assert found == PromptFormat()
        assert (found.separator, found.input_prefix, found.output_prefix) == ("\n###\n", "", " => ")
        assert (found.chat_template, found.stop, found.default_max_tokens) == (CHAT_TEMPLATE, ("\nUser:",), 256)
        assert found.insertion is None
        assert found.chat_problem is None
        assert found.token_names == {}

    def test_every_field(self, tmp_path: Path) -> None:
        fields: dict[str, Any] = {
            "separator": "<|endoftext|>",
            "input_prefix": "Q: ",
            "output_prefix": "\nA: ",
            "chat_template": "{{ messages[0].content }}",
            "stop": ["\n\n", "<end>"],
            "default_max_tokens": 1,
            "insertion": "{suffix}{{}}<mid>{prompt}",
        }
        write(tmp_path, "banded.json", fields)
        assert load_prompt_format(tmp_path) == PromptFormat(**fields | {"stop": ("\n\n", "<end>")})

    def test_some_fields(self, tmp_path: Path) -> None:
        write(tmp_path, "banded.json", {"default_max_tokens": 7, "insertion": None})
        assert load_prompt_format(tmp_path) == PromptFormat(default_max_tokens=7)

    def test_template_of_the_tokenizer(self, tmp_path: Path) -> None:
        """banded.json's overrides it, and neither has the default template's stop."""
        write(tmp_path, "tokenizer_config.json", {"chat_template": "theirs", "bos_token": "<s>"})
        theirs = PromptFormat(chat_template="theirs", stop=(), token_names={"bos_token": "<s>"})
        assert load_prompt_format(tmp_path) == theirs
        write(tmp_path, "banded.json", {"stop": ["<end>"]})
        assert load_prompt_format(tmp_path) == replace(theirs, stop=("<end>",))
        write(tmp_path, "banded.json", {"chat_template": "ours"})
        assert load_prompt_format(tmp_path) == replace(theirs, chat_template="ours")

    def test_tokenizer_without_a_template(self, tmp_path: Path) -> None:
        write(tmp_path, "tokenizer_config.json", {"chat_template": None, "bos_token": None, "pad_token": {"content": "_"}})
        assert load_prompt_format(tmp_path) == PromptFormat(token_names={"pad_token": "_"})


BRACES = r"insertion must be a string that holds \{prompt\} and \{suffix\} once each, other braces doubled, got "


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seperator": "\n"}, r"banded\.json: unknown field 'seperator', expected one of chat_template, default_max_tok"),
        ({"bos_token": "<s>"}, r"banded\.json: unknown field 'bos_token'"),
        ({"chat_problem": None}, r"banded\.json: unknown field 'chat_problem'"),
        ({"token_names": {}}, r"banded\.json: unknown field 'token_names'"),
        ({"x" * 1000: 1}, r"banded\.json: unknown field 'x{80}', expected"),
        ({"separator": 5}, r"banded\.json: separator must be a string, got 5"),
        ({"separator": ["x" * 1000]}, r'banded\.json: separator must be a string, got \["x{78}\.\.\.$'),
        ({"input_prefix": None}, r"banded\.json: input_prefix must be a string, got null"),
        ({"output_prefix": {}}, r"banded\.json: output_prefix must be a string, got \{\}"),
        ({"chat_template": [1]}, r"banded\.json: chat_template must be a string, got \[1\]"),
        ({"stop": "\n"}, r'banded\.json: stop must be an array of strings that are not empty, got "\\n"'),
        ({"stop": ["a", ""]}, r'banded\.json: stop must be an array of strings that are not empty, got \["a", ""\]'),
        ({"stop": ["a", 1]}, r'banded\.json: stop must be an array of strings that are not empty, got \["a", 1\]'),
        ({"default_max_tokens": 0}, r"banded\.json: default_max_tokens must be an integer from 1, got 0"),
        ({"default_max_tokens": True}, r"banded\.json: default_max_tokens must be an integer from 1, got true"),
        ({"default_max_tokens": 1.5}, r"banded\.json: default_max_tokens must be an integer from 1, got 1\.5"),
        ({"insertion": 5}, BRACES + "5"),
        ({"insertion": "{prompt}"}, BRACES + '"{prompt}"'),
        ({"insertion": "{prompt}{suffix}{prompt}"}, BRACES),
        ({"insertion": "{prompt}{suffix}{}"}, BRACES),
        ({"insertion": "{prompt}{suffix!r}"}, BRACES),
        ({"insertion": "{prompt:>9}{suffix}"}, BRACES),
        ({"insertion": "{prompt.x}{suffix}"}, BRACES),
        ({"insertion": "{prompt}{suffix}}"}, BRACES),
    ],
)
def test_unusable_fields_are_named(tmp_path: Path, fields: Any, message: str) -> None:
    write(tmp_path, "banded.json", fields)
    with pytest.raises(PromptFormatError, match=message) as refusal:
        load_prompt_format(tmp_path)
    assert str(refusal.value).startswith(f"{tmp_path}: banded.json")
    assert len(str(refusal.value)) < len(str(tmp_path)) + 300


@pytest.mark.parametrize("file", ["banded.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("\n{% else %}", r"chat_template does not compile: line 2: .* 'else'"),
        ("{% if %}", "chat_template does not compile: line 1: Expected an expression"),
        ("{{ x | nothing }}", "chat_template does not compile: line 1: No filter named 'nothing'"),
        ("{% for a in b %}" * 30 + "{% endfor %}" * 30, "does not compile: too many statically nested"),
    ],
)
def test_a_template_that_does_not_compile_prevents_chats_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, template: str, problem: str
) -> None:
    write(tmp_path, file, {"chat_template": template})
    found = load_prompt_format(tmp_path)
    assert re.search(problem, found.chat_problem or "")
    assert caplog.messages == [f"{tmp_path}: chats are refused: {found.chat_problem}"]


NAMED = [{"name": "rag", "template": "b"}, {"name": "tool_use", "template": "c"}]


@pytest.mark.parametrize(
    ("settings", "files", "found"),
    [
        ([{"name": "default", "template": "a"}, *NAMED], {}, "a"),
        ({"default": "a", "rag": "b"}, {}, "a"),
        (NAMED, {"chat_template.jinja": "a"}, "a"),
        ("old", {"chat_template.jinja": "a", "additional_chat_templates/rag.jinja": "b"}, "a"),
        (None, {"additional_chat_templates/default.jinja": "a"}, "a"),
        (NAMED, {}, "none of the chat templates ['rag', 'tool_use'] is named default"),
        (None, {"additional_chat_templates/rag.jinja": "b"}, None),
        (5, {}, "tokenizer_config.json: chat_template must be a string or strings by name, got 5"),
        (["a"], {}, 'tokenizer_config.json: chat_template must be a string or strings by name, got ["a"]'),
        ({"default": ["a"]}, {}, 'tokenizer_config.json: chat_template must be a string or strings by name, got ["a"]'),
        ("a", {"chat_template.jinja": b"\xff"}, "chat_template.jinja can't be read: "),
    ],
)
def test_of_several_templates_the_default_is_taken(
    tmp_path: Path, settings: Any, files: dict[str, str | bytes], found: str | None
) -> None:
    write(tmp_path, "tokenizer_config.json", {"chat_template": settings})
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    prompt_format = load_prompt_format(tmp_path)
    if found is None:
        assert prompt_format == PromptFormat()
    elif found == "a":
        assert prompt_format == PromptFormat(chat_template="a", stop=())
    else:
        assert found in (prompt_format.chat_problem or "")


def test_a_template_may_stand_in_a_file_of_its_own(tmp_path: Path) -> None:
    """As transformers 5 writes it. It overrides tokenizer_config.json's template, and banded.json's overrides it."""
    (tmp_path / "chat_template.jinja").write_text("file")
    write(tmp_path, "tokenizer_config.json", {"chat_template": "settings"})
    assert load_prompt_format(tmp_path) == PromptFormat(chat_template="file", stop=())
    write(tmp_path, "banded.json", {"chat_template": "ours"})
    assert load_prompt_format(tmp_path) == PromptFormat(chat_template="ours", stop=())
    write(tmp_path, "banded.json", {})


@pytest.mark.parametrize("name", ["banded.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "can't be read as JSON: Expecting property name"), ("[1]", "must hold a JSON object, got list")],
)
def test_files_that_hold_no_json_object_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(tmp_path / name))} {message}"):
        load_prompt_format(tmp_path)


class TestDefaultTemplate:
    def test_instructions_are_a_paragraph_before_the_turns(self) -> None:
        text = "Be brief.\n\nUser: Hi <there> & 'you'\nAssistant:  Yes?\n\nUser: Bye\nAssistant:"
        assert rendered(PromptFormat(), CHAT) == text
        assert rendered(PromptFormat(), [Turn("developer", "a"), Turn("system", "b")]) == "a\n\nb\n\nAssistant:"
        assert rendered(PromptFormat(), []) == "Assistant:"

    def test_other_roles_are_refused(self) -> None:
        with pytest.raises(jinja2.TemplateError, match="role 'tool' is not supported"):
            rendered(PromptFormat(), [Turn("tool", "4")])


CHATML = """{{ bos_token }}
{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\nBe nice.<|im_end|>\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
BLOCKS = """{% for message in messages %}
    {% if message.tool_calls %}{% continue %}{% endif %}
    {% if tools is not none or documents is not none %}{{ raise_exception('tools') }}{% endif %}
[{{ message.role | upper }}] {{ message | tojson }} {{ message.content.split(' ')[-1] }}{{ eos_token }}
    {% set last = loop.index0 %}
    {% if loop.index > 2 %}{% break %}{% endif %}
{% endfor %}
{% set found = namespace(count=0) %}{% for _ in messages %}{% set found.count = found.count + 1 %}{% endfor %}
{{ found.count }}
"""


GENERATION = """{% for message in messages %}{% set role = "outside" %}
    {% if message.role == "assistant" %}
    {%- generation -%}
        {% set role = message.role %}
        {{ role }} {{ loop.index }}: {{ message.content }}{{ eos_token }}
    {% endgeneration %}
    {% else %}
        {{ message.content }} {% generation %}x{% endgeneration %}
    {% endif %}
{{ role }}
{% endfor %}
"""
TOJSON = """{{ messages | tojson(separators=(",", ":")) }} {{ messages[0] | tojson(indent=2) }} {{ "é" | tojson(true) }}
{{ messages[1] | tojson(sort_keys=true, separators=(" , ", " : ")) }} {{ "é" | tojson(false, 4, (";", "="), true) }}
{{ {"b": 1, "a": [1, 2]} | tojson(false, none, (";", "="), true) }}"""
NAMES = """{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ mask_token is defined }}{{ sep_token }}|
{{ strftime_now("%Y") | length }}{{ strftime_now("%d %b %Y") == strftime_now("%d ") + strftime_now("%b %Y") }}"""


@pytest.mark.parametrize("template", [CHATML, BLOCKS, CHAT_TEMPLATE, GENERATION, TOJSON, NAMES])
def test_templates_render_as_in_transformers(template: str) -> None:
    chat = [message._asdict() for message in CHAT]
    texts, _ = render_jinja_template(
        conversations=[chat],
        chat_template=template,
        add_generation_prompt=True,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    names = {"pad_token": "<pad>", "unk_token": "<unk>"}
    assert rendered(PromptFormat(chat_template=template, token_names=names), CHAT) == texts[0]


@pytest.mark.parametrize("form", ["text", "list", "dict", "files"])
def test_checkpoints_render_as_with_apply_chat_template(tmp_path: Path, form: str) -> None:
    """The template is found, and its variables have their values, wherever the checkpoint keeps them."""
    write_vocabulary(tmp_path, {piece: n for n, piece in enumerate([*BYTE_OF, "<s>", "</s>", "<pad>", "<unk>"])}, [])
    write(tmp_path, "config.json", {"model_type": "gpt2", "vocab_size": 260})
    template = "{{ bos_token }}{{ unk_token }}{{ pad_token }}{{ sep_token }}" + GENERATION
    settings: dict[str, Any] = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}}
    settings |= {"pad_token": "<pad>", "unk_token": "<unk>", "tokenizer_class": "GPT2Tokenizer"}
    templates = {"default": template, "rag": "rag"}
    match form:
        case "text":
            settings["chat_template"] = template
        case "list":
            settings["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
        case "dict":
            settings["chat_template"] = templates
        case "files":
            (tmp_path / "chat_template.jinja").write_text(template)
            (tmp_path / "additional_chat_templates").mkdir()
            (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag")
    write(tmp_path, "tokenizer_config.json", settings)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    chat = [message._asdict() for message in CHAT]
    tokens = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    ours = load_tokenizer(tmp_path)
    assert chat_prompt(CHAT, load_prompt_format(tmp_path), ours).tokens == tokens


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.x.y }}", "'str object' has no attribute 'x'"),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
    ],
)
def test_templates_that_raise(template: str, message: str) -> None:
    with pytest.raises(jinja2.TemplateError, match=message):
        rendered(PromptFormat(chat_template=template), CHAT)
