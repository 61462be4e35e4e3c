"""Which test shows which line of the HTTP contract: `make conformance` writes CONFORMANCE.md from it."""

from collections.abc import Callable
from typing import Any, TypeVar

import pytest

F = TypeVar("F", bound=Callable[..., Any])


def contract(route: str, field: str, *behaviours: str) -> Callable[[F], F]:
    """Marks a test that shows how a field, or a part of a route, behaves."""

    def mark(test: F) -> F:
        marked: F = pytest.mark.contract(route, field, behaviours)(test)
        return marked

    return mark
