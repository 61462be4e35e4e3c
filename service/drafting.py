"""Guesses of a text's next tokens from its own past (prompt lookup). A wrong guess costs a row in a step, never a token:
the scheduler keeps what the model samples, and only that."""

from collections.abc import Sequence as Items

# Tokens of a sequence that a step computes ahead, at most: products take as long with 8 rows as with one.
MAX_DRAFT = 7
# Tokens that must have stood together before for what followed them to be a guess.
MATCH = 2


class PromptLookup:
    """A text that follows its own past for s tokens is trusted for s more.

    Guessing is free, since the next token is sampled anyway; so whether guesses come true is known before any is computed
    ahead, and wrong rows never outnumber the tokens that were guessed right.
    """

    def __init__(self, prompt: Items[int]):
        self._text = list(prompt)
        # Where each pair of tokens ended last. Of the prompt's own last pair, only an earlier place is of use.
        self._ends = {tuple(self._text[i - MATCH : i]): i for i in range(MATCH, len(self._text))}
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
            self._source, self._streak = None, 0
        self._text.append(token)
        pair = tuple(self._text[-MATCH:])
        if self._source is None:
            self._source = self._ends.get(pair)
        self._ends[pair] = len(self._text)

    def draft(self, limit: int) -> list[int]:
        """What follows in all likelihood, at most `limit` tokens. The copy may run into itself, as in a loop."""
        if self._source is None:
            return []
        period = len(self._text) - self._source
        return [self._text[self._source + i % period] for i in range(min(self._streak, limit))]
