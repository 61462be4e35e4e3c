"""What a client of the engine asks for: HTTP routes, `banded complete` and the Python API all make a GenerationRequest."""

import math
import secrets
import sys
from collections import abc, deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, takewhile
from typing import NamedTuple

from model.checkpoint.tokenizer import LongWordError, Tokenizer, TokenizerError
from model.config import GPTConfig
from model.step import Sampling
from service.engine.options import NOBODY
from service.engine.scheduler import NO_ADAPTER, AdapterRef, PrefixGroup, Sequence
from service.engine.workers import rest

# The largest number that a 64-bit integer holds.
MAX_INT = 2**63 - 1
MAX_BIAS = 100
MAX_SHOWN = 80  # characters of a client's own value that an error message repeats
# Least and greatest value of each number.
BOUNDS: dict[str, tuple[float, float]] = {
    "max_tokens": (0, MAX_INT),
    "n": (1, 128),
    "best_of": (1, 20),
    "temperature": (0, 2),
    "top_p": (0, 1),
    "top_k": (-1, MAX_INT),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (math.ulp(0.0), 10),  # above 0
    "min_tokens": (0, MAX_INT),
    "seed": (-MAX_INT - 1, MAX_INT),
    "logprobs": (0, 1000),
    "prompt_logprobs": (0, 1000),
}


def shown(text: str) -> str:
    """`text`, cut so that an error stays small whatever was sent, and without lone surrogates, which no answer can hold."""
    cut = text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."
    return cut.encode(errors="backslashreplace").decode()


class RequestError(ValueError):
    """A request that the model can't run. The message is for the client; `param` is the field that it is about."""

    def __init__(self, message: str, param: str, code: str | None = None):
        super().__init__(message)
        self.param = param
        self.code = code


def context_error(context: int, asked: str, param: str, *, prompt_fits: bool = False) -> RequestError:
    # LiteLLM's and LangChain's fallbacks look for both of these phrases.
    too_long = "" if prompt_fits else ": the prompt is too long"
    message = f"This model's maximum context length is {context} tokens, but the request asks for {asked}{too_long}"
    return RequestError(message, param, "context_length_exceeded")


def check_length(prompt_tokens: int, max_tokens: int, context: int, param: str = "prompt") -> None:
    if prompt_tokens + max_tokens > context:
        asked = f"{prompt_tokens + max_tokens} tokens ({prompt_tokens} in the prompt, {max_tokens} for the completion)"
        raise context_error(context, asked, param, prompt_fits=prompt_tokens < context)


def check_text_length(text: str, tokenizer: Tokenizer, context: int, param: str) -> None:
    """Refuse a text before it is tokenized if even the longest tokens would leave it too long."""
    least = tokenizer.least_tokens(tokenizer.num_known_bytes(text))
    if least > context:
        raise context_error(context, f"a prompt of at least {least} tokens", param)


