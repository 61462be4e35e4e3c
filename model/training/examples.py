"""Files of prompts and completions to learn from: read, checked and encoded. Needs no torch: the server reads them too."""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from statistics import mode
from typing import BinaryIO, NamedTuple

from model.checkpoint.files import few, json_lines
from model.checkpoint.tokenizer import Tokenizer, TokenizerError

# The target of a position that is not learnt: in a prompt, or in padding.
IGNORED = -1
# Characters of a line of JSONL: four times what fills a context of 2048 tokens with the longest ones.
MAX_LINE = 2**20


class TrainingExample(NamedTuple):
    """The model learns to write `completion` after `prompt`."""

    prompt: str
    completion: str
    line: int  # of its file, from 1


def read_examples(file: BinaryIO, name: str) -> Iterator[TrainingExample]:
    """From JSONL of {"prompt", "completion"}. Raises ValueError with `name`, the file's, and the line."""
    number = 0
    for number, line in json_lines(file, name):
        where = f"{name}, line {number}"
        if len(line) > MAX_LINE:
            raise ValueError(f"{where}: has {len(line)} characters, at most {MAX_LINE} are read")
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON: {error}") from error
        if not isinstance(fields, dict) or fields.keys() != {"prompt", "completion"}:
            raise ValueError(f'{where}: expected an object of "prompt" and "completion", got {line[:80]!r}')
        for field, text in fields.items():
            if not isinstance(text, str):
                raise ValueError(f"{where}: {field} must be a text, got {repr(text)[:80]}")
        if not fields["completion"]:
            raise ValueError(f"{where}: the completion is empty")
        yield TrainingExample(**fields, line=number)
    if not number:
        raise ValueError(f"{name} holds no examples")


def advice(examples: Sequence[TrainingExample]) -> list[str]:
    """How the file could be better, with line numbers.

    Every prompt should end in one separator, which no prompt holds elsewhere. Every completion should begin with a space,
    and all should end in the same text.
    """
    found = []
    prompts, completions = [example.prompt for example in examples], [example.completion for example in examples]
    separator, ending = common_suffix(prompts), common_suffix(completions)
    if any(prompts) and not separator:
        usual = mode(text[-1:] for text in prompts)
        odd = flagged(examples, [not text.endswith(usual) for text in prompts])
        found.append(f'end every prompt with the same separator, such as "\\n###\\n" or " =>"; unlike most: {odd}')
    elif separator.strip():
        inside = [separator.strip() in prompt[: len(prompt) - len(separator)] for prompt in prompts]
        if any(inside):
            found.append(f"the separator {separator!r} is inside the prompt too: {flagged(examples, inside)}")
    unspaced = [not completion[0].isspace() for completion in completions]
    if any(unspaced):
        found.append(f"begin every completion with a space, as words are tokens with one: {flagged(examples, unspaced)}")
    if len(set(completions)) > 1 and not ending and any(len(text.split()) > 1 for text in completions):
        found.append('end every completion with the same text, such as "\\n" or " END", to stop at')
    first_line = {example[:2]: example.line for example in reversed(examples)}
    repeated = [first_line[example[:2]] < example.line for example in examples]
    if any(repeated):
        found.append(f"leave out what stands there before: {flagged(examples, repeated)}")
    return found


def common_suffix(texts: Sequence[str]) -> str:
    """The longest ending of all texts; none for a single text."""
    if len(texts) < 2:
        return ""
    backwards = sorted(text[::-1] for text in texts)  # the first and the last share only what all share
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(backwards[0], backwards[-1], strict=False))
    return "".join(letter for letter, _ in pairs)[::-1]


def flagged(examples: Sequence[TrainingExample], flags: Sequence[bool]) -> str:
    """The flagged lines."""
    return lines([example.line for example, flag in zip(examples, flags, strict=True) if flag])


def lines(numbers: Sequence[int]) -> str:
    return f"line{'s' * (len(numbers) != 1)} {few(numbers)}"


class Encoded(NamedTuple):
    """The tokens of an example, and for each the token that follows it: IGNORED inside the prompt."""

    inputs: list[int]
    targets: list[int]


def encode(examples: Iterable[TrainingExample], tokenizer: Tokenizer, context: int) -> Iterator[Encoded]:
    """Prompt, completion, and eos if there is one. Raises ValueError naming the lines that can't be learnt."""
    too_long: list[int] = []
    longest = 0
    for prompt, completion, line in examples:
        least = tokenizer.least_tokens(tokenizer.num_known_bytes(prompt) + tokenizer.num_known_bytes(completion))
        if least > context + 1:  # known without tokenizing texts of any length
            too_long.append(line)
            longest = max(longest, least)
            continue
        try:
            before = tokenizer.encode_prompt(prompt)
            tokens = [*before, *tokenizer.checked(tokenizer.encode(completion)), *tokenizer.ending]
        except TokenizerError as error:
            raise ValueError(f"line {line}: {error}") from error
        targets = [IGNORED] * (len(before) - 1) + tokens[len(before) :]
        if len(tokens) - 1 > context:
            too_long.append(line)
            longest = max(longest, len(tokens) - 1)
        else:
            yield Encoded(tokens[:-1], targets)
    if too_long:
        raise ValueError(f"the model's context is {context} tokens; longer, up to {longest}: {lines(too_long)}")
