"""One choice on the client's side: its text and logprobs so far, its clock and its metrics."""

import codecs
import math
from array import array
from collections import abc
from dataclasses import dataclass
from typing import NamedTuple, overload

from model.checkpoint.tokenizer import Tokenizer
from model.step import TokenLogprobs
from service.engine.metrics import Metrics
from service.engine.request import GenerationRequest, Prompt
from service.engine.scheduler import Delta, FinishReason, Start
from service.engine.text import StopMatcher, TextStream


class ShownToken(NamedTuple):
    """A token of the text that the client has received."""

    token: int
    logprobs: TokenLogprobs | None  # None for the first token of a prompt
    offset: int  # characters from the start of the prompt to the character in which the token begins


class ShownTokens(abc.Sequence[ShownToken]):
    """Successive tokens of a choice. They are made when they are looked at: see LogprobColumns."""

    def __init__(self, choice: "Choice | None" = None, places: range = range(0)):
        self._choice, self._places = choice, places

    def __len__(self) -> int:
        return len(self._places)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShownTokens) and [*self] == [*other]

    @overload
    def __getitem__(self, place: int) -> ShownToken: ...
    @overload
    def __getitem__(self, place: slice) -> "ShownTokens": ...
    def __getitem__(self, place: int | slice) -> "ShownToken | ShownTokens":
        if isinstance(place, slice):
            return ShownTokens(self._choice, self._places[place])
        at = self._places[place]
        assert self._choice, "only a choice's tokens have places"
        return self._choice.shown_token(at)

    def followed_by(self, more: "ShownTokens") -> "ShownTokens":
        """With the tokens that come right after these."""
        return ShownTokens(self._choice, range(self._places.start, more._places.stop))


class LogprobColumns(abc.Sequence[TokenLogprobs]):
    """Logprobs of one token after the other.

    As objects, those of 64 prompts kept the garbage collector, and with it the event loop, busy for 50 to 70 ms at a time.
    """

    def __init__(self) -> None:
        self._logprobs, self._ids, self._values = array("f"), array("i"), array("f")
        self._ends = array("q", [0])  # of each token's ids and values

    def append(self, some: TokenLogprobs) -> None:
        self._logprobs.append(some.logprob)
        self._ids.extend(some.ids)
        self._values.extend(some.values)
        self._ends.append(len(self._ids))

    def __len__(self) -> int:
        return len(self._logprobs)

    @overload
    def __getitem__(self, place: int) -> TokenLogprobs: ...
    @overload
    def __getitem__(self, place: slice) -> list[TokenLogprobs]: ...
    def __getitem__(self, place: int | slice) -> TokenLogprobs | list[TokenLogprobs]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        at = range(len(self))[place]
        own = slice(self._ends[at], self._ends[at + 1])
        return TokenLogprobs(self._logprobs[at], self._ids[own], self._values[own])


class Output(NamedTuple):
    """What one token added to a choice. `text` may be empty: an incomplete character, or what may become a stop string."""

    choice: int  # number of the choice in its request
    text: str
    tokens: list[int]  # the token, visible in the text or not; none where a choice ends without one
    finish_reason: FinishReason | None
    shown: ShownTokens = ShownTokens()  # with logprobs: the tokens that `text` makes visible


