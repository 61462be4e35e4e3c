"""Limits of a key against a clock that the tests turn."""

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.limits import KeyLimits, LimitError, duration_text


class Clock:
    """A clock that starts at a large reading, where floats are coarse, as after years of running."""

    def __init__(self) -> None:
        self.now = 1e8

    def __call__(self) -> float:
        return self.now


def limits(clock: Clock, *, requests: int = 0, tokens: int = 0) -> KeyLimits:
    return KeyLimits(requests, tokens, clock)


def refused(charge: Any, *amount: int) -> LimitError:
    with pytest.raises(LimitError) as caught:
        charge(*amount)
    return caught.value


def test_requests_of_a_minute() -> None:
    clock = Clock()
    key = limits(clock, requests=3)
    for left in (2, 1, 0):
        key.charge(1, "requests")
        assert key.headers()["x-ratelimit-remaining-requests"] == str(left)
    error = refused(lambda: key.charge(1, "requests"))
    assert error.retry_after == 20
    assert str(error) == "this key's limit is 3 requests a minute; the request needs 1 and 0 are left: try again in 20 s"
    clock.now += 19.5
    assert refused(lambda: key.charge(1, "requests")).retry_after == 1
    clock.now += 0.5
    key.charge(1, "requests")
    refused(lambda: key.charge(1, "requests"))


def test_tokens_are_charged_and_refunded() -> None:
    clock = Clock()
    key = limits(clock, tokens=600)
    key.charge(600)
    error = refused(key.charge, 100)
    assert str(error) == "this key's limit is 600 tokens a minute; the request needs 100 and 0 are left: try again in 10 s"
    assert error.retry_after == 10
    key.refund(99)
    assert refused(key.charge, 100).retry_after == 1
    key.refund(1)
    key.charge(100)
    key.refund(10**9)
    assert key.headers()["x-ratelimit-remaining-tokens"] == "600"  # a full bucket holds no more


def test_what_could_never_pass_is_no_matter_of_waiting() -> None:
    key = limits(Clock(), tokens=600)
    error = refused(key.charge, 601)
    assert error.retry_after is None
    assert str(error) == (
        "the request asks for 601 tokens, prompts and completions together, but this key's limit is 600 tokens a minute"
    )
    key.charge(600)  # nothing was taken


def test_a_text_is_charged_at_most_a_minutes_tokens_and_owes_what_it_had_more() -> None:
    clock = Clock()
    key = limits(clock, tokens=600)
    with key.charged_text(10) as used:
        assert key.headers()["x-ratelimit-remaining-tokens"] == "590"
        used.append(100)
    assert key.headers()["x-ratelimit-remaining-tokens"] == "500"
    with key.charged_text(400) as used:
        used.append(100_000)
    with pytest.raises(LimitError) as caught, key.charged_text(1):
        pytest.fail("it owes 100 tokens, and 1 is needed")
    assert caught.value.retry_after == 11
    clock.now += 70
    with suppress(ValueError), key.charged_text(100_000):
        assert key.headers()["x-ratelimit-remaining-tokens"] == "0"
        raise ValueError
    assert key.headers()["x-ratelimit-remaining-tokens"] == "600", "what is refused costs nothing"
    with limits(clock).charged_text(10**9) as used:
        used.append(5)


def test_headers_are_those_of_the_limits_there_are() -> None:
    clock = Clock()
    key = limits(clock, requests=60, tokens=6000)
    key.charge(1, "requests")
    key.charge(1600)
    clock.now += 0.25
    assert key.headers() == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "750ms",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "4425",
        "x-ratelimit-reset-tokens": "15.75s",
    }
    only_tokens = limits(clock, tokens=5)
    only_tokens.charge(1, "requests")
    assert set(only_tokens.headers()) == {f"x-ratelimit-{what}-tokens" for what in ("limit", "remaining", "reset")}
    only_requests = limits(clock, requests=5)
    only_requests.charge(10**9)
    only_requests.refund(10**9)
    assert only_requests.headers()["x-ratelimit-remaining-requests"] == "5"


@given(
    limit=st.integers(1, 10**9),
    steps=st.lists(st.tuples(st.floats(0, 90), st.floats(0, 1)), max_size=20),
)
def test_waiting_as_long_as_told_is_enough_and_no_minute_gives_more_than_two_limits(
    limit: int, steps: list[tuple[float, float]]
) -> None:
    clock = Clock()
    key = limits(clock, tokens=limit)
    taken: list[tuple[float, int]] = []
    for seconds, share in steps:
        clock.now += seconds
        amount = int(share * limit)
        try:
            key.charge(amount)
        except LimitError as error:
            wait = error.retry_after or 0
            assert 1 <= wait <= 60
            clock.now += wait
            key.charge(amount)
        taken.append((clock.now, amount))
        assert 0 <= int(key.headers()["x-ratelimit-remaining-tokens"]) <= limit
    for start, _ in taken:
        within = sum(amount for then, amount in taken if start <= then < start + 60)
        assert within <= limit * (2 + 1e-6)  # a full bucket, and what a minute adds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0000001, "0s"),
        (0.0001, "1ms"),
        (0.006, "6ms"),
        (0.9994, "1s"),
        (1, "1s"),
        (8.64, "8.64s"),
        (59.9999, "1m0s"),
        (60, "1m0s"),
        (90, "1m30s"),
        (360, "6m0s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
