"""Guesses of a text's next tokens from its own past (prompt lookup). A wrong guess costs a row in a step, never a token:
the scheduler keeps what the model samples, and only that."""

from collections.abc import Sequence as Items

# Tokens of a sequence that a step computes ahead, at most: products take as long with 8 rows as with one.
MAX_DRAFT = 7


class PromptLookup:
    """A text that follows its own past for s tokens is trusted for s more.

    Guessing is free, since the next token is sampled anyway; so whether guesses come true is known before any is computed
    ahead, and wrong rows never outnumber the tokens that were guessed right.
    """

    def __init__(self, prompt: Items[int]):
        self._text = list(prompt)
        # Where each token stood last, one place on. Pairs of tokens guess better but notice a copy a token later: then 128
        # tokens of a random GPT-2 take 63 steps instead of 58.
        self._behind = {token: place for place, token in enumerate(self._text, 1)}
        self._source: int | None = None  # where the next token stands, if the text goes on as it did there
        self._streak = 0  # tokens that were guessed right in a row

    @property
    def last(self) -> int:
        return self._text[-1]

    def append(self, token: int) -> None:
        """The text's next token."""
        if self._source is not None and self._text[self._source] == token:
            self._source += 1
            self._streak += 1
        else:
            self._source, self._streak = self._behind.get(token), 0
        self._text.append(token)
        self._behind[token] = len(self._text)

    def draft(self, limit: int) -> list[int]:
        """What follows in all likelihood, at most `limit` tokens. The copy may run into itself, as in a loop."""
        if self._source is None:
            return []
        period = len(self._text) - self._source
        return [self._text[self._source + i % period] for i in range(min(self._streak, limit))]
