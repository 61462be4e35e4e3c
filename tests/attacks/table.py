"""What a program of attacks prints: a line for each case next to the figure that it must keep, and how many missed."""

import re
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

LAST_LINE = re.compile(r"(?P<cases>\d+) cases, (?P<missed>\d+) missed, (?P<skipped>\d+) skipped")


def last_line(cases: int, missed: int, skipped: int = 0) -> str:
    """How each program ends, so that tests.attacks can add them up."""
    return f"{cases} cases, {missed} missed, {skipped} skipped"


def run(main: Callable[[], int]) -> NoReturn:
    """Run a program. If it is told to end, it still ends its servers."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())


class Table:
    """Prints cases as they come and counts them."""

    def __init__(self, title: str, must: str):
        """`must`: the figure that every case keeps, unless it names its own."""
        self._cases = self._missed = self._skipped = 0
        print(f"{title}\n{'must':<58}{must}", flush=True)

    def case(self, name: str, outcome: str, faults: list[str] | None = None, must: str = "") -> None:
        """`faults` say in what the outcome misses the figure; none if it keeps it."""
        self._cases += 1
        self._missed += bool(faults)
        must = f"  (must: {must})" if must else ""
        print(f"{name:<58}{outcome}{must}{'  MISSED: ' + '; '.join(faults) if faults else ''}", flush=True)

    def skip(self, name: str, reason: str) -> None:
        self._cases += 1
        self._skipped += 1
        print(f"{name:<58}skipped: {reason}", flush=True)

    def end(self) -> int:
        """The exit status."""
        print(last_line(self._cases, self._missed, self._skipped), flush=True)
        return int(self._missed > 0)
