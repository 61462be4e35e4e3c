"""How many prompt tokens, and rows of a client with many, may run in a step. The cost of steps is learnt, and kept low."""

import sys
from typing import NamedTuple

from kernels.band import PAGE_SIZE

# Weight of the newest step in what is learnt: of the parts of a step's time, and of the mean decode-only step. The mean is
# what streams are used to. It moves slowly, so that a few steps that happen to carry long drafts hardly change it.
NEWEST = 0.5
NEWEST_MEAN = 0.05
# A step with prompts may take this many decode-only steps. One step in a hundred takes 1.5 times as long as predicted.
MAX_SLOWDOWN = 1.75
# The rows that a client decodes beyond those of every other may make a step take this many times as long.
MAX_CROWDING = 1.5


class Load(NamedTuple):
    """What a step computes."""

    rows: int  # decoded tokens, drafts included
    tokens: int  # prompt tokens
    keys: int  # keys that the prompt tokens see, added up
    explained: int = 0  # prompt tokens with logprobs: each takes a row of logits

    def scaled(self) -> tuple[float, ...]:
        """One number for each part of a step's time, of the order of 1 for a step that this part dominates."""
        return 1.0, self.rows / 32, self.tokens / 64, self.keys / 65536, self.explained / 64


class Pace:
    """Predicts the time of a step as a fixed part plus parts that grow with its rows, prompt tokens and their keys.

    The fixed part is mostly the reading of the weights. The factors follow the measured steps (normalised least mean
    squares).
    """

    def __init__(self) -> None:
        self._seconds = [0.0] * len(Load(0, 0, 0).scaled())
        self._decoding: float | None = None  # of a decode-only step

    def observe(self, load: Load, seconds: float) -> None:
        """Learn from a step that took `seconds`."""
        parts = load.scaled()
        step = NEWEST * (seconds - self._expected(load)) / sum(part * part for part in parts)
        self._seconds = [max(factor + step * part, 0.0) for factor, part in zip(self._seconds, parts, strict=True)]
        if not load.tokens:
            old = seconds if self._decoding is None else self._decoding
            self._decoding = old + NEWEST_MEAN * (seconds - old)

    def row_limit(self, start: int) -> int:
        """Decode rows, drafts included, that leave room for a page of a prompt that continues at position `start`."""
        return self._fitting(Load(1, 0, 0), other=Load(0, PAGE_SIZE, PAGE_SIZE * start))

    def chunk_limit(self, num_rows: int, start: int) -> int:
        """Prompt tokens, from position `start` on, that keep a step with `num_rows` decode rows within MAX_SLOWDOWN.

        At least a page, whose queries are cheapest together. Smaller chunks would cost the streams more throughput than
        they save them delay.
        """
        return max(PAGE_SIZE, self._fitting(Load(0, 1, start), other=Load(num_rows, 0, 0)))

    def crowd_limit(self, num_rows: int) -> int:
        """Decode rows, drafts included, that keep a step within MAX_CROWDING times one of `num_rows`."""
        fixed, seconds = (self._expected(Load(rows, 0, 0)) for rows in (0, num_rows))
        if seconds <= fixed:
            return sys.maxsize  # rows cost nothing, or it is not known yet
        return int(num_rows * (MAX_CROWDING * seconds - fixed) / (seconds - fixed))

    def _fitting(self, unit: Load, other: Load) -> int:
        """How many times a step that also computes `other` has room for `unit`; 0 until this is known."""
        one = self._expected(unit) - self._expected(Load(0, 0, 0))
        if self._decoding is None or one <= 0:
            return 0
        return max(0, int((MAX_SLOWDOWN * self._decoding - self._expected(other)) / one))

    def _expected(self, load: Load) -> float:
        return sum(factor * part for factor, part in zip(self._seconds, load.scaled(), strict=True))
