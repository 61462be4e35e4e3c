"""One choice on the client's side: its text so far, its clock and its metrics."""

from typing import NamedTuple

from service.metrics import Metrics
from service.scheduler import Delta, FinishReason, Sequence
from service.text import TextStream


class Output(NamedTuple):
    """What a choice gained: `text` may be empty while characters or a possible stop string are incomplete."""

    choice: int
    text: str
    tokens: list[int]
    finish_reason: FinishReason | None


class Choice:
    """Turns the deltas of one sequence into outputs. Times are those of the steps, however late a slow client reads."""

    def __init__(self, index: int, sequence: Sequence, text: TextStream, submitted: float, metrics: Metrics):
        self._index = index
        self._sequence = sequence
        self._text = text
        self._submitted = submitted
        self._metrics = metrics
        self._num_tokens = 0
        self._first_token: float | None = None
        self._last_token = submitted

    def advance(self, delta: Delta, now: float) -> Output:
        """Take in what a step that ended at `now` did. The end-of-text token counts but has no text; a stop string ends
        the choice."""
        finish, pieces = delta.finish_reason, []
        for token in delta.tokens:
            self._count(now)
            if token != self._sequence.eos_id:
                pieces.append(self._text.push(token))
        if self._text.stopped:
            finish = "stop"
        elif finish:
            pieces.append(self._text.finish())
        if finish:
            self._end(finish, now)
        return Output(self._index, "".join(pieces), delta.tokens, finish)

    def _count(self, now: float) -> None:
        metrics = self._metrics
        self._num_tokens += 1
        metrics.generated_tokens.inc()
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
