"""How many prompt tokens may run beside decoding streams: what steps cost is learnt, and they are kept short."""

from typing import NamedTuple

from kernels.band import PAGE_SIZE

# Weights of the newest step in what is learnt: of all steps' parts, and of the mean step without prompts. That one is what
# streams are used to: it has to outlast a few steps that happen to carry long drafts.
NEWEST = 0.5
NEWEST_MEAN = 0.05
# How much longer than that a step with prompts should take. One step in a hundred takes 1.5 times what was expected of it.
LONGER = 1.75


class Load(NamedTuple):
    """What a step computes."""

    rows: int  # tokens of sequences that decode, drafts included
    tokens: int  # of prompts
    keys: int  # that these see, added up

    def scaled(self) -> tuple[float, ...]:
        """One number for each part of a step's time, of the size of one for a step that it dominates."""
        return 1.0, self.rows / 32, self.tokens / 64, self.keys / 65536


class Pace:
    """A step's time is taken for a fixed part, mostly the reading of the weights, and parts that grow with its rows, its
    prompt tokens and the keys that these see. The factors follow the steps as they come (normalised least mean squares).
    """

    def __init__(self) -> None:
        self._seconds = [0.0] * len(Load(0, 0, 0).scaled())
        self._decoding: float | None = None  # of a step without prompts

    def observe(self, load: Load, seconds: float) -> None:
        """Learn from a step that took `seconds`."""
        parts = load.scaled()
        step = NEWEST * (seconds - self._expected(load)) / sum(part * part for part in parts)
        self._seconds = [max(factor + step * part, 0.0) for factor, part in zip(self._seconds, parts, strict=True)]
        if not load.tokens:
            old = seconds if self._decoding is None else self._decoding
            self._decoding = old + NEWEST_MEAN * (seconds - old)

    def row_limit(self, start: int) -> int:
        """Rows of decoding, drafts included, that leave room for a page of a prompt that goes on at position `start`."""
        return self._fitting(Load(1, 0, 0), beside=Load(0, PAGE_SIZE, PAGE_SIZE * start))

    def chunk_limit(self, num_rows: int, start: int) -> int:
        """Prompt tokens, from position `start` of a prompt on, that make a step with `num_rows` take LONGER times as long as
        one without prompts. A page at least, whose queries are cheapest together: in smaller chunks prompts would take more
        from the streams' throughput than they spare each of their tokens."""
        return max(PAGE_SIZE, self._fitting(Load(0, 1, start), beside=Load(num_rows, 0, 0)))

    def _fitting(self, unit: Load, beside: Load) -> int:
        """How often a step beside prompts has room for `unit`; 0 as long as that isn't known."""
        one = self._expected(unit) - self._expected(Load(0, 0, 0))
        if self._decoding is None or one <= 0:
            return 0
        return max(0, int((LONGER * self._decoding - self._expected(beside)) / one))

    def _expected(self, load: Load) -> float:
        return sum(factor * part for factor, part in zip(self._seconds, load.scaled(), strict=True))
