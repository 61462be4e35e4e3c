"""Few-shot tasks for a small model: documents of examples to learn from, and items that no document holds.

python -m model.training.tasks tales.txt --out DIR
"""

import argparse
import hashlib
import itertools
import json
import random
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from model.checkpoint.tokenizer import END_OF_TEXT, r50k_base

WORDS = Path(__file__).parent / "words.toml"
# This share of a task's possible queries is in no document.
HELD_OUT = 0.1
# A common word of the tales is one token and comes at least so often.
COMMON = 20
LEAST_COMMON = 50

# The numbers below are explained in NOTES.md. In half of the documents all examples are about so many words.
FEW_WORDS = [4, 6, 8, 12]
# This share of the documents is about copying even fewer words.
COPYING, COPIED_WORDS = 0.3, [2, 3, 4, 6]
# A model first sees so many words that repeat, in documents of so many. This share of the later documents repeats too.
REPEATED_WORDS, REPEATED_LENGTH = (2, 32), (64, 126)
REPEATING = 0.2

SENTENCES = ["I saw {}.", "she spoke of {}", "they asked for {} again", "there was {} in the tale", "he dreamt of {}", "{}"]

SEPARATORS = ["\n###\n", "\n", "\n\n", "\n---\n", "\n##\n", " ; ", "\n***\n", " | "]
PREFIXES = [
    ("", " => "),
    ("", " -> "),
    ("", " = "),
    ("", ": "),
    ("Q: ", "\nA: "),
    ("Input: ", "\nOutput: "),
    ("In: ", " Out: "),
    ("Question: ", "\nAnswer: "),
    ("> ", "\n"),
]


class Item(NamedTuple):
    input: str
    output: str
    # Other queries that this item answers: "slow => fast" also tells what "fast" asks for.
    answers: tuple[str, ...] = ()


# Makes one item per call. It already knows what a document's items share, such as the names of classes.
Source = Callable[[random.Random], Item]


class Words:
    """The words of words.toml, and a text's words of one token: `common` ones, and all for `repeated`, capitalised too."""

    def __init__(self, text: str):
        """Raises ValueError if the text has too few common words."""
        found = tomllib.loads(WORDS.read_text(encoding="utf-8"))
        opposites, irregular = ([pair.split() for pair in found[name].split(",")] for name in ("opposites", "irregular"))
        self.opposites = [pair for first, second in opposites for pair in ((first, second), (second, first))]
        self.plurals = [(one, many) for one, many in irregular] + [(noun, noun + "s") for noun in found["nouns"].split()]
        self.categories: dict[str, list[str]] = {name: words.split() for name, words in found["categories"].items()}
        letters = [[chr(ord(first) + place) for place in range(26)] for first in "aA"]
        numbers = [[str(number) for number in range(step, 100, step)] for step in (1, 2, 5)]
        self.sequences = [words.split() for words in found["sequences"].values()] + letters + numbers
        tokenizer = r50k_base()
        counts = Counter(re.findall(r"\b[a-z]{3,}\b", text))

        def is_token(word: str) -> bool:
            return len(tokenizer.encode(" " + word)) == 1

        single = sorted(filter(is_token, counts))
        self.common = [word for word in single if counts[word] >= COMMON]
        self.repeated = single + list(filter(is_token, map(str.capitalize, single)))
        if len(self.common) < LEAST_COMMON:
            raise ValueError(f"the text has {len(self.common)} common words; {LEAST_COMMON} are needed")


