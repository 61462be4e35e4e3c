"""Limits where the readings of a clock do not add up: a wait is over when it is, and not before."""

import pytest

from service.api.limits import KeyLimits, LimitError


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def exhausted(clock: Clock) -> KeyLimits:
    """Three requests a minute, all of which have been made."""
    key = KeyLimits(3, 0, clock)
    for _ in range(3):
        key.charge(1, "requests")
    return key


def remaining(key: KeyLimits) -> str:
    return key.headers()["x-ratelimit-remaining-requests"]


def test_a_request_passes_after_the_time_told_though_the_clock_adds_up_to_less() -> None:
    clock = Clock()
    key = exhausted(clock)
    with pytest.raises(LimitError) as refused:
        key.charge(1, "requests")
    assert refused.value.retry_after == 20
    for _ in range(100):
        clock.now += 0.2
    assert 20 - 1e-9 < clock.now < 20, "the sum of floats that this test is about"
    assert remaining(key) == "1"
    key.charge(1, "requests")
    assert remaining(key) == "0"


@pytest.mark.parametrize("missing", [1e-3, 1e-4])
def test_a_wait_that_is_not_over_is_told_as_a_whole_second(missing: float) -> None:
    clock = Clock()
    key = exhausted(clock)
    clock.now = 20 - missing
    assert remaining(key) == "0"
    with pytest.raises(LimitError, match="0 are left: try again in 1 s") as refused:
        key.charge(1, "requests")
    assert refused.value.retry_after == 1


@pytest.mark.parametrize(("elapsed", "seconds"), [(0.0, 20), (0.5, 20), (1.0, 19), (18.5, 2), (19.5, 1)])
def test_the_wait_is_rounded_up(elapsed: float, seconds: int) -> None:
    clock = Clock()
    key = exhausted(clock)
    clock.now = elapsed
    with pytest.raises(LimitError) as refused:
        key.charge(1, "requests")
    assert refused.value.retry_after == seconds


def test_a_bucket_that_lacks_a_millionth_of_a_request_is_full() -> None:
    clock = Clock()
    key = KeyLimits(3, 600, clock)
    key.charge(1, "requests")
    key.charge(1)
    clock.now = 20 - 1e-7
    assert key.headers() == {
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "3",
        "x-ratelimit-reset-requests": "0s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "600",
        "x-ratelimit-reset-tokens": "0s",
    }
