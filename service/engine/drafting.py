"""Guesses of a text's next tokens from its own past (prompt lookup). A wrong guess costs a row in a step, never a token:
the scheduler keeps what the model samples, and only that."""

from collections.abc import Sequence as Items

# Tokens of a sequence that a step computes ahead, at most: products take as long with 8 rows as with one.
MAX_DRAFT = 7
# Rows that take as long as what a step takes whatever its rows, the reading of the weights for the most part.
STEP_ROWS = 24


class PromptLookup:
    """A text is expected to follow its own past the longer, the longer it has followed it.

    Guessing is free, since the next token is sampled anyway; so how often guesses come true is known before any is computed
    ahead.
    """

    def __init__(self, prompt: Items[int]):
        self._text = list(prompt)
        # Where each token stood last, one place on. Pairs of tokens guess better but notice a copy a token later: then 128
        # tokens of a random GPT-2 take 63 steps instead of 58.
        self._behind = {token: place for place, token in enumerate(self._text, 1)}
        self._source: int | None = None  # where the next token stands, if the text goes on as it did there
        self._streak = 0  # tokens that were guessed right in a row
        self._guesses, self._right = 2, 1  # of the whole text; as if there had been one of each

    @property
    def last(self) -> int:
        return self._text[-1]

    @property
    def guess(self) -> int | None:
        """The next token, if the text goes on as it did before; None for a text that repeats nothing."""
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
            self._source, self._streak = self._behind.get(token), 0
        self._text.append(token)
        self._behind[token] = len(self._text)

    def draft(self, limit: int, streams: int) -> list[int]:
        """What may follow, at most `limit` tokens, in a step of `streams` sequences. The copy may run into itself, as in a
        loop.

        With p the part of all guesses that came true, a copy that has lasted for s tokens lasts for j more with a
        probability of about (s + p) / (s + j). A row that comes true saves its stream's share of a step.
        """
        if self._source is None:
            return []
        period = len(self._text) - self._source
        count = min(int((self._streak + self._right / self._guesses) * STEP_ROWS / streams), limit)
        return [self._text[self._source + i % period] for i in range(count)]
