"""The baselines that count words: their probabilities are right, and better than a uniform guess."""

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest

from tests.bench.ngrams import DISCOUNT, Ngrams, perplexity

SIZE = 9
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 7, 400) * RNG.integers(0, 2, 400)  # two tokens of the vocabulary never occur


def every_next(first: int, second: int) -> float:
    """The sum of the probabilities of all tokens after two given ones."""
    ngrams = Ngrams(TOKENS, SIZE)
    return sum(float(ngrams.trigram(np.array([first, second, third]))[0]) for third in range(SIZE))


@pytest.mark.parametrize("context", [(0, 0), (0, 3), (6, 6), (8, 0), (0, 8), (8, 7)])
def test_probabilities_add_up_to_one(context: tuple[int, int]) -> None:
    assert every_next(*context) == pytest.approx(1)
    ngrams = Ngrams(TOKENS, SIZE)
    assert ngrams.unigram(np.arange(SIZE)).sum() == pytest.approx(1)


def test_they_are_those_of_the_formula() -> None:
    """The formula of Chen and Goodman 1998, computed with dictionaries."""
    tokens = TOKENS.tolist()
    trigrams = Counter(zip(tokens, tokens[1:], tokens[2:], strict=False))
    bigrams = Counter(gram[1:] for gram in trigrams)
    unigrams = Counter(gram[1:] for gram in bigrams)

    levels: list[Counter[Any]] = [unigrams, bigrams, trigrams]

    def probability(gram: tuple[int, ...]) -> float:
        if not gram:
            return 1 / SIZE
        counts = levels[len(gram) - 1]
        behind: dict[int, int] = defaultdict(int)
        for other, count in counts.items():
            if other[:-1] == gram[:-1]:
                behind[other[-1]] += count
        if not behind:
            return probability(gram[1:])
        rest = DISCOUNT * len(behind) * probability(gram[1:])
        return (max(behind[gram[-1]] - DISCOUNT, 0) + rest) / sum(behind.values())

    asked = RNG.integers(0, SIZE, 60)
    found = Ngrams(TOKENS, SIZE).trigram(asked)
    expected = [probability(tuple(asked[i : i + 3].tolist())) for i in range(58)]
    assert found == pytest.approx(expected)


def test_what_repeats_is_expected() -> None:
    tokens = np.tile(np.arange(8), 50)
    ngrams = Ngrams(tokens, SIZE)
    assert perplexity(ngrams.trigram(tokens)) < 1.1
    assert perplexity(ngrams.unigram(tokens)) == pytest.approx(8, rel=0.01)
