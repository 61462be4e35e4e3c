"""Guesses from a text's own past: what they are, and what wrong ones cost at most."""

from hypothesis import given
from hypothesis import strategies as st

from service.drafting import PromptLookup


def lookup_of(*tokens: int, prompt: list[int]) -> PromptLookup:
    lookup = PromptLookup(prompt)
    for token in tokens:
        lookup.append(token)
    return lookup


def test_a_text_that_copies_its_prompt_is_trusted_for_as_long_as_it_has_done_so() -> None:
    lookup = lookup_of(1, prompt=[1, 2, 3, 4, 5, 6, 7, 8, 9, 0])
    assert lookup.draft(9) == [], "nothing was guessed yet"
    lookup.append(2)
    assert lookup.draft(9) == [3]
    lookup.append(3)
    lookup.append(4)
    assert lookup.draft(9) == [5, 6, 7]
    assert lookup.draft(2) == [5, 6]
    assert lookup.last == 4
    lookup.append(7)
    assert lookup.draft(9) == [], "another token than guessed"


def test_a_loop_is_copied_on_and_on() -> None:
    lookup = lookup_of(*[5, 6] * 5, prompt=[1])
    assert lookup.draft(5) == [5, 6, 5, 6, 5]


def test_the_latest_of_several_places_is_copied() -> None:
    lookup = lookup_of(1, 2, 4, prompt=[1, 2, 3, 1, 2, 4, 5, 1, 2, 4, 6])
    assert lookup.draft(9) == [6, 1]


def test_an_empty_prompt_says_nothing() -> None:
    assert lookup_of(7, prompt=[]).draft(9) == []


@given(
    prompt=st.lists(st.integers(0, 3), max_size=30),
    text=st.lists(st.integers(0, 3), max_size=200),
    limit=st.integers(0, 9),
)
def test_wrong_rows_never_outnumber_right_guesses(prompt: list[int], text: list[int], limit: int) -> None:
    lookup = PromptLookup(prompt)
    wrong = right = place = 0
    while place < len(text):
        draft = lookup.draft(limit) if place else []
        followed = next((i for i, token in enumerate(draft) if text[place + i : place + i + 1] != [token]), len(draft))
        wrong += len(draft) - followed
        for token in text[place : place + followed + 1]:
            guess = lookup.draft(1)
            right += guess == [token] or (not guess and lookup._source is not None and lookup._text[lookup._source] == token)
            lookup.append(token)
        place += followed + 1
        assert len(draft) <= limit
        assert wrong <= right
