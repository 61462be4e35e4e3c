"""Words that must not be generated, against a slow oracle, with and without steps in flight and drafts."""

import random

import pytest

from model.step import RowStart
from service.engine.request import GenerationRequest, Prompt, SamplingParams, bad_word_tokens
from service.engine.scheduler import Sequence
from tests.conformance import contract
from tests.service.engine.fakes import FakeEngine
from tests.service.helpers import run

TOKENIZER = FakeEngine.tokenizer
WORDS = ("one", "two", "three", "four")


def banned_after(past: list[int], runs: tuple[tuple[int, ...], ...]) -> set[int]:
    """The last token of each run whose other tokens the text ends with."""
    return {run[-1] for run in runs if past[max(len(past) - len(run) + 1, 0) :] == list(run[:-1]) or len(run) == 1}


def written(script: list[int], runs: tuple[tuple[int, ...], ...], count: int) -> list[int]:
    """What the fake engine writes token by token, with nothing in flight."""
    past: list[int] = []
    for place in range(count):
        allowed = [token for token in script if token not in banned_after(past, runs)]
        past.append(allowed[place % len(allowed)])
    return past


@contract("completions", "bad_words", "no such text is generated, nor after a space; several tokens as in vLLM")
@pytest.mark.parametrize(("overlap", "max_draft"), [(False, 0), (True, 0), (False, 7)])
@pytest.mark.parametrize("seed", range(8))
def test_bad_words_are_those_of_a_slow_oracle(
    overlap: bool, max_draft: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(FakeEngine, "overlap", overlap)
    scripts = [TOKENIZER.encode("".join(f" {rng.choice(WORDS)}" for _ in range(9)) + " five") for _ in range(3)]
    words = tuple(" ".join(rng.choices(WORDS, k=rng.randint(1, 3))) for _ in range(rng.randint(1, 4)))
    params = SamplingParams(max_tokens=30, bad_words=words, n=2)
    fake = FakeEngine(max_draft=max_draft)

    def script_of(start: RowStart) -> list[int]:
        return scripts[start.prompt[0]]

    fake.runner.script_of = script_of

    async def test() -> None:
        fake.engine.start()
        prompts = [Prompt([i, 5, 6]) for i in range(len(scripts))]
        generation = fake.engine.generate(GenerationRequest(prompts, params))
        async for _ in generation.outputs():
            pass
        runs = bad_word_tokens(words, TOKENIZER)
        expected = [written(script, runs, 30) for script in scripts]
        assert [[choice.tokens for choice in choices] for choices in generation.choices] == [[each] * 2 for each in expected]
        text = TOKENIZER.decode(expected[0])
        assert not any(f" {word} " in text for word in words)
        await fake.engine.stop()

    run(test)
    assert fake.scheduler.cache.check_integrity() == []


def test_the_spellings_of_a_word() -> None:
    assert bad_word_tokens(("king",), TOKENIZER) == ((3364,), (5822,))
    assert bad_word_tokens((" king",), TOKENIZER) == bad_word_tokens(("king",), TOKENIZER)
    assert bad_word_tokens(("<|endoftext|>",), TOKENIZER) == ((50256,), (220, 50256))
    assert bad_word_tokens(("\n",), TOKENIZER) == ((198,), (220, 198))


@pytest.mark.parametrize(
    ("generated", "banned"),
    [([], (3,)), ([1], (2, 3)), ([2], (3,)), ([1, 2], (3, 4)), ([9, 1, 2], (3, 4)), ([1, 2, 9], (3,)), ([1, 1], (2, 3))],
)
def test_what_is_banned_after_which_tokens(generated: list[int], banned: tuple[int, ...]) -> None:
    runs = ((3,), (1, 2), (1, 2, 4))
    sequence = Sequence([5], 9, SamplingParams().sampling(0, 0), bad_words=runs, generated=generated)
    assert sequence.banned() == banned == tuple(sorted(banned_after(generated, runs)))
