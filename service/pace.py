"""How many prompt tokens may run beside decoding streams: what steps cost is learnt, and they are kept short."""

from typing import NamedTuple

from kernels.band import PAGE_SIZE

# Weight of the newest step in what is learnt.
NEWEST = 0.5


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
            self._decoding = old + NEWEST / 2 * (seconds - old)

    def chunk_limit(self, num_rows: int, start: int) -> int:
        """Prompt tokens, from position `start` of a prompt on, that make a step with `num_rows` take twice as long as one
        without prompts. A page at least, whose queries are cheapest together: in smaller chunks prompts would take more
        from the streams' throughput than they spare each of their tokens."""
        one = self._expected(Load(0, 1, start)) - self._expected(Load(0, 0, 0))
        if self._decoding is None or one <= 0:
            return PAGE_SIZE
        room = 2 * self._decoding - self._expected(Load(num_rows, 0, 0))
        return max(PAGE_SIZE, int(room / one))

    def _expected(self, load: Load) -> float:
        return sum(factor * part for factor, part in zip(self._seconds, load.scaled(), strict=True))