class Choice:
    """Turns the deltas of one sequence into outputs, and adds them up.

    Times are those of the steps, however late a slow client reads.
    """

    def __init__(
        self,
        index: int,
        prompt: Prompt,
        request: GenerationRequest,
        prompt_logprobs: LogprobColumns,
        tokenizer: Tokenizer,
        metrics: Metrics,
        submitted: float,
        like: "Choice | None" = None,
    ):
        """`prompt_logprobs` is the same for all choices of a prompt: the first choice receives and appends them.

        `like` is another choice of the request. What is known of its stops and its prompt is not computed again.
        """
        params = request.params
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.tokens: list[int] = []
        self.prompt_logprobs = prompt_logprobs
        self.start: Start | None = None  # None until the engine has begun to compute it
        self.prompt = prompt
        self._index, self._params = index, params
        self._bytes_of = tokenizer.text_bytes if params.skip_special_tokens else self._spelled
        self._tokenizer = tokenizer
        self._silent_ids: frozenset[int] = frozenset()
        if not params.include_stop_str_in_output:
            same_ids = like and like.prompt.stop_token_ids == prompt.stop_token_ids
            self._silent_ids = like._silent_ids if like and same_ids else request.stop_ids(prompt, tokenizer)
        same_stops = like and like.prompt.stops == prompt.stops
        self._stops: StopMatcher = like._stops if like and same_stops else StopMatcher((*params.stop, *prompt.stops))
        self._before: tuple[int, bytes] = like._before if like and like.prompt is prompt else self._text_before()
        chars_before, unfinished = self._before
        self._text = TextStream(self._stops, include_stop=params.include_stop_str_in_output, start=chars_before)
        # If the prompt ends inside a character, the text begins afresh but the offsets count on.
        self._places = self._text
        if unfinished:
            self._places = TextStream((), start=chars_before)
            self._places.push(unfinished, searched=False)
        self._logprobs = LogprobColumns()  # of `tokens`, where asked for
        self._num_echoed = 0
        self._num_shown = 0
        self._began = False
        self._total_logprob = 0.0
        self._metrics = metrics
        self._submitted = submitted
        self._first_token: float | None = None
        self._last_token = submitted

    @property
    def mean_logprob(self) -> float:
        return self._total_logprob / len(self.tokens) if self.tokens else 0.0

    @property
    def facts(self) -> str:
        """What an error says of it."""
        cached = self.start.num_cached if self.start else 0
        prompt = f"{len(self.prompt.tokens)} prompt tokens, {cached} of them cached"
        return f"choice {self._index} ({prompt}, and {len(self.tokens)} generated)"

    def begin(self, start: Start) -> None:
        """The engine computes the first tokens of the sequence."""
        self.start = start
        self._metrics.prefix_cache_queries.inc(start.num_looked_up)
        self._metrics.prefix_cache_hits.inc(start.num_cached)

    def advance(self, delta: Delta, now: float) -> list[Output]:
        """Take in what a step that ended at `now` did, which may be several tokens, where they had been drafted.

        A stop string ends the choice and drops the tokens after it.
        """
        finish, echoed = delta.finish_reason, ""
        for each in delta.prompt_logprobs:
            self.prompt_logprobs.append(each)
        if not self._began and (delta.tokens or finish):
            self._began = True
            if self._params.echo:
                echoed = self._echo()
        logprobs: abc.Sequence[TokenLogprobs | None] = delta.logprobs or [None] * len(delta.tokens)
        outputs: list[Output] = []
        for token, token_logprobs in zip(delta.tokens, logprobs, strict=True):
            outputs.append(self._output(echoed + self._push(token, token_logprobs), [token]))
            echoed = ""
            if self._text.stopped:
                break
        if outputs:
            self._observe_tokens(len(outputs), now)
        if finish:
            last = outputs.pop() if outputs else self._output(echoed, [])
            rest = self._output(self._text.finish(), [])
            outputs.append(last._replace(text=last.text + rest.text, shown=last.shown.followed_by(rest.shown)))
        if self._text.stopped:
            finish = "stop"
        if finish:
            self._observe_end(finish, now)
            outputs[-1] = outputs[-1]._replace(finish_reason=finish)
        self.finish_reason = finish
        return outputs

    def _output(self, text: str, tokens: list[int]) -> Output:
        shown = self._newly_shown()
        self.text += text
        return Output(self._index, text, tokens, None, shown)

    def _spelled(self, token: int) -> bytes:
        """The token's bytes, a special token's name included. Ids that the vocabulary lacks have none."""
        return self._tokenizer.token_bytes(token) if token in self._tokenizer else b""

    def _prompt_bytes(self) -> list[bytes]:
        """What each prompt token adds to the text. A special token that the user gave by id is spelled out."""
        implicit = self.prompt.num_implicit
        return [b""] * implicit + [self._spelled(token) for token in self.prompt.tokens[implicit:]]

    def _text_before(self) -> tuple[int, bytes]:
        """Characters ahead of the choice's text, and the bytes of a character that the prompt leaves unfinished.

        Only offsets need them, and only logprobs have offsets.
        """
        if self._params.echo or self._params.logprobs is None:
            return 0, b""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return len(decoder.decode(b"".join(self._prompt_bytes()))), decoder.getstate()[0]

    def _echo(self) -> str:
        self._num_echoed = len(self.prompt.tokens)
        return "".join([self._text.push(data, searched=False) for data in self._prompt_bytes()])

    def _push(self, token: int, logprobs: TokenLogprobs | None) -> str:
        if logprobs is not None:
            self._logprobs.append(logprobs)
            self._total_logprob += logprobs.logprob
        data = b"" if token in self._silent_ids else self._bytes_of(token)
        if self._places is not self._text:
            self._places.push(data)
        searched = len(self.tokens) >= self._params.min_tokens
        self.tokens.append(token)
        return self._text.push(data, searched=searched)

    def _newly_shown(self) -> ShownTokens:
        """With logprobs: the tokens that have become visible since the last call."""
        if self._params.logprobs is None:
            return ShownTokens()
        shown = max(self._text.shown, self._num_echoed)
        new = range(self._num_shown, shown)
        self._num_shown = shown
        return ShownTokens(self, new)

    @property
    def shown(self) -> ShownTokens:
        """With logprobs: all tokens that are visible so far."""
        return ShownTokens(self, range(self._num_shown))

    def shown_token(self, place: int) -> ShownToken:
        """A token of the text, counted from the first one, of the prompt if that is echoed."""
        own = place - self._num_echoed
        offset = self._places.offsets[place + len(self._places.offsets) - self._num_echoed - len(self.tokens)]
        if own >= 0:
            return ShownToken(self.tokens[own], self._logprobs[own], offset)
        logprobs = self.prompt_logprobs[place - 1] if place else None
        return ShownToken(self.prompt.tokens[place], logprobs, offset)

    def _observe_tokens(self, num_tokens: int, now: float) -> None:
        metrics = self._metrics
        metrics.generated_tokens.inc(num_tokens)
        if self._first_token is None:
            assert self.start is not None, "tokens of a sequence that never began"
            self._first_token = now
            metrics.queue_time.observe(self.start.admitted - self._submitted)
            metrics.prefill_time.observe(now - self.start.admitted)
            metrics.time_to_first_token.observe(now - self._submitted)
        else:
            metrics.inter_token_latency.observe(now - self._last_token)
        self._last_token = now

    def _observe_end(self, finish: FinishReason, now: float) -> None:
        metrics, num_tokens = self._metrics, len(self.tokens)
        metrics.outcome(finish).inc()
        metrics.end_to_end_time.observe(now - self._submitted)
        metrics.request_generated_tokens.observe(num_tokens)
        if self._first_token is not None:
            metrics.decode_time.observe(now - self._first_token)
            if num_tokens > 1:
                metrics.time_per_output_token.observe((now - self._first_token) / (num_tokens - 1))


@dataclass(frozen=True)
class Score:
    """How likely a continuation is after a prompt."""

    logprob: float  # natural logarithm, of the whole continuation
    mean_logprob: float
    is_greedy: bool  # every token is the likeliest
    bits_per_byte: float | None  # None if the tokens have no text
    tokens: list[int]

    @classmethod
    def of(cls, tokens: list[int], choice: Choice, tokenizer: Tokenizer) -> "Score":
        """From the choice that has scored a continuation, with request.SCORING."""
        found = choice.prompt_logprobs
        logprob = sum(each.logprob for each in found)
        num_bytes = sum(len(tokenizer.text_bytes(token)) for token in tokens)
        bits = -logprob / math.log(2) / num_bytes if num_bytes else None
        return cls(logprob, logprob / len(tokens), all(each.logprob >= each.values[0] for each in found), bits, tokens)