def check_token_ids(tokens: abc.Iterable[int], vocab_size: int, param: str) -> None:
    for token in tokens:
        if not 0 <= token < vocab_size:
            message = (
                f"token id {shown(str(token))} is outside the model's vocabulary of {vocab_size} (0 to {vocab_size - 1})"
            )
            raise RequestError(message, param)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are picked, where a text ends, and what is reported of it. Names and bounds are those of the HTTP API.

    Raises RequestError naming the field for a value out of bounds.
    """

    max_tokens: int = 16
    n: int = 1  # choices for each prompt
    best_of: int | None = None  # generate so many, return the n with the highest mean logprob
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 and -1 keep all tokens
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: abc.Mapping[int, float] = field(default_factory=dict)  # token id -> what is added to its logit
    seed: int | None = None  # None: drawn for each request
    stop: tuple[str, ...] = ()  # texts that end a choice and are not part of it
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0  # neither end of text nor stop within so many tokens
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None  # how many of the likeliest tokens to report; 0: the chosen token only
    prompt_logprobs: int | None = None  # the same for each token of the prompt, echoed or not
    echo: bool = False  # the text begins with the prompt
    allowed_token_ids: tuple[int, ...] = ()  # no other token is generated; empty: all may be
    bad_words: tuple[str, ...] = ()  # texts that are not generated, neither as they are nor after a space
    skip_special_tokens: bool = True  # False: special tokens are spelled out in the text
    cache_prompt: bool = True  # whether the prompt may come from the prefix cache, and stay there

    def __post_init__(self) -> None:
        for name, (least, most) in BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                is_low = most == MAX_INT and value < least
                bounds = f"at least {least}" if is_low else f"from {least} to {most}"
                if name == "repetition_penalty":
                    bounds = f"above 0 and at most {most}"
                raise RequestError(f"'{name}': must be {bounds}, got {value}", name)
        if isinstance(self.stop, str) or not all(self.stop):
            raise RequestError("'stop': must be a tuple of texts, none of them empty", "stop")
        if isinstance(self.bad_words, str) or not all(word.strip(" ") for word in self.bad_words):
            raise RequestError("'bad_words': must hold texts, each of more than spaces", "bad_words")
        if self.best_of is not None and self.best_of < self.n:
            raise RequestError(f"'best_of': is {self.best_of}, less than n {self.n}", "best_of")
        if self.min_tokens > self.max_tokens:
            raise RequestError(f"'min_tokens': is {self.min_tokens}, more than max_tokens {self.max_tokens}", "min_tokens")
        if not all(-MAX_BIAS <= bias <= MAX_BIAS for bias in self.logit_bias.values()):
            raise RequestError(f"'logit_bias': holds a bias that is not from -{MAX_BIAS} to {MAX_BIAS}", "logit_bias")

    def check_tokens(self, vocab_size: int) -> None:
        """Raise RequestError for a token id that a model of this vocabulary doesn't have."""
        for name in ("logit_bias", "stop_token_ids", "allowed_token_ids"):
            check_token_ids(getattr(self, name), vocab_size, name)

    @property
    def num_candidates(self) -> int:
        """Choices generated for each prompt."""
        return self.best_of or self.n

    @cached_property
    def _biases(self) -> tuple[tuple[int, float], ...]:
        """Once for all choices: there may be a bias for every token of the vocabulary."""
        return tuple(self.logit_bias.items())

    @property
    def is_ranked(self) -> bool:
        return self.num_candidates > self.n

    def sampling(self, seed: int, choice: int) -> Sampling:
        """Of one choice of a request."""
        return Sampling(
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            seed=seed,
            choice=choice,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self._biases,
            allowed_token_ids=self.allowed_token_ids,
        )


# Generates nothing; Score.of reads the prompt's logprobs.
SCORING = SamplingParams(max_tokens=0, logprobs=1)


class ExampleCounts(NamedTuple):
    """How many of the few-shot examples are in the prompt, and how many had no room."""

    examples_used: int
    examples_dropped: int


class Prompt(NamedTuple):
    """What the model is given, never empty, and what ends its answer in addition to the request's own stops."""

    tokens: list[int]
    num_implicit: int = 0  # leading tokens that the user did not write: bos, or end of text for an empty prompt
    stops: tuple[str, ...] = ()  # texts that end the completion
    stop_token_ids: tuple[int, ...] = ()  # tokens that end it
    few_shot: ExampleCounts | None = None
    logprobs_from: int | None = None  # report the logprobs of its tokens from this position on, at least 1


def read_prompt(
    given: str | abc.Sequence[int],
    tokenizer: Tokenizer,
    config: GPTConfig,
    param: str,
    *,
    allow_special: bool = False,
    max_tokens: int | None = None,
) -> Prompt:
    """The prompt for a text, or for token ids, which are taken as they are; the end of it if `max_tokens` cuts it.

    Raises RequestError about `param` for ids that the model doesn't have and for a text that can't fit its context.
    """
    if isinstance(given, str):
        if max_tokens is None:
            check_text_length(given, tokenizer, config.n_positions, param)
        prompt = text_prompt(given, tokenizer, param, allow_special=allow_special, max_tokens=max_tokens)
        return end_of(prompt, max_tokens)
    check_token_ids(given, config.vocab_size, param)
    return end_of(Prompt(list(given)), max_tokens)


def end_of(prompt: Prompt, max_tokens: int | None) -> Prompt:
    """A prompt of at most `max_tokens`: the user's last ones, after those that every prompt starts with."""
    num_left_out = 0 if max_tokens is None else max(len(prompt.tokens) - max_tokens, 0)
    start = prompt.num_implicit
    return prompt._replace(tokens=prompt.tokens[:start] + prompt.tokens[start + num_left_out :])


def text_prompt(
    text: str,
    tokenizer: Tokenizer,
    param: str = "prompt",
    *,
    allow_special: bool = False,
    max_tokens: int | None = None,
) -> Prompt:
    """The prompt for a text, or for its last `max_tokens` tokens. Raises RequestError about `param` as start_prompt does."""
    pieces = encode_slowly([(text, allow_special)], tokenizer, param)
    tokens = deque(chain.from_iterable(pieces), None if max_tokens is None else min(max_tokens, sys.maxsize))
    return start_prompt(list(tokens), tokenizer, param)