class Tasks:
    """The tasks by name, and the documents made from them."""

    def __init__(self, words: Words):
        self.words = words
        # No single one is a held-out query, so any few of them make a document.
        self._copied = [word for word in words.common if not is_held_out(word)]
        self._about_words: dict[str, Callable[..., Item]] = {  # each makes an item of rng and `words`
            "copy": copy,
            "reverse": reverse,
            "capitals": capitals,
            "count": count_words,
            "lookup": look_up,
        }
        self._others: dict[str, Source] = {
            "plural": lambda rng: Item(*rng.choice(self.words.plurals)),
            "opposite": self._opposite,
            "next": self._next,
        }
        self.names = [*self._about_words, *self._others, "classify"]

    def _opposite(self, rng: random.Random) -> Item:
        word, opposite = rng.choice(self.words.opposites)
        return Item(word, opposite, (opposite,))

    def _next(self, rng: random.Random) -> Item:
        sequence = rng.choice(self.words.sequences)
        length = rng.randint(2, 4)
        start = rng.randrange(len(sequence) - length)
        shown = sequence[start : start + length]
        parts = [shown[begin:end] for begin in range(length) for end in range(begin + 2, length + 1)]
        return Item(" ".join(shown), sequence[start + length], tuple(" ".join(part) for part in parts))

    def _classify(self, rng: random.Random, names: dict[str, str]) -> Item:
        """A sentence about a word of a category. `names` has what each category is called."""
        category = rng.choice(sorted(names))
        return Item(rng.choice(SENTENCES).format(rng.choice(self.words.categories[category])), names[category])

    def _source(self, task: str, rng: random.Random) -> Source:
        """The source of a document's items."""
        if task in self._about_words:
            words = rng.sample(self.words.common, rng.choice(FEW_WORDS)) if rng.random() < 0.5 else self.words.common
            return partial(self._about_words[task], words=words)
        if task in self._others:
            return self._others[task]
        categories = rng.sample(sorted(self.words.categories), rng.randint(2, 4))
        # In half of the documents only the examples tell what each category is called.
        names = rng.sample(self.words.common, len(categories)) if rng.random() < 0.5 else categories
        return partial(self._classify, names=dict(zip(categories, names, strict=True)))

    def items(self, rng: random.Random, source: Source, *, held_out: bool) -> Iterator[Item]:
        """Items without end: either those whose query is held out, or those that answer no held-out query."""
        while True:
            item = source(rng)
            queries = (item.input,) if held_out else (item.input, *item.answers)
            if any(map(is_held_out, queries)) == held_out:
                yield item

    def document(self, rng: random.Random) -> str:
        return self.repetition(rng) if rng.random() < REPEATING else self.few_shot(rng)

    def few_shot(self, rng: random.Random) -> str:
        """Examples of one task, with the document's own separator and prefixes."""
        if rng.random() < COPYING:
            return self._lay_out(rng, partial(copy, words=rng.sample(self._copied, rng.choice(COPIED_WORDS))))
        return self._lay_out(rng, self._source(rng.choice(self.names), rng))

    def repetition(self, rng: random.Random) -> str:
        """Random words that repeat in one order, so only the text so far tells which comes next."""
        least, most = REPEATED_WORDS
        words = rng.sample(self.words.repeated, int(least * ((most + 1) / least) ** rng.random()))
        return " ".join(itertools.islice(itertools.cycle(words), rng.randint(*REPEATED_LENGTH)))

    def _lay_out(self, rng: random.Random, source: Source) -> str:
        items = self.items(rng, source, held_out=False)
        before, between = rng.choice(PREFIXES)
        separator = rng.choice([text for text in SEPARATORS if text not in between])
        count = rng.choice([2, 4, 8, 12, 18, 24, 32])
        examples = [before + item.input + between + item.output for item, _ in zip(items, range(count), strict=False)]
        return separator.join(examples)

    def distinct_items(self, rng: random.Random, count: int, *, held_out: bool) -> Iterator[dict[str, str]]:
        """`count` items of every task, with distinct inputs. Fewer if the task has no more."""
        sources: dict[str, Source] = {
            **{task: partial(make, words=self.words.common) for task, make in self._about_words.items()},
            **self._others,
            "classify": partial(self._classify, names={name: name for name in self.words.categories}),
        }
        for task, source in sources.items():
            seen: set[str] = set()
            for item, _ in zip(self.items(rng, source, held_out=held_out), range(100 * count), strict=False):
                if item.input not in seen and len(seen) < count:
                    seen.add(item.input)
                    yield {"task": task, "input": item.input, "output": item.output}


def some(rng: random.Random, words: list[str], least: int, most: int) -> list[str]:
    return rng.sample(words, rng.randint(least, min(most, len(words))))


def copy(rng: random.Random, words: list[str]) -> Item:
    text = " ".join(some(rng, words, 1, 4))
    return Item(text, text)


def reverse(rng: random.Random, words: list[str]) -> Item:
    text = some(rng, words, 2, 4)
    return Item(" ".join(text), " ".join(reversed(text)))


def capitals(rng: random.Random, words: list[str]) -> Item:
    text = " ".join(some(rng, words, 1, 3))
    return Item(text, text.title())


def count_words(rng: random.Random, words: list[str]) -> Item:
    times = rng.randint(1, 6)
    return Item(" ".join([rng.choice(words)] * times), str(times))


def look_up(rng: random.Random, words: list[str]) -> Item:
    names = some(rng, words, 2, 5)
    values = [str(rng.randrange(10)) for _ in names]
    asked = rng.randrange(len(names))
    table = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
    return Item(f"{table}, {names[asked]}", values[asked])


def is_held_out(query: str) -> bool:
    """A hash of the query decides, so the answer is the same in every process and version."""
    return hashlib.sha256(query.lower().encode()).digest()[0] < 256 * HELD_OUT


def write_documents(path: Path, make: Callable[[random.Random], str], num_tokens: int, seed: int) -> int:
    """Write documents of about `num_tokens` tokens in all, and return their number."""
    rng, tokenizer = random.Random(seed), r50k_base()
    total = count = 0
    with path.open("w", encoding="utf-8") as file:
        while total < num_tokens:
            document = make(rng)
            total += len(tokenizer.encode(document)) + 1
            count += 1
            file.write(f"{document}\n{END_OF_TEXT}\n")
    return count


def write_items(path: Path, tasks: Tasks, count: int, seed: int, *, held_out: bool) -> None:
    items = tasks.distinct_items(random.Random(seed), count, held_out=held_out)
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="whose common words the tasks are about")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--tokens", type=float, default=12e6, help="of tasks.txt, and twice as many of repeats.txt (default %(default)g)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tasks = Tasks(Words(args.text.read_text(encoding="utf-8-sig")))
    write_documents(args.out / "repeats.txt", tasks.repetition, int(2 * args.tokens), args.seed)
    count = write_documents(args.out / "tasks.txt", tasks.document, int(args.tokens), args.seed)
    write_items(args.out / "items.jsonl", tasks, 100, args.seed, held_out=True)
    write_items(args.out / "examples.jsonl", tasks, 100, args.seed, held_out=False)
    print(f"{count} documents of tasks about {len(tasks.words.common)} words in {args.out}")


if __name__ == "__main__":
    main()
