"""What tests of the service share."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from service.settings import Settings


def settings_of(**given: Any) -> Settings:
    """Settings with `given` values, the others at their defaults."""
    return Settings(**given)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def run(test: Callable[[], Awaitable[None]], *, seconds: float = 30) -> None:
    """Run an asynchronous test. `seconds` only end one that hangs."""

    async def limited() -> None:
        async with asyncio.timeout(seconds):
            await test()

    asyncio.run(limited())
