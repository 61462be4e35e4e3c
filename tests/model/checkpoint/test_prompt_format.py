"""Prompt formats are read from a checkpoint's files or refused by file and field; templates render as in transformers."""

import json
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from model.checkpoint.files import CheckpointError
from model.checkpoint.prompt_format import CHAT_TEMPLATE, PromptFormat, PromptFormatError, Turn, load_prompt_format

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
        assert found.bos_token is None

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
        assert load_prompt_format(tmp_path) == PromptFormat(chat_template="theirs", stop=(), bos_token="<s>")
        write(tmp_path, "banded.json", {"stop": ["<end>"]})
        assert load_prompt_format(tmp_path) == PromptFormat(chat_template="theirs", stop=("<end>",), bos_token="<s>")
        write(tmp_path, "banded.json", {"chat_template": "ours"})
        assert load_prompt_format(tmp_path) == PromptFormat(chat_template="ours", stop=(), bos_token="<s>")

    def test_tokenizer_without_a_single_template(self, tmp_path: Path) -> None:
        named = [{"name": "default", "template": "theirs"}]
        write(tmp_path, "tokenizer_config.json", {"chat_template": named, "bos_token": {"content": "<s>"}})
        assert load_prompt_format(tmp_path) == PromptFormat(bos_token="<s>")
        write(tmp_path, "tokenizer_config.json", {"chat_template": None, "bos_token": None})
        assert load_prompt_format(tmp_path) == PromptFormat()


BRACES = r"insertion must be a string that holds \{prompt\} and \{suffix\} once each, other braces doubled, got "


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seperator": "\n"}, r"banded\.json: unknown field 'seperator', expected one of chat_template, default_max_tok"),
        ({"bos_token": "<s>"}, r"banded\.json: unknown field 'bos_token'"),
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
        ({"chat_template": "{% if %}"}, r"banded\.json: chat_template does not compile: line 1: Expected an expression"),
        ({"chat_template": "{{ x | nothing }}"}, r"chat_template does not compile: line 1: No filter named 'nothing'"),
        ({"chat_template": "{% for a in b %}" * 30 + "{% endfor %}" * 30}, "does not compile: too many statically nested"),
    ],
)
def test_unusable_fields_are_named(tmp_path: Path, fields: Any, message: str) -> None:
    write(tmp_path, "banded.json", fields)
    with pytest.raises(PromptFormatError, match=message) as refusal:
        load_prompt_format(tmp_path)
    assert str(refusal.value).startswith(f"{tmp_path}: banded.json")
    assert len(str(refusal.value)) < len(str(tmp_path)) + 300


def test_template_of_the_tokenizer_that_does_not_compile(tmp_path: Path) -> None:
    write(tmp_path, "tokenizer_config.json", {"chat_template": "\n{% else %}"})
    message = r"tokenizer_config\.json: chat_template does not compile: line 2: .* 'else'"
    with pytest.raises(PromptFormatError, match=message):
        load_prompt_format(tmp_path)


def test_a_template_may_stand_in_a_file_of_its_own(tmp_path: Path) -> None:
    """As transformers 5 writes it. It overrides tokenizer_config.json's template, and banded.json's overrides it."""
    (tmp_path / "chat_template.jinja").write_text("file")
    write(tmp_path, "tokenizer_config.json", {"chat_template": "settings"})
    assert load_prompt_format(tmp_path) == PromptFormat(chat_template="file", stop=())
    write(tmp_path, "banded.json", {"chat_template": "ours"})
    assert load_prompt_format(tmp_path) == PromptFormat(chat_template="ours", stop=())
    write(tmp_path, "banded.json", {})
    (tmp_path / "chat_template.jinja").write_text("{% else %}")
    with pytest.raises(
        PromptFormatError, match=r": chat_template\.jinja: chat_template does not compile: line 1: .* 'else'"
    ):
        load_prompt_format(tmp_path)


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


@pytest.mark.parametrize("template", [CHATML, BLOCKS, CHAT_TEMPLATE])
def test_templates_render_as_in_transformers(template: str) -> None:
    chat = [message._asdict() for message in CHAT]
    texts, _ = render_jinja_template(
        conversations=[chat], chat_template=template, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert rendered(PromptFormat(chat_template=template), CHAT) == texts[0]


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
