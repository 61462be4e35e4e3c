"""`python -m tests.bench.ngrams TRAIN VALID`: the perplexity that counting words reaches, in the embedded model's tokens.

Prints that of a unigram and that of a trigram model (interpolated Kneser-Ney, Chen and Goodman 1998, one discount).
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.checkpoint.tokenizer import r50k_base
from model.training.data import read_tokens

DISCOUNT = 0.75

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Counts(NamedTuple):
    """How often each key was counted. The keys are sorted."""

    keys: Ints
    counts: Ints

    def of(self, keys: Ints) -> Ints:
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[places] == keys, self.counts[places], 0)

    def by(self, contexts: Ints) -> tuple["Counts", "Counts"]:
        """For each context, the sum of its counts and the number of its keys. `contexts` has one entry a key, sorted too."""
        found, first = np.unique(contexts, return_index=True)
        return Counts(found, np.add.reduceat(self.counts, first)), Counts(found, np.diff(np.append(first, len(contexts))))


def count(keys: Ints) -> Counts:
    return Counts(*np.unique(keys, return_counts=True))


class Ngrams:
    """Interpolated Kneser-Ney over tokens below `vocab_size`. Lower orders count the contexts in which a token was seen."""

    def __init__(self, tokens: Ints, vocab_size: int):
        self._size = size = vocab_size
        trigrams = count((tokens[:-2] * size + tokens[1:-1]) * size + tokens[2:])
        bigrams = count(trigrams.keys % size**2)
        unigrams = count(bigrams.keys % size)
        self._levels = [(grams, *grams.by(grams.keys // size)) for grams in (trigrams, bigrams, unigrams)]
        self._plain = count(tokens)

    def unigram(self, tokens: Ints) -> Floats:
        """Probability of each token, from its own frequency alone."""
        return self._discounted(self._plain.of(tokens), self._plain.counts.sum(), len(self._plain.keys), 1 / self._size)

    def trigram(self, tokens: Ints) -> Floats:
        """Probability of tokens 2, 3, ..., each from the two tokens ahead of it."""
        first, second, third = tokens[:-2], tokens[1:-1], tokens[2:]
        contexts = [first * self._size + second, second, np.zeros_like(third)]
        probability: Floats = np.full(len(third), 1 / self._size)
        for (grams, totals, kinds), context in reversed(list(zip(self._levels, contexts, strict=True))):
            total = totals.of(context)
            seen = self._discounted(
                grams.of(context * self._size + third), np.maximum(total, 1), kinds.of(context), probability
            )
            probability = np.where(total > 0, seen, probability)
        return probability

    @staticmethod
    def _discounted(counts: Ints, total: Ints | int, kinds: Ints | int, lower: Floats | float) -> Floats:
        rest: Floats = (np.maximum(counts - DISCOUNT, 0) + DISCOUNT * kinds * lower) / total
        return rest


def perplexity(probability: Floats) -> float:
    return float(np.exp(-np.log(probability).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("valid", type=Path)
    args = parser.parse_args()
    tokenizer = r50k_base()
    train, valid = (read_tokens([path], tokenizer).numpy().astype(np.int64) for path in (args.train, args.valid))
    ngrams = Ngrams(train, tokenizer.max_id + 1)
    print(f"{len(train)} tokens counted, {len(valid) - 2} predicted")
    print(f"unigram perplexity {perplexity(ngrams.unigram(valid[2:])):.1f}")
    print(f"trigram perplexity {perplexity(ngrams.trigram(valid)):.1f}")


if __name__ == "__main__":
    main()
