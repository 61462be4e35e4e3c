"""How a checkpoint lays out few-shot examples, chats and insertions as text: its banded.json and its chat template."""

import dataclasses
import json
import logging
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jinja2

from model.checkpoint import templates
from model.checkpoint.files import CheckpointError, Json, is_there, optional_json, read_text
from model.checkpoint.render import compiled, render
from model.checkpoint.vocabulary import ROLES, SETTINGS_FILE, SPECIAL_MAP_FILE, special_roles

log = logging.getLogger("banded.checkpoint")

PROMPT_FORMAT_FILE = "banded.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_DIRECTORY = "additional_chat_templates"
TEMPLATE_BYTES = 1 << 20
MAX_TEXT = 4096  # characters of any other text
MAX_STOPS = 64
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
    checkpoints, and `stop` the strings that end its answers. The last two fields are not banded.json's: `chat_problem`
    tells why no chat can be laid out, if so, and `token_names` what the tokenizer calls pad_token, unk_token and the
    like: templates may write bos_token even if plain prompts don't start with it.

    Raises PromptFormatError naming the field that can't be used.
    """

    separator: str = "\n###\n"
    input_prefix: str = ""
    output_prefix: str = " => "
    chat_template: str = CHAT_TEMPLATE
    stop: tuple[str, ...] = ("\nUser:",)
    default_max_tokens: int = 256
    insertion: str | None = None
    chat_problem: str | None = None
    token_names: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("separator", "input_prefix", "output_prefix", "chat_template"):
            check_field(name, getattr(self, name), "a string", isinstance(getattr(self, name), str))
        strings = isinstance(self.stop, tuple) and all(isinstance(stop, str) and stop for stop in self.stop)
        check_field("stop", self.stop, "an array of strings that are not empty", strings)
        number = type(self.default_max_tokens) is int and self.default_max_tokens >= 1
        check_field("default_max_tokens", self.default_max_tokens, "an integer from 1", number)
        texts = {"separator": [self.separator], "input_prefix": [self.input_prefix], "output_prefix": [self.output_prefix]}
        for name, values in (texts | {"stop": self.stop, "insertion": [self.insertion or ""]}).items():
            if len(values) > MAX_STOPS or any(len(str(value)) > MAX_TEXT for value in values):
                raise PromptFormatError(f"{name} must be at most {MAX_STOPS} strings of {MAX_TEXT} characters")
        if self.insertion is not None:
            expected = "a string that holds {prompt} and {suffix} once each, other braces doubled"
            check_field("insertion", self.insertion, expected, is_insertion(self.insertion))

    @property
    def is_own(self) -> bool:
        """Whether the chat template is ours, which takes no time to speak of. Any other runs in another process."""
        return self.chat_template == CHAT_TEMPLATE

    def render_chat(
        self,
        messages: Sequence[Turn],
        *,
        bos_token: str,
        eos_token: str,
        add_generation_prompt: bool = True,
        max_chars: int | None = None,
    ) -> str:
        """The text of a chat up to where the next answer begins, or without the beginning of an answer.

        The tokens that are given count where the checkpoint names none. Raises jinja2.TemplateError with what the template
        raises, for a text of more than `max_chars` characters, and if the template takes too much time or memory.
        """
        variables = {
            "messages": [message._asdict() for message in messages],
            "add_generation_prompt": add_generation_prompt,
            **{"bos_token": bos_token, "eos_token": eos_token, **self.token_names},
            # Published templates ask whether these are none. If they were missing, they would not be.
            "tools": None,
            "documents": None,
        }
        if self.is_own:
            return render(compiled(self.chat_template), variables, max_chars)
        return templates.process.render(self.chat_template, variables, max_chars)


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

    The chat template is that of banded.json, or else a published one. The default stop belongs to the default template. A
    template that can't be used becomes `chat_problem`, with a line in the log: all but chats can be served.
    Raises CheckpointError naming file and field that can't be used.
    """
    files = (PROMPT_FORMAT_FILE, SETTINGS_FILE, SPECIAL_MAP_FILE)
    fields, settings, special_map = (optional_json(directory / name) or {} for name in files)
    names = {role: name for role, name in special_roles(settings, special_map).items() if role in ROLES}
    if isinstance(fields.get("stop"), list):
        fields["stop"] = tuple(fields["stop"])
    template, problem = fields.get("chat_template"), None
    if "chat_template" not in fields:
        try:
            template = published_template(directory, settings)
        except CheckpointError as error:
            problem = str(error)
    if template is not None or problem:
        fields.setdefault("stop", ())
    if isinstance(template, str):
        fields["chat_template"], problem = template, why_not_compiled(template)
    if problem:
        log.warning("%s: chats are refused: %s", directory, problem)
    try:
        refuse_unknown(fields)
        return PromptFormat(**fields, chat_problem=problem, token_names=names)
    except PromptFormatError as error:
        raise PromptFormatError(f"{directory}: {PROMPT_FORMAT_FILE}: {error}") from None


def published_template(directory: Path, settings: Json) -> str | None:
    """The chat template that a checkpoint brings; None if it brings none. Of several, the one named default.

    They stand in tokenizer_config.json, as one text or by name, or in files of their own, which overrule it. Raises
    CheckpointError if none of them is the default, or one is no text.
    """
    value = settings.get("chat_template")
    match value:
        case dict():
            named = dict(value)
        case [*entries] if all(isinstance(entry, dict) for entry in entries):
            named = {entry.get("name"): entry.get("template") for entry in entries}
        case _:
            named = {"default": value}
    if is_there(directory / TEMPLATE_FILE):
        named["default"] = directory / TEMPLATE_FILE
    named |= {path.stem: path for path in (directory / TEMPLATE_DIRECTORY).glob("*.jinja")}
    if "default" not in named:
        raise PromptFormatError(f"none of the chat templates {sorted(map(str, named))!s:.{MAX_SHOWN}} is named default")
    template = named["default"]
    if isinstance(template, Path):
        template = read_text(template, TEMPLATE_BYTES)
    if template is not None:
        check_field(f"{SETTINGS_FILE}: chat_template", template, "a string or strings by name", isinstance(template, str))
    return template


def why_not_compiled(template: str) -> str | None:
    if template == CHAT_TEMPLATE:
        return None
    try:
        templates.process.render(template, None)
    except jinja2.TemplateError as error:
        return f"chat_template does not compile: {error!s:.200}"
    except templates.TemplateProcessError:  # the first chat tells
        return None
    return None


def refuse_unknown(fields: Json) -> None:
    known = {field.name for field in dataclasses.fields(PromptFormat)} - {"chat_problem", "token_names"}
    for name in fields:
        if name not in known:
            expected = ", ".join(sorted(known))
            raise PromptFormatError(f"unknown field {name[:MAX_SHOWN]!r}, expected one of {expected}")
