"""What tests of the service share."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from service.settings import Settings
from tests.serving import PATIENCE


def settings_of(**given: Any) -> Settings:
    """Settings with `given` values, the others at their defaults."""
    return Settings(**given)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.005)


def run(test: Callable[[], Awaitable[None]], *, seconds: float = PATIENCE) -> None:
    """Run an asynchronous test. `seconds` only end one that hangs."""

    async def limited() -> None:
        async with asyncio.timeout(seconds):
            await test()

    asyncio.run(limited())
