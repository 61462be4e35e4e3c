"""One choice on the client's side: its text and logprobs so far, its clock and its metrics."""

import codecs
from collections.abc import Sequence as Items
from typing import NamedTuple

from model.checkpoint.tokenizer import Tokenizer
from model.step import TokenLogprobs
from service.engine.metrics import Metrics
from service.engine.scheduler import Delta, FinishReason, Sequence
from service.engine.text import TextStream


class ChoiceRequest(NamedTuple):
    """A sequence, and what of it the client wants to see."""

    sequence: Sequence
    stops: tuple[str, ...] = ()
    include_stop: bool = False  # the stop string, or the token in stop_ids, is part of the text
    echo: bool = False  # the prompt's text and tokens come first
    num_implicit: int = 0  # leading prompt tokens that nobody wrote, so that they have no text


class ShownToken(NamedTuple):
    """A token of the text that a client has by now."""

    token: int
    logprobs: TokenLogprobs | None  # None for the first of a prompt
    offset: int  # characters from the start of the prompt to the character in which the token begins


class Output(NamedTuple):
    """What a choice gained: `text` may be empty while characters or a possible stop string are incomplete."""

    choice: int
    text: str
    tokens: list[int]  # sampled by now, shown or not
    finish_reason: FinishReason | None
    logprobs: Items[TokenLogprobs] = ()  # of `tokens`, where asked for
    scores: Items[TokenLogprobs] = ()  # of the prompt's next tokens, from the sequence's scored_from on
    shown: Items[ShownToken] = ()  # where logprobs are asked for: the tokens that `text` makes visible


class Choice:
    """Turns the deltas of one sequence into outputs. Times are those of the steps, however late a slow client reads."""

    def __init__(
        self,
        index: int,
        request: ChoiceRequest,
        prompt_scores: list[TokenLogprobs],
        tokenizer: Tokenizer,
        submitted: float,
        metrics: Metrics,
    ):
        """`prompt_scores` belongs to all choices of a prompt: the first of them gets the logprobs and adds them to it."""
        self._index = index
        self._request = request
        self._sequence = request.sequence
        self._tokenizer = tokenizer
        self._prompt_scores = prompt_scores
        before, unfinished = self._text_before()
        self._text = TextStream(request.stops, include_stop=request.include_stop, start=before)
        # The text begins afresh behind a prompt that ends inside a character, offsets do not.
        self._places = self._text
        if unfinished:
            self._places = TextStream((), start=before)
            self._places.push(unfinished, searched=False)
        self._num_echoed = 0
        self._tokens: list[tuple[int, TokenLogprobs | None]] = []  # that `_text` has taken in
        self._num_shown = 0
        self._began = False
        self._submitted = submitted
        self._metrics = metrics
        self._num_tokens = 0
        self._first_token: float | None = None
        self._last_token = submitted

    def advance(self, delta: Delta, now: float) -> Output:
        """Take in what a step that ended at `now` did. A stop string ends the choice: tokens behind it never were."""
        finish, pieces = delta.finish_reason, []
        self._prompt_scores.extend(delta.scores)
        if not self._began and (delta.tokens or finish):
            self._began = True
            self._metrics.prefix_cache_queries.inc(self._sequence.num_looked_up)
            self._metrics.prefix_cache_hits.inc(self._sequence.num_cached)
            if self._request.echo:
                pieces += self._echo()
        logprobs: Items[TokenLogprobs | None] = delta.logprobs or [None] * len(delta.tokens)
        count = 0
        for token, token_logprobs in zip(delta.tokens, logprobs, strict=True):
            count += 1
            pieces.append(self._push(token, token_logprobs))
            if self._text.stopped:
                break
        if count:
            self._count(count, now)
        if finish:
            pieces.append(self._text.finish())
        if self._text.stopped:
            finish = "stop"
        if finish:
            self._end(finish, now)
        shown = self._shown() if self._sequence.top_logprobs is not None else ()
        tokens, logprobs = delta.tokens[:count], delta.logprobs[:count]
        return Output(self._index, "".join(pieces), tokens, finish, logprobs, delta.scores, shown)

    def _prompt_bytes(self) -> list[bytes]:
        """What each prompt token adds to the text. Special ones that the user asked for by id are spelt out."""
        implicit = self._request.num_implicit
        tokens = self._sequence.prompt[implicit:]
        known = (token in self._tokenizer for token in tokens)
        return [b""] * implicit + [self._tokenizer.token_bytes(t) if k else b"" for t, k in zip(tokens, known, strict=True)]

    def _text_before(self) -> tuple[int, bytes]:
        """Characters before the text that the choice begins with, and bytes of a character that the prompt leaves
        unfinished; for offsets only, which nobody asks for without logprobs."""
        if self._request.echo or self._sequence.top_logprobs is None:
            return 0, b""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return len(decoder.decode(b"".join(self._prompt_bytes()))), decoder.getstate()[0]

    def _echo(self) -> list[str]:
        scores = [None, *self._prompt_scores] if self._prompt_scores else [None] * len(self._sequence.prompt)
        self._tokens += zip(self._sequence.prompt, scores, strict=True)
        self._num_echoed = len(self._tokens)
        return [self._text.push(data, searched=False) for data in self._prompt_bytes()]

    def _push(self, token: int, logprobs: TokenLogprobs | None) -> str:
        self._tokens.append((token, logprobs))
        silent = token in self._sequence.stop_ids and not self._request.include_stop
        data = b"" if silent else self._tokenizer.text_bytes(token)
        if self._places is not self._text:
            self._places.push(data)
        searched = self._num_tokens >= self._sequence.min_tokens
        self._num_tokens += 1
        return self._text.push(data, searched=searched)

    def _shown(self) -> list[ShownToken]:
        """Tokens that the client sees since the last call."""
        shown = max(self._text.shown, self._num_echoed)
        new = slice(self._num_shown, shown)
        self._num_shown = shown
        offsets = self._places.offsets[len(self._places.offsets) - len(self._tokens) :]
        pairs = zip(self._tokens[new], offsets[new], strict=True)
        return [ShownToken(token, logprobs, offset) for (token, logprobs), offset in pairs]

    def _count(self, num_tokens: int, now: float) -> None:
        metrics = self._metrics
        metrics.generated_tokens.inc(num_tokens)
        if self._first_token is None:
            self._first_token = now
            metrics.queue_time.observe(self._sequence.started - self._submitted)
            metrics.prefill_time.observe(now - self._sequence.started)
            metrics.time_to_first_token.observe(now - self._submitted)
        else:
            metrics.inter_token_latency.observe(now - self._last_token)
        self._last_token = now

    def _end(self, finish: FinishReason, now: float) -> None:
        metrics = self._metrics
        metrics.outcome(finish).inc()
        metrics.end_to_end_time.observe(now - self._submitted)
        metrics.request_generated_tokens.observe(self._num_tokens)
        if self._first_token is not None:
            metrics.decode_time.observe(now - self._first_token)
            if self._num_tokens > 1:
                metrics.time_per_output_token.observe((now - self._first_token) / (self._num_tokens - 1))
