"""Guesses of a text's next tokens from its own past (prompt lookup).

A wrong guess costs a row in a step, never a token: the scheduler keeps what the model samples, and only that.
"""

from collections.abc import Sequence

# Most guessed tokens of a sequence in a step: products of 8 rows take as long as products of one.
MAX_DRAFT = 7
# Rows that take as long as the fixed part of a step, most of which is reading the weights.
STEP_ROWS = 24


class PromptLookup:
    """The longer a text has been repeating itself, the longer we expect it to go on.

    Guessing is free, since the next token is sampled anyway. So we know how often guesses come true before any guess is
    computed ahead.
    """

    def __init__(self, prompt: Sequence[int]):
        self._text = list(prompt)
        # The place after each token's last occurrence. Pairs of tokens would guess better, but notice a copy a token later.
        self._after = {token: place for place, token in enumerate(self._text, 1)}
        self._source: int | None = None  # where the next token stands if the text continues as it did there
        self._streak = 0  # tokens that were guessed right in a row
        self._guesses, self._right = 2, 1  # of the whole text, with one right and one wrong guess to begin with

    @property
    def last(self) -> int:
        return self._text[-1]

    @property
    def guess(self) -> int | None:
        """The next token if the text goes on as it did before; None for a text that repeats nothing."""
        return None if self._source is None else self._text[self._source]

    def append(self, token: int) -> None:
        """The text's next token."""
        right = token == self.guess
        self._guesses += self._source is not None
        self._right += right
        if right and self._source is not None:
            self._source += 1
            self._streak += 1
        else:
            self._source, self._streak = self._after.get(token), 0
        self._text.append(token)
        self._after[token] = len(self._text)

    def draft(self, limit: int, streams: int) -> list[int]:
        """Guesses of the following tokens, at most `limit`, for a step of `streams` sequences.

        Let p be the share of all guesses that came true. A copy that has lasted for s tokens lasts for j more with a
        probability of about (s + p) / (s + j). A guess that comes true saves its stream's share of a step. The copy may
        run into itself, as in a loop.
        """
        if self._source is None:
            return []
        period = len(self._text) - self._source
        count = min(int((self._streak + self._right / self._guesses) * STEP_ROWS / streams), limit)
        return [self._text[self._source + i % period] for i in range(count)]
