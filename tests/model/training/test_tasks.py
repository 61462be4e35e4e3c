"""The few-shot tasks: right answers, and items that no document holds."""

import json
import random
from pathlib import Path

import pytest

from model.checkpoint.tokenizer import r50k_base
from model.training.tasks import (
    COMMON,
    COPIED_WORDS,
    COPYING,
    PREFIXES,
    REPEATED_LENGTH,
    REPEATED_WORDS,
    REPEATING,
    SEPARATORS,
    Tasks,
    Words,
    is_held_out,
    write_documents,
    write_items,
)

WORDS = """
about after again against all along always among and another any asked away back bear beautiful because bed been before began
behind being beside best better between big bird black boy bread bright bring brother brought but called came can cat child
children come could cried dark daughter day days dead dear deep did die does dog done door down each earth eat end evening
"""


@pytest.fixture(scope="module")
def tasks() -> Tasks:
    return Tasks(Words((WORDS + " seldom Bilbo rumpelstiltskin ") * COMMON))


def items_of(tasks: Tasks, path: Path, *, held_out: bool) -> list[dict[str, str]]:
    write_items(path, tasks, 50, seed=0, held_out=held_out)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def items(tasks: Tasks, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return items_of(tasks, tmp_path_factory.mktemp("items") / "items.jsonl", held_out=True)


def test_common_words_are_one_token_in_small_letters(tasks: Tasks) -> None:
    assert tasks.words.common == sorted({*WORDS.split(), "seldom"})


def test_a_text_with_few_common_words_is_refused() -> None:
    with pytest.raises(ValueError, match="the text has 1 common words; 50 are needed"):
        Words("king " * COMMON + "queen")


def test_every_task_has_items_that_are_held_out_and_differ(tasks: Tasks, items: list[dict[str, str]]) -> None:
    inputs = [(item["task"], item["input"]) for item in items]
    assert len(set(inputs)) == len(inputs)
    counts = {name: sum(task == name for task, _ in inputs) for name in tasks.names}
    assert all(count >= 8 for count in counts.values()), counts
    assert counts["copy"] == counts["reverse"] == counts["lookup"] == 50
    assert all(is_held_out(text) for _, text in inputs)


def test_items_for_prompts_are_not_held_out(tasks: Tasks, tmp_path: Path) -> None:
    found = items_of(tasks, tmp_path / "examples.jsonl", held_out=False)
    assert len(found) == 50 * len(tasks.names)
    assert not any(is_held_out(item["input"]) for item in found)


def test_answers_are_right(tasks: Tasks, items: list[dict[str, str]]) -> None:
    words = tasks.words
    for item in items:
        query, answer = item["input"], item["output"]
        right = {
            "copy": lambda q=query: q,
            "reverse": lambda q=query: " ".join(q.split()[::-1]),
            "capitals": lambda q=query: " ".join(word.capitalize() for word in q.split()),
            "plural": lambda q=query: dict(words.plurals)[q],
            "count": lambda q=query: str(len(q.split())),
            "lookup": lambda q=query: dict(pair.split() for pair in q.split(", ")[:-1])[q.split(", ")[-1]],
        }
        if item["task"] in right:
            assert answer == right[item["task"]]()
        elif item["task"] == "opposite":
            assert [query, answer] in [list(pair) for pair in words.opposites]
        elif item["task"] == "classify":
            assert any(word in query for word in words.categories[answer])
        else:
            assert any(f" {query} {answer} " in f" {' '.join(sequence)} " for sequence in words.sequences)


def examples_of(document: str) -> tuple[tuple[str, str, str], list[tuple[str, str]]]:
    """A document's separator and prefixes, the longest that fit, and its queries with their answers."""
    layouts = [
        (separator, before, between)
        for separator in SEPARATORS
        for before, between in PREFIXES
        if separator in document and all(between in part and part.startswith(before) for part in document.split(separator))
    ]
    assert layouts, document
    separator, before, between = layout = max(layouts, key=lambda layout: sum(map(len, layout)))
    examples = (part.removeprefix(before).split(between, 1) for part in document.split(separator))
    return layout, [(query, answer) for query, answer in examples]


def test_documents_hold_examples_of_one_task_and_none_that_is_held_out(tasks: Tasks) -> None:
    rng = random.Random(1)
    layouts = set()
    for _ in range(300):
        layout, examples = examples_of(tasks.few_shot(rng))
        layouts.add(layout)
        assert not any(is_held_out(query) for query, _ in examples), examples
    assert len(layouts) > 40


def test_some_documents_copy_very_few_words(tasks: Tasks) -> None:
    rng = random.Random(4)
    found, seen = 0, set()
    for _ in range(1000):
        _, examples = examples_of(tasks.few_shot(rng))
        words = {word for query, _ in examples for word in query.split()}
        if len(examples) >= 8 and len(words) <= max(COPIED_WORDS) and all(query == answer for query, answer in examples):
            found += 1
            seen |= words
    assert found > 1000 * COPYING / 2
    assert seen >= {word for word in tasks.words.common if not is_held_out(word)}


def test_repetitions_come_in_one_order_and_are_of_words_of_one_token(tasks: Tasks) -> None:
    rng = random.Random(5)
    tokenizer, numbers = r50k_base(), set()
    for _ in range(1000):
        words = tasks.repetition(rng).split(" ")
        number = len(set(words))
        numbers.add(number)
        assert words == [words[place % number] for place in range(len(words))]
        assert len(tokenizer.encode(" " + " ".join(words))) == len(words)
        assert REPEATED_LENGTH[0] <= len(words) <= REPEATED_LENGTH[1]
    assert numbers == set(range(REPEATED_WORDS[0], REPEATED_WORDS[1] + 1))
    assert set(tasks.words.common) < set(tasks.words.repeated)
    assert any(word.istitle() for word in tasks.words.repeated)


def test_no_document_tells_what_a_held_out_item_asks(tasks: Tasks, items: list[dict[str, str]]) -> None:
    """Not even by the opposite's opposite, or by a longer sequence that contains the shorter one."""
    rng = random.Random(2)
    documents = [tasks.few_shot(rng) for _ in range(3000)]
    sequences = {f" {item['input']} {item['output']} ".lower() for item in items if item["task"] == "next"}
    pairs = {item["output"] for item in items if item["task"] == "opposite"}
    assert min(len(sequences), len(pairs)) >= 8
    assert not any(sequence in f" {text.lower()} " for text in documents for sequence in sequences)
    for document in documents:
        before, between = max((p for p in PREFIXES if p[1] in document), key=lambda p: len(p[1]))
        assert not any(
            f"{before}{word}{between}{opposite}" in document for word in pairs for opposite in opposites(tasks, word)
        )


def opposites(tasks: Tasks, word: str) -> list[str]:
    return [other for one, other in tasks.words.opposites if one == word]


def test_a_word_has_one_opposite(tasks: Tasks) -> None:
    words = [word for word, _ in tasks.words.opposites]
    assert len(set(words)) == len(words)


def test_documents_depend_on_the_seed_only(tasks: Tasks, tmp_path: Path) -> None:
    write_documents(tmp_path / "one", tasks.document, 5000, seed=3)
    write_documents(tmp_path / "two", tasks.document, 5000, seed=3)
    write_documents(tmp_path / "three", tasks.document, 5000, seed=4)
    one, two, three = ((tmp_path / name).read_text(encoding="utf-8") for name in ("one", "two", "three"))
    assert one == two != three
    assert one.endswith("\n<|endoftext|>\n")


def test_some_documents_are_repetitions(tasks: Tasks) -> None:
    rng = random.Random(6)
    documents = [tasks.document(rng) for _ in range(1000)]
    few_shot = [text for text in documents if any(between in text for _, between in PREFIXES)]
    assert len(documents) - len(few_shot) == pytest.approx(1000 * REPEATING, rel=0.2)