def encode_slowly(parts: abc.Iterable[tuple[str, bool]], tokenizer: Tokenizer, param: str) -> abc.Iterator[list[int]]:
    """Tokenizer.encode_slowly. Raises RequestError about `param` for a word that is too long."""
    try:
        for tokens in tokenizer.encode_slowly(parts):
            yield tokens
            rest()
    except LongWordError as error:
        raise RequestError(f"'{param}': {error}", param) from error


def start_prompt(tokens: list[int], tokenizer: Tokenizer, param: str = "prompt") -> Prompt:
    """`tokens`, after bos if the model has one. Without both it is the token that starts a document.

    Raises RequestError about `param` if the model has none, or no row for one of `tokens`.
    """
    try:
        started = tokenizer.started(tokens)
    except TokenizerError as error:
        raise RequestError(f"'{param}': {error}", param) from error
    return Prompt(started, num_implicit=len(started) - len(tokens))


@dataclass(frozen=True)
class GenerationRequest:
    """Prompts, and how each is to be completed."""

    prompts: abc.Sequence[Prompt]
    params: SamplingParams
    adapter: AdapterRef = NO_ADAPTER
    client: bytes | None = None  # who shares the engine with others; None: nobody else's request is of the same client
    cache_scope: str = NOBODY  # requests of different scopes find nothing of each other in the prefix cache

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.params.num_candidates

    @property
    def size(self) -> int:
        """About how many characters and tokens are gone through to make its sequences and choices."""
        texts = (*self.params.bad_words, *self.params.stop, *(stop for prompt in self.prompts[:1] for stop in prompt.stops))
        per_choice = 64 * self.num_choices
        return per_choice + sum(len(prompt.tokens) for prompt in self.prompts) + sum(map(len, texts))

    def stop_ids(self, prompt: Prompt, tokenizer: Tokenizer) -> frozenset[int]:
        """Tokens that end a choice. A stop that names a special token is that token: it has no text to be searched for."""
        special = {token for name, token in tokenizer.special_tokens.items() if name in self.params.stop}
        eos = () if self.params.ignore_eos else tokenizer.eos_ids
        stop_ids = (*self.params.stop_token_ids, *prompt.stop_token_ids, *special, *eos)
        return frozenset(filter(tokenizer.has_row, stop_ids))

    def sequences(self, tokenizer: Tokenizer, deadline: float = math.inf) -> list[list[Sequence]]:
        """The sequences to run: one list for each prompt, with one sequence for each of its choices."""
        params, count = self.params, self.params.num_candidates
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        explains = (params.echo and params.logprobs is not None) or params.prompt_logprobs is not None
        bad_words = bad_word_tokens(params.bad_words, tokenizer)
        client: Hashable = object() if self.client is None else self.client
        common = None
        if count == 1 and len(self.prompts) > 1:
            common = PrefixGroup(num_common([prompt.tokens for prompt in self.prompts]), forks=False)
        rows = []
        all_stop_ids: dict[tuple[int, ...], frozenset[int]] = {}
        for i, prompt in enumerate(self.prompts):
            group = PrefixGroup(len(prompt.tokens), forks=True) if count > 1 else common
            if prompt.stop_token_ids not in all_stop_ids:
                all_stop_ids[prompt.stop_token_ids] = self.stop_ids(prompt, tokenizer)
            stop_ids = all_stop_ids[prompt.stop_token_ids]
            rows.append(
                [
                    Sequence(
                        prompt.tokens,
                        params.max_tokens,
                        params.sampling(seed, i * count + k),
                        stop_ids,
                        min_tokens=params.min_tokens,
                        top_logprobs=0 if params.is_ranked and params.logprobs is None else params.logprobs,
                        # The first choice brings the prompt's logprobs, for all of them.
                        prompt_logprobs_from=1 if explains and k == 0 else prompt.logprobs_from,
                        prompt_top_logprobs=params.prompt_logprobs or 0,
                        bad_words=bad_words,
                        is_cached=params.cache_prompt,
                        cache_scope=self.cache_scope,
                        group=group,
                        adapter=self.adapter,
                        client=client,
                        deadline=deadline,
                    )
                    for k in range(count)
                ]
            )
        return rows


def bad_word_tokens(words: abc.Iterable[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The token runs of each word, at the start of a text and after a space. Names of special tokens are these tokens."""
    spellings = [spelling for word in words for spelling in (word.lstrip(" "), " " + word.lstrip(" "))]
    return tuple(tuple(tokenizer.encode(spelling, allow_special=True)) for spelling in spellings)


def num_common(prompts: abc.Sequence[list[int]]) -> int:
    """How many leading tokens are the same in all prompts."""
    columns = zip(*prompts, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
