"""From what a request says to the tokens that the engine runs: plain text, few-shot examples, chats and insertions.

A user's text never becomes a special token unless `allow_special`; what the model's prompt format says always may.
"""

import re
import secrets
import string
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate, chain, pairwise
from typing import Literal, NamedTuple

from model.checkpoint.prompt_format import PromptFormat, Turn
from model.checkpoint.templates import TemplateProcessError
from model.checkpoint.tokenizer import PromptPart, Tokenizer
from service.engine.request import (
    ExampleCounts,
    Prompt,
    RequestError,
    check_text_length,
    context_error,
    encode_slowly,
    start_prompt,
)

MAX_REASON = 200  # characters of a template's own error that a message repeats


class Example(NamedTuple):
    """A worked example."""

    input: str
    output: str


class FewShot(NamedTuple):
    """Turns a query into a few-shot prompt. None stands for the prompt format's text, an empty instruction for no text."""

    examples: Sequence[Example]
    instruction: str | None = None
    input_prefix: str | None = None
    output_prefix: str | None = None
    separator: str | None = None
    on_overflow: Literal["drop", "error"] = "drop"  # drop: leave out the oldest examples


def few_shot_prompt(
    query: str,
    few_shot: FewShot,
    prompt_format: PromptFormat,
    tokenizer: Tokenizer,
    *,
    context: int,
    max_tokens: int,
    allow_special: bool = False,
) -> Prompt:
    """[instruction + separator] + (input_prefix + input + output_prefix + output + separator) for each example +
    input_prefix + query + output_prefix without its trailing spaces.

    Special tokens in the separator are always special, and the completion ends at the separator: see `ends_at`. If prompt
    and `max_tokens` exceed `context` tokens, the oldest examples are dropped until they fit. Raises RequestError if that is
    not wanted, or not enough.
    """
    total, room = len(few_shot.examples), context - max_tokens
    separator = prompt_format.separator if few_shot.separator is None else few_shot.separator
    check_text_length(separator, tokenizer, context, "few_shot.separator")

    def parts(examples: Sequence[Example]) -> list[PromptPart]:
        return few_shot_parts(query, few_shot._replace(examples=examples), prompt_format, allow_special)

    @cache
    def prompt(dropped: int) -> Prompt:
        return start_prompt(encoded(parts(few_shot.examples[dropped:]), tokenizer), tokenizer)

    # Lengths are added, since the same long text may stand between all examples.
    without = sum(tokenizer.num_known_bytes(part.text) for part in parts(()))
    around = sum(tokenizer.num_known_bytes(part.text) for part in parts([Example("", "")])) - without
    own = [around + sum(map(tokenizer.num_known_bytes, example)) for example in few_shot.examples]
    # Of the last examples: none, one, two and so on.
    num_bytes = list(accumulate(reversed(own), initial=without))

    def least_tokens(dropped: int) -> int:
        """A lower bound on the prompt's tokens, known without laying it out."""
        return tokenizer.least_tokens(num_bytes[total - dropped])

    def fits(dropped: int) -> bool:
        return least_tokens(dropped) <= room and len(prompt(dropped).tokens) <= room

    most = total if few_shot.on_overflow == "drop" else 0
    # Bisection works because fewer examples mean fewer tokens. Merged white space can make an exception, which may cost one
    # example too many.
    dropped = 0 if fits(0) else 1 + bisect_left(range(1, most + 1), True, key=fits)
    if dropped > most:
        is_least = least_tokens(most) > room
        count = least_tokens(most) if is_least else len(prompt(most).tokens)
        asked = (
            f"{'at least ' * is_least}{count + max_tokens} tokens ({count} in the prompt with {total - most} of its {total} "
            f"examples, {max_tokens} for the completion)"
        )
        raise context_error(context, asked, "prompt", prompt_fits=count < context)
    stops, stop_token_ids = ends_at([separator], tokenizer)
    counts = ExampleCounts(examples_used=total - dropped, examples_dropped=dropped)
    return prompt(dropped)._replace(stops=stops, stop_token_ids=stop_token_ids, few_shot=counts)


def few_shot_parts(query: str, few_shot: FewShot, prompt_format: PromptFormat, allow_special: bool) -> list[PromptPart]:
    def own(text: str) -> PromptPart:
        return PromptPart(text, allow_special)

    def own_or_default(text: str | None, default: str) -> PromptPart:
        return PromptPart(default, True) if text is None else own(text)

    input_prefix = own_or_default(few_shot.input_prefix, prompt_format.input_prefix)
    output_prefix = own_or_default(few_shot.output_prefix, prompt_format.output_prefix)
    separator = PromptPart(prompt_format.separator if few_shot.separator is None else few_shot.separator, True)
    parts = [own(few_shot.instruction), separator] if few_shot.instruction else []
    for example in few_shot.examples:
        parts += [input_prefix, own(example.input), output_prefix, own(example.output), separator]
    return [*parts, input_prefix, own(query), output_prefix._replace(text=output_prefix.text.rstrip(" "))]


