"""How a checkpoint lays out few-shot examples, chats and insertions as text: its banded.json and its chat template."""

import dataclasses
import json
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.checkpoint.files import CheckpointError, Json, optional_json, read_text
from model.checkpoint.vocabulary import SETTINGS_FILE

PROMPT_FORMAT_FILE = "banded.json"
TEMPLATE_FILE = "chat_template.jinja"
MAX_SHOWN = 80  # characters of a file's own value that an error message repeats

# Instructions come first, wherever the chat has them.
CHAT_TEMPLATE = """\
{% for message in messages if message.role in ("system", "developer") %}
{{ message.content }}

{% endfor %}
{% for message in messages if message.role not in ("system", "developer") %}
{% if message.role == "user" %}
User: {{ message.content }}
{% elif message.role == "assistant" %}
Assistant: {{ message.content }}
{% else %}
{{ raise_exception("role '" ~ message.role ~ "' is not supported") }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}Assistant:{% endif %}
"""


class PromptFormatError(CheckpointError):
    """A prompt format that can't be used: which file and field, and what is wrong with it."""


class Turn(NamedTuple):
    """One message of a chat. `role` is "system", "user" and the like."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """How text is laid out for one checkpoint. The defaults suit a model trained on plain text alone.

    `insertion` asks the model for the text between a prompt and a suffix: "<pre>{prompt}<suf>{suffix}<mid>" for example,
    with other braces doubled. None for a model that can't insert. `chat_template` is a Jinja template as in Hugging Face's
    checkpoints, and `stop` the strings that end its answers. `bos_token` comes from tokenizer_config.json, not from
    banded.json: templates may write it even if plain prompts don't start with it.

    Raises PromptFormatError naming the field that can't be used.
    """

    separator: str = "\n###\n"
    input_prefix: str = ""
    output_prefix: str = " => "
    chat_template: str = CHAT_TEMPLATE
    stop: tuple[str, ...] = ("\nUser:",)
    default_max_tokens: int = 256
    insertion: str | None = None
    bos_token: str | None = None

    def __post_init__(self) -> None:
        for name in ("separator", "input_prefix", "output_prefix", "chat_template"):
            check_field(name, getattr(self, name), "a string", isinstance(getattr(self, name), str))
        strings = isinstance(self.stop, tuple) and all(isinstance(stop, str) and stop for stop in self.stop)
        check_field("stop", self.stop, "an array of strings that are not empty", strings)
        number = type(self.default_max_tokens) is int and self.default_max_tokens >= 1
        check_field("default_max_tokens", self.default_max_tokens, "an integer from 1", number)
        if self.insertion is not None:
            expected = "a string that holds {prompt} and {suffix} once each, other braces doubled"
            check_field("insertion", self.insertion, expected, is_insertion(self.insertion))
        try:
            compiled(self.chat_template)
        except Exception as error:  # Jinja's own errors, and the limits of Python's compiler
            place = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise PromptFormatError(f"chat_template does not compile: {place}{error!s:.200}") from None

    def render_chat(
        self, messages: Sequence[Turn], *, bos_token: str, eos_token: str, add_generation_prompt: bool = True
    ) -> str:
        """The text of a chat up to where the next answer begins, or without the beginning of an answer.

        Raises whatever the template raises.
        """
        return compiled(self.chat_template).render(
            messages=[message._asdict() for message in messages],
            add_generation_prompt=add_generation_prompt,
            bos_token=bos_token,
            eos_token=eos_token,
            # Published templates ask whether these are none. If they were missing, they would not be.
            tools=None,
            documents=None,
        )


def check_field(name: str, value: object, expected: str, is_right: bool) -> None:
    if not is_right:
        shown = json.dumps(value)
        cut = shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + "..."
        raise PromptFormatError(f"{name} must be {expected}, got {cut}")


def is_insertion(template: object) -> bool:
    if not isinstance(template, str):
        return False
    try:
        fields = Counter(field[1:] for field in string.Formatter().parse(template) if field[1] is not None)
    except ValueError:  # an unpaired brace
        return False
    return fields == Counter([("prompt", "", None), ("suffix", "", None)])


def load_prompt_format(directory: Path) -> PromptFormat:
    """The prompt format of a checkpoint directory, with defaults for whatever banded.json leaves open, or for all of it.

    The chat template is that of banded.json, or else chat_template.jinja, or else tokenizer_config.json's. The default stop
    belongs to the default template. Raises CheckpointError naming file and field that can't be used.
    """
    fields, settings = (optional_json(directory / name) or {} for name in (PROMPT_FORMAT_FILE, SETTINGS_FILE))
    published, source = settings.get("chat_template"), SETTINGS_FILE
    if (directory / TEMPLATE_FILE).exists():
        published, source = read_text(directory / TEMPLATE_FILE), TEMPLATE_FILE
    if not isinstance(published, str) or "chat_template" in fields:
        published = None
    if isinstance(fields.get("stop"), list):
        fields["stop"] = tuple(fields["stop"])
    if "chat_template" in fields or published is not None:
        fields.setdefault("stop", ())
    bos_token = settings.get("bos_token")
    bos_token = bos_token.get("content") if isinstance(bos_token, dict) else bos_token  # an object or a string
    file = PROMPT_FORMAT_FILE
    try:
        refuse_unknown(fields)
        prompt_format = PromptFormat(**fields, bos_token=bos_token if isinstance(bos_token, str) else None)
        file = source
        return prompt_format if published is None else dataclasses.replace(prompt_format, chat_template=published)
    except PromptFormatError as error:
        raise PromptFormatError(f"{directory}: {file}: {error}") from None


def refuse_unknown(fields: Json) -> None:
    known = {field.name for field in dataclasses.fields(PromptFormat)} - {"bos_token"}
    for name in fields:
        if name not in known:
            expected = ", ".join(sorted(known))
            raise PromptFormatError(f"unknown field {name[:MAX_SHOWN]!r}, expected one of {expected}")


def raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    """Like transformers. Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


@cache
def compiled(template: str) -> jinja2.Template:
    """`template` in the environment that transformers gives published templates.

    A template is somebody else's program, so it runs in a sandbox.
    """
    extensions = ["jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = to_json
    return environment.from_string(template)
