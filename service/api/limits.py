"""Rate limits of a key: a bucket of requests and a bucket of tokens, each refilled evenly within a minute."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

MINUTE = 60.0
ROUNDING = 1e-6  # seconds by which the difference of two clock readings may be off


class LimitError(Exception):
    """More than a key may have now. It can have it in `retry_after` seconds, or never if that is None."""

    def __init__(self, message: str, retry_after: int | None):
        super().__init__(message)
        self.retry_after = retry_after


class Bucket:
    """Holds up to `limit` units and gains that many a minute. Times are seconds of one monotonic clock."""

    def __init__(self, limit: int, now: float):
        self.limit = limit
        self._level = float(limit)
        self._time = now

    def level(self, now: float) -> float:
        return min(float(self.limit), self._level + (now - self._time) * self.limit / MINUTE)

    def add(self, amount: int, now: float) -> None:
        self._level = min(float(self.limit), self.level(now) + amount)
        self._time = now

    def seconds_until(self, level: int, now: float) -> float:
        return max(0.0, level - self.level(now)) * MINUTE / self.limit


class KeyLimits:
    """What one key has left. A limit of 0 means that there is none."""

    def __init__(self, limit_requests: int, limit_tokens: int, clock: Callable[[], float] = time.monotonic):
        limits = {"requests": limit_requests, "tokens": limit_tokens}
        self._clock = clock
        self._buckets = {unit: Bucket(limit, clock()) for unit, limit in limits.items() if limit}

    def charge(self, amount: int, unit: str = "tokens") -> None:
        """Take what a request can use at most. Raises LimitError, and takes nothing, if less is left."""
        bucket = self._buckets.get(unit)
        if bucket is None:
            return
        limit = f"this key's limit is {bucket.limit} {unit} a minute"
        if amount > bucket.limit:
            message = f"the request asks for {amount} {unit}, prompts and completions together, but {limit}"
            raise LimitError(message, None)
        now = self._clock()
        wait = bucket.seconds_until(amount, now)
        if wait > ROUNDING:
            seconds = math.ceil(wait)
            message = f"{limit}; the request needs {amount} and {remaining(bucket, now)} are left: try again in {seconds} s"
            raise LimitError(message, seconds)
        bucket.add(-amount, now)

    def refund(self, num_tokens: int) -> None:
        """Give back the tokens that a finished request was charged for but did not use; below 0, it used more."""
        if bucket := self._buckets.get("tokens"):
            bucket.add(num_tokens, self._clock())

    @contextmanager
    def charged_text(self, num_tokens: int) -> Iterator[list[int]]:
        """Take the tokens of a text that no model runs on, as `charge` does, for as long as it is worked on.

        The work puts the tokens that it went through into the list: they are taken in the end, and nothing is if there
        are none. A text of more than a minute's tokens takes a minute's, since a file may well be longer.
        """
        charged, used = self._of_a_text(num_tokens), list[int]()
        self.charge(charged)
        try:
            yield used
        finally:
            self.refund(charged - self._of_a_text(sum(used)))

    def _of_a_text(self, num_tokens: int) -> int:
        bucket = self._buckets.get("tokens")
        return min(num_tokens, bucket.limit) if bucket else 0

    def headers(self) -> dict[str, str]:
        """The state of each bucket in OpenAI's headers; `reset` is the time until it is full."""
        now = self._clock()
        headers = {}
        for unit, bucket in self._buckets.items():
            headers[f"x-ratelimit-limit-{unit}"] = str(bucket.limit)
            headers[f"x-ratelimit-remaining-{unit}"] = str(remaining(bucket, now))
            headers[f"x-ratelimit-reset-{unit}"] = duration_text(bucket.seconds_until(bucket.limit, now))
        return headers


def remaining(bucket: Bucket, now: float) -> int:
    return max(0, int(bucket.level(now) + ROUNDING))


def duration_text(seconds: float) -> str:
    """A duration in OpenAI's form, rounded up to milliseconds: 0s, 6ms, 1.5s, 1m30s."""
    milliseconds = math.ceil(round(seconds * 1000, 3))
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{f'{minutes}m' if minutes else ''}{rest / 1000:g}s"