def ends_at(texts: Iterable[str], tokenizer: Tokenizer) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The stop strings and the stop tokens for a completion that ends at any of `texts`; an empty one ends nothing.

    Special tokens have no text that could be searched for, so a text that contains some ends the completion at the first
    of them. Whatever precedes that token stays in the completion.
    """
    stops, stop_token_ids = [], []
    special_ids = frozenset(tokenizer.special_tokens.values())
    for text in texts:
        special = [token for token in tokenizer.encode(text, allow_special=True) if token in special_ids]
        if special:
            stop_token_ids.append(special[0])
        elif text:
            stops.append(text)
    return tuple(stops), tuple(stop_token_ids)


def chat_prompt(
    messages: Sequence[Turn],
    prompt_format: PromptFormat,
    tokenizer: Tokenizer,
    *,
    allow_special: bool = False,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    max_chars: int | None = None,
) -> Prompt:
    """`messages` laid out by the model's template, which may write bos itself; the completion ends at its stops.

    It ends with the beginning of an answer if `add_generation_prompt`, or inside the last message if
    `continue_final_message`. Only contents are kept from becoming special tokens, since roles are the API's own words.
    Raises RequestError when the template raises, for whatever reason, when it writes more than `max_chars` characters or not
    the message to continue, and where the checkpoint has none that can be used.
    """
    if prompt_format.chat_problem:
        raise RequestError(f"'messages': the model can't chat: {prompt_format.chat_problem}", "messages")
    names = () if allow_special else tuple(tokenizer.special_tokens)
    mark, end = new_mark(), new_mark()
    marked = [Turn(message.role, mark_special(message.content, names, mark)) for message in messages]
    if continue_final_message:
        marked[-1] = marked[-1]._replace(content=f"{marked[-1].content}{end} ")
    bos_name, eos_name = (
        "" if token is None else tokenizer.token_name(token) for token in (tokenizer.bos_id, tokenizer.eos_id)
    )
    try:
        text = prompt_format.render_chat(
            marked,
            bos_token=bos_name,
            eos_token=eos_name,
            add_generation_prompt=add_generation_prompt,
            max_chars=max_chars,
        )
    except TemplateProcessError:
        raise
    except Exception as error:  # the template is someone else's program
        reason = without(end, str(error) or type(error).__name__).replace(mark, "")
        reason = reason.encode(errors="backslashreplace").decode()
        message = f"the model's chat template does not take these messages: {reason:.{MAX_REASON}}"
        raise RequestError(message, "messages") from error
    if continue_final_message:
        text, found, rest = text.rpartition(end)
        if not found:
            raise RequestError("the model's chat template leaves out the final message, so nothing continues it", "messages")
        text = without(end, text if rest.startswith(" ") else text.rstrip())  # a template may strip contents
    first, *marked_pieces = text.split(mark)
    parts = [PromptPart(first, True)]
    for piece in marked_pieces:
        parts += [PromptPart(piece[:1], False), PromptPart(piece[1:], True)]
    tokens = encoded(parts, tokenizer, "messages")
    if tokens[:1] == [tokenizer.bos_id]:
        del tokens[0]
    stops, stop_token_ids = ends_at(prompt_format.stop, tokenizer)
    return start_prompt(tokens, tokenizer, "messages")._replace(stops=stops, stop_token_ids=stop_token_ids)


def without(end: str, text: str) -> str:
    """`text` without the mark that stands, with a space after it, at the end of the message to continue."""
    return text.replace(f"{end} ", "").replace(end, "")


def new_mark() -> str:
    """No client can guess it, and no template changes it: private-use characters have no case and are not white space."""
    return "".join(chr(0xF0000 + secrets.randbelow(0xFFFE)) for _ in range(8))


def mark_special(text: str, names: Sequence[str], mark: str) -> str:
    """`text` with `mark` ahead of each character at which one of `names` begins.

    At the text's borders part of a name is enough, since the template may put the rest of the name next to it.
    """
    if not names:
        return text
    places = {match.start() for match in re.finditer(f"(?={'|'.join(map(re.escape, names))})", text)}
    # Templates like to strip white space.
    start, end = len(text) - len(text.lstrip()), text.rstrip()
    for name in names:
        for cut in range(1, len(name)):
            if text.startswith(name[cut:], start):
                places.add(start)
            if end.endswith(name[:cut]):
                places.add(len(end) - cut)
    return mark.join(text[left:right] for left, right in pairwise([0, *sorted(places), len(text)]))


def insertion_prompt(
    prompt: str, suffix: str, prompt_format: PromptFormat, tokenizer: Tokenizer, *, allow_special: bool = False
) -> Prompt:
    """The prompt for what stands between `prompt` and `suffix`. Raises RequestError for a model that can't insert."""
    if prompt_format.insertion is None:
        message = "'suffix' is not supported by this model: its card declares no format for insertions"
        raise RequestError(message, "suffix", "unsupported_parameter")
    texts = {"prompt": prompt, "suffix": suffix}
    parts = []
    for literal, name, _, _ in string.Formatter().parse(prompt_format.insertion):
        parts.append(PromptPart(literal, True))
        if name is not None:
            parts.append(PromptPart(texts[name], allow_special))
    return start_prompt(encoded(parts, tokenizer), tokenizer)


def encoded(parts: Iterable[PromptPart], tokenizer: Tokenizer, param: str = "prompt") -> list[int]:
    """Token ids of a layout. Raises RequestError about `param` for a word that is too long."""
    return list(chain.from_iterable(encode_slowly(parts, tokenizer, param)))
