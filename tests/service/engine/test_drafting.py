"""Drafts guessed from a text's own past: what they contain, and the most that wrong ones cost."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.drafting import STEP_ROWS, PromptLookup

COPY = [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]


def lookup_of(*tokens: int, prompt: list[int]) -> PromptLookup:
    lookup = PromptLookup(prompt)
    for token in tokens:
        lookup.append(token)
    return lookup


@pytest.mark.parametrize(
    ("streams", "lengths"),
    [
        # After 0, 1, 2 and 3 right guesses, the share of right guesses counts as 1/2, 2/3, 3/4 and 4/5.
        (STEP_ROWS, [0, 1, 2, 3]),
        (STEP_ROWS // 3, [1, 5, 8, 9]),
        (STEP_ROWS * 2, [0, 0, 1, 1]),
        (STEP_ROWS // 12, [6, 9, 9, 9]),  # the limit
    ],
)
def test_a_copy_is_trusted_the_more_the_longer_it_lasts_and_the_fewer_streams_there_are(
    streams: int, lengths: list[int]
) -> None:
    lookup = lookup_of(1, prompt=COPY)
    drafts = []
    for token in (2, 3, 4):
        drafts.append(lookup.draft(9, streams))
        lookup.append(token)
    drafts.append(lookup.draft(9, streams))
    for start, (draft, length) in enumerate(zip(drafts, lengths, strict=True), 2):
        assert draft == (COPY[start - 1 :] + COPY * 2)[:length]
    assert lookup.last == 4


def test_a_draft_ends_with_the_copy_and_keeps_to_the_limit() -> None:
    lookup = lookup_of(1, 2, 3, 4, prompt=COPY)
    assert lookup.draft(2, 1) == [5, 6]
    lookup.append(10)
    assert lookup.draft(9, 1) == [], "10 never occurred before"


def test_a_loop_is_copied_on_and_on() -> None:
    lookup = lookup_of(*[5, 6] * 5, prompt=[1])
    assert lookup.draft(5, 1) == [5, 6, 5, 6, 5]


def test_the_latest_of_several_places_is_copied() -> None:
    lookup = lookup_of(1, 2, 4, prompt=[1, 2, 3, 1, 2, 4, 5, 1, 2, 4, 6])
    assert lookup.draft(2, 1) == [6, 1]


def test_an_empty_prompt_says_nothing() -> None:
    assert lookup_of(7, prompt=[]).draft(9, 1) == []


def test_a_text_whose_guesses_never_come_true_gets_no_drafts_before_long() -> None:
    lookup = PromptLookup([])
    lengths = []
    for i in range(100):  # no token is followed by the same token twice
        lookup.append(0)
        lengths.append(len(lookup.draft(7, STEP_ROWS // 12)))
        lookup.append(1 + i)
    assert sum(lengths) < 40
    assert not any(lengths[12:])


@given(
    prompt=st.lists(st.integers(0, 3), max_size=30),
    text=st.lists(st.integers(0, 3), max_size=200),
    limit=st.integers(0, 9),
    streams=st.integers(1, 40),
)
def test_wrong_rows_are_bounded_by_right_guesses(prompt: list[int], text: list[int], limit: int, streams: int) -> None:
    lookup = PromptLookup(prompt)
    wrong = right = guesses = place = 0
    while place < len(text):
        draft = lookup.draft(limit, streams) if place else []
        followed = next((i for i, token in enumerate(draft) if text[place + i : place + i + 1] != [token]), len(draft))
        wrong += len(draft) - followed
        for token in text[place : place + followed + 1]:
            guesses += lookup.guess is not None
            right += lookup.guess == token
            lookup.append(token)
        place += followed + 1
        assert len(draft) <= limit
        # A copy that ends after s right guesses wastes at most (s + p) * STEP_ROWS / streams rows. p is the share of
        # right guesses so far. The right side of the bound sums this over all copies.
        assert wrong <= STEP_ROWS / streams * (right + (right + 1) * (1 + math.log(guesses + 2)))
